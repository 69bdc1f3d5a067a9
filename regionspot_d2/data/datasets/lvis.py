"""LVIS v1: train, val, the minival of the open-vocabulary field, and the base classes for training."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis import get_lvis_instances_meta, load_lvis_json
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from detectron2.utils.file_io import PathManager

# Registered by Detectron2 already; read here by our loader, which needs no lvis package.
_BUILTIN_SPLITS_LVIS = {"lvis_v1_train": "train", "lvis_v1_val": "val"}

# The trailing slash matters: Detectron2's loader appends "train2017" or "val2017" as it is.
_PREDEFINED_SPLITS_LVIS = {
    "lvis_v1_minival": ("coco/", "lvis/lvis_v1_minival.json"),
}
_PREDEFINED_SPLITS_LVIS_BASE = {
    "lvis_v1_train_base": ("coco/", "lvis/lvis_v1_train.json"),
}


def register_all_lvis(root: str) -> None:
    """Registers ``lvis_v1_minival`` and ``lvis_v1_train_base``, and our loader for Detectron2's LVIS v1 sets.

    Args:
        root: the folder of all datasets.
    """
    for name, split in _BUILTIN_SPLITS_LVIS.items():
        metadata = MetadataCatalog.get(name)
        DatasetCatalog.remove(name)
        _register_lvis(name, metadata.json_file, metadata.image_root, split)
    for name, (image_root, json_file) in _PREDEFINED_SPLITS_LVIS.items():
        _register_lvis(
            name, os.path.join(root, json_file), os.path.join(root, image_root), "minival"
        )
    for name, (image_root, json_file) in _PREDEFINED_SPLITS_LVIS_BASE.items():
        _register_lvis_base(name, os.path.join(root, json_file), os.path.join(root, image_root))


def _register_lvis(name: str, json_file: str, image_root: str, split: str) -> None:
    DatasetCatalog.register(name, lambda: load_lvis(json_file, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="lvis",
        split=split,
        **get_lvis_instances_meta("lvis_v1"),
    )


def _register_lvis_base(name: str, json_file: str, image_root: str) -> None:
    categories = sorted(LVIS_CATEGORIES, key=lambda category: category["id"])
    base = [category for category in categories if category["frequency"] != "r"]
    contiguous = {category["id"]: index for index, category in enumerate(base)}
    DatasetCatalog.register(name, lambda: load_lvis_base(json_file, image_root, contiguous))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="lvis",
        split="train, frequent and common classes",
        thing_classes=[category["synonyms"][0] for category in base],
        thing_dataset_id_to_contiguous_id=contiguous,
    )


def load_lvis(
    json_file: str, image_root: str, dataset_name: str | None = None
) -> list[dict[str, Any]]:
    """Loads LVIS annotations with Detectron2's loader, whatever is imported as ``lvis``.

    That loader imports the package ``lvis``, which fails on current NumPy, and which an evaluation with hotcoco has
    replaced by a module without the index the loader reads.

    Args:
        json_file: annotations in LVIS format.
        image_root: the folder of ``train2017`` and ``val2017``, with a trailing slash.
        dataset_name: fills this dataset's metadata; None leaves it alone.

    Returns:
        Detectron2's dataset dicts.

    Raises:
        ValueError: if the annotations have no segmentations.
    """
    with _lvis_module():
        return load_lvis_json(json_file, image_root, dataset_name)


def load_lvis_base(
    json_file: str, image_root: str, contiguous: dict[int, int]
) -> list[dict[str, Any]]:
    """Loads the annotations of some classes of LVIS: those of all others are left out.

    Args:
        json_file: annotations in LVIS format.
        image_root: the folder of ``train2017`` and ``val2017``, with a trailing slash.
        contiguous: from the LVIS category id of each class to its id among the chosen ones.

    Returns:
        Detectron2's dataset dicts, one per image of the file, some perhaps without annotations.
    """
    records = load_lvis(json_file, image_root)
    for record in records:
        kept = []
        for annotation in record["annotations"]:
            # Without a dataset name the loader gives the LVIS id less one.
            category_id = annotation["category_id"] + 1
            if category_id in contiguous:
                kept.append({**annotation, "category_id": contiguous[category_id]})
        record["annotations"] = kept
    return records


def minival(annotations: dict[str, Any]) -> dict[str, Any]:
    """The part of LVIS v1 val on images that no COCO detector was trained on.

    Args:
        annotations: the content of ``lvis_v1_val.json``.

    Returns:
        The same with the images of COCO val2017 only, and their annotations, masks included.
    """
    images = [image for image in annotations["images"] if "/val2017/" in image["coco_url"]]
    ids = {image["id"] for image in images}
    kept = [
        annotation for annotation in annotations["annotations"] if annotation["image_id"] in ids
    ]
    return {**annotations, "images": images, "annotations": kept}


class _LvisFile:
    """What Detectron2's loader asks of ``lvis.LVIS``."""

    def __init__(self, annotation_path: str) -> None:
        with PathManager.open(annotation_path) as file:
            content = json.load(file)
        self.imgs = {image["id"]: image for image in content["images"]}
        self.img_ann_map: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content.get("annotations", []):
            if "segmentation" not in annotation:
                raise ValueError(
                    f"{annotation_path}: annotation {annotation.get('id')} has no 'segmentation'. If this is MDETR's "
                    "minival, make one from lvis_v1_val.json with tools/prepare_lvis_minival.py instead."
                )
            self.img_ann_map[annotation["image_id"]].append(annotation)

    def load_imgs(self, ids: list[int]) -> list[dict[str, Any]]:
        return [self.imgs[image_id] for image_id in ids]


@contextlib.contextmanager
def _lvis_module() -> Iterator[None]:
    """Makes ``from lvis import LVIS`` give :class:`_LvisFile`."""
    module = ModuleType("lvis")
    module.LVIS = _LvisFile  # type: ignore[attr-defined]
    before = sys.modules.get("lvis")
    sys.modules["lvis"] = module
    try:
        yield
    finally:
        if before is None:
            del sys.modules["lvis"]
        else:
            sys.modules["lvis"] = before
