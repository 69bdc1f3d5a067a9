"""Annotation files in COCO format: class names, your own data, and corrections on the way in.

A dataset whose file needs corrections has ``annotations://<dataset>`` as ``metadata.json_file``.
Detectron2 opens it through ``PathManager``, for the loader and for the evaluator. The handler below
writes a corrected copy to the cache, once, and opens that. Nothing is read before it is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathHandler, PathManager

from ...files import cache_dir, expand_data_root, write_atomically

logger = logging.getLogger(__name__)

_PREFIX = "annotations://"

# Increase it whenever a correction changes, so that copies made before are not used any more.
_VERSION = 1

#: Changes a parsed annotation file in place, and says whether it did.
Correction = Callable[[dict[str, Any]], bool]


def number_annotations(content: dict[str, Any]) -> bool:
    """Gives the annotations the ids 1, 2, ... if an id is 0, missing or used twice.

    The COCO evaluation stores the id of the matched annotation and reads 0 as "unmatched", so a
    true positive on annotation 0 counts as a false one (cocoapi issue 507).
    """
    annotations = content.get("annotations", [])
    ids = {annotation.get("id", 0) for annotation in annotations}
    if len(ids) == len(annotations) and 0 not in ids:
        return False
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return bool(annotations)


def complete_annotations(content: dict[str, Any]) -> bool:
    """Adds ``area`` (of the box) and ``iscrowd`` (0) if missing; the evaluation needs both."""
    changed = False
    for annotation in content.get("annotations", []):
        changed |= not {"area", "iscrowd"} <= annotation.keys()
        if "area" not in annotation:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation.setdefault("iscrowd", 0)
    return changed


def register_corrected_coco(
    name: str, json_file: str, image_root: str, split: str, corrections: Sequence[Correction] = ()
) -> None:
    """Registers a COCO-format dataset with corrected annotations; reads nothing yet.

    Args:
        name: the dataset.
        json_file: annotations in COCO format.
        image_root: the folder that ``file_name`` in the JSON file is relative to.
        split: which part of the data it is, for the results table.
        corrections: made before those of ids and missing fields, which every dataset gets.
    """
    path = _PREFIX + name
    DatasetCatalog.register(name, lambda: load_coco_json(path, image_root, name))
    MetadataCatalog.get(name).set(
        json_file=path,
        source_file=os.fspath(json_file),
        corrections=(*corrections, number_annotations, complete_annotations),
        image_root=image_root,
        evaluator_type="coco",
        split=split,
    )


def source_file(json_file: str) -> str:
    """The file as it was downloaded; ``json_file`` itself unless it is ``annotations://...``."""
    return json_file if not json_file.startswith(_PREFIX) else _metadata(json_file).source_file


def _metadata(path: str) -> Any:
    dataset = path.removeprefix(_PREFIX)
    metadata = MetadataCatalog.get(dataset) if dataset in MetadataCatalog else None
    if metadata is None or metadata.get("corrections") is None:
        raise FileNotFoundError(f"{path}: no dataset '{dataset}' has corrected annotations.")
    return metadata


def _corrected_copy(path: str) -> str:
    metadata = _metadata(path)
    dataset, json_file = metadata.name, metadata.source_file
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(
            f"The annotations of dataset '{dataset}' are missing: {json_file}. datasets/README.md "
            "says what to download; set DETECTRON2_DATASETS to the folder of all datasets."
        )
    local_file = os.path.realpath(PathManager.get_local_path(json_file))
    state = os.stat(local_file)
    key = f"{_VERSION} {dataset} {local_file} {state.st_size} {state.st_mtime_ns}"
    name = re.sub(r"[^\w.-]", "_", dataset)
    digest = hashlib.sha1(key.encode()).hexdigest()[:12]
    copy = cache_dir() / "annotations" / f"{name}-{digest}.json"
    if copy.exists():
        return str(copy)

    with open(local_file, encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, dict) or not {"images", "categories"} <= content.keys():
        raise ValueError(
            f"{json_file} (dataset '{dataset}') is not in COCO format: it needs 'images', "
            "'categories' and 'annotations', but has "
            f"{sorted(content) if isinstance(content, dict) else 'a list'}."
        )
    changed = [correction(content) for correction in metadata.corrections]
    if any(changed):
        with write_atomically(copy, "w") as file:
            json.dump(content, file)
        logger.info(f"Corrected the annotations of '{dataset}': {copy}")
    else:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            copy.symlink_to(local_file)
    return str(copy)


class _CorrectedAnnotations(PathHandler):
    """``annotations://<dataset>`` for :data:`PathManager`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        return _corrected_copy(path)

    def _open(
        self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any
    ) -> IO[str] | IO[bytes]:
        if set(mode) & set("wax+"):
            raise ValueError(
                f"{path} is made from {source_file(path)}; write to that file instead."
            )
        return open(_corrected_copy(path), mode, buffering, **kwargs)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        self._check_kwargs(kwargs)
        return PathManager.isfile(source_file(path))

    _exists = _isfile


PathManager.register_handler(_CorrectedAnnotations())


def register_coco_format(entries: Sequence[Sequence[str]]) -> None:
    """Registers the datasets that ``cfg.DATASETS.COCO_FORMAT`` lists; known ones are skipped.

    Args:
        entries: ``[name, COCO-format JSON file, image folder]`` of each dataset;
            ``$DETECTRON2_DATASETS`` in a path stands for the folder of all datasets.

    Raises:
        ValueError: an entry has another form, or its name belongs to another dataset.
        FileNotFoundError: a JSON file or an image folder does not exist.
    """
    for index, entry in enumerate(entries):
        key = f"DATASETS.COCO_FORMAT[{index}]"
        parts = () if isinstance(entry, str) else tuple(entry)
        if len(parts) != 3 or not all(isinstance(part, (str, os.PathLike)) for part in parts):
            raise ValueError(
                f"{key} is {entry!r}; it must be [name, COCO-format json, image folder]."
            )
        name, json_file, image_root = (expand_data_root(os.fspath(part)) for part in parts)
        if not PathManager.isfile(json_file):
            raise FileNotFoundError(f"{key} ('{name}'): there is no annotation file '{json_file}'.")
        if not PathManager.isdir(image_root):
            raise FileNotFoundError(f"{key} ('{name}'): there is no image folder '{image_root}'.")
        if name not in DatasetCatalog:
            register_corrected_coco(name, json_file, image_root, split=Path(json_file).stem)
            continue
        metadata = MetadataCatalog.get(name)
        known_json = source_file(os.fspath(metadata.get("json_file", "")))
        known_root = os.fspath(metadata.get("image_root", ""))
        if (known_json, known_root) != (json_file, image_root):
            raise ValueError(
                f"{key}: the name '{name}' belongs to another dataset (json '{known_json}', images "
                f"'{known_root}'). Choose another name."
            )


def coco_dataset(
    photos: Iterable[tuple[str, tuple[int, int], Iterable[tuple[Sequence[float], str]]]],
) -> dict[str, Any]:
    """Makes a dataset in COCO format of named boxes; its categories are the names as they come.

    Args:
        photos: of each photo the file name, (width, height), and its regions: a box (XYXY, pixels
            of the photo) and a name.

    Returns:
        The content of the JSON file, with ids from 1.
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


def class_names(dataset_name: str) -> list[str]:
    """Reads the class names of a dataset, in the order of its contiguous class ids.

    Detectron2 fills ``thing_classes`` of a COCO-format dataset only when it loads the annotations.
    This reads the categories only, and stores the names in the metadata.

    Args:
        dataset_name: a dataset, or a metadata entry with ``thing_classes`` (a vocabulary).

    Raises:
        KeyError: no dataset of this name is registered.
        ValueError: the dataset has no class names.
        FileNotFoundError: its annotation file does not exist.
    """
    if dataset_name not in MetadataCatalog and dataset_name not in DatasetCatalog:
        raise KeyError(
            f"Dataset '{dataset_name}' is not registered. Register your own data with "
            "DATASETS.COCO_FORMAT, e.g. [['my_val', 'my/val.json', 'my/images']]."
        )
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("thing_classes") is None:
        if metadata.get("json_file") is not None:
            categories = read_categories(metadata.json_file)
            # In the order of load_coco_json: the two must agree on the contiguous ids.
            categories = sorted(categories, key=lambda category: category["id"])
            metadata.thing_classes = [category["name"] for category in categories]
        elif dataset_name in DatasetCatalog:
            DatasetCatalog.get(dataset_name)
    names = metadata.get("thing_classes")
    if not names:
        raise ValueError(
            f"Dataset '{dataset_name}' has no class names: its metadata has neither "
            "'thing_classes' nor a 'json_file'."
        )
    return list(names)


def read_categories(json_file: str) -> list[dict[str, Any]]:
    """Reads ``categories`` of a COCO-format file of any size without parsing its annotations.

    Returns:
        The categories, each with at least ``id`` and ``name``, in the file's order.

    Raises:
        ValueError: the file has none.
    """
    with (
        open(PathManager.get_local_path(json_file), "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        for match in re.finditer(rb'"categories"\s*:\s*(?=\[)', content):
            found = _decode_list(content, match.end())
            # Annotations may have a key of this name too, with other content.
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
