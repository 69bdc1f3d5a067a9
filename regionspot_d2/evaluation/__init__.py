"""Evaluators, the choice among them, and the results table."""

from __future__ import annotations

import os
from contextlib import nullcontext

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ..data.datasets import checked_annotations
from ..data.datasets.vocabularies import class_groups, head_training_names
from .coco import COCOAPEvaluator, lvis_library
from .lvis import LVISAPEvaluator, check_federated
from .panoptic import PanopticQualityEvaluator, check_panoptic
from .region_classification import RegionClassificationEvaluator
from .report import summarize_odinw, write_report

__all__ = [
    "COCOAPEvaluator",
    "LVISAPEvaluator",
    "PanopticQualityEvaluator",
    "RegionClassificationEvaluator",
    "build_evaluator",
    "check_evaluation",
    "summarize_odinw",
    "write_report",
]

# Detectron2's type of COCO panoptic datasets, and of others in the same format.
_PANOPTIC = "coco_panoptic_seg"


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Builds the evaluator of a dataset, chosen by the ``evaluator_type`` of its metadata.

    ``DATASETS.HEAD_TRAINED_ON``, or else ``DATASETS.TRAIN``, tells seen class names from unseen
    ones. The results json is written to ``output_folder``, by default
    ``<OUTPUT_DIR>/inference/<dataset_name>``.

    Raises:
        ValueError: the type is not one of "coco", "lvis" and "coco_panoptic_seg".
    """
    evaluator_type = _evaluator_type(dataset_name)
    if output_folder is None:
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    options = {"output_dir": output_folder, "backend": cfg.TEST.EVALUATION_BACKEND}
    if evaluator_type == _PANOPTIC:
        check_evaluation(cfg, dataset_name)
        return PanopticQualityEvaluator(dataset_name, **options)
    groups = class_groups(dataset_name, head_training_names(cfg))
    evaluator: DatasetEvaluator
    if evaluator_type == "coco":
        evaluator = COCOAPEvaluator(dataset_name, **options)
    else:
        fixed_ap = cfg.TEST.FIXED_AP
        evaluator = LVISAPEvaluator(dataset_name, fixed_ap=fixed_ap, groups=groups, **options)
    if not cfg.TEST.REGION_CLASSIFICATION:
        return evaluator
    naming = RegionClassificationEvaluator(dataset_name, groups=groups, output_dir=output_folder)
    return DatasetEvaluators([evaluator, naming])


def check_evaluation(cfg: CfgNode, dataset_name: str) -> None:
    """Raises the ValueError or ImportError with which :func:`build_evaluator` would fail.

    Files that were checked before are not read again.
    """
    evaluator_type = _evaluator_type(dataset_name)
    if evaluator_type == _PANOPTIC:
        if cfg.MODEL.META_ARCHITECTURE != "PanopticRegionSpot":
            raise ValueError(
                f"Dataset '{dataset_name}' is panoptic: it needs MODEL.META_ARCHITECTURE "
                f"PanopticRegionSpot, not {cfg.MODEL.META_ARCHITECTURE}."
            )
        check_panoptic(dataset_name, cfg.TEST.EVALUATION_BACKEND)
        return
    with lvis_library(cfg.TEST.EVALUATION_BACKEND) if evaluator_type == "lvis" else nullcontext():
        if MetadataCatalog.get(dataset_name).get("json_file") is None:
            return
        checked = checked_annotations(dataset_name)
        if evaluator_type == "lvis":
            check_federated(checked, cfg.TEST.EVALUATION_BACKEND)


def _evaluator_type(dataset_name: str) -> str:
    metadata = MetadataCatalog.get(dataset_name)
    # Datasets of a function usually have only class names; Detectron2 evaluates them like COCO.
    found = metadata.get("evaluator_type", "coco" if metadata.get("thing_classes") else None)
    if found not in ("coco", "lvis", _PANOPTIC):
        raise ValueError(
            f"Dataset '{dataset_name}' has the evaluator_type {found!r} in its metadata; "
            f"regionspot_d2 evaluates 'coco', 'lvis' and '{_PANOPTIC}'."
        )
    if found == "lvis" and metadata.get("json_file") is None:
        raise ValueError(f"Dataset '{dataset_name}': LVIS AP needs a json_file in its metadata.")
    return found
