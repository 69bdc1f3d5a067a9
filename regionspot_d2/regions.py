"""Boxes, points and masks as people write them, checked and turned into prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes
from torch import Tensor

from .modeling import PointPrompts
from .modeling.localizer import Prompts


def as_prompts(
    image_size: tuple[int, int],
    *,
    boxes: Any | None = None,
    points: Any | None = None,
    point_labels: Any | None = None,
    masks: Any | None = None,
) -> list[Prompts]:
    """Checks regions of all kinds, numbered in the order boxes, points, masks.

    Args:
        image_size: (H, W) of the image.
        boxes: see :func:`as_boxes`.
        points: see :func:`as_points`.
        point_labels: the ``labels`` of :func:`as_points`.
        masks: see :func:`as_masks`.

    Returns:
        One prompt for each kind that was given.

    Raises:
        ValueError: if none was given, or one of them cannot be meant.
    """
    if boxes is None and points is None and masks is None:
        raise ValueError("There are no regions: pass boxes=, points= or masks=.")
    if points is None and point_labels is not None:
        raise ValueError("There are point_labels= but no points=.")
    prompts: list[Prompts] = []
    count = 0
    if boxes is not None:
        found = as_boxes(boxes, image_size)
        prompts.append(found)
        count += len(found)
    if points is not None:
        marked = as_points(points, point_labels, image_size, count)
        prompts.append(marked)
        count += len(marked.points)
    if masks is not None:
        prompts.append(as_masks(masks, image_size, count))
    return prompts


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
    x0, y0, x1, y1 = values.unbind(1)
    faults = {
        "its numbers must be finite.": ~values.isfinite().all(1),
        "x0, y0, x1, y1 with x0 < x1 and y0 < y1 is expected. Are its corners swapped, or is it x, y, width, height?": (
            (x1 < x0) | (y1 < y0)
        ),
        "it has no area.": (x1 == x0) | (y1 == y0),
        f"it lies outside the image of {width} x {height} pixels.": (
            (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
        ),
    }
    found = torch.stack(list(faults.values()), dim=1).nonzero()
    if len(found):
        i, fault = found[0].tolist()
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
        points: R regions, each (P, 2) XY in pixels of the image, P may differ; or (R, 2), one point each.
        labels: like ``points``, 1 for a point on the region and 0 for one on the background; by default all 1.
        image_size: (H, W) of the image.
        first_region: number of the first region, for the messages.

    Returns:
        The points, padded to the longest row.

    Raises:
        ValueError: naming the first region without points, or with points outside the image.
    """
    regions = [_numbers(region, "points") for region in _each(points, "points")]
    for i, region in enumerate(regions):
        if len(region.shape) not in (1, 2) or (region.numel() and region.shape[-1] != 2):
            raise ValueError(
                f"The points of region {first_region + i} have the shape {tuple(region.shape)}; (P, 2) is expected, "
                "each x, y in pixels."
            )
    regions = [region.reshape(-1, 2) for region in regions]
    marks = [torch.ones(len(region)) for region in regions]
    if labels is not None:
        marks = [_numbers(label, "point labels").flatten() for label in _each(labels, "labels")]
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
        padded_marks[i, : len(region)] = mark.long()
    return PointPrompts(padded, padded_marks)


def as_masks(masks: Any, image_size: tuple[int, int], first_region: int = 0) -> BitMasks:
    """Checks masks.

    Args:
        masks: (R, H, W) of 0 and 1 at the size of the image, or (H, W), or ``BitMasks``.
        image_size: (H, W) of the image.
        first_region: number of the first region, for the messages.

    Raises:
        ValueError: if they have another size, or naming the first that is empty.
    """
    values = _numbers(masks.tensor if isinstance(masks, BitMasks) else masks, "masks") > 0
    if values.dim() == 1 and len(values) == 0:
        values = values.reshape(0, *image_size)
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


def _each(values: Any, what: str) -> Iterable[Any]:
    try:
        return list(values)
    except TypeError as error:
        raise ValueError(
            f"The {what} are {values!r}; a list with an entry per region is expected."
        ) from error


def _numbers(values: Any, what: str) -> Tensor:
    try:
        if isinstance(values, Sequence) and len(values) and isinstance(values[0], Tensor):
            return torch.stack(list(values)).detach().float().cpu()
        if isinstance(values, Sequence) and len(values) and isinstance(values[0], np.ndarray):
            values = np.stack(values)
        return torch.as_tensor(values).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The {what} cannot be read as numbers: {error}.") from error
