"""Chooses the evaluators of a dataset by its metadata."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from .coco import COCOAPEvaluator
from .lvis import LVISAPEvaluator
from .region_classification import RegionClassificationEvaluator
from .seen_names import class_groups, find_training_names


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Builds what ``Trainer.build_evaluator`` returns.

    Args:
        cfg: ``DATASETS.TRAIN`` tells seen class names from unseen ones.
        dataset_name: a dataset whose metadata has the ``evaluator_type`` "coco" or "lvis".
        output_folder: for the results json; by default ``<OUTPUT_DIR>/inference/<dataset_name>``.

    Raises:
        ValueError: the dataset has another type of evaluator.
    """
    if output_folder is None:
        output_folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in ("coco", "lvis"):
        raise ValueError(
            f"Dataset '{dataset_name}' has the evaluator_type {evaluator_type!r} in its metadata; "
            "regionspot_d2 evaluates 'coco' and 'lvis'."
        )
    groups = class_groups(dataset_name, find_training_names(cfg.DATASETS.TRAIN))
    average_precision: DatasetEvaluator
    if evaluator_type == "lvis":
        average_precision = LVISAPEvaluator(
            dataset_name,
            output_dir=output_folder,
            fixed_ap=cfg.TEST.FIXED_AP,
            groups=groups,
            backend=cfg.TEST.EVALUATION_BACKEND,
        )
    else:
        average_precision = COCOAPEvaluator(
            dataset_name, output_dir=output_folder, backend=cfg.TEST.EVALUATION_BACKEND
        )
    if not cfg.TEST.REGION_CLASSIFICATION:
        return average_precision
    return DatasetEvaluators(
        [average_precision, RegionClassificationEvaluator(dataset_name, groups=groups)]
    )
