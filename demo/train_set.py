"""Writes the demo's photos, with the boxes and names of boxes.json, as a data set in COCO format.

python demo/train_set.py --output output/demo_photos
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from photos import photo_paths
from PIL import Image

BOXES = Path(__file__).with_name("boxes.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo_photos"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    folder = args.output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    regions = json.loads(BOXES.read_text())
    names = list(dict.fromkeys(name for entry in regions.values() for name in entry["names"]))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, path in enumerate(photo_paths(), start=1):
        shutil.copy(path, folder / path.name)
        with Image.open(path) as photo:
            width, height = photo.size
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        entry = regions[path.name]
        for (x0, y0, x1, y1), name in zip(entry["boxes"], entry["names"]):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": names.index(name) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (args.output / "instances.json").write_text(json.dumps(content))
    print(f"{len(images)} photos, {len(annotations)} boxes, {len(names)} names: {args.output}")


if __name__ == "__main__":
    main()
