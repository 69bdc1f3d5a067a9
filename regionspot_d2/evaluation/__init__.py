"""Evaluators and the results table."""

from .build import build_evaluator
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
