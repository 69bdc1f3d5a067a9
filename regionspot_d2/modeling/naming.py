"""Scores to results: which names are kept, in which order.

This is the only place where scores become results.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .lazy_masks import MaskReader, nearest_masks, shared_masks
from .members import Vocabulary
from .scoring import Scoring, scores_of_names

# Pairs of a region and a name that are scored at a time: 64 MB of logits. All of 100,000 regions
# and 10,000 names would take 4 GB, several times over.
MAX_PAIRS_TOGETHER = 2**24


class _Pairs(NamedTuple):
    """Pairs of a region and a name, by their places in the flattened (R, C)."""

    places: Tensor
    probabilities: Tensor
    scores: Tensor

    @classmethod
    def of(cls, probabilities: Tensor, scores: Tensor, places: Tensor) -> _Pairs:
        found = scores.flatten()[places]
        same = probabilities is scores
        return cls(places, found if same else probabilities.flatten()[places], found)

    def take(self, which: Tensor) -> _Pairs:
        return _Pairs(*(values[which] for values in self))


def name_regions(
    logits: Tensor | Iterable[Tensor],
    boxes: Boxes,
    image_size: tuple[int, int],
    *,
    vocabulary: Vocabulary | None = None,
    scoring: Scoring | None = None,
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

    The score of a region's name is the softmax over the vocabulary, or what else ``scoring`` says,
    times the score of the region. Either each region keeps its ``topk`` best names of each group
    of the vocabulary, in the order of the regions; or the image keeps its ``max_pairs`` best pairs
    of region and name, best first.

    Args:
        logits: (R, M), of the members of the vocabulary; or its rows in parts, of which only one
            is held at a time.
        boxes: R boxes, XYXY, pixels of the image, which is of ``image_size`` (H, W).
        vocabulary: by default one whose members are its names.
        scoring: what a score is. A name that scores less than its threshold, before the score of
            the region comes in, is class -1; where ``topk`` is None, the pair is dropped.
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
        (place of the region in the question), with several groups ``group_index`` (place of the
        group) and, with ``masks``, ``pred_masks`` (bool).
    """
    first, scoring = keep_before_region_score, scoring or Scoring()
    limit = _least_score(vocabulary, scoring)
    kept: list[_Pairs] = []
    start = classes = 0
    for part in [logits] if isinstance(logits, Tensor) else logits:
        _check_finite(part)
        probabilities = scores = scores_of_names(part, vocabulary, scoring)
        rows, classes = scores.shape
        if region_scores is not None:
            scores = scores * region_scores[start : start + rows, None]
        # A pair that is not among the best of its part is not among those of the image.
        if topk is not None:
            places = _best_names(scores, topk, score_thresh, vocabulary)
            pairs = _Pairs.of(probabilities, scores, places)
        else:
            pairs = _Pairs.of(probabilities, scores, _passing(probabilities, limit))
            cut = (None, -1, first) if first > 0 else (score_thresh, max_pairs, 0)
            pairs = _best_pairs(pairs, *cut)
        kept.append(pairs._replace(places=pairs.places + start * classes) if start else pairs)
        start += rows
    pairs = _Pairs(*map(torch.cat, zip(*kept))) if len(kept) != 1 else kept[0]
    if topk is None:
        pairs = _best_pairs(pairs, score_thresh, max_pairs, first)
    regions = pairs.places // max(classes, 1)
    found = Instances(image_size)
    found.pred_boxes = Boxes(boxes.tensor[regions])
    found.scores = pairs.scores
    found.pred_classes = pairs.places % max(classes, 1)
    found.region_index = regions
    if vocabulary is not None and len(vocabulary.groups) > 1:
        found.group_index = _group_index(found.pred_classes, vocabulary)
    if limit is not None:
        found.pred_classes = found.pred_classes.masked_fill(pairs.probabilities < limit, -1)
        found.scores = found.scores.clamp(min=0)
    if output_size is not None:
        found = detector_postprocess(found, *output_size)
    if masks is not None:
        masks = nearest_masks(masks, image_size) if masks_by_nearest else masks
        found.pred_masks = shared_masks(masks, found.region_index, found.image_size)
    return found


def _check_finite(logits: Tensor) -> None:
    """Raises a ValueError for what is not a number: it would be the best of all scores."""
    if not logits.isfinite().all():
        raise ValueError(
            "Regions are compared with names by what is not a number: the weights of the model "
            "are damaged, or do not fit MODEL.PRECISION."
        )


def _least_score(vocabulary: Vocabulary | None, scoring: Scoring) -> float | None:
    """What a name must score to be given; None if every name may be."""
    deep = vocabulary is not None and vocabulary.parents
    return scoring.threshold if scoring.threshold > 0 or deep else None


def _group_index(classes: Tensor, vocabulary: Vocabulary) -> Tensor:
    ends = [group.names.stop for group in vocabulary.groups]
    return torch.bucketize(classes, torch.tensor(ends, device=classes.device), right=True)


def _passing(probabilities: Tensor, limit: float | None) -> Tensor:
    """Places of the pairs whose names may be given, in the flattened (R, C)."""
    if limit is None:
        return torch.arange(probabilities.numel(), device=probabilities.device)
    return (probabilities.flatten() >= limit).nonzero().flatten()


def _best_names(
    scores: Tensor, topk: int, score_thresh: float | None, vocabulary: Vocabulary | None
) -> Tensor:
    """Places in the flattened scores: each region's best names, region after region."""
    rows, classes = scores.shape
    if vocabulary is None or len(vocabulary.groups) == 1:
        best, names = scores.topk(min(topk, classes), dim=1)
    else:
        groups = [scores[:, g.names.start : g.names.stop] for g in vocabulary.groups]
        parts = [group.topk(min(topk, group.shape[1]), dim=1) for group in groups]
        best = torch.cat([part.values for part in parts], dim=1)
        starts = [group.names.start for group in vocabulary.groups]
        names = torch.cat([part.indices + start for part, start in zip(parts, starts)], dim=1)
    pairs = torch.arange(rows, device=scores.device)[:, None] * classes + names
    return pairs.flatten() if score_thresh is None else pairs[best > score_thresh]


def _best_pairs(pairs: _Pairs, score_thresh: float | None, count: int, first: int) -> _Pairs:
    """The best of some pairs, best first."""
    if 0 < first < len(pairs.places):
        pairs = pairs.take(pairs.probabilities.topk(first).indices)
    if score_thresh is not None:
        pairs = pairs.take(pairs.scores > score_thresh)
    if 0 <= count < len(pairs.places):
        return pairs.take(pairs.scores.topk(count).indices)
    return pairs.take(pairs.scores.sort(descending=True, stable=True).indices)
