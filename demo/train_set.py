"""Writes the demo's photos, with the boxes and names of boxes.json, as a data set in COCO format.

python demo/train_set.py --output output/demo_photos

``--random-boxes N`` adds N boxes to each photo, anywhere, and names all by the mini model: among many regions of a photo a head
cannot learn names by heart, and has to look where its region is.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from photos import photo_paths
from PIL import Image

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.engine import load_config
from regionspot_d2.modeling.embedded import known_vocabulary
from regionspot_d2.modeling.vocabulary import clean_name

BOXES = Path(__file__).with_name("boxes.json")
MINI = Path(__file__).parent.parent / "configs/mini/regionspot_mini.yaml"
# Of the sides of random boxes, relative to those of the photo.
SMALLEST, LARGEST = 0.12, 0.9

Region = tuple[list[float], str]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo_photos"))
    parser.add_argument("--random-boxes", type=int, default=0, metavar="N", help="per photo")
    return parser.parse_args()


def with_random_boxes(path: Path, boxes: list[list[float]], count: int) -> list[list[float]]:
    """The boxes (XYXY, pixels of the photo), and random ones of every size and place."""
    with Image.open(path) as photo:
        sides_of_photo = torch.tensor(photo.size * 2)
    generator = torch.Generator().manual_seed(0)
    scale = math.log(LARGEST / SMALLEST)
    sides = SMALLEST * torch.exp(scale * torch.rand(count, 2, generator=generator))
    corners = (1 - sides) * torch.rand(count, 2, generator=generator)
    return boxes + (torch.cat([corners, corners + sides], 1) * sides_of_photo).tolist()


def named_by_mini(boxes: dict[Path, list[list[float]]]) -> dict[str, list[Region]]:
    """The boxes of each photo with the names that the mini model gives them among those of LVIS, by file name."""
    words = known_vocabulary("lvis")
    predictor = RegionSpotPredictor(load_config(str(MINI), [], training=False), vocabulary=words)
    found = predictor.predict_batch(boxes.keys(), list(boxes.values()))
    return {
        path.name: [(box, clean_name(words[i])) for box, i in zip(boxes[path], names.pred_classes)]
        for path, names in zip(boxes, found)
    }


def main() -> None:
    args = parse_arguments()
    folder = args.output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    paths = photo_paths()
    given = json.loads(BOXES.read_text())
    regions = {name: list(zip(x["boxes"], x["names"])) for name, x in given.items()}
    if args.random_boxes > 0:
        regions = named_by_mini(
            {
                path: with_random_boxes(path, given[path.name]["boxes"], args.random_boxes)
                for path in paths
            }
        )
    names = list(dict.fromkeys(name for region in regions.values() for _, name in region))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, path in enumerate(paths, start=1):
        shutil.copy(path, folder / path.name)
        with Image.open(path) as photo:
            width, height = photo.size
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        for (x0, y0, x1, y1), name in regions[path.name]:
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
