"""COCO-format datasets, ODinW and own data among them: Detectron2's evaluator with a choice of library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator

from .libraries import check_backend, coco_library


class COCOAPEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator on hotcoco or pycocotools, for boxes, and masks where both sides have them."""

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        backend: str = "hotcoco",
    ) -> None:
        """
        Args:
            dataset_name: a dataset with a ``json_file`` in COCO format.
            tasks: of "bbox" and "segm"; None for what predictions and annotations have.
            distributed: whether results of all processes are collected.
            output_dir: folder for ``coco_instances_results.json``; None writes nothing.
            backend: "hotcoco", or "reference" for pycocotools.
        """
        self._backend = check_backend(backend)
        with coco_library(backend):
            super().__init__(dataset_name, tasks, distributed, output_dir, use_fast_impl=False)
        annotations = self._coco_api.loadAnns(self._coco_api.getAnnIds()[:1])
        self._do_evaluation = bool(annotations)
        self._has_masks = any(annotation.get("segmentation") for annotation in annotations)

    def _tasks_from_predictions(self, predictions: list[dict[str, Any]]) -> list[str]:
        tasks = super()._tasks_from_predictions(predictions)
        return tasks if self._has_masks else [task for task in tasks if task != "segm"]

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Any = None) -> None:
        with coco_library(self._backend):
            super()._eval_predictions(predictions, img_ids)
