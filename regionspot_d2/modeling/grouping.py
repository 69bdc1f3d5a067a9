"""Regions without a localizer: places of an image that look alike and touch each other.

In a few views of the image, the cells of the vision-language model's grid are merged, the two most
alike neighbors first, until one region is left. The box of each region on the way is a candidate.
(Greedy grouping as in selective search, Uijlings et al., IJCV 2013, with Ward's criterion on the
tokens in place of color and texture.)
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

import numpy as np
import torch
from detectron2.layers import nms
from detectron2.structures import Boxes
from torch import Tensor

from .encoded import EncodedImages
from .views import pyramid_views

# The whole image and a level of views with half its side, which overlap by half.
GROUPING_VIEWS = 10
# Cells of the smallest region, as a share of its view.
_MIN_SHARE = 1 / 64
# Boxes of different views, or of a region before and after a merge, that are as good as the same.
_SAME = 0.8
# A small part of an object is often named as surely as the whole; with this power of its share of
# the image in the score, the whole comes first. Chosen on 16 photos of COCO, as were the other
# numbers here and those for grouped boxes in everything.py.
_AREA_POWER = 0.05


@torch.no_grad()
def regions_of_tokens(encoded: EncodedImages) -> tuple[Boxes, Tensor]:
    """Finds candidate regions of the first image, the largest first.

    Returns:
        R boxes, XYXY in pixels of the image, and scores (R,) in 0..1, higher for larger boxes.
    """
    height, width = encoded.image_sizes[0]
    views = pyramid_views((height, width), GROUPING_VIEWS)
    model, parts = encoded.vision_language, []
    for view, tokens in zip(views, encoded.view_tokens(0, views)):
        cells = model.appearance(tokens[model.num_prefix_tokens :]).float().cpu().numpy()
        rows, columns = model.grid_size
        scale = ((view[2] - view[0]) / columns, (view[3] - view[1]) / rows) * 2
        parts.append(grouped_boxes(cells, model.grid_size) * scale + (*view[:2], *view[:2]))
    boxes = torch.from_numpy(np.concatenate(parts)).float().to(encoded.device)
    shares = Boxes(boxes).area() / (height * width)
    kept = nms(boxes, shares, _SAME)
    return Boxes(boxes[kept]), shares[kept].clamp(max=1) ** _AREA_POWER


def grouped_boxes(cells: np.ndarray, grid_size: tuple[int, int]) -> np.ndarray:
    """The boxes of all regions that appear while the cells of a grid are merged.

    Args:
        cells: (rows * columns, F), float.
        grid_size: rows and columns.

    Returns:
        (G, 4), XYXY in cells, the smallest regions left out.
    """
    rows, columns = grid_size
    sums, sizes = cells.astype(np.float32), np.ones(len(cells))
    y, x = np.divmod(np.arange(len(cells)), columns)
    boxes = np.stack([x, y, x + 1, y + 1], axis=1).astype(float)
    neighbors: list[set[int]] = [set() for _ in cells]
    for a in range(len(cells)):
        for b in ([a + 1] if x[a] + 1 < columns else []) + (
            [a + columns] if y[a] + 1 < rows else []
        ):
            neighbors[a].add(b)
            neighbors[b].add(a)

    def merge_of(a: int, b: int) -> tuple[float, int, int, float, float]:
        # By how much the spread inside regions grows. The sizes tell outdated entries of the heap.
        apart = sums[a] / sizes[a] - sums[b] / sizes[b]
        cost = float(apart @ apart) * sizes[a] * sizes[b] / (sizes[a] + sizes[b])
        return cost, a, b, sizes[a], sizes[b]

    heap = [merge_of(a, b) for a, others in enumerate(neighbors) for b in others if a < b]
    heapify(heap)
    found = []
    while heap:
        _, a, b, *before = heappop(heap)
        if [sizes[a], sizes[b]] != before:
            continue
        sums[a] += sums[b]
        sizes[a], sizes[b] = sizes[a] + sizes[b], 0
        boxes[a] = [
            *np.minimum(boxes[a, :2], boxes[b, :2]),
            *np.maximum(boxes[a, 2:], boxes[b, 2:]),
        ]
        if sizes[a] >= _MIN_SHARE * len(cells):
            found.append(boxes[a].copy())
        neighbors[a] = (neighbors[a] | neighbors[b]) - {a, b}
        for c in neighbors[a]:
            neighbors[c].discard(b)
            neighbors[c].add(a)
            heappush(heap, merge_of(a, c))
    return np.array(found).reshape(-1, 4)
