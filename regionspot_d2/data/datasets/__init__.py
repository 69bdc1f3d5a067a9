"""Datasets of the field, registered by name; their files lie where ``datasets/README.md`` says."""

import os

from detectron2.data import MetadataCatalog

from .annotations import source_file
from .class_names import class_names, read_categories
from .coco_format import coco_dataset, expand_root, register_coco_format
from .lvis import minival, register_all_lvis
from .objects365 import register_all_objects365
from .odinw import ODINW_13, ODINW_35, register_all_odinw
from .vast_vocabulary import register_all_vast_vocabulary

__all__ = [
    "ODINW_13",
    "ODINW_35",
    "class_names",
    "coco_dataset",
    "expand_root",
    "minival",
    "read_categories",
    "register_all_lvis",
    "register_all_objects365",
    "register_all_odinw",
    "register_all_vast_vocabulary",
    "register_coco_format",
    "source_file",
]

# As in detectron2/data/datasets/builtin.py.
_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_all_lvis(_root)
register_all_odinw(_root)
register_all_objects365(_root)
register_all_vast_vocabulary(_root)

# Detectron2 registers COCO without the word for the results table.
MetadataCatalog.get("coco_2017_train").set(split="train")
MetadataCatalog.get("coco_2017_val").set(split="val")
