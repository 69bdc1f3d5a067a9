"""What files of regions have of each image; every mistake is a ValueError that names the entry."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown  # short, however long or deep a value is
from typing import Any

from .results import is_number

PIXELS = "multiply x by its width, y by its height: pixels are expected."
_CORNERS_EXPECTED = "four numbers x0, y0, x1, y1 are expected."
_SIZE_EXPECTED = "four numbers x, y, width, height are expected."
# What a csv calls the image, the corners of a box, or its corner and size, and the score.
_IMAGE = ("file_name", "filename", "file", "image", "image_path", "path")
_CORNERS = (
    ("x0", "y0", "x1", "y1"),
    ("x_min", "y_min", "x_max", "y_max"),  # supervision's
    ("xmin", "ymin", "xmax", "ymax"),
    ("x1", "y1", "x2", "y2"),
)
_SIZES = (("x", "y", "width", "height"), ("x", "y", "w", "h"))
_SCORE = ("score", "confidence")


@dataclass
class Listed:
    """The boxes that a file has of one image.

    Attributes:
        boxes: XYXY, pixels of the image, or fractions of its sides if ``are_fractions``.
        scores: one for each box; None if the file has none.
        are_fractions: whether boxes are in 0..1.
    """

    boxes: list[list[float]] = field(default_factory=list)
    scores: list[float] | None = None
    are_fractions: bool = False

    def in_pixels(self, width: int, height: int) -> list[list[float]]:
        """The boxes, XYXY, in pixels of an image of this size."""
        if not self.are_fractions:
            return self.boxes
        sides = (width, height, width, height)
        return [[value * side for value, side in zip(box, sides)] for box in self.boxes]


@dataclass
class _Row:
    """One box of a file that has a line, or a dict, for each box."""

    where: str
    image: str
    box: Any
    score: Any
    region: Any = None


def read_ours(content: Any) -> dict[str, Listed]:
    """The boxes of our json, as demo/README.md shows it."""
    if not isinstance(content, dict):
        raise ValueError(
            "a dict from file names to boxes is expected, or COCO's json: a dataset, or a list of "
            "results."
        )
    found = {}
    for name, entry in content.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("boxes"), list):
            raise ValueError(f"{shown(name)} has no list 'boxes'.")
        boxes, scores = entry["boxes"], entry.get("scores")
        for i, box in enumerate(boxes):
            _check_box(box, f"{shown(name)} has the box {shown(box)} (region {i})")
        if scores is not None and (not isinstance(scores, list) or len(scores) != len(boxes)):
            raise ValueError(
                f"{shown(name)} needs one score per box: {len(boxes)} boxes, the scores "
                f"{shown(scores)}."
            )
        for i, score in enumerate(scores or []):
            _check_score(score, f"{shown(name)} has the score {shown(score)} (region {i})")
        found[name] = Listed(boxes, scores)
    return found


def _are_four_numbers(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def _check_box(box: Any, what: str) -> None:
    """If boxes fit the image is checked later."""
    if not _are_four_numbers(box):
        raise ValueError(f"{what}; {_CORNERS_EXPECTED}")
    if is_fraction(box):
        raise ValueError(f"{what}, in fractions of the image; {PIXELS}")


def _check_score(score: Any, what: str) -> None:
    if not is_number(score):
        raise ValueError(f"{what}; a number is expected.")


def _by_image(rows: Iterable[_Row]) -> dict[str, Listed]:
    """Checks boxes that are listed one by one; a region with several names is one region."""
    found: dict[str, Listed] = {}
    seen = set()
    for row in rows:
        _check_box(row.box, f"{row.where} has the box {shown(row.box)}")
        listed = found.setdefault(row.image, Listed(scores=None if row.score is None else []))
        if (listed.scores is None) != (row.score is None):
            raise ValueError(
                f"{row.where}: some boxes of {shown(row.image)} have a score, and some have none."
            )
        if row.region is not None:
            if (row.image, shown(row.region)) in seen:
                continue
            seen.add((row.image, shown(row.region)))
        listed.boxes.append(row.box)
        if listed.scores is not None:
            _check_score(row.score, f"{row.where} has the score {shown(row.score)}")
            listed.scores.append(row.score)
    return found


def _corners(box: Any, where: str) -> list[float]:
    """XYWH as XYXY."""
    if not _are_four_numbers(box):
        raise ValueError(f"{where} has the box {shown(box)}; {_SIZE_EXPECTED}")
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def is_coco(content: Mapping[str, Any]) -> bool:
    """Whether a json is a dataset in COCO format."""
    return all(isinstance(content.get(key), list) for key in ("images", "annotations"))


def read_coco(content: Mapping[str, Any]) -> dict[str, Listed]:
    """The boxes of a dataset in COCO format, without crowds."""
    names = {}
    for i, image in enumerate(content["images"]):
        fits = isinstance(image, dict) and isinstance(image.get("file_name"), str)
        if not fits or type(image.get("id")) not in (int, str):
            raise ValueError(f"image {i} (counted from 0) has no id or no file_name.")
        names[image["id"]] = image["file_name"]
    rows = []
    for i, annotation in enumerate(content["annotations"]):
        where = f"annotation {i} (counted from 0)"
        known = isinstance(annotation, dict) and type(annotation.get("image_id")) in (int, str)
        if not known or annotation["image_id"] not in names:
            raise ValueError(f"{where} has no image_id of one of the images.")
        if not annotation.get("iscrowd"):
            image = names[annotation["image_id"]]
            rows.append(_row(where, image, annotation))
    # An image without annotations has no regions, which is known.
    return {name: Listed() for name in names.values()} | _by_image(rows)


def read_results(content: list[Any]) -> dict[str, Listed]:
    """The boxes of a list of results in COCO format, by image id or, if given, by file name."""
    return _by_image(_results(content))


def _results(content: list[Any]) -> Iterator[_Row]:
    for i, result in enumerate(content):
        where = f"result {i} (counted from 0)"
        if not isinstance(result, dict):
            raise ValueError(f"{where} is {shown(result)}; image_id, bbox and score are expected.")
        image = result.get("file_name", result.get("image_id"))
        if type(image) not in (int, str):
            raise ValueError(f"{where} has no image_id and no file_name.")
        yield _row(where, str(image), result)


def _row(where: str, image: str, entry: Mapping[str, Any]) -> _Row:
    box = _corners(entry.get("bbox"), where)
    return _Row(where, image, box, entry.get("score"), entry.get("region"))


def read_csv(file: str) -> dict[str, Listed]:
    """The boxes of a table with a row for each; its first line names the columns."""
    return _by_image(_table(file))


def _table(file: str) -> Iterator[_Row]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        first = lines.readline()
        lines.seek(0)
        delimiter = max(",;\t", key=first.count)
        try:
            rows = csv.DictReader(lines, delimiter=delimiter)
            columns = {name.strip().lower(): name for name in rows.fieldnames or [] if name}
            image, corners, sizes, score = _columns(columns)
            for row in rows:
                where = f"line {rows.line_num}"
                if not row[columns[image]]:
                    raise ValueError(f"{where} has no {columns[image]}.")
                box: list[Any] = [_number(row[columns[name]]) for name in corners or sizes]
                value = _number(row[columns[score]]) if score else None
                region = row[columns["region"]] or None if "region" in columns else None
                yield _Row(
                    where,
                    row[columns[image]],
                    box if corners else _corners(box, where),
                    value,
                    region,
                )
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"it is no csv in UTF-8: {error}.") from error


def _columns(
    columns: Mapping[str, str],
) -> tuple[str, tuple[str, ...], tuple[str, ...], str | None]:
    image = next((name for name in _IMAGE if name in columns), None)
    corners = next((names for names in _CORNERS if columns.keys() >= {*names}), ())
    sizes = next((names for names in _SIZES if columns.keys() >= {*names}), ())
    if image is None or not (corners or sizes):
        raise ValueError(
            f"its first line has the columns {', '.join(columns) or 'none'}; file_name, x0, y0, "
            "x1, y1 and possibly score are expected."
        )
    return image, corners, sizes, next((name for name in _SCORE if name in columns), None)


def _number(text: str | None) -> Any:
    """The number that a text is, or else the text, which a message then shows."""
    try:
        return float(text or "")
    except ValueError:
        return text


def read_yolo(folder: str) -> dict[str, Listed]:
    """The boxes of a folder of labels, by the names of images without their endings."""
    files = label_files(folder)
    if not files:
        raise ValueError("the folder has no .txt file, as YOLO has one for each image.")
    found = {}
    for path in files:
        parts = path.relative_to(folder).with_suffix("").parts
        # Of labels/train/x.txt, for images/train/x.jpg.
        inside = parts[parts.index("labels") + 1 :] if "labels" in parts[:-1] else parts
        found["/".join(inside)] = _read_labels(path, str(path.relative_to(folder)))
    return found


def _read_labels(path: Path, name: str) -> Listed:
    rows: list[list[Any]] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start} is not UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        if not line.split():
            continue
        values = [_number(word) for word in line.split()]
        usual = len(values) in (5, 6) and all(map(is_number, values))
        # Rounding may leave the image by a little.
        if not usual or not all(-0.01 <= value <= 1.01 for value in values[1:5]):
            raise ValueError(
                f"{name}, line {number}: '{line.strip()[:40]}'; a class number and the center x, "
                "center y, width and height in 0..1 are expected, and possibly a score."
            )
        rows.append(values)
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name}: some lines have a score, and some have none.")
    boxes = [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for _, x, y, w, h, *_ in rows]
    scores = [row[5] for row in rows] if rows and len(rows[0]) == 6 else None
    return Listed(boxes, scores, are_fractions=True)


def label_files(folder: str) -> list[Path]:
    """The .txt files of a folder of YOLO's labels, with those in the folders inside it."""
    return sorted(path for path in Path(folder).rglob("*.txt") if path.name != "classes.txt")


def is_fraction(numbers: Iterable[float]) -> bool:
    """Whether they all lie within the first pixel, as fractions of the image would."""
    return all(0 <= number <= 1 for number in numbers)
