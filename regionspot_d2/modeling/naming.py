"""From a question about regions to their names: what is known, what is found, what is kept.

This is the only place where scores become results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Any, NamedTuple, TypeAlias

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import log_first_n
from torch import Tensor

from .interfaces import Embedding, Localizer, RegionHead, image_size_of
from .lazy_masks import MaskReader, shared_masks
from .prompts import Prompts

# From places of regions (K,) to the logits of their masks, (K, 1, h, w).
LogitReader: TypeAlias = Callable[[Tensor], Tensor]
# Boxes of point prompts are read off masks of this long side, in pixels.
_POINT_BOX_SIDE = 256
# Regions whose mask logits are read at a time: 64 MB of SAM's.
_MASK_CHUNK = 256
# Pairs of a region and a name that are scored at a time: 64 MB of logits. All of 100,000 regions
# and 10,000 names would take 4 GB, several times over.
MAX_PAIRS_TOGETHER = 2**24


@dataclass(frozen=True)
class EncodedImages:
    """What the frozen encoders know of images.

    Attributes:
        images: RGB, 0..255, each (3, H, W) of its own size.
        image_tokens: (B, L, W) of the vision-language model.
    """

    images: tuple[Tensor, ...]
    image_tokens: Tensor
    localizer: Localizer = field(repr=False)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(H, W) of each image."""
        return [image_size_of(image) for image in self.images]

    @cached_property
    def embeddings(self) -> list[Embedding]:
        """What the localizer knows of each image, found out when it is first needed.

        Training from cached tokens never needs it, nor does a head that reads no mask tokens until
        masks are asked for.
        """
        return self.localizer.encode_images(list(self.images))


@dataclass(frozen=True)
class Answer:
    """What the model finds out about the regions of one image, whatever the vocabulary.

    Attributes:
        image_size: (H, W) of the image.
        embeddings: (R, D), the regions in text space, rows of unit length.
        boxes: R boxes, XYXY, pixels of the image.
        mask_logits: reads the localizer's, or None.
    """

    image_size: tuple[int, int]
    embeddings: Tensor
    boxes: Boxes
    mask_logits: LogitReader | None = field(repr=False)
    localizer: Localizer = field(repr=False)

    def masks(self, regions: Tensor, size: tuple[int, int]) -> Tensor:
        """The masks of some regions, by their places (K,), at a size (H, W): (K, H, W), bool."""
        assert self.mask_logits is not None
        masks = torch.empty((len(regions), *size), dtype=torch.bool, device=regions.device)
        for part, held in zip(regions.split(_MASK_CHUNK), masks.split(_MASK_CHUNK)):
            logits = self.mask_logits(part)
            held.copy_(self.localizer.full_size_masks(logits, self.image_size, size))
        return masks


@dataclass(frozen=True)
class LocalizedRegions:
    """The regions of one image as the localizer sees them, with mask logits (R, 1, h, w)."""

    tokens: Tensor
    boxes: Boxes
    mask_logits: Tensor | None


def answer_regions(
    encoded: EncodedImages,
    head: RegionHead,
    prompts: Sequence[Prompts],
    *,
    with_masks: bool,
    mask_tokens: Sequence[Tensor] | None,
    max_regions: int,
) -> list[Answer]:
    """What :meth:`RegionSpot.answer` does, for at most ``max_regions`` of an image at a time.

    Self-attention over all of them at once would take the square of their number. More are split
    into groups of equal size; mask logits are then found again when they are read, not held.
    """
    if max(map(len, prompts), default=0) <= max_regions:
        return _answer_together(encoded, head, prompts, mask_tokens, with_masks)
    log_first_n(
        logging.WARNING,
        f"An image has {max(map(len, prompts))} regions, more than MODEL.REGION_HEAD.MAX_REGIONS "
        f"({max_regions}): they are named in groups, and regions of different groups do not see "
        "each other.",
        name=__name__,
        key="caller",
    )
    device = encoded.image_tokens.device
    groups = [
        torch.arange(len(prompt), device=device).tensor_split(
            max(1, ceil(len(prompt) / max_regions))
        )
        for prompt in prompts
    ]
    answers: list[list[Answer]] = [[] for _ in prompts]
    for k in range(max(map(len, groups))):
        rows = [group[k] if k < len(group) else group[0][:0] for group in groups]
        parts = [prompt[places] for prompt, places in zip(prompts, rows)]
        tokens = mask_tokens and [t[places] for t, places in zip(mask_tokens, rows)]
        for found, part in zip(answers, _answer_together(encoded, head, parts, tokens, False)):
            found.append(part)
    return [
        Answer(
            size,
            torch.cat([part.embeddings for part in parts]),
            Boxes.cat([part.boxes for part in parts]),
            _logits_again(encoded, i, prompts[i]) if with_masks else None,
            encoded.localizer,
        )
        for i, (size, parts) in enumerate(zip(encoded.image_sizes, answers))
    ]


def _answer_together(
    encoded: EncodedImages,
    head: RegionHead,
    prompts: Sequence[Prompts],
    mask_tokens: Sequence[Tensor] | None,
    with_masks: bool,
) -> list[Answer]:
    sizes = encoded.image_sizes
    if mask_tokens is None:
        regions = localize(encoded, head, prompts, with_masks=with_masks)
    else:
        regions = [
            LocalizedRegions(tokens, prompt.boxes(size), None)
            for tokens, prompt, size in zip(mask_tokens, prompts, sizes)
        ]
    embeddings = head(
        [found.tokens for found in regions],
        encoded.image_tokens,
        [relative_boxes(found.boxes, size) for found, size in zip(regions, sizes)],
    )
    readers = [None if r.mask_logits is None else r.mask_logits.__getitem__ for r in regions]
    return [
        Answer(size, embedding, found.boxes, reader, encoded.localizer)
        for size, embedding, found, reader in zip(sizes, embeddings, regions, readers)
    ]


def _logits_again(encoded: EncodedImages, i: int, prompts: Prompts) -> LogitReader | None:
    @torch.no_grad()
    def read(regions: Tensor) -> Any:
        rows, places = regions.unique(return_inverse=True)
        found = encoded.localizer.localize(
            encoded.embeddings[i], encoded.image_sizes[i], prompts[rows], with_masks=True
        )
        return found[1] if found[1] is None else found[1][places]

    first = torch.arange(min(1, len(prompts)), device=encoded.image_tokens.device)
    return None if read(first) is None else read  # not every localizer finds masks


def localize(
    encoded: EncodedImages, head: RegionHead, prompts: Sequence[Prompts], *, with_masks: bool
) -> list[LocalizedRegions]:
    """Runs the localizer's decoder on the regions of each image, if head or masks need it."""
    found = []
    for i, (prompt, size) in enumerate(zip(prompts, encoded.image_sizes)):
        # The box of a point is that of its mask.
        needs_masks = with_masks or prompt.boxes_need_masks
        masks = logits = None
        if needs_masks or head.reads_mask_tokens:
            tokens, logits = encoded.localizer.localize(
                encoded.embeddings[i], size, prompt, with_masks=needs_masks
            )
        else:
            tokens = encoded.image_tokens.new_zeros(len(prompt), encoded.localizer.token_dim)
        if prompt.boxes_need_masks and logits is not None:
            scale = min(1.0, _POINT_BOX_SIDE / max(size))
            height, width = (max(1, round(length * scale)) for length in size)
            masks = encoded.localizer.full_size_masks(logits, size, (height, width))
        boxes = prompt.boxes(size, masks)
        found.append(LocalizedRegions(tokens, boxes, logits if with_masks else None))
    return found


def relative_boxes(boxes: Boxes, image_size: tuple[int, int]) -> Tensor:
    """Boxes in pixels of an image as region heads read them: (R, 4) in 0..1, cut at its edges."""
    inside = Boxes(boxes.tensor.clone())
    inside.clip(image_size)
    return inside.tensor / inside.tensor.new_tensor([*reversed(image_size)] * 2)


class _Pairs(NamedTuple):
    """Pairs of a region and a name, by their places in the flattened (R, C)."""

    places: Tensor
    probabilities: Tensor
    scores: Tensor

    def take(self, which: Tensor) -> _Pairs:
        return _Pairs(*(values[which] for values in self))


def name_regions(
    logits: Tensor | Iterable[Tensor],
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
) -> Instances:
    """Turns the logits of an image's regions into results.

    The score of a region's name is the softmax over the vocabulary, times the score of the region.
    Either each region keeps its ``topk`` best names, in the order of the regions; or the image
    keeps its ``max_pairs`` best pairs of region and name, best first.

    Args:
        logits: (R, C), or its rows in parts, of which only one is held at a time.
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

    Returns:
        ``pred_boxes``, ``scores``, ``pred_classes`` (places in the vocabulary), ``region_index``
        (place of the region in the question) and, with ``masks``, ``pred_masks`` (bool).
    """
    first = keep_before_region_score
    kept: list[_Pairs] = []
    start = classes = 0
    for part in [logits] if isinstance(logits, Tensor) else logits:
        rows, classes = part.shape
        probabilities = scores = part.softmax(1)
        if region_scores is not None:
            scores = scores * region_scores[start : start + rows, None]
        places = torch.arange(scores.numel(), device=scores.device)
        pairs = _Pairs(places, probabilities.flatten(), scores.flatten())
        # A pair that is not among the best of its part is not among those of the image.
        if topk is not None:
            pairs = pairs.take(_best_names(scores, topk, score_thresh))
        elif first > 0:
            pairs = _best_pairs(pairs, None, -1, first)
        else:
            pairs = _best_pairs(pairs, score_thresh, max_pairs, 0)
        kept.append(pairs._replace(places=pairs.places + start * classes))
        start += rows
    pairs = _Pairs(*map(torch.cat, zip(*kept)))
    if topk is None:
        pairs = _best_pairs(pairs, score_thresh, max_pairs, first)
    regions = pairs.places // max(classes, 1)
    found = Instances(image_size)
    found.pred_boxes = Boxes(boxes.tensor[regions])
    found.scores = pairs.scores
    found.pred_classes = pairs.places % max(classes, 1)
    found.region_index = regions
    if output_size is not None:
        found = detector_postprocess(found, *output_size)
    if masks is not None:
        found.pred_masks = shared_masks(masks, found.region_index, found.image_size)
    return found


def _best_names(scores: Tensor, topk: int, score_thresh: float | None) -> Tensor:
    """Places in the flattened scores: each region's best names, region after region."""
    count = min(topk, scores.shape[1])
    best, classes = scores.topk(count, dim=1)
    pairs = (torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]) + classes
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
