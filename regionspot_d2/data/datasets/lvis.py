"""LVIS v1: train, val, minival (its images in COCO val2017), and train without rare classes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis import get_lvis_instances_meta
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from detectron2.structures import BoxMode

from .validation import AnnotationsError, read_annotations


def register_all_lvis(root: str) -> None:
    """Registers ``lvis_v1_minival`` and ``lvis_v1_train_base`` below the folder of all datasets.

    Detectron2's ``lvis_v1_train`` and ``lvis_v1_val`` get our loader too.
    """
    meta = get_lvis_instances_meta("lvis_v1")
    for split in ("train", "val"):
        known = MetadataCatalog.get(f"lvis_v1_{split}")
        DatasetCatalog.remove(known.name)
        _register(known.name, known.json_file, known.image_root, split=split, **meta)
    # With a slash: load_lvis appends "train2017" or "val2017" directly, as Detectron2 does.
    images = os.path.join(root, "coco/")
    minival_json = os.path.join(root, "lvis/lvis_v1_minival.json")
    _register("lvis_v1_minival", minival_json, images, split="minival", **meta)
    base = sorted((c for c in LVIS_CATEGORIES if c["frequency"] != "r"), key=lambda c: c["id"])
    _register(
        "lvis_v1_train_base",
        os.path.join(root, "lvis/lvis_v1_train.json"),
        images,
        split="train, frequent and common classes",
        thing_classes=[category["synonyms"][0] for category in base],
        thing_dataset_id_to_contiguous_id={c["id"]: index for index, c in enumerate(base)},
    )


def _register(name: str, json_file: str, image_root: str, **metadata: Any) -> None:
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    DatasetCatalog.register(name, lambda: load_lvis(json_file, image_root, contiguous))
    paths = {"json_file": json_file, "image_root": image_root}
    MetadataCatalog.get(name).set(**paths, evaluator_type="lvis", **metadata)


def load_lvis(
    json_file: str, image_root: str, contiguous: Mapping[int, int] | None = None
) -> list[dict[str, Any]]:
    """Loads LVIS annotations into the same dataset dicts as Detectron2's ``load_lvis_json``.

    That loader imports the package ``lvis``, which fails on current NumPy and whose replacement,
    hotcoco, lacks the index that the loader reads.

    Args:
        image_root: the folder of ``train2017`` and ``val2017``, with a trailing slash.
        contiguous: class ids by LVIS category id, by default the category id minus 1; annotations
            of other categories are dropped.

    Raises:
        ValueError: the file has a fault, e.g. annotations without valid polygons.
    """
    content = read_annotations(json_file, lvis=True)
    annotations = content.get("annotations", [])
    if len({str(annotation.get("id")) for annotation in annotations}) < len(annotations):
        raise ValueError(f"{json_file}: several annotations have the same 'id'.")
    objects = defaultdict(list)
    for annotation in annotations:
        _check_polygons(annotation, json_file)
        category_id = annotation["category_id"]
        class_id = category_id - 1 if contiguous is None else contiguous.get(category_id)
        if class_id is not None:
            kept = {key: annotation[key] for key in ("bbox", "segmentation")}
            kept.update(bbox_mode=BoxMode.XYWH_ABS, category_id=class_id)
            objects[annotation["image_id"]].append(kept)
    return [
        {
            # LVIS v1 names an image only by its URL, whose last folder is COCO's split.
            "file_name": image_root + "/".join(_url(image, json_file).split("/")[-2:]),
            "height": image["height"],
            "width": image["width"],
            "not_exhaustive_category_ids": image.get("not_exhaustive_category_ids", []),
            "neg_category_ids": image.get("neg_category_ids", []),
            "image_id": image["id"],
            "annotations": objects[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def _url(image: Mapping[str, Any], json_file: str) -> str:
    if not isinstance(url := image.get("coco_url"), str):
        raise AnnotationsError(
            f"{json_file}: the image {image['id']!r} has no 'coco_url', which says where LVIS's "
            "images are. Register annotations with a 'file_name' by DATASETS.COCO_FORMAT."
        )
    return url


def _check_polygons(annotation: Mapping[str, Any], json_file: str) -> None:
    if "segmentation" not in annotation:
        raise ValueError(
            f"{json_file}: annotation {annotation.get('id')} has no 'segmentation'. If this is "
            "MDETR's minival, make one with tools/prepare_lvis_minival.py from lvis_v1_val.json."
        )
    polygons = annotation["segmentation"]
    if not polygons or any(len(xy) % 2 or len(xy) < 6 for xy in polygons):
        raise ValueError(f"{json_file}: annotation {annotation.get('id')} has no valid polygons.")


def minival(annotations: dict[str, Any]) -> dict[str, Any]:
    """The content of ``lvis_v1_val.json`` for those images that are not in COCO's training set."""
    images = [image for image in annotations["images"] if "/val2017/" in image.get("coco_url", "")]
    ids = {image["id"] for image in images}
    objects = [entry for entry in annotations.get("annotations", []) if entry["image_id"] in ids]
    return {**annotations, "images": images, "annotations": objects}
