"""The choice of the library that computes AP, and the evaluator of COCO-format datasets.

hotcoco gives the same AP as the reference libraries, pycocotools and lvis, many times faster.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import hotcoco
import numpy as np
from detectron2.evaluation import COCOEvaluator, coco_evaluation

BACKENDS = ("hotcoco", "reference")


def _uses_hotcoco(backend: str) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"TEST.EVALUATION_BACKEND is '{backend}'; it must be one of {BACKENDS}.")
    return backend == "hotcoco"


@contextlib.contextmanager
def lvis_library(backend: str) -> Iterator[ModuleType]:
    """Yields the module whose ``LVIS``, ``LVISResults`` and ``LVISEval`` compute LVIS AP."""
    if _uses_hotcoco(backend):
        yield hotcoco
        return
    try:
        library = importlib.import_module("lvis")
    except ImportError as error:
        raise ImportError(
            "TEST.EVALUATION_BACKEND: reference needs the package lvis, which is not installed: "
            "pip install --no-deps lvis==0.5.3. The default, hotcoco, gives the same numbers."
        ) from error
    # lvis 0.5.3, its last release, still uses np.float, which NumPy 1.24 removed.
    removed = "float" not in vars(np)
    if removed:
        np.float = float  # type: ignore[attr-defined]
    try:
        yield library
    finally:
        if removed:
            del np.float  # type: ignore[attr-defined]


@contextlib.contextmanager
def coco_library(backend: str) -> Iterator[None]:
    """Inside it, Detectron2's ``COCOEvaluator`` computes AP with the chosen library."""
    if not _uses_hotcoco(backend):
        yield
        return
    # COCOEvaluator takes these classes from its module's names and has no parameter for them.
    replaced = {"COCO": hotcoco.COCO, "COCOeval": hotcoco.COCOeval}
    originals = {name: vars(coco_evaluation)[name] for name in replaced}
    vars(coco_evaluation).update(replaced)
    try:
        yield
    finally:
        vars(coco_evaluation).update(originals)


class COCOAPEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator with a choice of library, also for ODinW and your own data.

    Boxes are always evaluated, masks only if both predictions and annotations have them. The
    ``backend`` is "hotcoco", or "reference" for pycocotools; the other arguments are Detectron2's.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        backend: str = "hotcoco",
    ) -> None:
        self._backend = backend
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
