"""Small datasets in LVIS and COCO format with random results, for the evaluation's tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import Boxes, Instances

from regionspot_d2.data.datasets.lvis import load_lvis

SIDE = 200

# Three of each frequency; the first of each group is a name of Objects365.
CATEGORIES = [
    ("person", "r", ["human"]),
    ("gargoyle", "r", ["gargoyle"]),
    ("bat_(animal)", "r", ["bat_(animal)"]),
    ("chair", "c", ["chair"]),
    ("gemstone", "c", ["gemstone"]),
    ("seashell", "c", ["seashell"]),
    ("lamp", "f", ["lamp"]),
    ("knob", "f", ["knob"]),
    ("shelving_unit", "f", ["shelf"]),
]


def annotations(
    rng: np.random.Generator, num_images: int = 20, objects_per_image: int = 6
) -> dict[str, Any]:
    """LVIS (hence COCO) annotations: category ids 1..9, each object's mask is its box."""
    categories = [
        {"id": i, "name": name, "synonyms": synonyms, "frequency": frequency}
        for i, (name, frequency, synonyms) in enumerate(CATEGORIES, start=1)
    ]
    images, found = [], []
    for image_id in range(1, num_images + 1):
        # The ninth class occurs nowhere.
        classes = rng.integers(1, len(CATEGORIES), objects_per_image)
        absent = [c for c in range(1, len(CATEGORIES) + 1) if c not in classes]
        images.append(
            {
                "id": image_id,
                "width": SIDE,
                "height": SIDE,
                "file_name": f"{image_id}.jpg",
                "coco_url": f"http://images.cocodataset.org/val2017/{image_id}.jpg",
                "neg_category_ids": absent[:2],
                "not_exhaustive_category_ids": [int(classes[0])],
            }
        )
        for category_id in classes.tolist():
            x, y, w, h = (round(v, 2) for v in [*rng.uniform(0, 90, 2), *rng.uniform(8, 100, 2)])
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    return {"images": images, "annotations": found, "categories": categories}


def register_lvis(name: str, content: dict[str, Any], folder: Path) -> None:
    """Registers annotations as an LVIS dataset."""
    json_file = _write(name, content, folder)
    DatasetCatalog.register(name, lambda: load_lvis(json_file, f"{folder}/"))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        evaluator_type="lvis",
        split="val",
        thing_classes=[category["name"] for category in content["categories"]],
    )


def register_coco(name: str, content: dict[str, Any], folder: Path) -> None:
    """Registers annotations as a COCO dataset."""
    json_file = _write(name, content, folder)
    DatasetCatalog.register(name, lambda: load_coco_json(json_file, str(folder), name))
    MetadataCatalog.get(name).set(json_file=json_file, evaluator_type="coco", split="val")
    DatasetCatalog.get(name)


def _write(name: str, content: dict[str, Any], folder: Path) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return str(path)


def forget(*names: str) -> None:
    """Removes datasets from the catalogs."""
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        if name in MetadataCatalog:
            MetadataCatalog.remove(name)


def random_outputs(
    content: dict[str, Any],
    rng: np.random.Generator,
    per_object: int = 8,
    *,
    masks: bool = False,
) -> list[Instances]:
    """Results around the objects of each image, half of the right class; many scores tie."""
    outputs = []
    for image in content["images"]:
        boxes, classes = [], []
        for annotation in of_image(content, image["id"]):
            x, y, w, h = annotation["bbox"]
            for _ in range(per_object):
                shift = rng.normal(0, 3, 4)
                corners = np.array([x, y, x + w, y + h]) + shift
                low, high = np.minimum(corners[:2], corners[2:] - 2), corners[2:]
                boxes.append(np.clip(np.r_[low, high], 0, SIDE))
                right = annotation["category_id"] - 1
                classes.append(right if rng.random() < 0.5 else rng.integers(len(CATEGORIES)))
        outputs.append(instances(boxes, classes, rng.random(len(boxes)).round(2), masks=masks))
    return outputs


def oracle_outputs(
    records: Sequence[dict[str, Any]], num_classes: int, *, masks: bool = False
) -> Iterator[tuple[dict[str, Any], Instances]]:
    """Inputs with the true boxes as proposals; results score 1 for the true class, else 0.01."""
    for record in records:
        boxes = np.array([a["bbox"] for a in record["annotations"]]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        truth = [a["category_id"] for a in record["annotations"]]
        # The model sees the image at half its size.
        proposals = Instances((SIDE // 2, SIDE // 2))
        proposals.proposal_boxes = Boxes(torch.tensor(boxes / 2, dtype=torch.float32))
        regions = np.repeat(np.arange(len(boxes)), num_classes)
        classes = np.tile(np.arange(num_classes), len(boxes))
        right = classes == np.array(truth, dtype=int)[regions]
        result = instances(boxes[regions], classes, np.where(right, 1.0, 0.01), masks=masks)
        result.region_index = torch.from_numpy(regions)
        image = torch.zeros(3, SIDE // 2, SIDE // 2)
        sizes = {"image": image, "height": SIDE, "width": SIDE}
        yield {"image_id": record["image_id"], "proposals": proposals, **sizes}, result


def instances(boxes: Any, classes: Any, scores: Any, *, masks: bool = False) -> Instances:
    """Results of one image from XYXY boxes; masks are the filled boxes."""
    found = Instances((SIDE, SIDE))
    found.pred_boxes = Boxes(torch.as_tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32))
    found.pred_classes = torch.as_tensor(np.array(classes, dtype=np.int64))
    found.scores = torch.as_tensor(np.array(scores), dtype=torch.float32)
    if masks:
        found.pred_masks = torch.zeros(len(found), SIDE, SIDE, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(found.pred_masks, found.pred_boxes.tensor.round().int()):
            mask[y0:y1, x0:x1] = True
    return found


def of_image(content: dict[str, Any], image_id: int) -> list[dict[str, Any]]:
    """The annotations of an image."""
    return [a for a in content["annotations"] if a["image_id"] == image_id]


def run(evaluator: Any, content: dict[str, Any], outputs: Sequence[Instances]) -> dict[str, Any]:
    """Feeds results to an evaluator, image by image."""
    evaluator.reset()
    for image, found in zip(content["images"], outputs):
        evaluator.process([{"image_id": image["id"]}], [{"instances": found}])
    return evaluator.evaluate()
