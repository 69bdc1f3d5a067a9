"""Datasets, loaders and proposals. Importing this registers the datasets."""

from .datasets import ODINW_13, ODINW_35, class_names, register_coco_format

__all__ = ["ODINW_13", "ODINW_35", "class_names", "register_coco_format"]
