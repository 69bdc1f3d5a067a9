"""LVIS: standard and Fixed AP, of boxes and masks, by frequency and by what was trained on."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import LVISEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from .libraries import check_backend, lvis_library
from .training_names import class_groups

_AREAS = {"s": 1, "m": 2, "l": 3}
_IOU_50, _IOU_75 = 0, 5

# Predictions collected before those that can no longer count are dropped.
_PRUNE_EVERY = 2_000_000


class LVISAPEvaluator(LVISEvaluator):
    """Detectron2's LVIS evaluator with a choice of library, Fixed AP, and AP of groups of classes.

    Standard AP takes the 300 best results of an image, whatever their classes, so that results of one class push out
    those of another. Fixed AP (Dave et al., arXiv 2102.01066) has no limit per image and takes the 10,000 best
    results of each class over the whole dataset. Both are then the usual federated AP of LVIS.

    A model that keeps few results per image (``TEST.DETECTIONS_PER_IMAGE``) has dropped some that Fixed AP counts.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int = 300,
        fixed_ap: bool = False,
        max_dets_per_class: int = 10_000,
        groups: Mapping[str, Collection[int]] | None = None,
        backend: str = "hotcoco",
    ) -> None:
        """
        Args:
            dataset_name: a dataset with a ``json_file`` in LVIS format.
            tasks: of "bbox" and "segm"; None for what predictions and annotations have.
            distributed: whether results of all processes are collected.
            output_dir: folder for ``lvis_instances_results.json``; None writes nothing.
            max_dets_per_image: results per image in standard AP.
            fixed_ap: whether to compute Fixed AP too.
            max_dets_per_class: results per class in Fixed AP.
            groups: contiguous class ids by the suffix their AP gets ("r" for APr); None for rare, common and
                frequent.
            backend: "hotcoco", or "reference" for the package lvis.
        """
        self._backend = check_backend(backend)
        with lvis_library(backend):
            super().__init__(
                dataset_name,
                tasks,
                distributed,
                output_dir,
                max_dets_per_image=max_dets_per_image,
            )
            annotations = self._lvis_api.load_anns(self._lvis_api.get_ann_ids()[:1])
            category_ids = sorted(self._lvis_api.get_cat_ids())
        self._has_masks = any(annotation.get("segmentation") for annotation in annotations)
        self._fixed_ap = fixed_ap
        self._max_dets_per_class = max_dets_per_class
        self._groups = class_groups(dataset_name) if groups is None else groups
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is None:
            contiguous = {category_id: i for i, category_id in enumerate(category_ids)}
        self._contiguous_ids = contiguous
        self._category_ids = {i: category_id for category_id, i in contiguous.items()}

    def reset(self) -> None:
        super().reset()
        # Results of a class that score no more than this cannot be among its best.
        self._floors = torch.full((max(self._category_ids) + 1,), -torch.inf)
        self._collected = 0
        self._prune_at = _PRUNE_EVERY

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collects the results of some images, without those that no AP counts.

        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``instances``: ``pred_boxes``, ``scores``, ``pred_classes`` and perhaps
                ``pred_masks``, in the size of the original image.
        """
        kept = []
        for output in outputs:
            instances = output["instances"].to(self._cpu_device)
            kept.append({"instances": instances[self._may_count(instances)]})
            self._collected += len(kept[-1]["instances"])
        super().process(inputs, kept)
        if self._fixed_ap and self._collected > self._prune_at:
            self._prune()

    def _may_count(self, instances: Instances) -> torch.Tensor:
        best = instances.scores.argsort(descending=True, stable=True)[: self._max_dets_per_image]
        counts = torch.zeros(len(instances), dtype=torch.bool)
        counts[best] = True
        if self._fixed_ap:
            counts |= instances.scores > self._floors[instances.pred_classes]
        return counts

    def _prune(self) -> None:
        results = self._counted(self._predictions)
        by_image: dict[Any, list[dict[str, Any]]] = {}
        for result in results:
            by_image.setdefault(result["image_id"], []).append(result)
        for prediction in self._predictions:
            prediction["instances"] = by_image.get(prediction["image_id"], [])
        classes = np.array([result["category_id"] for result in results])
        scores = np.array([result["score"] for result in results])
        last = _ranks(classes, scores) == self._max_dets_per_class - 1
        self._floors[classes[last]] = torch.from_numpy(scores[last]).to(self._floors)
        self._collected = len(results)
        self._prune_at = len(results) + _PRUNE_EVERY

    def _counted(self, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The results that some AP counts: the same ones whatever each process has dropped before."""
        results = list(itertools.chain(*(x["instances"] for x in predictions)))
        scores = np.array([result["score"] for result in results])
        images = np.repeat(np.arange(len(predictions)), [len(x["instances"]) for x in predictions])
        counts = _ranks(images, scores) < self._max_dets_per_image
        if self._fixed_ap:
            classes = np.array([result["category_id"] for result in results])
            counts |= _ranks(classes, scores) < self._max_dets_per_class
        return [result for result, count in zip(results, counts) if count]

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Computes AP over the images of all processes; None in all processes but the first.

        Unlike Detectron2's evaluator it does not write ``instances_predictions.pth``, the results json over again,
        which takes longer than the evaluation.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
            if not comm.is_main_process():
                return None
        self._results: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._eval_predictions(predictions)
        return copy.deepcopy(self._results)

    def _eval_predictions(self, predictions: list[dict[str, Any]]) -> None:
        results = self._counted(predictions)
        for result in results:
            result["category_id"] = self._category_ids[result["category_id"]]
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
            path = os.path.join(self._output_dir, "lvis_instances_results.json")
            self._logger.info(f"Saving results to {path}")
            with PathManager.open(path, "w") as file:
                file.write(json.dumps(results))
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return

        tasks = self._tasks or self._tasks_from_predictions(results)
        if not self._tasks and not self._has_masks:
            tasks = ("bbox",)
        classes = np.array([result["category_id"] for result in results])
        scores = np.array([result["score"] for result in results])
        best_of_class = _ranks(classes, scores) < self._max_dets_per_class
        for task in tasks:
            self._results[task] = self._average_precision(results, task, self._max_dets_per_image)
            if self._fixed_ap:
                fixed = [result for result, best in zip(results, best_of_class) if best]
                self._results[f"{task}_fixed"] = self._average_precision(fixed, task, -1)
        for task, metrics in self._results.items():
            self._logger.info(f"Evaluation results for {task}:\n{create_small_table(metrics)}")

    def _average_precision(
        self, results: list[dict[str, Any]], task: str, max_dets_per_image: int
    ) -> dict[str, float]:
        """AP of results in LVIS format, in percent; -1 results per image is no limit."""
        areas = [f"AP{area}" for area in _AREAS]
        if not results:
            self._logger.warning("There are no predictions.")
            names = ["AP", "AP50", "AP75", *areas, *(f"AP{group}" for group in self._groups)]
            return dict.fromkeys(names, float("nan"))
        if task == "segm":
            # Areas are those of the boxes where there are any.
            results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
        elif self._backend == "reference":
            # The library writes into what it is given.
            results = [dict(result) for result in results]
        with lvis_library(self._backend):
            from lvis import LVISEval, LVISResults

            found = LVISResults(self._lvis_api, results, max_dets=max_dets_per_image)
            evaluation = LVISEval(self._lvis_api, found, task)
            evaluation.evaluate()
            evaluation.accumulate()
        # (IoU thresholds, recalls, classes, areas); hotcoco adds an axis for the limit per image.
        precision = evaluation.eval["precision"]
        precision = precision.reshape(*precision.shape[:4])
        ids = [self._contiguous_ids.get(category_id) for category_id in evaluation.params.cat_ids]
        everywhere = precision[..., 0]
        metrics = {
            "AP": _mean(everywhere),
            "AP50": _mean(everywhere[_IOU_50]),
            "AP75": _mean(everywhere[_IOU_75]),
        }
        metrics.update((f"AP{area}", _mean(precision[..., i])) for area, i in _AREAS.items())
        for group, members in self._groups.items():
            metrics[f"AP{group}"] = _mean(everywhere[..., [i in members for i in ids]])
        return metrics


def _ranks(keys: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The place of each score among those of the same key, best first; equal scores stay in their order."""
    if not len(keys):
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort((-scores, keys))
    ordered = keys[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, len(keys)])
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(starts, sizes)
    return ranks


def _mean(precision: np.ndarray) -> float:
    """Mean in percent of what could be computed; -1 marks what could not, NaN is the mean of nothing."""
    valid = precision[precision > -1]
    return float(valid.mean() * 100) if valid.size else float("nan")
