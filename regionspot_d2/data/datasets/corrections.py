"""Checked annotation files and their corrections, in a copy in the cache; the file itself stays."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ...files import cache_dir, data_root, private_folder, sha256_of_file, write_atomically
from ...safe_loading import json_encoding
from .validation import read_annotations

logger = logging.getLogger(__name__)

# Increase it whenever a correction changes, so that older copies are no longer used.
_VERSION = 3
# Hexadecimal digits that stand for a photo, and the most photos for which it is worth the space.
KEY_LENGTH, _MOST_PHOTOS = 12, 200_000
# Changes a parsed annotation file in place and returns whether it did.
Correction = Callable[[dict[str, Any]], bool]


def repair_annotations(content: dict[str, Any], *, lvis: bool = False) -> bool:
    """Makes checked annotations fit for evaluation: valid ids, and ``area`` and ``iscrowd``.

    The ids become 1, 2, ... if one is 0, missing, used twice, or no positive integer of 53 bits.
    The evaluation stores the id of the matched annotation and reads 0 as "unmatched", so a match
    with annotation 0 counts as a false positive (cocoapi issue 507). Polygons of less than three
    points go, which libraries read as something else. LVIS has no ``iscrowd``.
    """
    changed = False
    for entry in (*content["images"], *content["categories"]):
        for key in ("id", "width", "height"):
            if isinstance(entry.get(key), float):
                entry[key], changed = int(entry[key]), True
    annotations = content.setdefault("annotations", [])
    numbers = [annotation.get("id", 0) for annotation in annotations]
    renumber = not all(type(number) is int and 0 < number < 1 << 53 for number in numbers) or len(
        set(numbers)
    ) < len(numbers)
    changed |= renumber
    for number, annotation in enumerate(annotations, start=1):
        if renumber:
            annotation["id"] = number
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
            changed = True
        if not lvis and type(annotation.get("iscrowd")) is not int:
            annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
            changed = True
        polygons = annotation.get("segmentation")
        if isinstance(polygons, list) and any(len(polygon) < 6 for polygon in polygons):
            annotation["segmentation"] = [p for p in polygons if len(p) >= 6]
            changed = True
    return changed


class CheckedFile(NamedTuple):
    """An annotation file without faults, and what evaluation needs to know of it.

    Attributes:
        file: the file as the user knows it.
        path: what to read: the same file, or a corrected copy.
        annotations: how many there are, crowds included.
        masks: how many of them have a mask.
        flagged: how many have ``iscrowd`` or ``ignore``, and the id of the first.
        maskless: the id of the first annotation without a mask.
        unfederated: the id of the first image without the lists of LVIS's federated evaluation.
        photos: what :func:`photos_of` says of the images.
    """

    file: str
    path: str
    annotations: int
    masks: int
    flagged: list[Any]
    maskless: Any
    unfederated: Any
    photos: str


def photos_of(images: Sequence[Mapping[str, Any]]) -> str:
    """Keys of photos, one after the other: enough to tell whether two datasets share some.

    A key stands for the name of the file, without folders, and the size. "" if there are too many.
    """
    if len(images) > _MOST_PHOTOS:
        return ""
    keys = set()
    for image in images:
        name = str(image.get("file_name") or image.get("coco_url")).rpartition("/")[2]
        text = f"{name} {image.get('width')} {image.get('height')}"
        keys.add(hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:KEY_LENGTH])
    return "".join(sorted(keys))


def how_to_get(dataset: str) -> str:
    """What to do for a dataset whose files are not there."""
    if made_by := MetadataCatalog.get(dataset).get("made_by"):
        how = f"python {made_by} makes them"
    else:
        how = "datasets/README.md says what to download"
    return f"{how}. The folder of all datasets, DETECTRON2_DATASETS, is '{data_root()}'."


def checked_file(
    dataset: str,
    json_file: str,
    corrections: Sequence[Correction],
    *,
    lvis: bool,
    keep: bool = True,
) -> CheckedFile:
    """Checks the annotation file of a dataset, once for each content, and corrects a copy.

    The copy is in the cache, or without ``keep`` beside the file.

    Raises:
        AnnotationsError: the file has a fault.
        FileNotFoundError: there is no such file.
    """
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(
            f"The annotations of dataset '{dataset}' are missing: {json_file}. "
            f"{how_to_get(dataset)}"
        )
    local_file = os.path.realpath(PathManager.get_local_path(json_file))
    state = os.stat(local_file)
    # Size and time tell a changed file without reading gigabytes for a hash of the content.
    key = f"{_VERSION} {dataset} {lvis} {local_file} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.sha1(key.encode(errors="surrogateescape")).hexdigest()[:12]
    name = re.sub(r"[^\w.-]", "_", dataset)
    folder = private_folder(cache_dir() / "annotations") if keep else Path(local_file).parent
    copy = folder / f"{name}-{digest}.json"
    note = copy.with_suffix(".checked")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(note.read_text(encoding="utf-8"))
        sha256 = known.pop("sha256")
        if sha256 is None or sha256 == _sha256(copy, os.stat(copy).st_mtime_ns):
            return CheckedFile(**known, file=json_file, path=str(copy) if sha256 else local_file)
    content = read_annotations(json_file, lvis=lvis)
    facts, changed = correct(content, corrections, lvis=lvis)
    # hotcoco reads no other encoding.
    corrected = changed or json_encoding(json_file) != "utf-8"
    if corrected:
        with write_atomically(copy, "w") as file:
            file.write(json.dumps(content))  # json.dump would take ten times as long
        logger.info(f"Corrected the annotations of '{dataset}': {copy}")
    with write_atomically(note, "w") as file:
        json.dump({**facts, "sha256": sha256_of_file(copy) if corrected else None}, file)
    return CheckedFile(**facts, file=json_file, path=str(copy) if corrected else local_file)


@functools.cache
def _sha256(copy: Path, modified: int) -> str:
    return sha256_of_file(copy)


def correct(
    content: dict[str, Any], corrections: Sequence[Correction] = (), *, lvis: bool = False
) -> tuple[dict[str, Any], bool]:
    """Corrects checked annotations in place.

    Returns:
        The fields of :class:`CheckedFile` but the path, and whether anything was changed.
    """
    # A list, so that every correction is made.
    changed = any(
        [
            *(correction(content) for correction in corrections),
            repair_annotations(content, lvis=lvis),
        ]
    )
    annotations = content["annotations"]
    maskless = [a["id"] for a in annotations if not a.get("segmentation")]
    flagged = [a["id"] for a in annotations if a.get("iscrowd") or a.get("ignore")]
    federated = {"neg_category_ids", "not_exhaustive_category_ids"}
    unfederated = (image["id"] for image in content["images"] if not federated <= image.keys())
    return {
        "annotations": len(annotations),
        "masks": len(annotations) - len(maskless),
        "flagged": [len(flagged), *flagged[:1]],
        "maskless": maskless[0] if maskless else None,
        "unfederated": next(unfederated, None),
        "photos": photos_of(content["images"]),
    }, changed
