"""Every region of an image, once: found without prompts, named, and free of duplicates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from detectron2.layers import nms
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.structures.boxes import pairwise_intersection
from torch import Tensor

from ..arrays import check_number
from .answers import LogitReader, logits_again
from .automatic_masks import FoundRegions, regions_of_points
from .encoded import EncodedImages
from .grouping import GROUPING_VIEWS, regions_of_tokens
from .prompts import BoxPrompts
from .questions import as_count
from .scoring import Scoring
from .words import Words

if TYPE_CHECKING:
    from .regionspot import RegionSpot

# A region is a part of a better one of its name if so much of it lies inside, unless it is so much
# smaller that it may be another object, as a person in front of a person.
_INSIDE, _MUCH_SMALLER = 0.8, 1 / 30
# Boxes found in views are coarse: two of one name that touch are most often one object.
_GROUPED_IOU, _GROUPED_INSIDE = 0.15, 0.5
# Regions that were found in views are named in them too, with so much around them.
_GROUPING_ZOOM = 1.5
_MAX_POINTS_PER_SIDE = 1000


@dataclass(frozen=True)
class Search:
    """How regions are looked for. The numbers are those of SAM's automatic mask generator.

    Attributes:
        by_masks: True asks the localizer, by a grid of points; False groups what the
            vision-language model sees in a few views. None asks localizers whose masks are fine.
        points_per_side: of the grid; as many columns as rows.
        pred_iou_thresh: masks of which the localizer expects a lower IoU are dropped.
        stability_thresh: masks whose area changes more with the threshold are dropped.
        box_nms_thresh: of two regions with a larger IoU the worse one is dropped.
        name_nms_thresh: the same among regions of one name, where masks were found.

    Raises:
        ValueError: a number makes no sense; the message names it.
    """

    by_masks: bool | None = None
    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_thresh: float = 0.95
    box_nms_thresh: float = 0.7
    name_nms_thresh: float = 0.5

    def __post_init__(self) -> None:
        if not (self.by_masks is None or isinstance(self.by_masks, bool)):
            raise ValueError(f"by_masks is {self.by_masks!r:.60}; True, False or None is expected.")
        if as_count(self.points_per_side, "points_per_side", "point") > _MAX_POINTS_PER_SIDE:
            raise ValueError(
                f"points_per_side is {self.points_per_side}; at most {_MAX_POINTS_PER_SIDE} is "
                "expected: each point of the grid is decoded."
            )
        for name in ("pred_iou_thresh", "stability_thresh", "box_nms_thresh", "name_nms_thresh"):
            # A negative threshold lets every mask pass, and drops every box that overlaps another.
            low = 0 if "nms" in name else -math.inf
            check_number(vars(self)[name], name, low, 1)


@torch.no_grad()
def name_everything(
    model: RegionSpot,
    encoded: EncodedImages,
    words: Words,
    search: Search,
    *,
    scoring: Scoring | None = None,
    with_masks: bool,
    topk: int = 1,
    score_thresh: float = 0.0,
    max_regions: int | None = 100,
    zoom: float | None = None,
    output_size: tuple[int, int] | None = None,
) -> Instances:
    """Finds the regions of one encoded image and names them.

    Returns:
        As :func:`~regionspot_d2.modeling.naming.name_regions` with ``topk``, best region first;
        ``region_index`` counts the regions in this order. A score is that of the name times that
        of the region. Of regions that share a name and a place the best is left.
    """
    if not isinstance(search, Search):
        raise ValueError(f"search is of the type {type(search).__name__}; a Search is expected.")
    check_number(score_thresh, "score_thresh", -math.inf, 1)
    by_masks = model.localizer.masks_are_fine if search.by_masks is None else search.by_masks
    if by_masks:
        place = encoded.embeddings[0], encoded.image_sizes[0], encoded.device
        with encoded.frozen_context():
            regions = regions_of_points(model.localizer, *place, search)
    else:
        regions = FoundRegions(*regions_of_tokens(encoded))
        zoom = (model.zoom or _GROUPING_ZOOM) if zoom is None else zoom
    prompts = BoxPrompts(regions.boxes)
    [answer] = model.answer(
        encoded,
        [prompts],
        with_masks=False,
        mask_tokens=None if regions.tokens is None else [regions.tokens],
        zoom=zoom,
        # The views in which the regions were found have been encoded already.
        max_views=None if by_masks else GROUPING_VIEWS,
    )
    rules = {"scoring": scoring or model.scoring, "region_scores": regions.scores}
    best = model.name(answer, words, topk=1, **rules)
    if best.has("group_index"):  # duplicates are told by the names of the first group
        best = best[best.group_index == 0]
    boxes, scores = best.pred_boxes.tensor, best.scores
    rule = (search.name_nms_thresh, _INSIDE) if by_masks else (_GROUPED_IOU, _GROUPED_INSIDE)
    kept = distinct_regions(best.pred_boxes, scores, best.pred_classes, *rule)
    kept = kept[nms(boxes[kept], scores[kept], search.box_nms_thresh)]
    kept = kept[best.scores[kept] > score_thresh][:max_regions]
    answer = replace(answer, embeddings=answer.embeddings[kept], boxes=answer.boxes[kept])
    read: LogitReader | None = None
    if with_masks and regions.mask_logits is not None:
        read = regions.mask_logits.__getitem__
    elif with_masks and regions.tokens is None:  # boxes that no localizer has seen
        read = logits_again(encoded, 0, prompts)
    if read is not None:
        answer = replace(answer, mask_logits=lambda places: read(kept[places]))
    rules["region_scores"] = regions.scores[kept]
    return model.name(answer, words, topk=topk, output_size=output_size, **rules)


def distinct_regions(
    boxes: Boxes,
    scores: Tensor,
    classes: Tensor,
    iou_thresh: float,
    inside_thresh: float = _INSIDE,
) -> Tensor:
    """Drops regions that a better one of the same name overlaps or holds as a part.

    Args:
        boxes: R boxes.
        scores, classes: (R,).
        iou_thresh: a larger IoU with a better region is too much.
        inside_thresh: the same for the share of a region that lies inside a better one, which is
            larger, but not many times.

    Returns:
        The places of those that are left, (K,), best first.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, classes = boxes[order], classes[order]
    area = boxes.area()
    inside = pairwise_intersection(boxes, boxes) > inside_thresh * area
    part = inside & (area > _MUCH_SMALLER * area[:, None])
    again = part | (pairwise_iou(boxes, boxes) > iou_thresh)
    again = (again & (classes[:, None] == classes)).triu(1).cpu()
    left = torch.ones(len(order), dtype=torch.bool)
    for place, worse in enumerate(again):
        if left[place]:
            left &= ~worse
    return order[left.to(order.device)]
