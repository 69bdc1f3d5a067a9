"""The reader of annotation files, COCO's and LVIS's: a fault is one line, with file and entry.

What passes here is safe for pycocotools, which ends the process on some faulty masks, and means
the same to every library.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from math import isfinite
from typing import Any

from ...safe_loading import read_json

logger = logging.getLogger(__name__)

_PARTS = ("images", "annotations", "categories")
_MAX_SIDE = 1_000_000
_MAX_ID = 1 << 128  # as large as a UUID
_MAX_OUTLINE = 4_000_000  # pixels along the polygons of one annotation; about 160 MB


class AnnotationsError(ValueError):
    """An annotation file has a fault; the message names file, entry and what was expected."""


def read_annotations(json_file: str, *, lvis: bool = False) -> dict[str, Any]:
    """Reads and checks an annotation file.

    Raises:
        AnnotationsError: it is not json, or has a fault.
        FileNotFoundError: there is no such file.
    """
    try:
        content = read_json(json_file, unique_keys=False)  # other tools write keys twice
    except ValueError as error:
        raise AnnotationsError(str(error)) from None
    check_annotations(content, json_file, lvis=lvis)
    return content


# A rule after the other reads better than many functions of one rule.
def check_annotations(content: Any, where: str, *, lvis: bool = False) -> None:  # noqa: C901
    """Raises an :class:`AnnotationsError` for the first fault of a COCO or LVIS annotation file.

    Keys that nobody reads may hold anything. LVIS may lack categories and the names of images.
    """
    if not isinstance(content, dict) or not {"images", "categories"} <= content.keys():
        found = _shown(sorted(content) if isinstance(content, dict) else content)
        raise AnnotationsError(
            f"{where} is not in COCO format: expected a dict with 'images', 'categories' and "
            f"'annotations', found {found}."
        )
    part, index, entry = "", 0, None
    try:
        for part in _PARTS:
            if not isinstance(content.get(part, []), list):
                raise _Fault(f"must be a list, but is {_shown(content[part])}")
        part, categories = "categories", content["categories"]
        for index, entry in enumerate(categories):  # noqa: B007 (the message reads it)
            _text(_dict(entry), "name")
        category_ids = _ids(categories)
        names = Counter(category["name"] for category in categories)
        if twice := [name for name, count in names.items() if count > 1]:
            logger.warning(
                f"{where}: several categories are named {_shown(twice[0])}; a model gives them the "
                "same scores."
            )
        part, images = "images", content["images"]
        for index, entry in enumerate(images):  # noqa: B007 (the message reads it)
            _check_image(_dict(entry), lvis)
        by_id = dict(zip(_ids(images), images))
        part, strays, classes = "annotations", [], category_ids if categories or not lvis else None
        for index, entry in enumerate(content.get("annotations", [])):
            _check_annotation(_dict(entry), by_id, classes)
            if entry["image_id"] not in by_id:
                strays.append(index)
        if strays and len(strays) == len(content["annotations"]):
            raise _Fault("and all others belong to images that are not in 'images'", 0)
        if strays:
            logger.warning(
                f"{where}: {len(strays)} annotations belong to images that are not in 'images' and "
                f"are left out; the first is annotations[{strays[0]}]."
            )
    except _Fault as fault:
        if fault.index is not None:
            index, entry = fault.index, content[part][fault.index]
        number = entry.get("id") if isinstance(entry, dict) else None
        named = f" (id {_shown(number)})" if number is not None else ""
        place = f"{part}[{index}]{named}" if entry is not None else f"'{part}'"
        raise AnnotationsError(f"{where}: {place} {fault}.") from None


class _Fault(Exception):
    """What is wrong with the entry that is checked, or with the one at ``index``."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


def _shown(value: Any) -> str:
    """A value of any size in a few characters, with control characters escaped."""
    if isinstance(value, int) and abs(value) >= _MAX_ID:
        return "an integer of more than 38 digits"
    if isinstance(value, (dict, list)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} entries"
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # integers too long to print, deep nesting
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dict(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise _Fault(f"must be a dict, but is {_shown(entry)}")
    return entry


def _text(entry: Mapping[str, Any], key: str) -> None:
    value = entry.get(key)
    if not isinstance(value, str):
        found = f"is {_shown(value)}" if key in entry else "is missing"
        raise _Fault(f"'{key}' {found}; it must be text")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _Fault(f"'{key}' is {_shown(value)}, which has half a character")


def _is_number(value: Any) -> bool:
    # NaN fails the comparison; so do integers that no float holds.
    return type(value) in (int, float) and -1e9 <= value <= 1e9


def _spread(values: list[Any], far: float = 1e9) -> float | None:
    """How far apart the numbers of a list are; None unless all are numbers from -far to far.

    NumPy would not be faster: making an array of a list takes as long as all of this.
    """
    if not values:
        return 0
    if not set(map(type, values)) <= {int, float}:
        return None
    low, high = min(values), max(values)
    # They may pass over a NaN; a sum does not.
    return high - low if -far <= low and high <= far and isfinite(sum(values)) else None


def _is_id(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer() and abs(value) < 1 << 53
    return isinstance(value, str) or (type(value) is int and abs(value) < _MAX_ID)


def _ids(entries: list[dict[str, Any]]) -> dict[Any, int]:
    """The place of each id. They are all numbers or all text, because they are sorted."""
    places: dict[Any, int] = {}
    for index, entry in enumerate(entries):
        if not _is_id(number := entry.get("id")):
            found = f"is {_shown(number)}" if "id" in entry else "is missing"
            raise _Fault(f"'id' {found}; it must be an integer or text", index)
        if isinstance(number, str):
            _text(entry, "id")
        if (first := places.setdefault(number, index)) != index:
            raise _Fault(f"has the id of entry {first}; ids must differ", index)
        if isinstance(number, str) != isinstance(entries[0]["id"], str):
            raise _Fault("'id' is text where others are numbers, or the reverse; use one", index)
    return places


def _check_image(image: dict[str, Any], lvis: bool) -> None:
    for key in ("width", "height"):
        value: Any = image.get(key)
        if not _is_number(value) or value != int(value) or not 0 < value <= _MAX_SIDE:
            found = f"is {_shown(value)}" if key in image else "is missing"
            raise _Fault(f"'{key}' {found}; it must be a positive integer")
    if not lvis or "file_name" in image:  # LVIS names images by their coco_url
        _text(image, "file_name")
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        listed = image.get(key, [])
        if lvis and (not isinstance(listed, list) or not all(map(_is_id, listed))):
            raise _Fault(f"'{key}' is {_shown(listed)}; it must be a list of category ids")


def _check_annotation(  # noqa: C901
    annotation: dict[str, Any], images: Mapping[Any, Any], categories: Mapping[Any, Any] | None
) -> None:
    for key, part, known in (("image_id", 0, images), ("category_id", 2, categories)):
        number = annotation.get(key)
        if type(number) in (int, str) and known is not None and number in known:
            continue
        others = {} if known is None else known
        alike = all(isinstance(one, str) == isinstance(number, str) for one in islice(others, 1))
        # Annotations of images that the file does not have (any more) do no harm.
        if not (_is_id(number) and alike and (part == 0 or known is None or number in known)):
            found = f"is {_shown(number)}" if key in annotation else "is missing"
            raise _Fault(f"'{key}' {found}; it must be an id in '{_PARTS[part]}'")
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or _spread(box) is None:
        found = f"is {_shown(box)}" if "bbox" in annotation else "is missing"
        raise _Fault(f"'bbox' {found}; it must be four numbers, [x, y, width, height]")
    if box[2] < 0 or box[3] < 0:
        raise _Fault(f"'bbox' is {_shown(box)}; its width and height must not be negative")
    area = annotation.get("area")
    if area is not None and not (type(area) in (int, float) and 0 <= area <= _MAX_SIDE**2):
        raise _Fault(f"'area' is {_shown(area)}; it must be a number, at least 0")
    for key in ("iscrowd", "ignore"):
        flag = annotation.get(key)
        if flag is not None and not (isinstance(flag, (int, float)) and flag in (0, 1)):
            raise _Fault(f"'{key}' is {_shown(flag)}; it must be 0 or 1")
    points = annotation.get("keypoints") or []
    if not isinstance(points, list) or _spread(points) is None:
        raise _Fault(f"'keypoints' is {_shown(points)}; it must be a list of numbers")
    if (mask := annotation.get("segmentation")) is not None:
        image = images.get(annotation["image_id"]) or {"height": _MAX_SIDE, "width": _MAX_SIDE}
        if problem := _mask_problem(mask, int(image["height"]), int(image["width"])):
            raise _Fault(f"'segmentation' {problem}")


def _mask_problem(mask: Any, height: int, width: int) -> str:
    if isinstance(mask, dict):
        return _rle_problem(mask, height, width)
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        return f"is {_shown(mask)}; it must be a list of polygons, each [x, y, x, y, ...], or RLE"
    far, bound = max(20 * max(height, width), 100_000), 0.0
    for polygon in mask:
        if len(polygon) % 2:
            return f"has a polygon of {len(polygon)} numbers; it must be pairs of x and y"
        if (spread := _spread(polygon, far)) is None:
            wrong = next(v for v in polygon if not (_is_number(v) and -far <= v <= far))
            return f"has {_shown(wrong)} in a polygon; the image is {width} x {height}"
        # No side is longer than all coordinates are apart. That mixes x and y, but is fast.
        bound += len(polygon) / 2 * spread
    # pycocotools takes memory for each pixel along an outline, also outside the image.
    if bound > _MAX_OUTLINE and (outline := sum(map(_outline, mask))) > _MAX_OUTLINE:
        return f"has polygons of {outline:.3g} pixels around; at most {_MAX_OUTLINE:.3g} are read"
    return ""


def _outline(polygon: list[float]) -> float:
    """Pixels along a polygon."""
    points = list(zip(polygon[::2], polygon[1::2]))
    pairs = zip(points, points[1:] + points[:1])
    return sum(max(abs(x1 - x0), abs(y1 - y0)) for (x0, y0), (x1, y1) in pairs)


def _rle_problem(mask: dict[str, Any], height: int, width: int) -> str:
    size, counts = mask.get("size"), mask.get("counts")
    if size != [height, width]:
        return f"is RLE of size {_shown(size)}; the image has height and width {[height, width]}"
    runs = _decoded(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(n) is int and n >= 0 for n in runs):
        return "is RLE with 'counts' that cannot be read"
    if sum(runs) != height * width:
        return "is RLE whose 'counts' do not add up to the pixels of the image"
    return ""


def _decoded(counts: str) -> list[int] | None:
    """The runs in a compressed RLE: digits of 5 bits, then differences to the run before last."""
    runs: list[int] = []
    value = shift = 0
    for digit in (ord(letter) - 48 for letter in counts):
        if not 0 <= digit < 64 or shift > 60:
            return None
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:  # the last digit; bit 16 is the sign
            value -= (1 << shift) * bool(digit & 16)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if not shift else None


def number_ids(content: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, int], dict[Any, int]]:
    """Checked annotations with ids that every library takes, 1, 2, ... in the order of the old.

    Returns:
        New content, with only the keys that evaluation reads; and the new id of each image and of
        each category.
    """
    images, categories = (
        {old: new for new, old in enumerate(sorted(entry["id"] for entry in content[part]), 1)}
        for part in ("images", "categories")
    )
    image_keys, keys = ("width", "height"), ("bbox", "area", "iscrowd", "ignore", "segmentation")
    listed = ("neg_category_ids", "not_exhaustive_category_ids")
    found: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for image in content["images"]:
        entry = {"id": images[image["id"]], "file_name": ""}
        entry.update((key, int(image[key])) for key in image_keys)
        for key in listed:
            if isinstance(image.get(key), list):
                entry[key] = [categories[old] for old in image[key] if old in categories]
        found["images"].append(entry)
    of_images = [a for a in content.get("annotations", []) if a["image_id"] in images]
    for number, annotation in enumerate(of_images, start=1):
        entry = {key: annotation[key] for key in keys if annotation.get(key) is not None}
        entry.update(id=number, image_id=images[annotation["image_id"]])
        entry["category_id"] = categories[annotation["category_id"]]
        found["annotations"].append(entry)
    for category in content["categories"]:
        found["categories"].append({"id": categories[category["id"]], "name": category["name"]})
        if isinstance(category.get("frequency"), str):
            found["categories"][-1]["frequency"] = category["frequency"]
    return found, images, categories
