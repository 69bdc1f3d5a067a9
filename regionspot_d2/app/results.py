"""Results of a run as COCO json and as a table, and those of other runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as shown  # short, however long or deep a value is
from typing import Any, TypeGuard

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from pycocotools import mask as mask_api
from tabulate import tabulate

from ..modeling.vocabulary import clean_name
from ..safe_loading import read_json
from .drawing import xyxy
from .names import printable

# The results of one image: "file_name", "height", "width", and "annotations" in COCO format that
# have no ids yet.
Entry = dict[str, Any]
# A mask is decoded in full; PIL's limit for images.
_MAX_PIXELS = 2 * 89_478_485


def is_number(value: Any) -> bool:
    """Whether a value read from json is a number of a size that can be computed with.

    Python also reads NaN, Infinity, and integers of 400 digits.
    """
    return type(value) in (int, float) and abs(value) < 1e30  # NaN is not less than anything


def is_entry(value: Any, names: Mapping[int, str]) -> TypeGuard[Entry]:
    """Whether a value from a journal, which others may have edited, is what we note there."""
    if not isinstance(value, dict) or not isinstance(value.get("annotations"), list):
        return False
    if not isinstance(value.get("file_name"), str):
        return False
    annotations, images = value["annotations"], {0: value["file_name"]}
    return (
        all(type(value.get(key)) is int for key in ("height", "width"))
        and not any(_fault(annotation, images, names) for annotation in annotations)
        and all({"score", "region"} <= annotation.keys() for annotation in annotations)
    )


def to_entry(
    file_name: str, found: Instances, clicks: Mapping[int, list[list[float]]] | None = None
) -> Entry:
    """The results of one image; "region" of an annotation is the place of its region, from 0.

    Args:
        file_name: the image's.
        found: as a predictor names regions.
        clicks: the points [x, y, label] of regions that were given by points, by their place.
    """
    height, width = found.image_size
    found = found.to("cpu")
    annotations = instances_to_coco_json(found, 0)
    for annotation, region in zip(annotations, found.region_index.tolist()):
        annotation["region"] = region
        if clicks and region in clicks:
            annotation["points"] = clicks[region]
        annotation["category_id"] += 1
        annotation["iscrowd"] = 0
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if "segmentation" in annotation:
            annotation["area"] = int(mask_api.area(annotation["segmentation"]))
    return {"file_name": file_name, "height": height, "width": width, "annotations": annotations}


def to_coco(entries: Sequence[Entry], names: Sequence[str]) -> dict[str, Any]:
    """A dataset in COCO format whose annotations have scores."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, entry in enumerate(entries, start=1):
        image = {key: entry[key] for key in ("file_name", "height", "width")}
        images.append({"id": image_id, **image})
        for annotation in entry["annotations"]:
            numbers = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**annotation, **numbers})
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    return {"images": images, "categories": categories, "annotations": annotations}


def table(entries: Sequence[Entry], names: Mapping[int, str]) -> str:
    """A row for each name of each region, with its track if there are tracks."""
    rows = []
    tracked = any("track_id" in a for entry in entries for a in entry["annotations"])
    for entry in entries:
        for annotation in entry["annotations"]:
            box = ", ".join(f"{value:.0f}" for value in xyxy(annotation))
            name = printable(clean_name(names[annotation["category_id"]]))
            file_name = printable(Path(entry["file_name"]).name)
            track = [annotation.get("track_id", "")] if tracked else []
            score = f"{annotation['score']:.3f}"
            rows.append([file_name, annotation["region"], *track, box, name, score])
    headers = ["image", "region", *(["track"] if tracked else [])]
    return tabulate(rows, headers=[*headers, "box (x0, y0, x1, y1)", "name", "score"])


class OtherResults:
    """Results of another run, or ground truth, to be drawn beside ours."""

    def __init__(self, file: str) -> None:
        """
        Args:
            file: a json file in COCO format, as the demo writes it; scores may be missing.

        Raises:
            SystemExit: it cannot be read, or is something else.
        """
        try:
            content = read_json(os.path.expanduser(file))
            images = {image["id"]: image["file_name"] for image in content["images"]}
            self.names = {c["id"]: str(c["name"]) for c in content["categories"]}
            self._annotations: dict[str, list[dict[str, Any]]] = {n: [] for n in images.values()}
            self._by_name = {Path(name).name: name for name in self._annotations}
            for i, annotation in enumerate(content["annotations"]):
                if fault := _fault(annotation, images, self.names):
                    raise ValueError(f"annotation {i} (counted from 0) {fault}")
                self._annotations[images[annotation["image_id"]]].append(_with_rle(annotation))
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: --compare {file}: {error}") from error
        except (AttributeError, KeyError, TypeError) as error:
            raise SystemExit(
                f"error: --compare {file}: results.json of another run of the demo is expected, "
                "with images, categories and annotations."
            ) from error

    def of(self, file_name: str) -> list[dict[str, Any]] | None:
        """The annotations of an image, found by its path or else its name; None if missing."""
        known = file_name if file_name in self._annotations else None
        return self._annotations.get(known or self._by_name.get(Path(file_name).name, ""))


def _fault(annotation: Any, images: Mapping[Any, str], names: Mapping[Any, str]) -> str | None:
    """What is missing from an annotation in COCO format, or cannot be drawn."""
    if not isinstance(annotation, dict):
        return f"is {shown(annotation)}; a dict is expected."
    fits: dict[str, tuple[Callable[[Any], bool], str]] = {
        "image_id": (
            lambda value: type(value) in (int, str) and value in images,
            "the id of an image",
        ),
        "category_id": (
            lambda value: type(value) in (int, str) and value in names,
            "the id of a category",
        ),
        "bbox": (lambda value: _are_numbers(value) and len(value) == 4, "x, y, width, height"),
        "score": (lambda value: value is None or is_number(value), "a number"),
        "region": (lambda _: type(annotation.get("region", 0)) is int, "a whole number"),
        "track_id": (lambda _: type(annotation.get("track_id", 0)) is int, "a whole number"),
        "points": (lambda _: _are_points(annotation.get("points", [])), "a list of x, y, label"),
        "segmentation": (_is_segmentation, "polygons or a run-length encoding"),
    }
    for key, (fit, expected) in fits.items():
        if not fit(annotation.get(key)):
            return f"has the {key} {_shown(annotation.get(key))}; {expected} is expected."
    return None


def _shown(value: Any) -> str:
    return value[:40] if isinstance(value, str) else shown(value)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(is_number, values))


def _are_points(value: Any) -> bool:
    return isinstance(value, list) and all(_are_numbers(p) and len(p) == 3 for p in value)


def _is_segmentation(value: Any) -> bool:
    if isinstance(value, list):
        return all(_are_numbers(xy) and len(xy) >= 6 and len(xy) % 2 == 0 for xy in value)
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        if not _is_list_of_counts(size) or len(size) != 2 or math.prod(size) > _MAX_PIXELS:
            return False
        if isinstance(counts, str):
            return True
        return _is_list_of_counts(counts) and sum(counts) == math.prod(size)
    return value is None


def _is_list_of_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(isinstance(v, int) and v >= 0 for v in values)


def _with_rle(annotation: dict[str, Any]) -> dict[str, Any]:
    """Encodes a crowd's plain counts, which Detectron2 draws only if the image sizes are equal."""
    mask = annotation.get("segmentation")
    if not isinstance(mask, dict) or isinstance(mask["counts"], str):
        return annotation
    return {**annotation, "segmentation": mask_api.frPyObjects(mask, *mask["size"])}
