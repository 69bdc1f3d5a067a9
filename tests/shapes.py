"""A dataset of colored rectangles that the tiny towers can learn, for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from PIL import Image

from .datasets_on_disk import annotation
from .tiny import tiny_cfg

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def write_shapes(folder: Path, images: int = 12) -> list[str]:
    """Writes images of one to three rectangles; returns their entry of DATASETS.COCO_FORMAT."""
    random = np.random.RandomState(0)
    (folder / "images").mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        pixels = random.randint(90, 140, (64, 96, 3)).astype(np.uint8)
        for _ in range(random.randint(1, 4)):
            category = random.randint(3)
            w, h = (int(side) for side in random.randint(20, 40, 2))
            x, y = int(random.randint(96 - w)), int(random.randint(64 - h))
            pixels[y : y + h, x : x + w] = list(COLORS.values())[category]
            box = [float(v) for v in (x, y, w, h)]
            annotations.append(annotation(len(annotations) + 1, number, box, category + 1))
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        entries.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 64})
    categories = [{"id": i, "name": name} for i, name in enumerate(COLORS, start=1)]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "shapes.json").write_text(json.dumps(content))
    return ["shapes", str(folder / "shapes.json"), str(folder / "images")]


def shapes_cfg(folder: Path) -> CfgNode:
    """A config of tiny towers that trains on new shapes in ``folder`` and tests on them."""
    cfg = tiny_cfg()
    cfg.DATASETS.COCO_FORMAT = [write_shapes(folder / "data")]
    cfg.DATASETS.TRAIN = ("shapes",)
    cfg.DATASETS.TEST = ("shapes",)
    cfg.DATASETS.PROPOSAL_FILES_TEST = ("ground_truth://shapes",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.MODEL.MASK_ON = False
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 1e-3
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.MAX_ITER = 8
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SEED = 5
    cfg.OUTPUT_DIR = str(folder / "output")
    return cfg
