#!/usr/bin/env python
"""Extracts tinycoco, 32 photos for trying out training and evaluation, from COCO 2017 val.

    tools/prepare_tinycoco.py

It reads coco/annotations/instances_val2017.json and coco/val2017/ below $DETECTRON2_DATASETS, and
writes tinycoco/instances.json and tinycoco/images/ there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="by default the one named below")
    add("--images", type=Path, metavar="FOLDER", help="by default the one named below")
    add("--output", type=Path, metavar="FOLDER", help="by default tinycoco/, as below")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

from regionspot_d2.data.datasets.validation import read_annotations
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.files import data_root, write_atomically

# fmt: off
IMAGE_IDS = (
    6818, 17627, 37777, 41888, 58636, 87038, 143931, 153299, 174482, 181666, 184321, 184791,
    226111, 252219, 289393, 296649, 303818, 308394, 322864, 331352, 348881, 386912, 397133,
    403385, 456496, 458054, 460347, 463730, 480985, 491497, 502136, 522713,
)
# fmt: on


def subset(annotations: dict[str, Any]) -> dict[str, Any]:
    """Reduces the content of a COCO JSON file to the 32 photos; the categories stay."""
    chosen = set(IMAGE_IDS)
    return {
        **annotations,
        "images": [image for image in annotations["images"] if image["id"] in chosen],
        "annotations": [a for a in annotations.get("annotations", []) if a["image_id"] in chosen],
    }


@told_in_a_line("prepare_tinycoco.py")
def main() -> None:
    args = argument_parser().parse_args()
    root = Path(data_root())
    json_file = args.json or root / "coco" / "annotations" / "instances_val2017.json"
    photos = args.images or root / "coco" / "val2017"
    output = args.output or root / "tinycoco"

    if not json_file.is_file():
        raise FileNotFoundError(
            f"{json_file} does not exist; datasets/README.md says where COCO goes."
        )
    kept = subset(read_annotations(str(json_file)))
    missing = set(IMAGE_IDS) - {image["id"] for image in kept["images"]}
    if missing:
        raise ValueError(
            f"{json_file} lacks image {min(missing)}; is it COCO's instances_val2017.json?"
        )
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for image in kept["images"]:
        photo = photos / image["file_name"]
        if not photo.is_file():
            raise FileNotFoundError(f"{photo} does not exist.")
        shutil.copy(photo, folder)
    with write_atomically(output / "instances.json", "w") as file:
        json.dump(kept, file)
    print(f"{output}: {len(kept['images'])} images, {len(kept['annotations'])} annotations")


if __name__ == "__main__":
    main()
