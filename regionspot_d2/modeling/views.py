"""Zoom: the views of an image in which its regions are seen.

A token of CLIP ViT-L/14 at 224 pixels covers a sixteenth of the image's side, more than many
objects do. In a view, a part of the image that holds a region and what is around it, the same
region covers many tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import NamedTuple

import torch
from detectron2.structures import Boxes
from torch import Tensor

# Sides of the smallest view, in pixels: below, there is nothing to see but enlarged pixels.
_MIN_SIDE = 48

# XYXY, whole pixels of the image.
View = tuple[int, int, int, int]


class Zoom(NamedTuple):
    """How closely regions are looked at.

    Attributes:
        factor: the side of a view, in longer sides of its region; at least 1.
        max_views: of an image, which bounds the cost of many regions.
    """

    factor: float
    max_views: int


class ViewsOfRegions(NamedTuple):
    """The views of an image, each with at least one region.

    Attributes:
        views: V views.
        view_of_region: (R,), the place of each region's view, int64.
    """

    views: list[View]
    view_of_region: Tensor


class ViewFinder:
    """Finds the views of one image's regions.

    While there are no more regions than ``zoom.max_views``, each is seen in a square of its own.
    More share the views of a pyramid: level 0 is the whole image, and views of the next level have
    half the side and overlap by half. Each region is seen in the smallest view of the pyramid that
    holds its own square. A region's view then depends on no other region but by their number.
    """

    def __init__(self, zoom: Zoom, image_size: tuple[int, int], regions: int) -> None:
        """
        Args:
            zoom: the same for all regions.
            image_size: (H, W).
            regions: how many there are in the whole question, of which calls may ask a part.
        """
        self.zoom = zoom
        self.image_size = image_size
        shared = regions > zoom.max_views
        self._levels = list(_pyramid(image_size, zoom.max_views)) if shared else None

    def __call__(self, boxes: Boxes) -> ViewsOfRegions:
        """Finds the views of R boxes, XYXY, pixels of the image."""
        # On the CPU in float64: views must be the same whatever the device and the precision.
        squares = self._squares(boxes.tensor.detach().double().cpu())
        views = squares if self._levels is None else self._in_pyramid(squares, self._levels)
        whole = torch.cat([views[:, :2].floor(), views[:, 2:].ceil()], dim=1).long()
        distinct, places = whole.unique(dim=0, return_inverse=True)
        rows = [(x0, y0, x1, y1) for x0, y0, x1, y1 in distinct.tolist()]
        return ViewsOfRegions(rows, places.to(boxes.device))

    def _squares(self, boxes: Tensor) -> Tensor:
        """A square around each box, moved inside the image and cut where it is larger."""
        size = boxes.new_tensor([*reversed(self.image_size)])
        corners = boxes.view(-1, 2, 2).minimum(size).clamp(min=0)
        longer = (corners[:, 1] - corners[:, 0]).amax(1, keepdim=True)
        sides = (longer * self.zoom.factor).clamp(min=_MIN_SIDE).minimum(size)
        start = (corners.mean(1) - sides / 2).clamp(min=0).minimum(size - sides)
        return torch.cat([start, start + sides], dim=1)

    def _in_pyramid(self, squares: Tensor, levels: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The smallest view of the pyramid that holds each square."""
        size = squares.new_tensor([*reversed(self.image_size)])
        found = torch.cat([torch.zeros(2).to(size), size]).repeat(len(squares), 1)
        center = (squares[:, :2] + squares[:, 2:]) / 2
        for sides, counts in levels:
            steps = (size - sides) / (counts - 1).clamp(min=1)
            # Of the views that hold a square, the one whose middle is nearest to the square's.
            places = ((center - sides / 2) / steps.clamp(min=1e-9)).round()
            start = places.clamp(min=0).minimum(counts - 1) * steps
            views = torch.cat([start, start + sides], dim=1)
            holds = (views[:, :2] <= squares[:, :2] + 0.5) & (squares[:, 2:] <= views[:, 2:] + 0.5)
            found = torch.where(holds.all(1, keepdim=True), views, found)
        return found


def pyramid_views(image_size: tuple[int, int], max_views: int) -> list[View]:
    """All views of a pyramid of at most so many, the whole image first, as ViewFinder has them."""
    height, width = image_size
    views = [(0, 0, width, height)]
    for sides, counts in _pyramid(image_size, max_views):
        columns, rows = (int(count) for count in counts)
        steps = (torch.tensor([width, height]).double() - sides) / (counts - 1).clamp(min=1)
        for place in torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1):
            start = place * steps
            corners = (*start.floor().tolist(), *(start + sides).ceil().tolist())
            x0, y0, x1, y1 = map(int, corners)
            views.append((x0, y0, x1, y1))
    return views


def _pyramid(image_size: tuple[int, int], max_views: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The levels of a pyramid of at most so many views, the whole image (level 0) left out.

    Yields:
        The (width, height) of a level's views, and how many there are across and down.
    """
    height, width = image_size
    size = torch.tensor([width, height], dtype=torch.float64)
    total, side = 1, max(image_size) / 2
    while side >= _MIN_SIDE:
        sides = size.clamp(max=side)
        counts = ((size - sides) / (sides / 2)).ceil() + 1
        total += math.prod(int(count) for count in counts)
        if total > max_views:
            return
        yield sides, counts
        side /= 2


def relative_boxes(boxes: Boxes, image_size: tuple[int, int]) -> Tensor:
    """Boxes in pixels of an image as region heads read them: (R, 4) in 0..1, cut at its edges."""
    inside = Boxes(boxes.tensor.clone())
    inside.clip(image_size)
    return inside.tensor / inside.tensor.new_tensor([*reversed(image_size)] * 2)


def boxes_in_view(boxes: Boxes, view: View) -> Tensor:
    """Boxes in pixels of an image, in a view of it, as region heads read them: (R, 4) in 0..1."""
    x0, y0, x1, y1 = view
    moved = Boxes(boxes.tensor - boxes.tensor.new_tensor([x0, y0, x0, y0]))
    return relative_boxes(moved, (y1 - y0, x1 - x0))


def whole_view(image_size: tuple[int, int]) -> View:
    """The view that is the image of (H, W) itself."""
    return 0, 0, image_size[1], image_size[0]


def crop(image: Tensor, view: View) -> Tensor:
    """The pixels (..., h, w) of a view of an image (..., H, W)."""
    x0, y0, x1, y1 = view
    return image[..., y0:y1, x0:x1]


def masks_in_view(masks: Tensor, image_size: tuple[int, int], view: View) -> Tensor:
    """Masks (R, h, w) of an image, at any size that covers it, as masks (R, h, w) of a view."""
    sizes = zip(masks.shape[1:], image_size, (view[1::2], view[0::2]))
    rows, columns = (
        # The middle of each pixel of the view's mask, in pixels of the image's mask.
        ((start + (torch.arange(n) + 0.5) * (end - start) / n) * n / length).long().clamp(max=n - 1)
        for n, length, (start, end) in sizes
    )
    return masks[:, rows.to(masks.device)[:, None], columns.to(masks.device)]


def check_zoom(zoom: float, name: str = "zoom") -> float:
    """Checks the factor of a zoom: 0, which means the whole image, or at least 1.

    Raises:
        ValueError: it is another number; ``name`` says where it comes from.
    """
    number = isinstance(zoom, Real) and not isinstance(zoom, bool)
    if not (number and (zoom == 0 or 1 <= zoom < math.inf)):
        raise ValueError(
            f"{name} is {zoom!r:.60}; it must be 0 (regions are seen in the whole image) or at "
            "least 1 (in a view so many times as large as their longer side, 2 for example)."
        )
    return float(zoom)
