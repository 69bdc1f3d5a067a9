"""Annotation files in COCO format: class names, your own data, and corrections of faulty files.

A dataset whose file needs corrections has ``annotations://<dataset>`` as ``metadata.json_file``,
which its loader and evaluator open through ``PathManager``. The handler below then writes a
corrected copy to the cache, once, and opens that. Nothing is read before it is needed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathHandler, PathManager

from ...files import expand_data_root
from .corrections import CheckedFile, Correction, checked_file
from .validation import check_annotations

_PREFIX = "annotations://"


def register_corrected_coco(
    name: str, json_file: str, image_root: str, split: str, corrections: Sequence[Correction] = ()
) -> None:
    """Registers a COCO-format dataset with corrected annotations; reads nothing yet.

    ``corrections`` come before :func:`repair_annotations`; the results table shows ``split``.
    """
    path = _PREFIX + name

    def load() -> list[dict[str, Any]]:
        _forget_names(MetadataCatalog.get(name))
        return load_coco_json(path, image_root, name)

    DatasetCatalog.register(name, load)
    metadata = MetadataCatalog.get(name).set(evaluator_type="coco", split=split)
    metadata.set(json_file=path, source_file=os.fspath(json_file), image_root=image_root)
    metadata.set(corrections=tuple(corrections))


def source_file(json_file: str) -> str:
    """The file as downloaded; ``json_file`` itself unless it begins with ``annotations://``."""
    return _metadata(json_file).source_file if json_file.startswith(_PREFIX) else json_file


def _metadata(path: str) -> Metadata:
    name = path.removeprefix(_PREFIX)
    if name not in MetadataCatalog or MetadataCatalog.get(name).get("corrections") is None:
        raise FileNotFoundError(f"{path}: no dataset '{name}' has corrected annotations.")
    return MetadataCatalog.get(name)


def _forget_names(metadata: Metadata) -> None:
    # The file may have been edited since they were read, and Metadata refuses other values.
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        vars(metadata).pop(key, None)


def checked_annotations(
    dataset: str, *, lvis: bool | None = None, keep: bool = True
) -> CheckedFile:
    """Checks and corrects the annotation file of a dataset, once for each content.

    Args:
        lvis: whether it is in LVIS format; by default the dataset's metadata say so.
        keep: False for a file that will soon be gone; it leaves nothing in the cache.

    Raises:
        AnnotationsError: the file has a fault.
        FileNotFoundError: there is no such file.
    """
    metadata = MetadataCatalog.get(dataset)
    json_file = source_file(os.fspath(metadata.json_file))
    if lvis is None:
        lvis = metadata.get("evaluator_type") == "lvis"
    return checked_file(dataset, json_file, metadata.get("corrections", ()), lvis=lvis, keep=keep)


class _CorrectedAnnotations(PathHandler):
    """Opens ``annotations://<dataset>`` for :data:`PathManager`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return checked_annotations(_metadata(path).name).path

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if set(mode) & set("wax+"):
            raise ValueError(
                f"{path} is a copy of {source_file(path)}; write to that file instead."
            )
        return open(self._get_local_path(path), mode, buffering, **kwargs)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return PathManager.isfile(source_file(path))

    _exists = _isfile


PathManager.register_handler(_CorrectedAnnotations())


def register_coco_format(entries: Sequence[Sequence[str]]) -> None:
    """Registers the datasets of ``cfg.DATASETS.COCO_FORMAT``; skips those already registered.

    An entry is ``[name, COCO-format JSON file, image folder]``; ``$DETECTRON2_DATASETS`` in a path
    stands for the folder of all datasets. An entry for a name of ours, such as "tinycoco", says
    where the dataset is if its usual place has none.

    Raises:
        ValueError: an entry is malformed, or its name belongs to another dataset that is there.
        FileNotFoundError: a JSON file or an image folder does not exist.
    """
    for index, entry in enumerate(entries):
        key = f"DATASETS.COCO_FORMAT[{index}]"
        parts = () if isinstance(entry, str) else tuple(entry)
        if len(parts) != 3 or not all(isinstance(part, (str, os.PathLike)) for part in parts):
            form = "[name, COCO-format json, image folder]"
            raise ValueError(f"{key} is {entry!r}; it must be {form}.")
        name, *paths = (os.fspath(part) for part in parts)
        json_file, image_root = (
            path if "://" in path else os.path.normpath(os.path.expanduser(path))
            for path in map(expand_data_root, paths)
        )
        if not PathManager.isfile(json_file):
            raise FileNotFoundError(f"{key} ('{name}'): there is no annotation file '{json_file}'.")
        if not PathManager.isdir(image_root):
            raise FileNotFoundError(f"{key} ('{name}'): there is no image folder '{image_root}'.")
        if name in DatasetCatalog and _may_lie_elsewhere(name):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        if name not in DatasetCatalog:
            register_corrected_coco(name, json_file, image_root, split=Path(json_file).stem)
            continue
        metadata = MetadataCatalog.get(name)
        known_json = os.path.normpath(source_file(os.fspath(metadata.get("json_file", ""))))
        known_root = os.path.normpath(os.fspath(metadata.get("image_root", "")))
        if (known_json, known_root) != (json_file, image_root):
            raise ValueError(
                f"{key}: '{name}' belongs to another dataset (annotations '{known_json}', images "
                f"'{known_root}'). Choose another name."
            )
        _forget_names(metadata)


def _may_lie_elsewhere(name: str) -> bool:
    """Whether a dataset is of the kind that an entry registers, and not where it was said to be."""
    metadata = MetadataCatalog.get(name)
    corrections = metadata.get("corrections")
    return corrections == () and not PathManager.isfile(metadata.source_file)


def coco_dataset(
    photos: Iterable[tuple[str, tuple[int, int], Iterable[tuple[Sequence[float], str]]]],
) -> dict[str, Any]:
    """Makes the content of a COCO-format JSON file from named boxes, with ids from 1.

    Args:
        photos: the file name, (width, height) and regions of each photo; a region is a box (XYXY,
            pixels of the photo) and a name.
    """
    names: dict[str, int] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (file_name, (width, height), regions) in enumerate(photos, start=1):
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for (x0, y0, x1, y1), name in regions:
            category = {"category_id": names.setdefault(name, len(names) + 1), "iscrowd": 0}
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            ids = {"id": len(annotations) + 1, "image_id": number}
            annotations.append({**ids, **category, **box})
    categories = [{"id": number, "name": name} for name, number in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def class_names(dataset_name: str) -> list[str]:
    """The class names of a dataset or vocabulary, in the order of its contiguous class ids.

    Detectron2 fills ``thing_classes`` of a COCO-format dataset only when it loads the annotations.
    This reads only the categories, and stores the names in the metadata.

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
            metadata.thing_classes = [c["name"] for c in read_categories(metadata.json_file)]
        elif dataset_name in DatasetCatalog:
            DatasetCatalog.get(dataset_name)  # its loader may set them
    if not metadata.get("thing_classes"):
        missing = "its metadata has neither 'thing_classes' nor a 'json_file'"
        raise ValueError(f"Dataset '{dataset_name}' has no class names: {missing}.")
    return list(metadata.thing_classes)


def contiguous_ids(dataset_name: str) -> dict[int, int]:
    """The contiguous class ids of a dataset, by the category ids of its annotation file."""
    metadata = MetadataCatalog.get(dataset_name)
    if (ids := metadata.get("thing_dataset_id_to_contiguous_id")) is not None:
        return ids
    return {c["id"]: index for index, c in enumerate(categories_of(dataset_name))}


def categories_of(dataset_name: str) -> list[dict[str, Any]]:
    """:func:`read_categories` of a dataset; those of a function have their contiguous ids."""
    if (json_file := MetadataCatalog.get(dataset_name).get("json_file")) is not None:
        return read_categories(json_file)
    return [{"id": i, "name": name} for i, name in enumerate(class_names(dataset_name))]


def read_categories(json_file: str) -> list[dict[str, Any]]:
    """Reads the categories of a COCO-format file of any size without parsing its annotations.

    Each has at least ``id`` and ``name``. They are in the order of ``load_coco_json``, by id: the
    two must agree on the contiguous ids.

    Raises:
        ValueError: the file has no categories.
    """
    local_file = PathManager.get_local_path(json_file)
    state = os.stat(local_file)
    return list(_categories(json_file, local_file, state.st_size, state.st_mtime_ns))


# An evaluator asks three times, and finding them may take a search through a gigabyte.
@functools.lru_cache(maxsize=32)
def _categories(json_file: str, local_file: str, size: int, _modified: int) -> list[dict[str, Any]]:
    if size:  # nothing cannot be mapped
        with (
            open(local_file, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            for match in re.finditer(rb'"categories"\s*:\s*(?=\[)', content):
                found = _decode_list(content, match.end())
                # Annotations may have a key of this name too, with other content.
                if found and all(isinstance(c, dict) and {"id", "name"} <= c.keys() for c in found):
                    check_annotations({"images": [], "categories": found}, json_file)
                    return sorted(found, key=lambda category: category["id"])
    raise ValueError(f"{json_file} has no 'categories' with 'id' and 'name'; is it in COCO format?")


def _decode_list(content: mmap.mmap, start: int) -> list[Any]:
    """The JSON list that begins at ``start``, from as little text as suffices; else empty."""
    for size in (1 << 16, 1 << 20, 1 << 24, len(content)):
        with contextlib.suppress(ValueError, RecursionError):
            text = content[start : start + size].decode(errors="ignore")
            return json.JSONDecoder().raw_decode(text)[0]
    return []
