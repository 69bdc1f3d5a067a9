"""Regions as people write them, checked at the door: whatever makes no sense is one error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from operator import index, length_hint
from os import PathLike
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes
from torch import Tensor

from ..arrays import as_numbers
from .interfaces import image_size_of
from .prompts import BoxPrompts, MaskPrompts, MixedPrompts, PointPrompts, Prompts

# On an image of a pixel or two, boxes between 0 and 1 may be pixels.
_TINY_IMAGE = 2
_FRACTIONS = (
    "The {} lie between 0 and 1, like fractions of the image; pixels are expected: multiply x by "
    "{} and y by {}."
)


def as_prompts(
    image_size: tuple[int, int],
    *,
    boxes: Any | None = None,
    points: Any | None = None,
    point_labels: Any | None = None,
    masks: Any | None = None,
) -> Prompts:
    """Checks regions as people write them, numbered in the order boxes, points, masks.

    Args:
        image_size: (H, W) of the image.
        boxes, points, point_labels, masks: see :func:`as_boxes`, :func:`as_points` and
            :func:`as_masks`.

    Raises:
        ValueError: there are none, or one of them makes no sense; the message names it.
    """
    if boxes is None and points is None and masks is None:
        raise ValueError("There are no regions: pass boxes=, points= or masks=.")
    if points is None and point_labels is not None:
        raise ValueError("There are point_labels= but no points=.")
    parts: list[Prompts] = []
    if boxes is not None:
        parts.append(BoxPrompts(as_boxes(boxes, image_size)))
    if points is not None:
        parts.append(as_points(points, point_labels, image_size, sum(map(len, parts))))
    if masks is not None:
        parts.append(as_masks(masks, image_size, sum(map(len, parts))))
    return MixedPrompts(parts)


def as_boxes(boxes: Any, image_size: tuple[int, int]) -> Boxes:
    """Checks R boxes, XYXY in pixels of the image; what hangs over its edge is cut off.

    Raises:
        ValueError: a box is not four finite numbers, has its corners swapped, has no area, or lies
            outside the image; or all of them look like fractions of the image.
    """
    values = _numbers(boxes.tensor if isinstance(boxes, Boxes) else boxes, "boxes").float()
    if values.numel() == 0:
        return Boxes(torch.zeros(0, 4))
    if values.shape == (4,):
        values = values[None]
    if values.dim() != 2 or values.shape[1] != 4:
        shape = tuple(values.shape)
        raise ValueError(f"Boxes have the shape {shape}; (R, 4), x0, y0, x1, y1, is expected.")
    height, width = image_size
    x0, y0, x1, y1 = values.unbind(1)
    faults = {
        "its numbers must be finite.": ~values.isfinite().all(1),
        "x0, y0, x1, y1 with x0 < x1 and y0 < y1 is expected. Are its corners swapped, or is it "
        "x, y, width, height?": (x1 < x0) | (y1 < y0),
        "it has no area.": (x1 == x0) | (y1 == y0),
        f"it lies outside the image of {width} x {height} pixels.": (
            (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
        ),
    }
    wrong = torch.stack(list(faults.values()), dim=1).nonzero()
    if len(wrong):
        i, fault = wrong[0].tolist()
        numbers = ", ".join(f"{number:g}" for number in values[i].tolist())
        raise ValueError(f"Box {i} is ({numbers}); {list(faults)[fault]}")
    if max(image_size) > _TINY_IMAGE and values.min() >= 0 and values.max() <= 1:
        raise ValueError(_FRACTIONS.format("boxes", width, height))
    checked = Boxes(values.clone())
    checked.clip(image_size)
    return checked


def as_points(
    points: Any, labels: Any | None, image_size: tuple[int, int], first_region: int = 0
) -> PointPrompts:
    """Checks points; every region has one or more of its own.

    Args:
        points: R regions, each (P, 2) XY in pixels of the image, P may differ; or (R, 2).
        labels: like ``points``, 1 on the region, 0 beside it; by default all 1.
        image_size: (H, W) of the image.
        first_region: number of the first region, for the messages.

    Raises:
        ValueError: a region has no point on it, or one outside the image; or all of them look
            like fractions of the image.
    """
    rows = [_numbers(region, "points").float() for region in _each(points, "points")]
    for i, row in enumerate(rows):
        if row.dim() not in (1, 2) or (row.numel() and row.shape[-1] != 2):
            shape, region = tuple(row.shape), first_region + i
            raise ValueError(
                f"The points of region {region} have the shape {shape}; (P, 2), x, y, is expected."
            )
    rows = [row.reshape(-1, 2) for row in rows]
    marks = [torch.ones(len(row)) for row in rows]
    if labels is not None:
        marks = [_numbers(label, "point labels").flatten() for label in _each(labels, "labels")]
    if len(marks) != len(rows):
        raise ValueError(f"There are points of {len(rows)} regions but labels of {len(marks)}.")
    longest = max(map(len, rows), default=1)
    padded = torch.zeros(len(rows), longest, 2)
    padded_marks = torch.full((len(rows), longest), -1, dtype=torch.int64)
    for i, (row, mark) in enumerate(zip(rows, marks)):
        _check_points(row, mark, image_size, f"Region {first_region + i}")
        padded[i, : len(row)] = row
        padded_marks[i, : len(row)] = mark.long()
    # Whole numbers may well be the first pixels of the image.
    if max(image_size) > _TINY_IMAGE and padded.frac().any() and padded.max() <= 1:
        raise ValueError(_FRACTIONS.format("points", image_size[1], image_size[0]))
    return PointPrompts(padded, padded_marks)


def _check_points(row: Tensor, mark: Tensor, image_size: tuple[int, int], region: str) -> None:
    if len(row) == 0 or len(mark) != len(row):
        counts = f"{len(row)} points and {len(mark)} labels"
        raise ValueError(f"{region} has {counts}; as many of both are expected, at least one.")
    if not set(mark.tolist()) <= {0, 1}:
        raise ValueError(f"{region} has the labels {mark.tolist()}; 1 is on it, 0 beside it.")
    if not mark.any():
        raise ValueError(f"{region} has only points beside it (label 0); give one that is on it.")
    height, width = image_size
    inside = (row >= 0).all(1) & (row[:, 0] <= width) & (row[:, 1] <= height)
    if not inside.all():
        x, y = row[~inside][0].tolist()
        image = f"the image of {width} x {height} pixels"
        raise ValueError(f"{region} has the point ({x:g}, {y:g}), outside {image}.")


def as_masks(masks: Any, image_size: tuple[int, int], first_region: int = 0) -> MaskPrompts:
    """Checks masks: (R, H, W) of 0 and 1 at the size of the image, (H, W), or ``BitMasks``.

    Any number may stand for 1, such as 255, if it is the only one beside 0.

    Raises:
        ValueError: they have another size, one is empty, or they are numbers to be thresholded.
    """
    values = _numbers(masks.tensor if isinstance(masks, BitMasks) else masks, "masks")
    if values.dim() == 1 and len(values) == 0:
        values = values.reshape(0, *image_size)
    if values.dim() == 2:
        values = values[None]
    if values.dim() != 3 or tuple(values.shape[1:]) != tuple(image_size):
        shape, (height, width) = tuple(values.shape), image_size
        expected = f"(R, {height}, {width}) is expected, the size of the image."
        raise ValueError(f"Masks have the shape {shape}; {expected}")
    if values.dtype != torch.bool and values.numel():
        values, inside = values != 0, values
        other = values & (inside != inside.max())
        if other.any() or (values.any() and inside.max() < 1):
            found = f"{float(inside[other][0] if other.any() else inside.max()):g}"
            raise ValueError(
                f"The masks hold {found}; 0 and 1 are expected. Threshold scores first, as in "
                "masks > 0.5, and give each region of a label map a mask of its own."
            )
    values = values.bool()
    empty = (~values.flatten(1).any(1)).nonzero()
    if len(empty):
        raise ValueError(f"The mask of region {first_region + int(empty[0])} is empty.")
    return MaskPrompts(values)


def _each(values: Any, what: str) -> list[Any]:
    try:
        if isinstance(values, str | bytes | Mapping | Set):  # a dict would give its keys
            raise TypeError
        return list(values)
    except TypeError as error:
        message = f"The {what} are {values!r:.60}; a list with an entry per region is expected."
        raise ValueError(message) from error


def check_lists(images: Any, boxes: Any) -> None:
    """Checks that images and boxes are lists of as many entries, as far as that can be known.

    What can be iterated is not always a list: a dict gives its keys, one image its rows.

    Raises:
        ValueError: one is not.
    """
    for name, values, kinds, dimensions in (
        ("images", images, Iterable, 4),
        ("boxes", boxes, Sequence | np.ndarray | Tensor, 2),
    ):
        numbers = isinstance(values, Tensor)
        if isinstance(values, np.ndarray):  # of objects or of text, it is as good as a list
            numbers = values.dtype.kind not in "OU"
        no_list = isinstance(values, str | bytes | PathLike | Mapping | Set)
        if (numbers and values.ndim < dimensions) or no_list or not isinstance(values, kinds):
            found = f" of the shape {tuple(values.shape)}" if numbers else ""
            raise ValueError(
                f"{name} is of the type {type(values).__name__}{found}; a list with an entry for "
                "each image is expected."
            )
    count = length_hint(images, len(boxes))
    if count != len(boxes):
        raise ValueError(f"There are {count} images but boxes for {len(boxes)}.")


def as_count(value: Any, name: str, of: str) -> int:
    """A number of things: any type of whole numbers, but not True; ValueError below one."""
    try:
        count = index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool | np.bool_):
        raise ValueError(
            f"{name} is {value!r:.60}; a whole number, at least one {of}, is expected."
        )
    return count


def _numbers(values: Any, what: str) -> Tensor:
    return as_numbers(values, what).cpu()


def box_batches(
    images: Iterable[Any], boxes: Sequence[Any], read: Callable[[Any], Tensor], batch_size: int
) -> Iterator[tuple[list[Tensor], list[BoxPrompts]]]:
    """Batches of images, of which only one is held at once, with the boxes of each.

    Args:
        images: as many as boxes; they may come from a generator.
        boxes: per image (R, 4) XYXY, pixels of it.
        read: gives the pixels of an image, (3, H, W).

    Raises:
        ValueError: an image or its boxes make no sense, with the number of the image; there are not
            as many boxes as images; or ``batch_size`` is not a count.
    """
    check_lists(images, boxes)
    batch_size = as_count(batch_size, "batch_size", "image")
    following, count = iter(images), 0
    while chunk := list(islice(following, batch_size)):
        pixels, prompts = [], []
        for image in chunk:
            if count >= len(boxes):
                raise ValueError(f"There are more images than the {len(boxes)} with boxes.")
            try:
                pixels.append(read(image))
                prompts.append(BoxPrompts(as_boxes(boxes[count], image_size_of(pixels[-1]))))
            except ValueError as error:
                raise ValueError(f"Image {count}: {error}") from error
            count += 1
        yield pixels, prompts
    if count < len(boxes):
        raise ValueError(f"There are {count} images but boxes for {len(boxes)}.")
