"""Public datasets, registered by name; ``datasets/README.md`` says where their files lie."""

from __future__ import annotations

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from ...files import data_root
from ...files import expand_data_root as expand_root
from .annotations import (
    class_names,
    coco_dataset,
    read_categories,
    register_coco_format,
    source_file,
)
from .lvis import minival, register_all_lvis
from .odinw import ODINW_13, ODINW_35, register_all_odinw

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

# Of each dataset the image folder and the annotations.
_OBJECTS365 = {
    "objects365_v1_train": (
        "objects365_v1/train",
        "objects365_v1/annotations/objects365_train.json",
    ),
    "objects365_v1_val": ("objects365_v1/val", "objects365_v1/annotations/objects365_val.json"),
    "objects365_v2_train": ("objects365/train", "objects365/annotations/zhiyuan_objv2_train.json"),
    "objects365_v2_val": ("objects365/val", "objects365/annotations/zhiyuan_objv2_val.json"),
}
_VAST_VOCABULARY = {
    # As github.com/bethgelab/openimages2coco converts Open Images' csv files.
    "openimages_v6_train": (
        "openimages/train",
        "openimages/annotations/openimages_v6_train_bbox.json",
    ),
    "openimages_v6_val": ("openimages/val", "openimages/annotations/openimages_v6_val_bbox.json"),
    # Its JSON files name images "images/<category>/<image>.jpg".
    "v3det_train": ("v3det", "v3det/annotations/v3det_2023_v1_train.json"),
    "v3det_val": ("v3det", "v3det/annotations/v3det_2023_v1_val.json"),
}


def register_all_objects365(root: str) -> None:
    """Registers ``objects365_v{1,2}_{train,val}`` below the folder of all datasets."""
    for name, (image_root, json_file) in _OBJECTS365.items():
        _register_objects365(name, os.path.join(root, json_file), os.path.join(root, image_root))


def _register_objects365(name: str, json_file: str, image_root: str) -> None:
    def load() -> list[dict[str, Any]]:
        records = load_coco_json(json_file, "", name)
        for record in records:
            # v2 names an image "images/v1/patch8/x.jpg" that its archives hold as "patch8/x.jpg".
            parts = record["file_name"].split("/")
            inside = parts[-2:] if len(parts) > 1 and parts[-2].startswith("patch") else parts[-1:]
            record["file_name"] = os.path.join(image_root, *inside)
        return records

    DatasetCatalog.register(name, load)
    metadata = {"json_file": json_file, "image_root": image_root, "split": name.rsplit("_", 1)[1]}
    MetadataCatalog.get(name).set(evaluator_type="coco", **metadata)


def register_all_vast_vocabulary(root: str) -> None:
    """Registers ``openimages_v6_{train,val}`` and ``v3det_{train,val}``, likewise."""
    for name, (image_root, json_file) in _VAST_VOCABULARY.items():
        paths = (os.path.join(root, json_file), os.path.join(root, image_root))
        register_coco_instances(name, {"split": name.rsplit("_", 1)[1]}, *paths)


register_all_lvis(data_root())
register_all_odinw(data_root())
register_all_objects365(data_root())
register_all_vast_vocabulary(data_root())

# Detectron2 registers COCO without the split, which the results table shows.
MetadataCatalog.get("coco_2017_train").set(split="train")
MetadataCatalog.get("coco_2017_val").set(split="val")
