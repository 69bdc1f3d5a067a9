"""Evaluators, the choice among them, and the results table."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ..data.datasets.vocabularies import class_groups, find_training_names
from .coco import COCOAPEvaluator
from .lvis import LVISAPEvaluator
from .region_classification import RegionClassificationEvaluator
from .report import summarize_odinw, write_report

__all__ = [
    "COCOAPEvaluator",
    "LVISAPEvaluator",
    "RegionClassificationEvaluator",
    "build_evaluator",
    "summarize_odinw",
    "write_report",
]


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Builds the evaluator of a dataset, chosen by the ``evaluator_type`` of its metadata.

    ``DATASETS.TRAIN`` tells seen class names from unseen ones. The results json is written to
    ``output_folder``, by default ``<OUTPUT_DIR>/inference/<dataset_name>``.

    Raises:
        ValueError: the type is neither "coco" nor "lvis".
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in ("coco", "lvis"):
        raise ValueError(
            f"Dataset '{dataset_name}' has the evaluator_type {evaluator_type!r} in its metadata; "
            "regionspot_d2 evaluates 'coco' and 'lvis'."
        )
    if output_folder is None:
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    options = {"output_dir": output_folder, "backend": cfg.TEST.EVALUATION_BACKEND}
    groups = class_groups(dataset_name, find_training_names(cfg.DATASETS.TRAIN))
    evaluator: DatasetEvaluator
    if evaluator_type == "coco":
        evaluator = COCOAPEvaluator(dataset_name, **options)
    else:
        fixed_ap = cfg.TEST.FIXED_AP
        evaluator = LVISAPEvaluator(dataset_name, fixed_ap=fixed_ap, groups=groups, **options)
    if not cfg.TEST.REGION_CLASSIFICATION:
        return evaluator
    naming = RegionClassificationEvaluator(dataset_name, groups=groups)
    return DatasetEvaluators([evaluator, naming])
