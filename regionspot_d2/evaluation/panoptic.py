"""Panoptic quality: Detectron2's evaluator with a choice of library."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import hotcoco.panoptic
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator

from .coco import uses_hotcoco


class PanopticQualityEvaluator(COCOPanopticEvaluator):
    """Detectron2's COCO panoptic evaluator, also where the package panopticapi is missing.

    It is on no package index. ``backend`` is "hotcoco", which gives the same numbers, or
    "reference" for panopticapi; the other arguments are Detectron2's.
    """

    def __init__(
        self, dataset_name: str, output_dir: str | None = None, *, backend: str = "hotcoco"
    ) -> None:
        super().__init__(dataset_name, output_dir)
        self._backend = backend

    def process(self, inputs: Any, outputs: Any) -> None:
        with panoptic_library(self._backend):
            super().process(inputs, outputs)

    def evaluate(self) -> Mapping[str, Any] | None:
        with panoptic_library(self._backend):
            return super().evaluate()


@contextmanager
def panoptic_library(backend: str) -> Iterator[None]:
    """Lets Detectron2's evaluator find what it imports from panopticapi.

    Raises:
        ImportError: ``backend`` is "reference", and panopticapi is not installed.
    """
    if not uses_hotcoco(backend):
        try:
            importlib.import_module("panopticapi.evaluation")
        except ImportError as error:
            raise ImportError(
                "TEST.EVALUATION_BACKEND: reference needs the package panopticapi: pip install "
                "git+https://github.com/cocodataset/panopticapi.git. The default, hotcoco, gives "
                "the same numbers."
            ) from error
        yield
        return
    parts: dict[str, dict[str, Any]] = {
        "": {},
        ".utils": {"id2rgb": id2rgb},
        ".evaluation": {"pq_compute": panoptic_quality},
    }
    modules = {f"panopticapi{name}": ModuleType(f"panopticapi{name}") for name in parts}
    for module, content in zip(modules.values(), parts.values()):
        vars(module).update(content)
    # It imports them when it needs them and has no parameter for them.
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """Numbers of segments (H, W) as the colors of COCO's panoptic PNGs: (H, W, 3) uint8."""
    return np.stack([ids // 256**i % 256 for i in range(3)], axis=-1).astype(np.uint8)


def panoptic_quality(
    gt_json_file: str, pred_json_file: str, gt_folder: str, pred_folder: str
) -> Mapping[str, Any]:
    """What panopticapi's ``pq_compute`` gives, computed by hotcoco.

    hotcoco wants numbers for the ids of images, which are names in ADE20k.
    """
    contents = []
    for path in (gt_json_file, pred_json_file):
        with open(path) as file:
            contents.append(json.load(file))
    numbers = {image["id"]: i for i, image in enumerate(contents[0]["images"], start=1)}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, content in zip(("truth", "predictions"), contents):
            images = [{**image, "id": numbers[image["id"]]} for image in contents[0]["images"]]
            annotations = [
                {**a, "image_id": numbers[a["image_id"]]} for a in content["annotations"]
            ]
            files.append(os.path.join(folder, f"{name}.json"))
            with open(files[-1], "w") as file:
                json.dump({**content, "images": images, "annotations": annotations}, file)
        return hotcoco.panoptic.pq_compute(files[0], files[1], gt_folder, pred_folder)


def check_panoptic(dataset_name: str, backend: str) -> None:
    """Raises the error with which an evaluation of panoptic quality would end."""
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("thing_classes") != metadata.get("stuff_classes"):
        raise ValueError(
            f"Dataset '{dataset_name}' numbers things and stuff apart; evaluate one that lists "
            "them together, such as coco_2017_val_panoptic."
        )
    with panoptic_library(backend):
        for key in ("panoptic_json", "panoptic_root"):
            if not os.path.exists(path := metadata.get(key)):
                raise ValueError(
                    f"Dataset '{dataset_name}': its {key} is not there: '{path}'. "
                    "datasets/README.md says where to get it."
                )
