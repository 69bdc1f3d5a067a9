"""Accuracy of the names of ground-truth regions.

AP on ground-truth boxes depends on how many names each box may carry (plain CLIP crops have 25 or
40 AP on LVIS by that choice alone). The accuracies here do not.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from ..data.datasets import class_names
from .lvis import rank_within
from .seen_names import class_groups

logger = logging.getLogger(__name__)

# In pixels of the original image, between a box and its copy scaled to the model's input and back.
_TOLERANCE = 0.05

_NOT_LISTED = np.iinfo(np.int64).max


class RegionClassificationEvaluator(DatasetEvaluator):
    """Top-1 and top-5 accuracy on ground-truth regions, per region and as the mean over classes.

    It reads the usual output of a model that was given ground-truth boxes as ``proposals``: each
    result is a (region, name) pair, and its ``region_index`` is the place of its region in the
    proposals. A region's names are ranked by score. Regions are matched to annotations by their
    boxes, since loading may have sorted, clipped or cut them.

    A model returns only its best pairs (``TEST.DETECTIONS_PER_IMAGE``,
    ``MODEL.ROI_HEADS.SCORE_THRESH_TEST``). The worst pairs of an image go first, so a region with
    one pair left has its best name, and one with five its best five. A region with too few pairs
    is "undecided" and counts as wrong; ``decided1`` and ``decided5`` are the percentages of decided
    regions, and a warning tells if they are below 100. Limits of -1 and 0 keep every pair.

    Results, in percent, under ``region_classification``: ``top1``, ``top5`` (per region),
    ``mAcc1``, ``mAcc5`` (mean over classes), each also with the suffix of a group (``top1r``); and
    ``regions``, their number.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        *,
        groups: Mapping[str, Collection[int]] | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset with annotations. Crowds are left out.
            distributed: whether the results of all processes are collected.
            groups: contiguous class ids by suffix; None for rare, common and frequent where the
                dataset has frequencies.
        """
        self._distributed = distributed
        self._groups = class_groups(dataset_name) if groups is None else groups
        self._num_classes = len(class_names(dataset_name))
        self._truth = {
            record["image_id"]: _ground_truth(record) for record in DatasetCatalog.get(dataset_name)
        }

    def reset(self) -> None:
        # Rows of one region each: its class, the rank of that class, how many names were ranked.
        self._regions: list[np.ndarray] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Ranks the true class of each ground-truth region of some images.

        Args:
            inputs: dicts with ``image_id``, ``image``, ``height``, ``width`` and ``proposals``.
            outputs: dicts with ``instances``: ``scores``, ``pred_classes``, ``region_index``.

        Raises:
            ValueError: ``proposals`` or ``region_index`` are missing.
        """
        for x, output in zip(inputs, outputs):
            instances = output["instances"].to("cpu")
            if "proposals" not in x or not instances.has("region_index"):
                raise ValueError(
                    "Region classification needs regions from a proposal file "
                    "(MODEL.LOAD_PROPOSALS: True and DATASETS.PROPOSAL_FILES_TEST, made from "
                    "ground truth by tools/prepare_proposals.py) and a model that says which "
                    "region a result is of (RegionSpot). TEST.REGION_CLASSIFICATION: False turns "
                    "it off."
                )
            boxes = Boxes(x["proposals"].proposal_boxes.tensor.detach().cpu().clone())
            boxes.scale(x["width"] / x["image"].shape[-1], x["height"] / x["image"].shape[-2])
            true_boxes, true_classes = self._truth[x["image_id"]]
            ranks, counts = _rank_names(instances, len(boxes), self._num_classes)
            rows = np.full((len(true_classes), 3), [0, _NOT_LISTED, 0])
            rows[:, 0] = true_classes
            if len(boxes) and len(rows):
                distance, nearest = torch.cdist(true_boxes, boxes.tensor, p=torch.inf).min(dim=1)
                found = (distance <= _TOLERANCE).numpy()
                region = nearest.numpy()[found]
                rows[found, 1] = ranks[region, true_classes[found]]
                rows[found, 2] = counts[region]
            self._regions.append(rows)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Computes the accuracies over all processes; None in all processes but the first."""
        regions = self._regions
        if self._distributed:
            comm.synchronize()
            regions = list(itertools.chain(*comm.gather(regions, dst=0)))
            if not comm.is_main_process():
                return None
        classes, ranks, listed = np.concatenate([np.zeros((0, 3), np.int64), *regions]).T
        metrics: dict[str, float] = {"regions": float(len(classes))}
        selections = {"": np.ones(len(classes), dtype=bool)}
        for group, members in self._groups.items():
            selections[group] = np.isin(classes, list(members))
        for k in (1, 5):
            correct = ranks < k
            decided = correct | (listed >= min(k, self._num_classes))
            metrics[f"decided{k}"] = _percent(decided)
            for group, selection in selections.items():
                metrics[f"top{k}{group}"] = _percent(correct[selection])
                metrics[f"mAcc{k}{group}"] = _class_mean(correct[selection], classes[selection])
        if min(metrics["decided1"], metrics["decided5"]) < 100:
            logger.warning(
                "Some ground-truth regions were not asked for, or too few of their names were "
                f"kept: the first name is known for {metrics['decided1']:.2f} %, the first five "
                f"for {metrics['decided5']:.2f} %; the others count as wrong. Raise "
                "TEST.DETECTIONS_PER_IMAGE (-1: no limit), lower "
                "MODEL.ROI_HEADS.SCORE_THRESH_TEST, and check that the boxes are ground truth."
            )
        logger.info(f"Evaluation of region classification:\n{create_small_table(metrics)}")
        return OrderedDict(region_classification=metrics)


def _ground_truth(record: dict[str, Any]) -> tuple[torch.Tensor, np.ndarray]:
    """Boxes (G, 4), XYXY, clipped to the original image; and contiguous class ids (G,)."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    inside = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    # As Detectron2 clips proposals.
    inside.clip((record["height"], record["width"]))
    classes = np.array([a["category_id"] for a in annotations], dtype=np.int64)
    return inside.tensor, classes


def _rank_names(
    instances: Instances, num_regions: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (R, C) of each region's names, 0 for the best, and how many it has (R,)."""
    regions, classes = instances.region_index.numpy(), instances.pred_classes.numpy()
    ranks = np.full((num_regions, num_classes), _NOT_LISTED)
    ranks[regions, classes] = rank_within(regions, instances.scores.numpy())
    return ranks, np.bincount(regions, minlength=num_regions)


def _percent(values: np.ndarray) -> float:
    return float(values.mean() * 100) if values.size else float("nan")


def _class_mean(correct: np.ndarray, classes: np.ndarray) -> float:
    """Accuracy of each class that has regions, averaged over those classes."""
    counts = np.bincount(classes)
    hits = np.bincount(classes, weights=correct)
    return _percent(hits[counts > 0] / counts[counts > 0])
