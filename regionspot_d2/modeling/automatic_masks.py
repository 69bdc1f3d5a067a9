"""Regions without prompts: the masks that a localizer finds under a grid of points.

The grid and the filters are those of segment-anything's automatic mask generator, for any
localizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from detectron2.layers import nms
from detectron2.structures import Boxes, Instances
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils import amg
from torch import Tensor

from .interfaces import Embedding, Localizer, image_size_of

if TYPE_CHECKING:
    from .everything import Search

# The numbers that ``SamAutomaticMaskGenerator`` takes, and its defaults, made for SAM ViT-H.
AUTOMATIC_MASK_SETTINGS: dict[str, int | float] = {
    name: parameter.default
    for name, parameter in signature(SamAutomaticMaskGenerator).parameters.items()
    if isinstance(parameter.default, int | float)
}
# Of the masks of the points that are decoded together.
_MAX_PIXELS = 2**26


class FoundRegions(NamedTuple):
    """Regions that nobody asked for, best first.

    Attributes:
        boxes: R boxes, XYXY, pixels of the image. A box encloses all pixels of its mask.
        scores: (R,) in 0..1, how sure the source is that this is a region.
        tokens: (R, T) mask tokens, or None where no localizer was asked.
        mask_logits: (R, 1, h, w), or None as well.
    """

    boxes: Boxes
    scores: Tensor
    tokens: Tensor | None = None
    mask_logits: Tensor | None = None


@torch.no_grad()
def regions_of_points(
    localizer: Localizer,
    embedding: Embedding,
    image_size: tuple[int, int],
    device: torch.device,
    search: Search,
) -> FoundRegions:
    """Finds the regions under a grid of points of an image that has been encoded.

    Of SAM's masks for a point it takes the one whose token region heads are trained on, not the
    three that SAM makes where a point may mean a part or the whole.

    Args:
        localizer: decodes the points.
        embedding: of the image, from the localizer.
        image_size: (H, W).
        device: of the embedding.
        search: the grid and the filters.

    Raises:
        ValueError: the localizer finds no masks.
    """
    settings = dict(
        AUTOMATIC_MASK_SETTINGS,
        pred_iou_thresh=search.pred_iou_thresh,
        stability_score_thresh=search.stability_thresh,
        box_nms_thresh=search.box_nms_thresh,
    )
    grid = _Grid(amg.build_point_grid(search.points_per_side), image_size)
    found = _regions_of_grid(localizer, embedding, device, grid, settings)
    found = found.at(found.scores.argsort(descending=True, stable=True))
    boxes = Boxes(_enclosing(found.boxes))
    return FoundRegions(boxes, found.scores, found.tokens, found.mask_logits)


@torch.no_grad()
def automatic_boxes(
    localizer: Localizer, image: Tensor, *, with_masks: bool = False, **settings: Any
) -> Instances:
    """Finds the regions of an image that a localizer can segment.

    The image is encoded once, and with ``crop_n_layers`` each of its crops. Points are decoded to
    all masks that the localizer has for them.

    Args:
        localizer: any that finds masks.
        image: (3, H, W) RGB, 0..255.
        with_masks: whether to return the masks too.
        **settings: some of ``AUTOMATIC_MASK_SETTINGS``.

    Returns:
        On the CPU, best first: ``pred_boxes`` (XYXY, pixels of the image), ``scores`` (predicted
        IoU x stability, in 0..1) and, if asked for, ``pred_masks`` (bool, R x H x W). A box
        encloses all pixels of its mask, as COCO's do; segment-anything's ends one pixel earlier.

    Raises:
        TypeError: there is no localizer, or SAM does not have one of the settings.
        ValueError: the localizer finds no masks.
    """
    if not isinstance(localizer, Localizer):
        raise TypeError(f"MODEL.LOCALIZER.NAME: {type(localizer).__name__} is no Localizer.")
    if unknown := settings.keys() - AUTOMATIC_MASK_SETTINGS.keys():
        raise TypeError(
            f"{unknown.pop()} is no setting of automatic masks; these are: "
            f"{', '.join(AUTOMATIC_MASK_SETTINGS)}."
        )
    settings = {**AUTOMATIC_MASK_SETTINGS, **settings}
    size = image_size_of(image)
    device = next(chain(localizer.parameters(), localizer.buffers()), image).device
    pixels = image.detach().clamp(0, 255).to(device, torch.uint8)
    needs_masks = with_masks or settings["min_mask_region_area"] > 0
    parts = []
    for grid in _grids(size, settings):
        x0, y0, x1, y1 = grid.crop
        [embedding] = localizer.encode_images([pixels[:, y0:y1, x0:x1]])
        found = _regions_of_grid(
            localizer, embedding, device, grid, settings, multimask=True, with_logits=needs_masks
        )
        masks = None
        if needs_masks:
            masks = localizer.full_size_masks(found.mask_logits, grid.size).cpu()
            masks = amg.uncrop_masks(masks, grid.crop, *size)
        boxes = amg.uncrop_boxes_xyxy(found.boxes, grid.crop)
        parts.append((boxes.cpu(), found.scores.cpu(), masks, grid.size[0] * grid.size[1]))
    return _joined(size, parts, settings, with_masks)


def _joined(
    size: tuple[int, int],
    parts: Sequence[tuple[Tensor, Tensor, Tensor | None, int]],
    settings: Mapping[str, Any],
    with_masks: bool,
) -> Instances:
    """The regions of an image from boxes, scores, masks and area of each of its crops."""
    boxes, scores = (torch.cat(column) for column in list(zip(*parts))[:2])
    known = [part[2] for part in parts if part[2] is not None]
    masks = torch.cat(known) if known else torch.empty(len(boxes), 0)
    if len(parts) > 1:
        # Of regions that several crops show, that of the smallest is the finest.
        smallest = torch.cat([torch.full((len(part[1]),), 1 / part[3]) for part in parts])
        kept = nms(boxes, smallest, settings["crop_nms_thresh"])
        boxes, scores, masks = boxes[kept], scores[kept], masks[kept]
    if settings["min_mask_region_area"] > 0 and len(boxes):
        thresh = max(settings["box_nms_thresh"], settings["crop_nms_thresh"])
        boxes, masks, kept = _cleaned(masks, settings["min_mask_region_area"], thresh)
        scores = scores[kept]
    order = scores.argsort(descending=True, stable=True)
    regions = Instances(size, pred_boxes=Boxes(_enclosing(boxes[order])), scores=scores[order])
    if with_masks:
        regions.pred_masks = masks[order]
    return regions


def _cleaned(masks: Tensor, min_area: float, nms_thresh: float) -> tuple[Tensor, Tensor, Tensor]:
    """Masks without small holes and islands: their boxes, themselves, and which of them are left.

    Of those that have become the same, one that did not change is left.
    """
    cleaned, unchanged = [], []
    for mask in masks.numpy():
        mask, had_holes = amg.remove_small_regions(mask, min_area, mode="holes")
        mask, had_islands = amg.remove_small_regions(mask, min_area, mode="islands")
        cleaned.append(torch.from_numpy(mask))
        unchanged.append(float(not had_holes and not had_islands))
    masks = torch.stack(cleaned)
    boxes = amg.batched_mask_to_box(masks).float()
    kept = nms(boxes, torch.tensor(unchanged), nms_thresh)
    return boxes[kept], masks[kept], kept


class _Grid:
    """Points on an image or on a crop of it.

    Attributes:
        points: (P, 2) XY in 0..1 of the crop.
        crop: XYXY, pixels of the image.
        size: (H, W) of the crop.
        image_size: (H, W) of the image.
    """

    def __init__(
        self, points: np.ndarray, image_size: tuple[int, int], crop: list[int] | None = None
    ) -> None:
        self.points = points
        self.image_size = image_size
        self.crop = crop or [0, 0, image_size[1], image_size[0]]
        x0, y0, x1, y1 = self.crop
        self.size = y1 - y0, x1 - x0


def _grids(size: tuple[int, int], settings: Mapping[str, Any]) -> list[_Grid]:
    """Those of the whole image and of its crops."""
    layers = settings["crop_n_layers"]
    crops, indices = amg.generate_crop_boxes(size, layers, settings["crop_overlap_ratio"])
    scale = settings["crop_n_points_downscale_factor"]
    points = amg.build_all_layer_point_grids(settings["points_per_side"], layers, scale)
    return [_Grid(points[index], size, crop) for crop, index in zip(crops, indices)]


class _Found(NamedTuple):
    """Columns of R rows. Boxes end at their last pixel, as segment-anything's filters expect."""

    boxes: Tensor
    ranks: Tensor  # which of two that overlap is the better one
    scores: Tensor
    tokens: Tensor
    mask_logits: Tensor

    def at(self, rows: Tensor) -> _Found:
        return _Found(*(column[rows] for column in self))


def _enclosing(boxes: Tensor) -> Tensor:
    """Boxes that end behind their last pixel."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def _regions_of_grid(
    localizer: Localizer,
    embedding: Embedding,
    device: torch.device,
    grid: _Grid,
    settings: Mapping[str, Any],
    *,
    multimask: bool = False,
    with_logits: bool = True,
) -> _Found:
    """The regions of the points that pass, without those that overlap a better one."""
    height, width = grid.size
    places = torch.as_tensor(grid.points * (width, height), dtype=torch.float32, device=device)
    chunk = _MAX_PIXELS // ((3 if multimask else 1) * height * width)
    parts = []
    for points in places.split(max(1, min(settings["points_per_batch"], chunk))):
        decoded = localizer.decode_points(embedding, grid.size, points, multimask=multimask)
        found = _filtered(localizer, grid.size, decoded, settings)
        if not with_logits:
            found = found._replace(mask_logits=found.scores)  # instead of their many megabytes
        parts.append(found)
    found = _Found(*map(torch.cat, zip(*parts)))
    # What a crop cuts off, the whole image shows better.
    edges = [0, 0, grid.image_size[1], grid.image_size[0]]
    found = found.at(~amg.is_box_near_crop_edge(found.boxes, grid.crop, edges))
    return found.at(nms(found.boxes, found.ranks, settings["box_nms_thresh"]))


def _filtered(
    localizer: Localizer,
    size: tuple[int, int],
    decoded: tuple[Tensor, Tensor | None, Tensor | None],
    settings: Mapping[str, Any],
) -> _Found:
    """Those of the decoded regions whose masks are good and stable, and have a pixel."""
    tokens, logits, ious = decoded
    if logits is None:
        raise ValueError(
            f"MODEL.LOCALIZER.NAME: {type(localizer).__name__} finds no masks; look for regions in "
            "views instead."
        )
    rated = logits.new_ones(len(logits)) if ious is None else ious
    if settings["pred_iou_thresh"] > 0:
        good = rated > settings["pred_iou_thresh"]
        tokens, logits, rated = tokens[good], logits[good], rated[good]
    tokens, logits, rated = tokens.float(), logits.float(), rated.float()
    # Resizing is linear, so moved logits give the mask of a moved threshold.
    offset = settings["stability_score_offset"]
    inner, outer = (
        localizer.full_size_masks(logits + move, size).flatten(1).sum(1)
        for move in (-offset, offset)
    )
    stability = inner / outer.clamp(min=1)
    if settings["stability_score_thresh"] > 0:
        good = stability >= settings["stability_score_thresh"]
        tokens, logits, rated, stability = tokens[good], logits[good], rated[good], stability[good]
    masks = localizer.full_size_masks(logits, size)
    boxes = amg.batched_mask_to_box(masks).float()
    # The predicted IoU is a regression and may leave 0..1 a little.
    scores = rated.clamp(0, 1) * stability
    ranks = stability if ious is None else rated
    return _Found(boxes, ranks, scores, tokens, logits).at(masks.flatten(1).any(1))
