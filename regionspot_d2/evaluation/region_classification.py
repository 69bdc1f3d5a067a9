"""Accuracy of the names of ground-truth regions.

Unlike AP on ground-truth boxes, it does not depend on how many names a box may have, a choice that
moves plain CLIP crops from 25 to 40 AP on LVIS.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table

from ..data.datasets import class_names
from ..data.datasets.vocabularies import class_groups
from .calibration import calibration_error, draw_reliability, reliability
from .lvis import mean_percent, rank_within

logger = logging.getLogger(__name__)

# Pixels of the original image between a box and the same box scaled to the model's input and back.
_TOLERANCE = 0.05

_NOT_LISTED = np.iinfo(np.int64).max


class RegionClassificationEvaluator(DatasetEvaluator):
    """Top-1 and top-5 accuracy on ground-truth regions, per region and as the mean over classes.

    It reads the usual output of a model that was given ground-truth boxes as ``proposals``: pairs
    of a region and a name, where ``region_index`` is the region's place in the proposals. Regions
    are matched to annotations by box, since loading may have sorted, clipped or cut them.

    A model returns only its best pairs (``TEST.DETECTIONS_PER_IMAGE`` and
    ``MODEL.ROI_HEADS.SCORE_THRESH_TEST``; -1 and 0 keep all), so the pairs left of a region are its
    best. A region with too few of them is undecided and counts as wrong.

    Results, in percent, under ``region_classification``: ``top1``, ``top5`` (per region),
    ``mAcc1``, ``mAcc5`` (mean over classes), each also with the suffix of a group (``top1r``);
    ``decided1``, ``decided5``; ``ece``, the expected calibration error of the scores of the best
    names, see :mod:`~regionspot_d2.evaluation.calibration`; and ``regions``, the number of regions.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        *,
        groups: Mapping[str, Collection[int]] | None = None,
        output_dir: str | None = None,
    ) -> None:
        """Reads the annotations, without crowds.

        Args:
            dataset_name, distributed: as for Detectron2's evaluators.
            groups: see :class:`LVISAPEvaluator`.
            output_dir: for the reliability diagram, ``reliability.png``; by default none is drawn.
        """
        self._output_dir = output_dir
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._groups = class_groups(dataset_name) if groups is None else groups
        self._num_classes = len(class_names(dataset_name))
        records = DatasetCatalog.get(dataset_name)
        self._truth = {record["image_id"]: _ground_truth(record) for record in records}

    def reset(self) -> None:
        # Rows of one region each: its class, the rank of that class, how many names were ranked.
        self._regions: list[np.ndarray] = []
        # The score of the best name of each region; NaN if it is not known.
        self._scores: list[np.ndarray] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Ranks the true class of each ground-truth region of some images.

        ``inputs`` have ``proposals``; ``instances`` of ``outputs`` have ``scores``,
        ``pred_classes`` and ``region_index``. Raises a ValueError if there are none.
        """
        for x, output in zip(inputs, outputs):
            instances = output["instances"].to("cpu")
            if "proposals" not in x or not instances.has("region_index"):
                raise ValueError(
                    "TEST.REGION_CLASSIFICATION needs ground-truth regions (MODEL.LOAD_PROPOSALS: "
                    "True and DATASETS.PROPOSAL_FILES_TEST, made by tools/prepare_proposals.py) "
                    "and a model whose results have a region_index, as RegionSpot's do."
                )
            boxes = Boxes(x["proposals"].proposal_boxes.tensor.detach().cpu().clone())
            boxes.scale(x["width"] / x["image"].shape[-1], x["height"] / x["image"].shape[-2])
            true_boxes, true_classes = self._truth[x["image_id"]]
            regions, classes = instances.region_index.numpy(), instances.pred_classes.numpy()
            ranks = np.full((len(boxes), self._num_classes), _NOT_LISTED)
            ranks[regions, classes] = rank_within(regions, instances.scores.numpy())
            best = np.full(len(boxes), np.nan)
            np.fmax.at(best, regions, instances.scores.numpy().astype(float))
            rows = np.full((len(true_classes), 3), [0, _NOT_LISTED, 0])
            rows[:, 0] = true_classes
            scores = np.full(len(rows), np.nan)
            if len(boxes) and len(rows):
                distance, nearest = torch.cdist(true_boxes, boxes.tensor, p=torch.inf).min(dim=1)
                found = (distance <= _TOLERANCE).numpy()
                region = nearest.numpy()[found]
                rows[found, 1] = ranks[region, true_classes[found]]
                rows[found, 2] = np.bincount(regions, minlength=len(boxes))[region]
                scores[found] = best[region]
            self._regions.append(rows)
            self._scores.append(scores)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Computes the accuracies over all processes; None in all processes but the first."""
        regions, scores = self._regions, self._scores
        if self._distributed:
            comm.synchronize()
            regions = list(itertools.chain(*comm.gather(regions, dst=0)))
            scores = list(itertools.chain(*comm.gather(scores, dst=0)))
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
            metrics[f"decided{k}"] = mean_percent(decided)
            for group, selection in selections.items():
                metrics[f"top{k}{group}"] = mean_percent(correct[selection])
                metrics[f"mAcc{k}{group}"] = _class_mean(correct[selection], classes[selection])
        metrics["ece"] = 100 * self._calibration_error(ranks == 0, np.concatenate([[], *scores]))
        if min(metrics["decided1"], metrics["decided5"]) < 100:
            logger.warning(
                f"The best name is known for {metrics['decided1']:.2f} % of the ground-truth "
                f"regions, the best five for {metrics['decided5']:.2f} %; the others count as "
                "wrong. Raise TEST.DETECTIONS_PER_IMAGE (-1: no limit), lower "
                "MODEL.ROI_HEADS.SCORE_THRESH_TEST, and check that the boxes are ground truth."
            )
        logger.info(f"Evaluation of region classification:\n{create_small_table(metrics)}")
        return {"region_classification": metrics}

    def _calibration_error(self, right: np.ndarray, scores: np.ndarray) -> float:
        """That of the regions whose best name is known, which are also drawn."""
        known = np.isfinite(scores)
        bins = reliability(scores[known], right[known])
        if self._output_dir is not None and bins:
            PathManager.mkdirs(self._output_dir)
            path = os.path.join(self._output_dir, "reliability.png")
            draw_reliability(path, bins, self._dataset_name)
        return calibration_error(bins)


def _ground_truth(record: dict[str, Any]) -> tuple[torch.Tensor, np.ndarray]:
    """Boxes (G, 4), XYXY, clipped to the original image; and contiguous class ids (G,)."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    inside = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    inside.clip((record["height"], record["width"]))  # as Detectron2 clips proposals
    classes = np.array([a["category_id"] for a in annotations], dtype=np.int64)
    return inside.tensor, classes


def _class_mean(correct: np.ndarray, classes: np.ndarray) -> float:
    """Accuracy of each class that has regions, averaged over those classes."""
    counts = np.bincount(classes)
    hits = np.bincount(classes, weights=correct)
    return mean_percent(hits[counts > 0] / counts[counts > 0])
