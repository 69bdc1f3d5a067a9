"""LVIS: standard and Fixed AP of boxes and masks, also for rare, seen and other classes."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from ..data.datasets import AnnotationsError, checked_annotations
from ..data.datasets.annotations import contiguous_ids
from ..data.datasets.corrections import CheckedFile
from ..data.datasets.vocabularies import class_groups
from .coco import has_masks, load_truth, lvis_library

logger = logging.getLogger(__name__)

#: After this many new results, those that can no longer count are dropped.
PRUNE_EVERY = 2_000_000

_AREAS = {"s": 1, "m": 2, "l": 3}
_IOU_50, _IOU_75 = 0, 5


class LVISAPEvaluator(DatasetEvaluator):
    """LVIS AP with a choice of library, Fixed AP, and AP of groups of classes.

    A drop-in replacement for Detectron2's ``LVISEvaluator``. Standard AP counts the 300 best
    results of an image, whatever their classes, so one class can push out another. Fixed AP (Dave
    et al., arXiv 2102.01066) counts the 10,000 best results of each class over the whole dataset,
    without a limit per image; it misses results that the model dropped
    (``TEST.DETECTIONS_PER_IMAGE``). Both are the federated AP of LVIS on the results that count.
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
        """Reads the annotations.

        Args:
            groups: contiguous class ids by the suffix of their AP ("r" for APr); by default those
                of rare, common and frequent classes.
            backend: "hotcoco", or "reference" for the package lvis.

        Raises:
            ImportError: the backend is "reference" and the package lvis is not installed.
            ValueError: the annotation file has a fault, see :func:`check_federated`.
        """
        with lvis_library(backend) as library:
            checked = checked_annotations(dataset_name, lvis=True)
            check_federated(checked, backend)
            self._truth = load_truth(library, checked.path, lvis=True)
        self._backend = backend
        self._has_annotations = checked.annotations > 0
        self._has_masks = has_masks(checked)
        self._contiguous_ids = contiguous_ids(dataset_name)
        self._category_ids = {i: category for category, i in self._contiguous_ids.items()}
        self._tasks = tasks
        self._distributed = distributed
        self._output_dir = output_dir
        self._per_image = max_dets_per_image
        self._per_class = max_dets_per_class if fixed_ap else 0
        self._groups = class_groups(dataset_name) if groups is None else groups
        self.reset()

    def reset(self) -> None:
        num_classes = max(self._category_ids) + 1
        self._results = ResultBuffer(num_classes, self._per_image, self._per_class)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collects ``instances`` of ``outputs`` that can count, in the frame of the original image.

        They have ``pred_boxes``, ``scores``, ``pred_classes`` and optionally ``pred_masks``.
        """
        for x, output in zip(inputs, outputs):
            self._results.add(x["image_id"], output["instances"].to("cpu"))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Computes AP over the images of all processes; None in all processes but the first.

        Returns:
            Metrics in percent by task: "bbox" and "segm", with Fixed AP also "bbox_fixed" and
            "segm_fixed"; empty without annotations.
        """
        results = self._results.counted(self._results.results)
        if self._distributed:
            comm.synchronize()
            of_processes = comm.gather(results, dst=0)
            if not comm.is_main_process():
                return None
            if len(of_processes) > 1:
                results = self._results.counted(list(itertools.chain(*of_processes)))
        for result in results:
            result["category_id"] = self._category_ids[result["category_id"]]
        if self._output_dir:
            # Not as instances_predictions.pth too, as in Detectron2: that takes longer than AP.
            PathManager.mkdirs(self._output_dir)
            path = os.path.join(self._output_dir, "lvis_instances_results.json")
            with PathManager.open(path, "w") as file:
                file.write(json.dumps(results))
            logger.info(f"Saved the results to {path}")
        if not self._has_annotations:
            logger.info("There are no annotations to evaluate with.")
            return {}
        metrics = self._evaluate_results(results)
        for task, values in metrics.items():
            logger.info(f"Evaluation results for {task}:\n{create_small_table(values)}")
        return metrics

    def _evaluate_results(self, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        with_masks = self._has_masks and any("segmentation" in result for result in results)
        tasks = self._tasks or ["bbox", "segm"][: 1 + with_masks]
        kinds = {"": (results, self._per_image)}
        if self._per_class:
            ranks = rank_within(*_columns(results, "category_id", "score"))
            kinds["_fixed"] = (list(itertools.compress(results, ranks < self._per_class)), -1)
        return {
            task + kind: self._average_precision(counted, task, limit)
            for task in tasks
            for kind, (counted, limit) in kinds.items()
        }

    def _average_precision(
        self, results: list[dict[str, Any]], task: str, max_dets_per_image: int
    ) -> dict[str, float]:
        """AP of results in LVIS format, in percent; a limit of -1 is none."""
        if not results:
            logger.warning("There are no predictions.")
            return {f"AP{s}": float("nan") for s in ("", "50", "75", *_AREAS, *self._groups)}
        if task == "segm":
            # With a box in the result, the libraries would use its area, not the mask's.
            results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
        elif self._backend == "reference":
            # lvis changes the dicts that it is given.
            results = [dict(result) for result in results]
        with lvis_library(self._backend) as library:
            truth = self._truth.annotations
            found = library.LVISResults(
                truth, self._truth.renumber(results), max_dets=max_dets_per_image
            )
            evaluation = library.LVISEval(truth, found, task)
            evaluation.evaluate()
            evaluation.accumulate()
        # (IoU thresholds, recalls, classes, areas); hotcoco adds an axis for the limit per image.
        precision = evaluation.eval["precision"]
        precision = precision.reshape(*precision.shape[:4])
        own_ids = {new: old for old, new in self._truth.categories.items()}
        category_ids = (own_ids.get(number, number) for number in evaluation.params.cat_ids)
        ids = [self._contiguous_ids.get(number) for number in category_ids]
        all_areas = precision[..., 0]
        parts = {"": all_areas, "50": all_areas[_IOU_50], "75": all_areas[_IOU_75]}
        parts.update((area, precision[..., i]) for area, i in _AREAS.items())
        for group, members in self._groups.items():
            parts[group] = all_areas[..., [i in members for i in ids]]
        # -1 marks classes without objects.
        return {f"AP{suffix}": mean_percent(part[part > -1]) for suffix, part in parts.items()}


class ResultBuffer:
    """Collects what can be among the best results of its image or, over all images, of its class.

    ``results`` are in COCO format, with contiguous category ids; ``per_class`` may be 0.
    """

    def __init__(self, num_classes: int, per_image: int, per_class: int) -> None:
        self.results: list[dict[str, Any]] = []
        self._per_image = per_image
        self._per_class = per_class
        # Results of a class with at most this score cannot be among its best.
        self._floors = torch.full((num_classes,), -torch.inf)
        self._prune_at = PRUNE_EVERY

    def add(self, image_id: Any, instances: Instances) -> None:
        """Collects the results of one image, on the CPU."""
        best = instances.scores.argsort(descending=True, stable=True)[: self._per_image]
        counts = torch.zeros(len(instances), dtype=torch.bool)
        counts[best] = True
        if self._per_class:
            counts |= instances.scores > self._floors[instances.pred_classes]
        self.results += instances_to_coco_json(instances[counts], image_id)
        if self._per_class and len(self.results) > self._prune_at:
            self._prune()

    def _prune(self) -> None:
        self.results = self.counted(self.results)
        classes, scores = _columns(self.results, "category_id", "score")
        last = rank_within(classes, scores) == self._per_class - 1
        self._floors[classes[last]] = torch.from_numpy(scores[last]).to(self._floors)
        self._prune_at = len(self.results) + PRUNE_EVERY

    def counted(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The ``results`` that count among themselves."""
        images, classes, scores = _columns(results, "image_id", "category_id", "score")
        counts = rank_within(images, scores) < self._per_image
        if self._per_class:
            counts |= rank_within(classes, scores) < self._per_class
        return list(itertools.compress(results, counts))


def check_federated(checked: CheckedFile, backend: str) -> None:
    """Raises an AnnotationsError if LVIS AP of the annotations would be wrong."""
    if checked.annotations and checked.unfederated is not None:
        raise AnnotationsError(
            f"{checked.file}: image {checked.unfederated!r} has no 'neg_category_ids' or no "
            "'not_exhaustive_category_ids', without which LVIS AP is wrong. Copy them from LVIS's "
            "own file, or register the annotations by DATASETS.COCO_FORMAT for COCO AP."
        )
    # hotcoco honors iscrowd but not ignore; lvis does the opposite.
    if backend == "hotcoco" and checked.flagged[0]:
        number, first = checked.flagged
        raise AnnotationsError(
            f"{checked.file}: {number} annotations, the first with id {first}, are flagged "
            "'iscrowd' or 'ignore', which hotcoco and lvis treat differently. Remove the flags, or "
            "set TEST.EVALUATION_BACKEND: reference."
        )


def _columns(results: list[dict[str, Any]], *keys: str) -> tuple[np.ndarray, ...]:
    return tuple(np.array([result[key] for result in results]) for key in keys)


def rank_within(keys: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Ranks (N,) of scores (N,) with the same key, 0 for the best; ties stay in their order."""
    # Sorted by key, then score, a rank is the distance from the first place of its key.
    order = np.lexsort((-scores, keys))
    _, starts, sizes = np.unique(keys[order], return_index=True, return_counts=True)
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(starts, sizes)
    return ranks


def mean_percent(values: np.ndarray) -> float:
    """The mean of values in [0, 1], in percent; NaN for none."""
    return float(values.mean() * 100) if values.size else float("nan")
