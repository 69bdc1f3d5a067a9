"""What a run has found, written down image by image, so that a run that was stopped can go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from pycocotools import mask as mask_api

# Of one image: "file_name", "height", "width", and "annotations" in COCO format, still without ids.
Entry = dict[str, Any]
_ENTRY_KEYS = {"file_name", "height", "width", "annotations"}


def is_number(value: Any) -> bool:
    """Whether a value of a json is a number; Python reads NaN and Infinity too."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def to_entry(file_name: str, found: Instances) -> Entry:
    """The results of one image; "region" of an annotation is the place of its region among those asked."""
    height, width = found.image_size
    found = found.to("cpu")
    annotations = instances_to_coco_json(found, 0)
    for annotation, region in zip(annotations, found.region_index.tolist()):
        annotation["region"] = region
        annotation["category_id"] += 1
        annotation["iscrowd"] = 0
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if "segmentation" in annotation:
            annotation["area"] = int(mask_api.area(annotation["segmentation"]))
    return {"file_name": file_name, "height": height, "width": width, "annotations": annotations}


def to_coco(entries: Sequence[Entry], names: Sequence[str]) -> dict[str, Any]:
    """A COCO data set with scores."""
    images, annotations = [], []
    for image_id, entry in enumerate(entries, start=1):
        image = {key: entry[key] for key in ("file_name", "height", "width")}
        images.append({"id": image_id, **image})
        for annotation in entry["annotations"]:
            numbers = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**annotation, **numbers})
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    return {"images": images, "categories": categories, "annotations": annotations}


class Record:
    """A file with the settings of a run, and then a line for each image that is finished."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """
        Args:
            path: the file.
            settings: what decides over the results, by the option's name.
            resume: whether to go on with an existing file, instead of beginning anew.

        Raises:
            OSError: if it cannot be read or written.
            SystemExit: if the file was begun with other settings, or is damaged.
        """
        self.entries: dict[str, Entry] = {}
        lines = _whole_lines(path) if resume and path.exists() else []
        if lines:
            begun = lines[0]
            now = json.loads(json.dumps(settings))
            other = [option for option in now if begun.get(option) != now[option]]
            if other:
                raise SystemExit(
                    f"error: --resume: {path} was begun with another {', '.join(other)}. Go on with the same, or "
                    "leave out --resume to begin anew."
                )
            self.entries = {entry["file_name"]: entry for entry in lines[1:]}
        self._file = path.open("a" if lines else "w", encoding="utf-8")
        if not lines:
            self._write(settings)

    def add(self, entry: Entry) -> None:
        """Notes that an image is finished."""
        self.entries[entry["file_name"]] = entry
        self._write(entry)

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; a last one that a killed run left unfinished is cut off."""
    found: list[dict[str, Any]] = []
    with path.open("r+b") as file:
        lines = file.read().splitlines(keepends=True)
        for line in lines:
            content = _parse_line(line)
            # The first line has the settings.
            if content is None or (found and not _ENTRY_KEYS <= content.keys()):
                break
            found.append(content)
        if len(found) < len(lines) - 1:
            raise SystemExit(
                f"error: --resume: {path}, line {len(found) + 1} is not what the demo writes there, but "
                f"{lines[len(found)][:40]!r}. Mend or delete the line, or leave out --resume to begin anew."
            )
        file.truncate(sum(map(len, lines[: len(found)])))
    return found


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and line.endswith(b"\n") else None


class OtherResults:
    """Results of another run, or ground truth, to be drawn beside ours."""

    def __init__(self, file: str) -> None:
        """
        Args:
            file: a json in COCO format, as the demo writes it; scores may be missing.

        Raises:
            SystemExit: if it cannot be read as that.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
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
        except (KeyError, TypeError) as error:
            raise SystemExit(
                f"error: --compare {file}: results.json of another run of the demo is expected, with images, "
                "categories and annotations."
            ) from error

    def of(self, file_name: str) -> list[dict[str, Any]] | None:
        """The annotations of an image, by its path or else by its name; None if it is not there."""
        known = file_name if file_name in self._annotations else None
        return self._annotations.get(known or self._by_name.get(Path(file_name).name, ""))


def _fault(annotation: Any, images: Mapping[Any, str], names: Mapping[Any, str]) -> str | None:
    """What of an annotation in COCO format is missing or cannot be drawn."""
    if not isinstance(annotation, dict):
        return f"is {annotation!r}; a dict is expected."
    fits: dict[str, tuple[Callable[[Any], bool], str]] = {
        "image_id": (lambda value: value in images, "the id of an image"),
        "category_id": (lambda value: value in names, "the id of a category"),
        "bbox": (lambda value: _are_numbers(value) and len(value) == 4, "x, y, width, height"),
        "score": (lambda value: value is None or is_number(value), "a number"),
        "region": (lambda _: isinstance(annotation.get("region", 0), int), "a whole number"),
        "segmentation": (_is_segmentation, "polygons or a run-length encoding"),
    }
    for key, (fit, expected) in fits.items():
        if not fit(annotation.get(key)):
            return f"has the {key} {str(annotation.get(key))[:40]}; {expected} is expected."
    return None


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(is_number, values))


def _is_segmentation(value: Any) -> bool:
    if isinstance(value, list):
        return all(_are_numbers(xy) and len(xy) >= 6 and len(xy) % 2 == 0 for xy in value)
    if isinstance(value, dict):
        size, counts = value.get("size"), value.get("counts")
        if not _are_counts(size) or len(size) != 2:
            return False
        return isinstance(counts, str) or (_are_counts(counts) and sum(counts) == math.prod(size))
    return value is None


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and v >= 0 for v in values)


def _with_rle(annotation: dict[str, Any]) -> dict[str, Any]:
    """Ground truth has crowds as plain counts, which Detectron2 draws in images of the very same size alone."""
    mask = annotation.get("segmentation")
    if not isinstance(mask, dict) or isinstance(mask["counts"], str):
        return annotation
    return {**annotation, "segmentation": mask_api.frPyObjects(mask, *mask["size"])}
