"""Boxes, points and masks as people write them, checked and turned into prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes
from torch import Tensor

from .modeling import PointPrompts


def as_boxes(boxes: Any, image_size: tuple[int, int]) -> Boxes:
    """Checks boxes; what hangs over the edge of the image is cut off.

    Args:
        boxes: R boxes, XYXY, pixels of the image: ``Boxes``, a tensor, an array or lists.
        image_size: (H, W) of the image.

    Returns:
        The boxes, inside the image.

    Raises:
        ValueError: naming the first box that is not four finite numbers, has its corners swapped, has no area, or lies
            outside the image.
    """
    values = _numbers(boxes.tensor if isinstance(boxes, Boxes) else boxes, "boxes")
    if values.numel() == 0:
        return Boxes(torch.zeros(0, 4))
    if values.dim() == 1 and len(values) == 4:
        values = values[None]
    if values.dim() != 2 or values.shape[1] != 4:
        raise ValueError(
            f"Boxes have the shape {tuple(values.shape)}; (R, 4) is expected, each x0, y0, x1, y1 in pixels."
        )
    height, width = image_size
    for i, (x0, y0, x1, y1) in enumerate(values.tolist()):
        said = f"Box {i} is ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        if not np.isfinite([x0, y0, x1, y1]).all():
            raise ValueError(f"{said}; its numbers must be finite.")
        if x1 < x0 or y1 < y0:
            raise ValueError(
                f"{said}; x0, y0, x1, y1 with x0 < x1 and y0 < y1 is expected. Are its corners swapped, "
                "or is it x, y, width, height?"
            )
        if x1 == x0 or y1 == y0:
            raise ValueError(f"{said}; it has no area.")
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise ValueError(f"{said}; it lies outside the image of {width} x {height} pixels.")
    checked = Boxes(values.clone())
    checked.clip(image_size)
    return checked


def as_points(
    points: Any, labels: Any | None, image_size: tuple[int, int], first_region: int = 0
) -> PointPrompts:
    """Checks points; every region has one or more of its own.

    Args:
        points: R regions, each (P, 2) XY in pixels of the image, P may differ; or (R, 2), one point each.
        labels: like ``points``, 1 for a point on the region and 0 for one on the background; by default all 1.
        image_size: (H, W) of the image.
        first_region: number of the first region, for the messages.

    Returns:
        The points, padded to the longest row.

    Raises:
        ValueError: naming the first region without points, or with points outside the image.
    """
    regions = [_numbers(region, "points").reshape(-1, 2) for region in points]
    marks = [torch.ones(len(region), dtype=torch.int64) for region in regions]
    if labels is not None:
        marks = [_numbers(label, "point labels").reshape(-1).long() for label in labels]
    if len(marks) != len(regions):
        raise ValueError(f"There are points of {len(regions)} regions but labels of {len(marks)}.")
    height, width = image_size
    longest = max((len(region) for region in regions), default=1)
    padded = torch.zeros(len(regions), longest, 2)
    padded_marks = torch.full((len(regions), longest), -1, dtype=torch.int64)
    for i, (region, mark) in enumerate(zip(regions, marks)):
        said = f"Region {first_region + i}"
        if len(region) == 0 or len(mark) != len(region):
            raise ValueError(
                f"{said} has {len(region)} points and {len(mark)} labels; as many of both are expected, at least one."
            )
        if not set(mark.tolist()) <= {0, 1}:
            raise ValueError(
                f"{said} has the labels {mark.tolist()}; 1 is on the region, 0 beside."
            )
        inside = (region >= 0).all(1) & (region[:, 0] <= width) & (region[:, 1] <= height)
        if not inside.all():
            x, y = region[~inside][0].tolist()
            raise ValueError(
                f"{said} has the point ({x:g}, {y:g}), outside the image of {width} x {height} pixels."
            )
        padded[i, : len(region)] = region
        padded_marks[i, : len(region)] = mark
    return PointPrompts(padded, padded_marks)


def as_masks(masks: Any, image_size: tuple[int, int], first_region: int = 0) -> BitMasks:
    """Checks masks.

    Args:
        masks: (R, H, W) of 0 and 1 at the size of the image, or ``BitMasks``.
        image_size: (H, W) of the image.
        first_region: number of the first region, for the messages.

    Raises:
        ValueError: if they have another size, or naming the first that is empty.
    """
    values = _numbers(masks.tensor if isinstance(masks, BitMasks) else masks, "masks") > 0
    if values.dim() == 2:
        values = values[None]
    if values.dim() != 3 or tuple(values.shape[1:]) != tuple(image_size):
        raise ValueError(
            f"Masks have the shape {tuple(values.shape)}; (R, {image_size[0]}, {image_size[1]}) is expected, "
            "the size of the image."
        )
    empty = (~values.flatten(1).any(1)).nonzero()
    if len(empty):
        raise ValueError(f"The mask of region {first_region + int(empty[0])} is empty.")
    return BitMasks(values)


def _numbers(values: Any, what: str) -> Tensor:
    try:
        if isinstance(values, Sequence) and len(values) and isinstance(values[0], Tensor):
            return torch.stack(list(values)).detach().float().cpu()
        return torch.as_tensor(values).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The {what} cannot be read as numbers: {error}.") from error
