"""COCO-format annotation files, repaired on the way in for the loader and the evaluator alike.

``metadata.json_file`` of a dataset that needs it is ``annotations://<dataset name>``. Everything in Detectron2 opens
that path through ``PathManager``, which finds the handler below: it corrects a copy of the file in the cache, once,
and hands that out. Nothing is read before somebody asks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from detectron2.utils.file_io import PathHandler, PathManager

logger = logging.getLogger(__name__)

PREFIX = "annotations://"

# Counts up whenever a correction changes what it does: copies made before are then left alone.
_VERSION = 1

Correction = Callable[[dict[str, Any]], bool]


class _Source(NamedTuple):
    json_file: str
    corrections: tuple[Correction, ...]


_SOURCES: dict[str, _Source] = {}


def number_annotations(content: dict[str, Any]) -> bool:
    """Gives the annotations the ids 1, 2, ... where an id is 0, missing or used twice.

    The COCO evaluation stores the id of the matched annotation and reads 0 as "unmatched", so a true positive on
    annotation 0 counts as a false one (cocoapi issue 507).
    """
    annotations = content.get("annotations", [])
    ids = {annotation.get("id", 0) for annotation in annotations}
    if len(ids) == len(annotations) and 0 not in ids:
        return False
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return bool(annotations)


def complete_annotations(content: dict[str, Any]) -> bool:
    """Adds ``area`` (of the box) and ``iscrowd`` (0) where they are missing; the evaluation needs both."""
    changed = False
    for annotation in content.get("annotations", []):
        if "area" not in annotation:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
            changed = True
        if "iscrowd" not in annotation:
            annotation["iscrowd"] = 0
            changed = True
    return changed


def corrected(dataset_name: str, json_file: str, *corrections: Correction) -> str:
    """Names the corrected copy of an annotation file. Opens nothing.

    Args:
        dataset_name: the dataset the file belongs to.
        json_file: the file as it was downloaded.
        corrections: applied in turn to the parsed file, in place; each says whether it changed anything.

    Returns:
        A path for ``metadata.json_file`` and ``load_coco_json``, to be opened with ``PathManager``.
    """
    _SOURCES[dataset_name] = _Source(os.fspath(json_file), corrections)
    return PREFIX + dataset_name


def source_file(json_file: str) -> str:
    """The file as it was downloaded: what :func:`corrected` was given, and any other path unchanged."""
    if not json_file.startswith(PREFIX):
        return json_file
    return _source(json_file).json_file


def _source(path: str) -> _Source:
    dataset_name = path[len(PREFIX) :]
    if dataset_name not in _SOURCES:
        raise FileNotFoundError(f"{path}: no dataset '{dataset_name}' has corrected annotations.")
    return _SOURCES[dataset_name]


def _corrected_copy(path: str) -> str:
    dataset_name = path[len(PREFIX) :]
    json_file, corrections = _source(path)
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(
            f"The annotations of dataset '{dataset_name}' are not there: {json_file}. datasets/README.md says "
            "what to download; the environment variable DETECTRON2_DATASETS names the folder of all datasets."
        )
    local_file = os.path.realpath(PathManager.get_local_path(json_file))
    state = os.stat(local_file)
    key = f"{_VERSION} {dataset_name} {local_file} {state.st_size} {state.st_mtime_ns}"
    name = re.sub(r"[^\w.-]", "_", dataset_name)
    # The folder that regionspot_d2.modeling.weights.cache_dir names; data/ does not import modeling/.
    cache = Path(os.environ.get("REGIONSPOT_CACHE") or "~/.cache/regionspot_d2").expanduser()
    copy = cache / "annotations" / f"{name}-{hashlib.sha1(key.encode()).hexdigest()[:12]}.json"
    if copy.exists():
        return str(copy)

    with open(local_file) as file:
        content = json.load(file)
    if not isinstance(content, dict) or not {"images", "categories"} <= content.keys():
        raise ValueError(
            f"{json_file} (dataset '{dataset_name}') is not in COCO format: it needs 'images', 'categories' and "
            f"'annotations', and has {sorted(content) if isinstance(content, dict) else 'a list'}."
        )
    changed = [correction(content) for correction in corrections]
    copy.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may do this at once; each moves its own file into place.
    partial = copy.with_suffix(f".{os.getpid()}")
    if any(changed):
        with open(partial, "w") as file:
            json.dump(content, file)
        logger.info(f"Corrected the annotations of '{dataset_name}': {copy}")
    else:
        partial.symlink_to(local_file)
    os.replace(partial, copy)
    return str(copy)


class _CorrectedAnnotations(PathHandler):
    """``annotations://<dataset name>`` for :data:`PathManager`."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

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
        return PathManager.isfile(_source(path).json_file)

    _exists = _isfile


PathManager.register_handler(_CorrectedAnnotations())
