#!/usr/bin/env python
"""Extracts LVIS minival from LVIS v1 val: the images in COCO val2017, not used to train detectors.

    tools/prepare_lvis_minival.py

It reads $DETECTRON2_DATASETS/lvis/lvis_v1_val.json and writes lvis_v1_minival.json next to it.
"""

from __future__ import annotations

import json
import os

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--lvis-val", metavar="FILE", help="by default the one named below")
    parser.add_argument("--output", metavar="FILE", help="by default next to it")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

from regionspot_d2.data.datasets import minival
from regionspot_d2.data.datasets.validation import read_annotations
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.files import data_root, write_atomically

# Of the official file, and of the "minival" that the literature reports on.
_VAL_IMAGES = 19809
_MINIVAL_IMAGES = 4809


@told_in_a_line("prepare_lvis_minival.py")
def main() -> None:
    args = argument_parser().parse_args()
    folder = os.path.join(data_root(), "lvis")
    source = args.lvis_val or os.path.join(folder, "lvis_v1_val.json")
    output = args.output or os.path.join(folder, "lvis_v1_minival.json")

    annotations = read_annotations(source, lvis=True)
    kept = minival(annotations)
    if not kept["images"]:
        raise ValueError(f"{source} has no image of COCO val2017; is it lvis_v1_val.json?")
    with write_atomically(output, "w") as file:
        json.dump(kept, file)
    print(
        f"{output}: {len(kept['images'])} of {len(annotations['images'])} images, "
        f"{len(kept['annotations'])} of {len(annotations['annotations'])} annotations"
    )
    if len(annotations["images"]) == _VAL_IMAGES and len(kept["images"]) != _MINIVAL_IMAGES:
        print(f"Warning: the minival of the literature has {_MINIVAL_IMAGES} images.")


if __name__ == "__main__":
    main()
