"""Objects365 v1 and v2."""

from __future__ import annotations

import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

_PREDEFINED_SPLITS_OBJECTS365 = {
    "objects365_v1_train": (
        "objects365_v1/train",
        "objects365_v1/annotations/objects365_train.json",
    ),
    "objects365_v1_val": ("objects365_v1/val", "objects365_v1/annotations/objects365_val.json"),
    "objects365_v2_train": ("objects365/train", "objects365/annotations/zhiyuan_objv2_train.json"),
    "objects365_v2_val": ("objects365/val", "objects365/annotations/zhiyuan_objv2_val.json"),
}


def register_all_objects365(root: str) -> None:
    """Registers ``objects365_v{1,2}_{train,val}``.

    Args:
        root: the folder of all datasets.
    """
    for name, (image_root, json_file) in _PREDEFINED_SPLITS_OBJECTS365.items():
        _register(name, os.path.join(root, json_file), os.path.join(root, image_root))


def _register(name: str, json_file: str, image_root: str) -> None:
    DatasetCatalog.register(name, lambda: load_objects365(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        split=name.rsplit("_", 1)[1],
    )


def load_objects365(json_file: str, image_root: str, dataset_name: str) -> list[dict[str, Any]]:
    """Loads Objects365, whose v2 names an image ``images/v1/patch8/x.jpg`` that its archives hold as ``patch8/x.jpg``.

    Args:
        json_file: the annotations as they were downloaded.
        image_root: the folder of the images (v1), or of ``patch0``, ``patch1``, ... (v2).
        dataset_name: fills this dataset's metadata.

    Returns:
        Detectron2's dataset dicts.
    """
    records = load_coco_json(json_file, "", dataset_name)
    for record in records:
        parts = record["file_name"].split("/")
        inside = parts[-2:] if len(parts) > 1 and parts[-2].startswith("patch") else parts[-1:]
        record["file_name"] = os.path.join(image_root, *inside)
    return records
