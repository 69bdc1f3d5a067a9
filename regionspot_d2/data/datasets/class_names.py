"""The words of a dataset, known before its annotations are."""

from __future__ import annotations

import json
import mmap
import re
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager


def class_names(dataset_name: str) -> list[str]:
    """The class names of a dataset, in the order of its contiguous class ids.

    Detectron2 fills ``thing_classes`` of a COCO-format dataset only when its annotations are loaded. This reads the
    categories alone, and leaves them in the metadata.

    Args:
        dataset_name: a registered dataset, or a metadata entry that has ``thing_classes`` (a custom vocabulary).

    Returns:
        ``MetadataCatalog.get(dataset_name).thing_classes``.

    Raises:
        KeyError: if no dataset of this name is registered.
        ValueError: if the dataset names no classes.
        FileNotFoundError: if its annotation file is not there.
    """
    if dataset_name not in MetadataCatalog and dataset_name not in DatasetCatalog:
        raise KeyError(
            f"Dataset '{dataset_name}' is not registered. Own data is registered by DATASETS.COCO_FORMAT, "
            "e.g. [['my_val', 'my/val.json', 'my/images']]."
        )
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("thing_classes") is None:
        if metadata.get("json_file") is not None:
            categories = read_categories(metadata.json_file)
            # As load_coco_json orders them: the two must agree on the contiguous ids.
            metadata.thing_classes = [
                category["name"] for category in sorted(categories, key=lambda c: c["id"])
            ]
        elif dataset_name in DatasetCatalog:
            DatasetCatalog.get(dataset_name)
    names = metadata.get("thing_classes")
    if not names:
        raise ValueError(
            f"Dataset '{dataset_name}' has no class names: its metadata has neither 'thing_classes' nor a 'json_file'."
        )
    return list(names)


def read_categories(json_file: str) -> list[dict[str, Any]]:
    """Reads ``categories`` of a COCO-format file without its annotations.

    Args:
        json_file: a COCO-format annotation file, of any size.

    Returns:
        The categories, each with at least ``id`` and ``name``, in the file's order.

    Raises:
        ValueError: if the file has none.
    """
    with (
        open(PathManager.get_local_path(json_file), "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        for match in re.finditer(rb'"categories"\s*:\s*(?=\[)', content):
            found = _decode_list(content, match.end())
            # Annotations may have a key of this name too, with other things in it.
            if found and all(isinstance(c, dict) and {"id", "name"} <= c.keys() for c in found):
                return found
    raise ValueError(f"{json_file} has no 'categories' with 'id' and 'name'; is it in COCO format?")


def _decode_list(content: mmap.mmap, start: int) -> list[Any]:
    size = 1 << 16
    while True:
        text = content[start : start + size].decode(errors="ignore")
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except json.JSONDecodeError:
            if start + size >= len(content):
                return []
            size *= 4
