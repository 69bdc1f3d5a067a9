"""Datasets, loaders and sources of regions. Importing this registers the datasets."""

from . import ground_truth as _  # only registration
from .datasets import ODINW_13, ODINW_35, class_names, register_coco_format

__all__ = ["ODINW_13", "ODINW_35", "class_names", "register_coco_format"]
