"""ADE20k's panoptic validation and training sets; COCO's are registered by Detectron2."""

from __future__ import annotations

import json
import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES
from detectron2.utils.file_io import PathManager

# Of the 150 classes of the MIT scene parsing benchmark, counted from 0, those that its instance
# segmentation leaves out.
_STUFF = (
    *(0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59),
    *(60, 61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122),
    *(128, 131, 140, 141, 145),
)


def register_all_ade20k_panoptic(root: str) -> None:
    """Registers ``ade20k_panoptic_{train,val}`` below ``root``, the folder of all datasets."""
    names = [name.split(",")[0].strip() for name in ADE20K_SEM_SEG_CATEGORIES]
    things = [i for i in range(len(names)) if i not in _STUFF]
    folder = os.path.join(root, "ADEChallengeData2016")
    for name, images in (("train", "training"), ("val", "validation")):
        panoptic_root = os.path.join(folder, f"ade20k_panoptic_{name}")
        metadata = MetadataCatalog.get(f"ade20k_panoptic_{name}").set(
            thing_classes=names,
            stuff_classes=names,
            thing_dataset_id_to_contiguous_id={i: i for i in things},
            stuff_dataset_id_to_contiguous_id={i: i for i in _STUFF},
            image_root=os.path.join(folder, "images", images),
            panoptic_root=panoptic_root,
            panoptic_json=f"{panoptic_root}.json",
            evaluator_type="coco_panoptic_seg",
            split=name,
        )
        DatasetCatalog.register(metadata.name, lambda metadata=metadata: _load(metadata))


def _load(metadata: Any) -> list[dict[str, Any]]:
    """As Detectron2's loader, which wants numbers for the ids of images; ADE20k's are names."""
    with PathManager.open(metadata.panoptic_json) as file:
        content = json.load(file)
    images = {image["id"]: image for image in content["images"]}
    return [
        {
            "file_name": os.path.join(metadata.image_root, images[key]["file_name"]),
            "image_id": key,
            "height": images[key]["height"],
            "width": images[key]["width"],
        }
        for key in (annotation["image_id"] for annotation in content["annotations"])
    ]
