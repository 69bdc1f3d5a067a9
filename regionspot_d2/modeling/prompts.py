"""Prompts: the regions of one image that a question is about, as boxes, points or masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes
from torch import Tensor


class Prompts(ABC):
    """R regions of one image, in pixels of that image.

    Attributes:
        parts: the same regions in groups of one kind, in order.
        boxes_need_masks: whether :meth:`boxes` reads the masks that a localizer found.
    """

    boxes_need_masks: bool = False

    @property
    def parts(self) -> Sequence[Prompts]:
        return (self,)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def to(self, device: torch.device | str) -> Prompts: ...

    @abstractmethod
    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        """The boxes of the regions: R boxes, XYXY, pixels of the image.

        Args:
            image_size: (H, W) of the image.
            masks: (R, h, w) bool, what the localizer found, at any size that covers the image;
                read only where ``boxes_need_masks``.
        """


@dataclass(frozen=True)
class BoxPrompts(Prompts):
    """Regions given as R boxes, XYXY, pixels of the image."""

    values: Boxes

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device | str) -> BoxPrompts:
        return BoxPrompts(self.values.to(device))

    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        return self.values


@dataclass(frozen=True)
class PointPrompts(Prompts):
    """Regions given by points on and beside them.

    Attributes:
        points: (R, P, 2) XY, pixels of the image.
        labels: (R, P), 1 on the region, 0 beside it, -1 where a row has fewer than P points.
    """

    points: Tensor
    labels: Tensor
    boxes_need_masks = True

    def __len__(self) -> int:
        return len(self.points)

    def to(self, device: torch.device | str) -> PointPrompts:
        return PointPrompts(self.points.to(device), self.labels.to(device))

    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        """The boxes of the masks, widened to hold the points on their regions.

        A poor mask leaves such points out. Where a mask is empty, the points are all that is known;
        where there are only background points besides, the box is all zero.
        """
        if masks is None:
            raise ValueError("The box of a point is the box of its mask; pass the masks with it.")
        height, width = image_size
        found = BitMasks(masks).get_bounding_boxes().to(masks.device)
        found.scale(width / masks.shape[2], height / masks.shape[1])
        has_mask = masks.flatten(1).any(1)[:, None]
        on_region = (self.labels == 1)[..., None]
        # A point on the far edge of the image means its last pixel.
        last_pixel = self.points.new_tensor([width - 1, height - 1])
        pixels = self.points.floor().minimum(last_pixel)
        first = pixels.masked_fill(~on_region, torch.inf).amin(1)
        last = pixels.masked_fill(~on_region, -torch.inf).amax(1) + 1
        start = torch.where(has_mask, torch.minimum(found.tensor[:, :2], first), first)
        end = torch.where(has_mask, torch.maximum(found.tensor[:, 2:], last), last)
        around = torch.cat([start, end], dim=1)
        boxes = Boxes(around.where(around.isfinite(), around.new_zeros(())))
        boxes.clip(image_size)
        return boxes


@dataclass(frozen=True)
class MaskPrompts(Prompts):
    """Regions given as masks: (R, H, W), bool, at the size of the image."""

    masks: Tensor

    def __len__(self) -> int:
        return len(self.masks)

    def to(self, device: torch.device | str) -> MaskPrompts:
        return MaskPrompts(self.masks.to(device))

    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        return BitMasks(self.masks).get_bounding_boxes().to(self.masks.device)


class MixedPrompts(Prompts):
    """Regions of several kinds that are asked for together, numbered part after part."""

    parts: Sequence[Prompts] = ()

    def __init__(self, parts: Sequence[Prompts]) -> None:
        self.parts = parts
        self.boxes_need_masks = any(part.boxes_need_masks for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def to(self, device: torch.device | str) -> MixedPrompts:
        return MixedPrompts([part.to(device) for part in self.parts])

    def boxes(self, image_size: tuple[int, int], masks: Tensor | None = None) -> Boxes:
        counts = [len(part) for part in self.parts]
        of_parts = [None] * len(counts) if masks is None else masks.split(counts)
        return Boxes.cat([part.boxes(image_size, m) for part, m in zip(self.parts, of_parts)])


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
            outside the image.
    """
    values = _numbers(boxes.tensor if isinstance(boxes, Boxes) else boxes, "boxes")
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
        ValueError: a region has no point, or one outside the image.
    """
    rows = [_numbers(region, "points") for region in _each(points, "points")]
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
    return PointPrompts(padded, padded_marks)


def _check_points(row: Tensor, mark: Tensor, image_size: tuple[int, int], region: str) -> None:
    if len(row) == 0 or len(mark) != len(row):
        counts = f"{len(row)} points and {len(mark)} labels"
        raise ValueError(f"{region} has {counts}; as many of both are expected, at least one.")
    if not set(mark.tolist()) <= {0, 1}:
        raise ValueError(f"{region} has the labels {mark.tolist()}; 1 is on it, 0 beside it.")
    height, width = image_size
    inside = (row >= 0).all(1) & (row[:, 0] <= width) & (row[:, 1] <= height)
    if not inside.all():
        x, y = row[~inside][0].tolist()
        image = f"the image of {width} x {height} pixels"
        raise ValueError(f"{region} has the point ({x:g}, {y:g}), outside {image}.")


def as_masks(masks: Any, image_size: tuple[int, int], first_region: int = 0) -> MaskPrompts:
    """Checks masks: (R, H, W) of 0 and 1 at the size of the image, (H, W), or ``BitMasks``.

    Raises:
        ValueError: they have another size, or one is empty.
    """
    values = _numbers(masks.tensor if isinstance(masks, BitMasks) else masks, "masks") > 0
    if values.dim() == 1 and len(values) == 0:
        values = values.reshape(0, *image_size)
    if values.dim() == 2:
        values = values[None]
    if values.dim() != 3 or tuple(values.shape[1:]) != tuple(image_size):
        shape, (height, width) = tuple(values.shape), image_size
        expected = f"(R, {height}, {width}) is expected, the size of the image."
        raise ValueError(f"Masks have the shape {shape}; {expected}")
    empty = (~values.flatten(1).any(1)).nonzero()
    if len(empty):
        raise ValueError(f"The mask of region {first_region + int(empty[0])} is empty.")
    return MaskPrompts(values)


def _each(values: Any, what: str) -> list[Any]:
    try:
        return list(values)
    except TypeError as error:
        message = f"The {what} are {values!r}; a list with an entry per region is expected."
        raise ValueError(message) from error


def _numbers(values: Any, what: str) -> Tensor:
    try:
        first = values[0] if isinstance(values, Sequence) and len(values) else None
        if isinstance(first, Tensor):
            values = torch.stack(list(values))
        elif isinstance(first, np.ndarray):
            values = np.stack(values)
        return torch.as_tensor(values).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The {what} cannot be read as numbers: {error}.") from error
