"""LVIS: standard and Fixed AP of boxes and masks, by class frequency and by seen names."""

from __future__ import annotations

import itertools
import json
import logging
import mmap
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from .coco import check_backend, lvis_library
from .seen_names import class_groups

logger = logging.getLogger(__name__)

#: After this many more results, those that can no longer count are dropped.
PRUNE_EVERY = 2_000_000

_AREAS = {"s": 1, "m": 2, "l": 3}
_IOU_50, _IOU_75 = 0, 5


class LVISAPEvaluator(DatasetEvaluator):
    """LVIS AP with a choice of library, Fixed AP, and AP of groups of classes.

    A drop-in replacement for Detectron2's ``LVISEvaluator``. Standard AP takes the 300 best results
    of an image, whatever their classes, so results of one class push out those of another. Fixed AP
    (Dave et al., arXiv 2102.01066) has no limit per image and takes the 10,000 best results of each
    class over the whole dataset. Both are then the usual federated AP of LVIS.

    A model that keeps few results per image (``TEST.DETECTIONS_PER_IMAGE``) has dropped some that
    Fixed AP counts.
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
            tasks, distributed, output_dir: as for Detectron2's ``LVISEvaluator``.
            max_dets_per_image: results per image in standard AP.
            fixed_ap: whether to compute Fixed AP too.
            max_dets_per_class: results per class in Fixed AP.
            groups: contiguous class ids by the suffix their AP gets ("r" for APr); None for rare,
                common and frequent.
            backend: "hotcoco", or "reference" for the package lvis.

        Raises:
            ValueError: the backend is hotcoco and an annotation is flagged ``iscrowd`` or
                ``ignore``, which hotcoco and lvis treat differently.
        """
        self._backend = check_backend(backend)
        metadata = MetadataCatalog.get(dataset_name)
        json_file = PathManager.get_local_path(metadata.json_file)
        if backend == "hotcoco":
            _refuse_flags(json_file)
        with lvis_library(backend) as library:
            self._truth = library.LVIS(json_file)
        first = self._truth.load_anns(self._truth.get_ann_ids()[:1])
        self._has_annotations = bool(first)
        self._has_masks = any(annotation.get("segmentation") for annotation in first)
        contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is None:
            category_ids = sorted(self._truth.get_cat_ids())
            contiguous = {category_id: i for i, category_id in enumerate(category_ids)}
        self._contiguous_ids = contiguous
        self._category_ids = {i: category_id for category_id, i in contiguous.items()}
        self._tasks = tasks
        self._distributed = distributed
        self._output_dir = output_dir
        self._max_dets_per_image = max_dets_per_image
        self._max_dets_per_class = max_dets_per_class
        self._fixed_ap = fixed_ap
        self._groups = class_groups(dataset_name) if groups is None else groups
        self.reset()

    def reset(self) -> None:
        per_class = self._max_dets_per_class if self._fixed_ap else 0
        self._results = ResultBuffer(
            max(self._category_ids) + 1, self._max_dets_per_image, per_class
        )

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Collects the results of some images, without those that no AP counts.

        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``instances``: ``pred_boxes``, ``scores``, ``pred_classes`` and
                optionally ``pred_masks``, in the frame of the original image.
        """
        for x, output in zip(inputs, outputs):
            self._results.add(x["image_id"], output["instances"].to("cpu"))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Computes AP over the images of all processes.

        Returns:
            Metrics in percent by task: "bbox" and "segm", with Fixed AP also "bbox_fixed" and
            "segm_fixed"; nothing without annotations. None in all processes but the first.
        """
        results = self._results.counted()
        if self._distributed:
            comm.synchronize()
            of_processes = comm.gather(results, dst=0)
            if not comm.is_main_process():
                return None
            results = self._results.counted(list(itertools.chain(*of_processes)))
        for result in results:
            result["category_id"] = self._category_ids[result["category_id"]]
        self._save(results)
        if not self._has_annotations:
            logger.info("Annotations are not available for evaluation.")
            return {}
        metrics = self._evaluate_results(results)
        for task, values in metrics.items():
            logger.info(f"Evaluation results for {task}:\n{create_small_table(values)}")
        return metrics

    def _save(self, results: list[dict[str, Any]]) -> None:
        # Detectron2's evaluator also writes instances_predictions.pth, the same once more, which
        # takes longer than the evaluation.
        if not self._output_dir:
            return
        PathManager.mkdirs(self._output_dir)
        path = os.path.join(self._output_dir, "lvis_instances_results.json")
        logger.info(f"Saving results to {path}")
        with PathManager.open(path, "w") as file:
            file.write(json.dumps(results))

    def _evaluate_results(self, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        """Metrics by task, from results in LVIS format."""
        with_masks = self._has_masks and any("segmentation" in result for result in results)
        tasks = self._tasks or (("bbox", "segm") if with_masks else ("bbox",))
        best_of_class = results
        if self._fixed_ap:
            ranks = rank_within(*_columns(results, "category_id", "score"))
            best_of_class = list(itertools.compress(results, ranks < self._max_dets_per_class))
        metrics = {}
        for task in tasks:
            metrics[task] = self._average_precision(results, task, self._max_dets_per_image)
            if self._fixed_ap:
                metrics[f"{task}_fixed"] = self._average_precision(best_of_class, task, -1)
        return metrics

    def _average_precision(
        self, results: list[dict[str, Any]], task: str, max_dets_per_image: int
    ) -> dict[str, float]:
        """AP of results in LVIS format, in percent; -1 results per image is no limit."""
        if not results:
            logger.warning("There are no predictions.")
            suffixes = ["", "50", "75", *_AREAS, *self._groups]
            return {f"AP{suffix}": float("nan") for suffix in suffixes}
        if task == "segm":
            # The libraries take areas from the boxes where there are any.
            results = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
        elif self._backend == "reference":
            # lvis writes into what it is given.
            results = [dict(result) for result in results]
        with lvis_library(self._backend) as library:
            found = library.LVISResults(self._truth, results, max_dets=max_dets_per_image)
            evaluation = library.LVISEval(self._truth, found, task)
            evaluation.evaluate()
            evaluation.accumulate()
        # (IoU thresholds, recalls, classes, areas); hotcoco adds an axis for the limit per image.
        precision = evaluation.eval["precision"]
        precision = precision.reshape(*precision.shape[:4])
        ids = [self._contiguous_ids.get(category_id) for category_id in evaluation.params.cat_ids]
        all_areas = precision[..., 0]
        metrics = {
            "AP": _mean(all_areas),
            "AP50": _mean(all_areas[_IOU_50]),
            "AP75": _mean(all_areas[_IOU_75]),
        }
        metrics.update((f"AP{area}", _mean(precision[..., i])) for area, i in _AREAS.items())
        for group, members in self._groups.items():
            metrics[f"AP{group}"] = _mean(all_areas[..., [i in members for i in ids]])
        return metrics


class ResultBuffer:
    """Collects results and drops those that can count neither per image nor per class.

    Attributes:
        results: in COCO format, with contiguous category ids.
    """

    def __init__(self, num_classes: int, per_image: int, per_class: int) -> None:
        """
        Args:
            num_classes: one more than the largest contiguous class id.
            per_image: the best results of an image count.
            per_class: the best results of a class count too, over all images; 0 for none.
        """
        self.results: list[dict[str, Any]] = []
        self._per_image = per_image
        self._per_class = per_class
        # Results of a class that score no more than this cannot be among its best.
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
        self.results = self.counted()
        classes, scores = _columns(self.results, "category_id", "score")
        last = rank_within(classes, scores) == self._per_class - 1
        self._floors[classes[last]] = torch.from_numpy(scores[last]).to(self._floors)
        self._prune_at = len(self.results) + PRUNE_EVERY

    def counted(self, results: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Those of ``results`` (by default its own) that count, whatever was dropped before."""
        results = self.results if results is None else results
        images, classes, scores = _columns(results, "image_id", "category_id", "score")
        counts = rank_within(images, scores) < self._per_image
        if self._per_class:
            counts |= rank_within(classes, scores) < self._per_class
        return list(itertools.compress(results, counts))


def _refuse_flags(json_file: str) -> None:
    """Raises a ValueError if hotcoco and lvis would differ on a file: it has flagged annotations.

    hotcoco honors ``iscrowd`` and not ``ignore``; for lvis it is the other way round.
    """
    with open(json_file, "rb") as file:
        # Official files have neither key, and searching is far quicker than parsing.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if text.find(b'"iscrowd"') < 0 and text.find(b'"ignore"') < 0:
                return
        annotations = json.load(file).get("annotations", [])
    flagged = [a["id"] for a in annotations if a.get("iscrowd") or a.get("ignore")]
    if flagged:
        raise ValueError(
            f"{json_file}: {len(flagged)} annotations, the first with id {flagged[0]}, are flagged "
            "'iscrowd' or 'ignore', which hotcoco treats differently from the reference library "
            "lvis. Set TEST.EVALUATION_BACKEND: reference, or remove the flags."
        )


def _columns(results: list[dict[str, Any]], *keys: str) -> tuple[np.ndarray, ...]:
    return tuple(np.array([result[key] for result in results]) for key in keys)


def rank_within(keys: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The place of each score among those of the same key, best first; ties stay in their order."""
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
    """Mean in percent of the valid entries (-1 marks the others); NaN if there are none."""
    valid = precision[precision > -1]
    return float(valid.mean() * 100) if valid.size else float("nan")
