"""Tiny datasets written to a folder, for the tests of everything that reads datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Real photos with boxes, where the checkout has them.
TINYCOCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "tinycoco"

# (width, height) of the images 1, 2, ...
SIZES = ((64, 48), (50, 70), (40, 40), (80, 60))


def write_images(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Writes an image of noise per name; returns the entries of ``images``, with ids from 1."""
    entries = []
    for index, (name, (width, height)) in enumerate(zip(names, SIZES), start=1):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(index).randint(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        entries.append({"id": index, "file_name": name, "width": width, "height": height})
    return entries


def annotation(
    number: int, image_id: int, box: list[float], category: int = 1, **more: Any
) -> dict:
    """A COCO annotation with all that evaluation needs; ``box`` is XYWH."""
    x, y, w, h = box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": box,
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        **more,
    }


def write_coco(folder: Path) -> tuple[str, str]:
    """Writes four images: two boxes, one box and a crowd, none, one box.

    Returns:
        The json file and the image folder.
    """
    images = write_images(folder / "images", [f"{n}.png" for n in "abcd"])
    annotations = [
        annotation(1, 1, [4.25, 6.5, 20.0, 30.75]),
        annotation(2, 1, [30.0, 10.0, 33.5, 20.0], category=3),
        annotation(3, 2, [0.0, 0.0, 50.0, 70.0], category=3),
        annotation(4, 2, [10.0, 10.0, 30.0, 30.0], iscrowd=1),
        annotation(5, 4, [71.3, 52.6, 8.4, 7.1]),
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    json_file = folder / "instances.json"
    json_file.write_text(json.dumps(content))
    return str(json_file), str(folder / "images")
