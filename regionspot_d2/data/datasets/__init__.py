"""Public datasets, registered by name; ``datasets/README.md`` says where their files belong."""

from __future__ import annotations

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from ...files import data_root
from ...files import expand_data_root as expand_root
from .annotations import (
    checked_annotations,
    class_names,
    coco_dataset,
    register_coco_format,
    register_corrected_coco,
    source_file,
)
from .corrections import how_to_get
from .lvis import minival, register_all_lvis
from .odinw import ODINW_13, ODINW_35, register_all_odinw
from .panoptic import register_all_ade20k_panoptic
from .validation import AnnotationsError

__all__ = [
    "ODINW_13",
    "ODINW_35",
    "AnnotationsError",
    "checked_annotations",
    "class_names",
    "coco_dataset",
    "expand_root",
    "how_to_get",
    "minival",
    "register_all_lvis",
    "register_all_objects365",
    "register_all_odinw",
    "register_coco_format",
    "source_file",
]

# The image folder and the annotation file, which is in a folder "annotations" of the same dataset.
_OBJECTS365 = {
    "objects365_v1_train": ("objects365_v1/train", "objects365_train.json"),
    "objects365_v1_val": ("objects365_v1/val", "objects365_val.json"),
    "objects365_v2_train": ("objects365/train", "zhiyuan_objv2_train.json"),
    "objects365_v2_val": ("objects365/val", "zhiyuan_objv2_val.json"),
}
_VAST_VOCABULARY = {
    # As github.com/bethgelab/openimages2coco converts the csv files of Open Images.
    "openimages_v6_train": ("openimages/train", "openimages_v6_train_bbox.json"),
    "openimages_v6_val": ("openimages/val", "openimages_v6_val_bbox.json"),
    # Its JSON files name images "images/<category>/<image>.jpg".
    "v3det_train": ("v3det", "v3det_2023_v1_train.json"),
    "v3det_val": ("v3det", "v3det_2023_v1_val.json"),
}


def register_all_objects365(root: str) -> None:
    """Registers ``objects365_v{1,2}_{train,val}`` below ``root``, the folder of all datasets."""
    for name, files in _OBJECTS365.items():
        _register(root, name, *files, load=_load_objects365)


def _load_objects365(json_file: str, image_root: str, name: str) -> list[dict[str, Any]]:
    records = load_coco_json(json_file, "", name)
    for record in records:
        # v2 names an image "images/v1/patch8/x.jpg" that its archives store as "patch8/x.jpg".
        parts = record["file_name"].split("/")
        inside = parts[-2:] if len(parts) > 1 and parts[-2].startswith("patch") else parts[-1:]
        record["file_name"] = os.path.join(image_root, *inside)
    return records


def _register(root: str, name: str, images: str, file: str, load: Any = load_coco_json) -> None:
    image_root = os.path.join(root, images)
    # Not annotations://<name>: reading class names must not parse gigabytes.
    json_file = os.path.join(root, images.split("/")[0], "annotations", file)
    DatasetCatalog.register(name, lambda: load(checked_annotations(name).path, image_root, name))
    metadata = MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root)
    metadata.set(evaluator_type="coco", split=name.rsplit("_", 1)[1])


def _register_tinycoco(root: str) -> None:
    folder = os.path.join(root, "tinycoco")
    files = os.path.join(folder, "instances.json"), os.path.join(folder, "images")
    register_corrected_coco("tinycoco", *files, split="val")


register_all_lvis(data_root())
register_all_odinw(data_root())
register_all_objects365(data_root())
register_all_ade20k_panoptic(data_root())
_register_tinycoco(data_root())
for _name, _files in _VAST_VOCABULARY.items():
    _register(data_root(), _name, *_files)

# Detectron2 registers COCO without the split, which the results table shows.
MetadataCatalog.get("coco_2017_train").set(split="train")
MetadataCatalog.get("coco_2017_val").set(split="val")
# What is not downloaded, but made of files that are.
MetadataCatalog.get("tinycoco").set(made_by="tools/prepare_tinycoco.py")
MetadataCatalog.get("lvis_v1_minival").set(made_by="tools/prepare_lvis_minival.py")
