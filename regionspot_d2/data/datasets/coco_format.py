"""Own data: a COCO-format json and a folder of images become a dataset, named in the config."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathManager

from .annotations import (
    Correction,
    complete_annotations,
    corrected,
    number_annotations,
    source_file,
)


def register_corrected_coco(
    name: str, json_file: str, image_root: str, split: str, corrections: Sequence[Correction] = ()
) -> None:
    """Registers a COCO-format dataset whose annotations are corrected for the COCO evaluation. Opens nothing.

    Args:
        name: the dataset.
        json_file: annotations in COCO format. Ids and missing fields are corrected in a copy.
        image_root: the folder that ``file_name`` in the json is relative to.
        split: which part of the data it is, for the results table.
        corrections: further corrections, before those of ids and missing fields.
    """
    path = corrected(name, json_file, *corrections, number_annotations, complete_annotations)
    DatasetCatalog.register(name, lambda: load_coco_json(path, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=path, image_root=image_root, evaluator_type="coco", split=split
    )


def expand_root(path: str) -> str:
    """Puts the folder of all datasets in the place of ``$DETECTRON2_DATASETS``, "datasets" if it is not set."""
    root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
    return path.replace("$DETECTRON2_DATASETS", root)


def register_coco_format(entries: Sequence[Sequence[str]]) -> None:
    """Registers the datasets that ``cfg.DATASETS.COCO_FORMAT`` lists. The same list may be registered again.

    Args:
        entries: ``[name, COCO-format json, image folder]`` of each dataset; ``$DETECTRON2_DATASETS`` in a path is the
            folder of all datasets.

    Raises:
        ValueError: if an entry has another form, or its name belongs to another dataset.
        FileNotFoundError: if a json or an image folder is not there.
    """
    for index, entry in enumerate(entries):
        key = f"DATASETS.COCO_FORMAT[{index}]"
        if (
            isinstance(entry, str)
            or len(entry) != 3
            or not all(isinstance(part, (str, os.PathLike)) for part in entry)
        ):
            raise ValueError(
                f"{key} is {entry!r}; it must be [name, COCO-format json, image folder]."
            )
        name, json_file, image_root = (expand_root(os.fspath(part)) for part in entry)
        if not PathManager.isfile(json_file):
            raise FileNotFoundError(f"{key} ('{name}'): there is no annotation file '{json_file}'.")
        if not PathManager.isdir(image_root):
            raise FileNotFoundError(f"{key} ('{name}'): there is no image folder '{image_root}'.")
        if name in DatasetCatalog:
            metadata = MetadataCatalog.get(name)
            registered = (
                source_file(os.fspath(metadata.get("json_file", ""))),
                os.fspath(metadata.get("image_root", "")),
            )
            if registered == (json_file, image_root):
                continue
            raise ValueError(
                f"{key}: the name '{name}' belongs to another dataset (json '{registered[0]}', images "
                f"'{registered[1]}'). Choose another name."
            )
        register_corrected_coco(name, json_file, image_root, split=Path(json_file).stem)


def coco_dataset(
    photos: Iterable[tuple[str, tuple[int, int], Iterable[tuple[Sequence[float], str]]]],
) -> dict[str, Any]:
    """Makes named boxes a data set in COCO format, whose categories are the names in the order they come.

    Args:
        photos: of each the file name, its width and height, and its regions: a box (XYXY, pixels of the photo) and a name.

    Returns:
        The content of the json, ids from 1.
    """
    names: dict[str, int] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (file_name, (width, height), regions) in enumerate(photos, start=1):
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for (x0, y0, x1, y1), name in regions:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": names.setdefault(name, len(names) + 1),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for name, number in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}
