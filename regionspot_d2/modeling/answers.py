"""From a question about regions to an answer: what is known of images, what is found out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, TypeAlias

import torch
from detectron2.structures import Boxes
from detectron2.utils.logger import log_first_n
from torch import Tensor

from .encoded import VIEW_BATCH, EncodedImages
from .interfaces import Localizer, RegionHead
from .prompts import Prompts
from .views import (
    View,
    ViewFinder,
    Zoom,
    boxes_in_view,
    crop,
    masks_in_view,
    relative_boxes,
    whole_view,
)

# From places of regions (K,) to the logits of their masks, (K, 1, h, w).
LogitReader: TypeAlias = Callable[[Tensor], Tensor]
# Boxes of point prompts are read off masks of this long side, in pixels.
_POINT_BOX_SIDE = 256
# Regions whose mask logits are read at a time: 64 MB of SAM's.
_MASK_CHUNK = 256


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
    """The regions of one image as the localizer sees them.

    Attributes:
        tokens: (R, T), zeros if the region head reads none.
        boxes: R boxes, XYXY, pixels of the image.
        mask_logits: (R, 1, h, w), if they were asked for.
        head_masks: (R, *mask_size), bool, of the whole image, for a region head that reads masks.
    """

    image_size: tuple[int, int]
    tokens: Tensor
    boxes: Boxes
    mask_logits: Tensor | None = None
    head_masks: Tensor | None = None

    def in_view(self, rows: Tensor, view: View) -> LocalizedRegions:
        """Some of the regions, by their places, with ``head_masks`` of a view of the image."""
        masks = self.head_masks
        if masks is not None:
            masks = masks_in_view(masks[rows], self.image_size, view)
        return LocalizedRegions(self.image_size, self.tokens[rows], self.boxes[rows], None, masks)


def answer_regions(
    encoded: EncodedImages,
    head: RegionHead,
    prompts: Sequence[Prompts],
    *,
    with_masks: bool,
    mask_tokens: Sequence[Tensor] | None,
    max_regions: int,
    zoom: Zoom | None = None,
) -> list[Answer]:
    """What :meth:`RegionSpot.answer` does, for at most ``max_regions`` of an image at a time.

    Self-attention over all of them at once would take the square of their number. More are split
    into groups of equal size; mask logits are then found again when they are read, not held.
    """
    finders = zoom and [
        ViewFinder(zoom, size, len(prompt)) for size, prompt in zip(encoded.image_sizes, prompts)
    ]
    if max(map(len, prompts), default=0) <= max_regions:
        return _answer_together(encoded, head, prompts, mask_tokens, with_masks, finders)
    log_first_n(
        logging.WARNING,
        f"An image has {max(map(len, prompts))} regions, more than MODEL.REGION_HEAD.MAX_REGIONS "
        f"({max_regions}): they are named in groups, and regions of different groups do not see "
        "each other.",
        name=__name__,
        key="caller",
    )
    groups = [
        torch.arange(len(prompt), device=encoded.device).tensor_split(
            max(1, ceil(len(prompt) / max_regions))
        )
        for prompt in prompts
    ]
    answers: list[list[Answer]] = [[] for _ in prompts]
    for k in range(max(map(len, groups))):
        rows = [group[k] if k < len(group) else group[0][:0] for group in groups]
        parts = [prompt[places] for prompt, places in zip(prompts, rows)]
        tokens = mask_tokens and [t[places] for t, places in zip(mask_tokens, rows)]
        found = _answer_together(encoded, head, parts, tokens, False, finders)
        for of_image, part in zip(answers, found):
            of_image.append(part)
    return [
        Answer(
            size,
            torch.cat([part.embeddings for part in parts]),
            Boxes.cat([part.boxes for part in parts]),
            logits_again(encoded, i, prompts[i]) if with_masks else None,
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
    finders: Sequence[ViewFinder] | None,
) -> list[Answer]:
    sizes = encoded.image_sizes
    if mask_tokens is None or head.mask_size is not None:
        regions = localize(encoded, head, prompts, with_masks=with_masks)
    else:
        regions = [
            LocalizedRegions(size, tokens, prompt.boxes(size))
            for tokens, prompt, size in zip(mask_tokens, prompts, sizes)
        ]
    if finders is None:
        boxes = [relative_boxes(found.boxes, size) for found, size in zip(regions, sizes)]
        embeddings = _embed(encoded, head, encoded.images, encoded.image_tokens, regions, boxes)
    else:
        embeddings = [
            _embed_in_views(encoded, head, i, found, finder)
            for i, (found, finder) in enumerate(zip(regions, finders))
        ]
    readers = [None if r.mask_logits is None else r.mask_logits.__getitem__ for r in regions]
    return [
        Answer(size, embedding, found.boxes, reader, encoded.localizer)
        for size, embedding, found, reader in zip(sizes, embeddings, regions, readers)
    ]


def _embed(
    encoded: EncodedImages,
    head: RegionHead,
    images: Sequence[Tensor],
    image_tokens: Tensor,
    regions: Sequence[LocalizedRegions],
    boxes: list[Tensor],
) -> list[Tensor]:
    """Runs the head on regions of images, or of views, with whatever it reads."""
    more: dict[str, Any] = {}
    if head.reads_images:
        more["images"] = images
    if head.mask_size is not None:
        more["masks"] = [found.head_masks for found in regions]
    # A head that reads images runs the vision-language model on parts of them.
    with encoded.frozen_context() if head.reads_images else encoded.head_context():
        found = head([found.tokens for found in regions], image_tokens, boxes, **more)
    return [embedding.float() for embedding in found]


def _embed_in_views(
    encoded: EncodedImages, head: RegionHead, i: int, regions: LocalizedRegions, finder: ViewFinder
) -> Tensor:
    """Embeds the regions of image ``i``, each as it is seen in its view: (R, D).

    To the head a view is an image: the regions of one view attend to each other. Mask tokens stay
    those of the whole image, which knows more of what a region is a part of.
    """
    views, view_of_region = finder(regions.boxes)
    # Without regions the head answers to the whole image, with gradients for all its parameters.
    views = views or [whole_view(encoded.image_sizes[i])]
    members = [(view_of_region == place).nonzero()[:, 0] for place in range(len(views))]
    image_tokens = encoded.view_tokens(i, views)
    found: list[Tensor] = []
    for start in range(0, len(views), VIEW_BATCH):
        batch = range(start, min(start + VIEW_BATCH, len(views)))
        inside = [regions.in_view(members[place], views[place]) for place in batch]
        found += _embed(
            encoded,
            head,
            [crop(encoded.images[i], views[place]) for place in batch],
            torch.stack([image_tokens[place] for place in batch]),
            inside,
            [boxes_in_view(part.boxes, views[place]) for part, place in zip(inside, batch)],
        )
    # Back into the order in which the regions were asked for.
    return torch.cat(found)[torch.cat(members).argsort()]


def logits_again(encoded: EncodedImages, i: int, prompts: Prompts) -> LogitReader | None:
    """Mask logits of regions of image ``i``, found when they are read; None if there are none."""

    @torch.no_grad()
    def read(regions: Tensor) -> Any:
        rows, places = regions.unique(return_inverse=True)
        found = encoded.localize(i, prompts[rows], with_masks=True)
        return found[1] if found[1] is None else found[1][places]

    first = torch.arange(min(1, len(prompts)), device=encoded.device)
    return None if read(first) is None else read  # not every localizer finds masks


def localize(
    encoded: EncodedImages, head: RegionHead, prompts: Sequence[Prompts], *, with_masks: bool
) -> list[LocalizedRegions]:
    """Runs the localizer's decoder on the regions of each image, if head or masks need it."""
    found = []
    for i, (prompt, size) in enumerate(zip(prompts, encoded.image_sizes)):
        # The box of a point is that of its mask, unless the localizer's masks are often too small.
        by_masks = prompt.boxes_need_masks and encoded.localizer.masks_are_fine
        needs_masks = with_masks or by_masks or head.mask_size is not None
        masks = logits = head_masks = None
        if needs_masks or head.needs_localizer:
            tokens, logits = encoded.localize(i, prompt, with_masks=needs_masks)
        else:
            width = encoded.localizer.token_dim
            tokens = encoded.vision_language.logit_scale.new_zeros(len(prompt), width)
        if by_masks and logits is not None:
            scale = min(1.0, _POINT_BOX_SIDE / max(size))
            height, width = (max(1, round(length * scale)) for length in size)
            masks = encoded.localizer.full_size_masks(logits, size, (height, width))
        if head.mask_size is not None:
            if logits is None:
                names = f"{type(head).__name__} reads masks; {type(encoded.localizer).__name__}"
                raise ValueError(f"{names} (MODEL.LOCALIZER.NAME) finds none: choose another.")
            head_masks = encoded.localizer.full_size_masks(logits, size, head.mask_size)
        boxes = prompt.boxes(size, masks)
        kept = logits if with_masks else None
        found.append(LocalizedRegions(size, tokens, boxes, kept, head_masks))
    return found


def attention_maps(
    encoded: EncodedImages, head: RegionHead, prompts: Prompts, max_regions: int
) -> Tensor:
    """What :meth:`RegionSpot.attention` does."""
    if len(prompts) > max_regions:
        limit = f"{max_regions} (MODEL.REGION_HEAD.MAX_REGIONS)"
        raise ValueError(f"There are {len(prompts)} regions; ask for at most {limit}.")
    [regions] = localize(encoded, head, [prompts], with_masks=False)
    with encoded.head_context():
        maps = head.attention(regions.tokens, encoded.image_tokens).float()
    model = encoded.vision_language
    maps = maps[:, model.num_prefix_tokens :]
    return maps.reshape(len(maps), *model.grid_size)
