"""The two other training sets of the paper, OpenImages V6 and V3Det, in COCO format."""

from __future__ import annotations

import os

from detectron2.data.datasets import register_coco_instances

# As github.com/bethgelab/openimages2coco converts Open Images' csv files.
_PREDEFINED_SPLITS_OPENIMAGES = {
    "openimages_v6_train": (
        "openimages/train",
        "openimages/annotations/openimages_v6_train_bbox.json",
    ),
    "openimages_v6_val": (
        "openimages/val",
        "openimages/annotations/openimages_v6_val_bbox.json",
    ),
}
# Its json names images "images/<category>/<image>.jpg".
_PREDEFINED_SPLITS_V3DET = {
    "v3det_train": ("v3det", "v3det/annotations/v3det_2023_v1_train.json"),
    "v3det_val": ("v3det", "v3det/annotations/v3det_2023_v1_val.json"),
}


def register_all_vast_vocabulary(root: str) -> None:
    """Registers ``openimages_v6_{train,val}`` and ``v3det_{train,val}``.

    Args:
        root: the folder of all datasets.
    """
    tables = {**_PREDEFINED_SPLITS_OPENIMAGES, **_PREDEFINED_SPLITS_V3DET}
    for name, (image_root, json_file) in tables.items():
        split = name.rsplit("_", 1)[1]
        register_coco_instances(
            name, {"split": split}, os.path.join(root, json_file), os.path.join(root, image_root)
        )
