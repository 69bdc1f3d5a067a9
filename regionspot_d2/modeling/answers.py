"""What the model knows of images before it is asked, and what it finds out about their regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from detectron2.structures import Boxes
from torch import Tensor

from .interfaces import Embedding, Localizer, RegionHead, image_size_of
from .prompts import Prompts

# Boxes of point prompts are read off masks of this long side, in pixels.
_POINT_BOX_SIDE = 256


@dataclass(frozen=True)
class EncodedImages:
    """What the frozen encoders know of images.

    The localizer's part is computed when it is first needed, and kept: training from cached tokens
    never needs it, nor does a head that reads no mask tokens until masks are asked for.

    Attributes:
        images: RGB, 0..255, each (3, H, W) of its own size.
        image_tokens: (B, L, W) of the vision-language model.
        localizer: encodes the images.
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
        """What the localizer knows of each image."""
        return self.localizer.encode_images(list(self.images))


@dataclass(frozen=True)
class Answer:
    """What the model finds out about the regions of one image, whatever the vocabulary.

    Attributes:
        image_size: (H, W) of the image.
        embeddings: (R, D), the regions in text space, rows of unit length.
        boxes: R boxes, XYXY, pixels of the image.
        mask_logits: (R, 1, h, w) of the localizer, or None.
        localizer: brings the masks to full size.
    """

    image_size: tuple[int, int]
    embeddings: Tensor
    boxes: Boxes
    mask_logits: Tensor | None
    localizer: Localizer = field(repr=False)

    def masks(self, regions: Tensor, size: tuple[int, int]) -> Tensor:
        """The masks of some regions, by their places (K,), at a size (H, W): (K, H, W), bool."""
        assert self.mask_logits is not None
        return self.localizer.full_size_masks(self.mask_logits[regions], self.image_size, size)


@dataclass(frozen=True)
class LocalizedRegions:
    """The regions of one image as the localizer sees them.

    Attributes:
        tokens: (R, T); zeros for a head that reads none.
        boxes: R boxes, XYXY, pixels of the image.
        mask_logits: (R, 1, h, w), or None if nothing asked for them.
    """

    tokens: Tensor
    boxes: Boxes
    mask_logits: Tensor | None


def localize(
    encoded: EncodedImages, head: RegionHead, prompts: Sequence[Prompts], *, with_masks: bool
) -> list[LocalizedRegions]:
    """Runs the localizer's decoder, as far as the head and the masks need it.

    Args:
        encoded: the images.
        head: says whether it reads mask tokens.
        prompts: the regions of each image.
        with_masks: False skips whatever only masks need.
    """
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
    """Boxes in pixels of an image as region heads read them: (R, 4) in 0..1 of it, inside it."""
    height, width = image_size
    inside = Boxes(boxes.tensor.clone())
    inside.clip(image_size)
    return inside.tensor / torch.tensor([width, height] * 2).to(inside.tensor)
