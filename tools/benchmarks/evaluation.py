#!/usr/bin/env python
"""Times evaluation and compares its metrics with those of the reference libraries.

    pip install --no-deps lvis==0.5.3
    python tools/benchmarks/evaluation.py lvis

``lvis`` runs our evaluator with hotcoco against Detectron2's with the package lvis. Both get the
same synthetic results (by default 500 images, 1203 classes, 150,000 detections) and are timed from
the annotation file to the metrics, results json included. On a busy machine processor time is more
reliable than wall time. The exit status is 1 if a metric differs by more than 1e-6.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    lvis = parser.add_subparsers(dest="command", required=True).add_parser("lvis")
    lvis.add_argument("--images", type=int, default=500)
    lvis.add_argument("--detections-per-image", type=int, default=300)
    lvis.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator
from detectron2.structures import Boxes, Instances

from regionspot_d2.evaluation import LVISAPEvaluator
from regionspot_d2.evaluation.coco import lvis_library

_DATASET = "benchmark_lvis_v1"
_WIDTH, _HEIGHT = 640, 480
# The numbers of rare, common and frequent classes of LVIS v1.
_FREQUENCIES = {"r": 337, "c": 461, "f": 405}
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


def make_annotations(num_images: int, rng: np.random.Generator) -> dict[str, Any]:
    """Twelve objects per image, as in LVIS, and a few classes known to be absent."""
    frequencies = "".join(key * count for key, count in _FREQUENCIES.items())
    categories = [
        {"id": i, "name": f"class {i}", "synonyms": [], "frequency": frequency}
        for i, frequency in enumerate(rng.permutation(list(frequencies)).tolist(), start=1)
    ]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, num_images + 1):
        present, absent = np.split(rng.integers(1, len(categories) + 1, 32), [12])
        images.append(
            {
                "id": image_id,
                "file_name": f"{image_id}.jpg",
                "width": _WIDTH,
                "height": _HEIGHT,
                "neg_category_ids": sorted(set(absent.tolist()) - set(present.tolist())),
                "not_exhaustive_category_ids": present[:2].tolist(),
            }
        )
        corners = rng.uniform(0, (_WIDTH - 40, _HEIGHT - 40), (12, 2))
        sizes = rng.uniform(8, (_WIDTH, _HEIGHT), (12, 2))
        sizes = np.minimum(sizes, (_WIDTH, _HEIGHT) - corners)
        for category_id, (x, y), (w, h) in zip(present.tolist(), corners.tolist(), sizes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    return {"images": images, "annotations": annotations, "categories": categories}


def make_output(
    boxes: np.ndarray, category_ids: np.ndarray, num_detections: int, rng: np.random.Generator
) -> Instances:
    """Detections around the objects of an image, two thirds of the right class."""
    objects = rng.integers(len(boxes), size=num_detections)
    scale = np.tile(boxes[objects, 2:], 2)
    xyxy = np.concatenate([boxes[objects, :2], boxes[objects, :2] + boxes[objects, 2:]], axis=1)
    xyxy = xyxy + rng.normal(0, 0.08, xyxy.shape) * scale
    low, high = np.minimum(xyxy[:, :2], xyxy[:, 2:]), np.maximum(xyxy[:, :2], xyxy[:, 2:])
    right = rng.random(num_detections) < 2 / 3
    classes = np.where(
        right,
        category_ids[objects] - 1,
        rng.integers(sum(_FREQUENCIES.values()), size=num_detections),
    )
    found = Instances((_HEIGHT, _WIDTH))
    found.pred_boxes = Boxes(torch.from_numpy(np.concatenate([low, high], axis=1)).float())
    found.pred_classes = torch.from_numpy(classes)
    found.scores = torch.from_numpy(rng.random(num_detections)).float()
    return found


class Measurement(NamedTuple):
    """An evaluator's metrics, and the seconds it took."""

    metrics: dict[str, float]
    clock: float
    processor: float


def measure(build: Callable[[], DatasetEvaluator], outputs: dict[int, Instances]) -> Measurement:
    """Runs an evaluator over all images."""
    clock, processor = time.perf_counter(), time.process_time()
    evaluator = build()
    evaluator.reset()
    for image_id, found in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    metrics = evaluator.evaluate()["bbox"]
    return Measurement(metrics, time.perf_counter() - clock, time.process_time() - processor)


def main(arguments: list[str] | None = None) -> int:
    args = argument_parser().parse_args(arguments)
    rng = np.random.default_rng(args.seed)
    content = make_annotations(args.images, rng)
    boxes = np.array([a["bbox"] for a in content["annotations"]]).reshape(args.images, -1, 4)
    ids = np.array([a["category_id"] for a in content["annotations"]]).reshape(args.images, -1)
    outputs = {
        image["id"]: make_output(boxes[i], ids[i], args.detections_per_image, rng)
        for i, image in enumerate(content["images"])
    }
    with tempfile.TemporaryDirectory() as folder:
        json_file = Path(folder) / "annotations.json"
        json_file.write_text(json.dumps(content))
        MetadataCatalog.get(_DATASET).set(json_file=str(json_file))
        ours = measure(lambda: LVISAPEvaluator(_DATASET, output_dir=f"{folder}/hotcoco"), outputs)
        with lvis_library("reference"):
            reference = measure(
                lambda: LVISEvaluator(_DATASET, output_dir=f"{folder}/lvis"), outputs
            )
    MetadataCatalog.remove(_DATASET)
    difference = max(abs(ours.metrics[name] - reference.metrics[name]) for name in _METRICS)
    print(f"{args.images} images, {args.images * args.detections_per_image} detections")
    for name, side in (("Detectron2's evaluator on lvis", reference), ("ours on hotcoco", ours)):
        print(
            f"{name:32s} {side.clock:8.2f} s wall {side.processor:8.2f} s processor   "
            f"AP {side.metrics['AP']:.6f}"
        )
    print(
        f"ratio {reference.clock / ours.clock:.1f} wall, "
        f"{reference.processor / ours.processor:.1f} processor (one run each: less than 2 may be "
        f"noise); largest difference of a metric {difference:.1e}"
    )
    return int(not difference <= 1e-6)


if __name__ == "__main__":
    sys.exit(main())
