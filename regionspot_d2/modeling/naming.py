"""Scores to results: which names are kept, in which order.

This is the only place where scores become results.
"""

from __future__ import annotations

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .lazy_masks import MaskReader, nearest_masks, shared_masks


def name_regions(
    logits: Tensor,
    boxes: Boxes,
    image_size: tuple[int, int],
    *,
    region_scores: Tensor | None = None,
    topk: int | None = None,
    score_thresh: float | None = None,
    max_pairs: int = -1,
    keep_before_region_score: int = 0,
    output_size: tuple[int, int] | None = None,
    masks: MaskReader | None = None,
    masks_by_nearest: bool = False,
) -> Instances:
    """Turns the logits of an image's regions into results.

    The score of a region's name is the softmax over the vocabulary, times the score of the region.
    Either each region keeps its ``topk`` best names, in the order of the regions; or the image
    keeps its ``max_pairs`` best pairs of region and name, best first.

    Args:
        logits: (R, C).
        boxes: R boxes, XYXY, pixels of the image, which is of ``image_size`` (H, W).
        region_scores: (R,), how sure the source of the regions was of each; by default 1.
        topk: names per region; None takes the best pairs of the image.
        score_thresh: pairs that do not score more are dropped.
        max_pairs: pairs that the image keeps; negative keeps all. Read where ``topk`` is None.
        keep_before_region_score: if positive, only so many pairs, by softmax, go on to be
            multiplied by the score of their region, the order of the published code. Read where
            ``topk`` is None.
        output_size: (H, W) to scale the results to; boxes without area are then dropped, as
            Detectron2 does for any detector. None leaves them as they are.
        masks: reads the masks of the regions that are left, at the size of the results.
        masks_by_nearest: makes masks at ``image_size`` and takes their nearest pixels, as the
            published code does.

    Returns:
        ``pred_boxes``, ``scores``, ``pred_classes`` (places in the vocabulary), ``region_index``
        (place of the region in the question) and, with ``masks``, ``pred_masks`` (bool).
    """
    probabilities = logits.softmax(1)
    scores = probabilities if region_scores is None else probabilities * region_scores[:, None]
    if topk is None:
        pairs = _best_pairs(
            probabilities, scores, score_thresh, max_pairs, keep_before_region_score
        )
    else:
        pairs = _best_names(scores, topk, score_thresh)
    regions = pairs // max(logits.shape[1], 1)
    found = Instances(image_size)
    found.pred_boxes = Boxes(boxes.tensor[regions])
    found.scores = scores.flatten()[pairs]
    found.pred_classes = pairs % max(logits.shape[1], 1)
    found.region_index = regions
    if output_size is not None:
        found = detector_postprocess(found, *output_size)
    if masks is not None:
        masks = nearest_masks(masks, image_size) if masks_by_nearest else masks
        found.pred_masks = shared_masks(masks, found.region_index, found.image_size)
    return found


def _best_names(scores: Tensor, topk: int, score_thresh: float | None) -> Tensor:
    """Places in the flattened scores: each region's best names, region after region."""
    count = min(topk, scores.shape[1])
    best, classes = scores.topk(count, dim=1)
    pairs = (torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]) + classes
    return pairs.flatten() if score_thresh is None else pairs[best > score_thresh]


def _best_pairs(
    probabilities: Tensor, scores: Tensor, score_thresh: float | None, count: int, first: int
) -> Tensor:
    """Places in the flattened scores: the best pairs of the image, best first."""
    probabilities, scores = probabilities.flatten(), scores.flatten()
    pairs = torch.arange(len(scores), device=scores.device)
    if 0 < first < len(pairs):
        pairs = probabilities.topk(first).indices
    if score_thresh is not None:
        pairs = pairs[scores[pairs] > score_thresh]
    if 0 <= count < len(pairs):
        return pairs[scores[pairs].topk(count).indices]
    return pairs[scores[pairs].sort(descending=True, stable=True).indices]
