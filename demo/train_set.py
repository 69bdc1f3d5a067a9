"""Writes the demo's photos, with the boxes and names of boxes.json, as a COCO dataset.

python demo/train_set.py --output output/demo_photos
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo_photos"))
    return parser


if __name__ == "__main__":
    begin(argument_parser())

from photos import photo_paths
from PIL import Image

from regionspot_d2.data.datasets import coco_dataset

BOXES = Path(__file__).with_name("boxes.json")


def main() -> None:
    args = argument_parser().parse_args()
    folder = args.output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    regions = json.loads(BOXES.read_text())
    photos = []
    for path in photo_paths():
        shutil.copy(path, folder / path.name)
        with Image.open(path) as photo:
            size = photo.size
        named = regions[path.name]
        photos.append((path.name, size, list(zip(named["boxes"], named["names"]))))
    content = coco_dataset(photos)
    (args.output / "instances.json").write_text(json.dumps(content))
    boxes, names = len(content["annotations"]), len(content["categories"])
    print(f"{len(photos)} photos, {boxes} boxes, {names} names: {args.output}")


if __name__ == "__main__":
    main()
