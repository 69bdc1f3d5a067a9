"""Named regions that overlap, to one segment per pixel: Detectron2's panoptic format."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeAlias

import torch
from detectron2.structures import Instances
from torch import Tensor

# Which segment each pixel belongs to, and what the segments are.
Panoptic: TypeAlias = tuple[Tensor, list[dict[str, Any]]]


def panoptic_segments(
    found: Instances,
    stuff_classes: Collection[int],
    *,
    overlap_thresh: float = 0.5,
    min_area: int = 64,
    stuff_area_limit: int = 4096,
) -> Panoptic:
    """Gives each pixel to the best of the regions that claim it.

    Args:
        found: one name per region: ``pred_masks``, ``scores`` and ``pred_classes``.
        stuff_classes: classes whose regions become one segment; each other region stays a segment
            of its own.
        overlap_thresh: a region that keeps no more than this share of its pixels is dropped.
        min_area: segments of fewer pixels are dropped.
        stuff_area_limit: the same for segments of stuff.

    Returns:
        ``panoptic_seg``, (H, W) int32 on the device of the masks, 0 where there is no segment; and
        ``segments_info``, best first: "id" (from 1), "isthing", "category_id" (the place in the
        vocabulary), "score" (of stuff: the best of its regions) and "area". Detectron2's
        ``Visualizer.draw_panoptic_seg_predictions`` draws them with metadata whose
        ``thing_classes`` and ``stuff_classes`` are both the vocabulary.
    """
    seg = torch.zeros(found.image_size, dtype=torch.int32, device=found.scores.device)
    segments: list[dict[str, Any]] = []
    of_stuff: dict[int, dict[str, Any]] = {}
    order = found.scores.argsort(descending=True, stable=True)
    # One by one: there may be more masks than memory.
    for mask, row in zip(found.pred_masks[order], order.tolist()):
        free = mask.to(seg.device) & (seg == 0)
        name, area = int(found.pred_classes[row]), int(free.sum())
        if area == 0 or area <= overlap_thresh * int(mask.sum()):
            continue
        segment = of_stuff.get(name)
        if segment is None:
            segment = {
                "id": len(segments) + 1,
                "isthing": name not in stuff_classes,
                "category_id": name,
                "score": float(found.scores[row]),
                "area": 0,
            }
            segments.append(segment)
            if not segment["isthing"]:
                of_stuff[name] = segment
        segment["area"] += area
        seg[free] = segment["id"]
    kept = [s for s in segments if s["area"] >= (min_area if s["isthing"] else stuff_area_limit)]
    numbers = seg.new_zeros(len(segments) + 1)
    for number, segment in enumerate(kept, start=1):
        numbers[segment["id"]] = number
        segment["id"] = number
    return numbers[seg.long()], kept
