"""The three parts of the model as interfaces: localizer, vision-language model, region head.

A new part is a class with one of these interfaces, registered under a name that the config gives.
What a part can do or needs is a property here, never found out by looking at an object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import torch
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from .compiling import Compilable
from .frozen import FrozenModule
from .prompts import PointPrompts, Prompts


class _Registry(Registry):
    """Detectron2's, whose ``get`` tells an unknown name as any other wrong value of a config."""

    def get(self, name: str) -> Any:
        if name not in self:
            known = ", ".join(key for key, _ in self)
            raise ValueError(f"MODEL.{self._name}.NAME is {name!r:.60}; it must be one of {known}.")
        return super().get(name)


# Built as ``get(name)(cfg)``, region heads as ``get(name)(cfg, localizer, vision_language)``.
LOCALIZER_REGISTRY = _Registry("LOCALIZER")
VISION_LANGUAGE_REGISTRY = _Registry("VISION_LANGUAGE")
REGION_HEAD_REGISTRY = _Registry("REGION_HEAD")

# What a localizer knows of an image. Only the localizer that made it may look inside.
Embedding: TypeAlias = Any


def _required() -> Any:
    """An attribute that a class must define, or it cannot be built."""
    return property(abstractmethod(lambda self: None))


class Localizer(FrozenModule, Compilable, ABC):
    """Images and prompts in, one mask token per region out, and masks where they are wanted.

    Attributes:
        token_dim: width T of a mask token.
        masks_are_fine: whether its masks tell more than the box they came from.
        identity: names its tokens in checkpoints, for heads do not carry over to others; "" stands
            for the name of the class.
    """

    token_dim: int = _required()
    masks_are_fine: bool = True
    identity: str = ""

    @abstractmethod
    def encode_images(self, images: list[Tensor]) -> list[Embedding]:
        """Encodes images, RGB, 0..255, each (3, H, W) of its own size, for any prompts."""

    @abstractmethod
    def decode(
        self,
        embedding: Embedding,
        image_size: tuple[int, int],
        prompts: Prompts,
        *,
        with_masks: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Finds the regions that prompts of one kind ask for on one encoded image.

        Args:
            embedding: of the image, from :meth:`encode_images`.
            image_size: its (H, W).
            prompts: R regions, pixels of the image. R may be 0.
            with_masks: False skips whatever only masks need.

        Returns:
            Mask tokens (R, T), and mask logits (R, 1, h, w) or None.
        """

    def decode_points(
        self,
        embedding: Embedding,
        image_size: tuple[int, int],
        points: Tensor,
        *,
        multimask: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Decodes points (R, 2), XY in pixels of the image, each a region of its own.

        Returns:
            What :meth:`decode` returns for them with masks, and the IoU (R,) that the localizer
            predicts for each mask, None where it predicts none. With ``multimask`` a localizer may
            give M masks for each point, its part, its whole: R * M rows, point by point.
        """
        labels = torch.ones(len(points), 1, dtype=torch.int64, device=points.device)
        prompts = PointPrompts(points[:, None], labels)
        return *self.decode(embedding, image_size, prompts, with_masks=True), None

    @abstractmethod
    def full_size_masks(
        self,
        mask_logits: Tensor,
        image_size: tuple[int, int],
        output_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Turns mask logits (R, 1, h, w) into masks of the whole image.

        Args:
            mask_logits: from :meth:`decode`.
            image_size: (H, W) of the image.
            output_size: (H', W') of the masks; by default that of the image.

        Returns:
            (R, H', W'), bool.
        """

    def localize(
        self,
        embedding: Embedding,
        image_size: tuple[int, int],
        prompts: Prompts,
        *,
        with_masks: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`decode` for prompts of mixed kinds, kind by kind."""
        found = [
            self.decode(embedding, image_size, part, with_masks=with_masks)
            for part in prompts.parts
        ]
        if len(found) == 1:
            return found[0]
        masks = [mask for _, mask in found if mask is not None]
        return torch.cat([token for token, _ in found]), torch.cat(masks) if with_masks else None

    def forward(
        self, images: list[Tensor], prompts: Sequence[Prompts], *, with_masks: bool = True
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Encodes images and decodes the prompts of each.

        Returns:
            Per image the mask tokens (R, T), and per image mask logits (R, 1, h, w) or None.
        """
        found = [
            self.localize(embedding, image_size_of(image), prompt, with_masks=with_masks)
            for image, embedding, prompt in zip(images, self.encode_images(images), prompts)
        ]
        masks = [mask for _, mask in found if mask is not None]
        return [token for token, _ in found], masks if with_masks else None


class VisionLanguageModel(FrozenModule, Compilable, ABC):
    """Turns images into grids of tokens and texts into vectors of one space.

    Attributes:
        image_dim: width W of an image token.
        text_dim: width D of a text embedding.
        image_size: height and width that images are squashed to.
        grid_size: rows and columns of the image tokens; the grid covers the whole image.
        num_prefix_tokens: tokens before the grid, 1 for a class token; L of them with the grid.
        templates: prompt templates that suit the text side, with one ``{}`` for the class name.
        logit_scale: a scalar tensor; cosines are multiplied by its exponential.
        logit_bias: a scalar tensor, added to these logits where a score is their sigmoid; None for
            a model that was trained to compare texts (CLIP), not to judge each one (SigLIP).
        fingerprint: changes with the text side; a key for embeddings that are kept on disk.
        resizes_plainly: whether images are squashed bilinearly without antialiasing, which
            ``INPUT.CACHED_IMAGE_SIZE`` can then do ahead of it.
        identity: as that of a :class:`Localizer`.
    """

    image_dim: int = _required()
    text_dim: int = _required()
    image_size: tuple[int, int] = _required()
    grid_size: tuple[int, int] = _required()
    num_prefix_tokens: int = _required()
    templates: tuple[str, ...] = _required()
    logit_scale: Tensor = _required()
    logit_bias: Tensor | None = None
    fingerprint: str = _required()
    identity: str = ""
    resizes_plainly: bool = True

    @abstractmethod
    def forward(self, images: list[Tensor]) -> Tensor:
        """Turns images, RGB, 0..255, each (3, H, W) of its own size, into tokens (B, L, W).

        Prefix tokens come first, then the grid, row by row.
        """

    @abstractmethod
    def project(self, image_tokens: Tensor) -> Tensor:
        """Takes image tokens (B, L, W) to text space: (B, L, D), not normalized."""

    def embed_images(self, images: list[Tensor]) -> Tensor:
        """Embeds whole images, as :meth:`forward` takes them: (B, D), not normalized.

        By default the class token in text space, or without one the mean of the projected grid. A
        model that pools in another way says so here.
        """
        tokens = self(images)
        if self.num_prefix_tokens:
            return self.project(tokens[:, :1])[:, 0]
        return self.project(tokens).mean(1)

    def appearance(self, image_tokens: Tensor) -> Tensor:
        """What of image tokens (..., W) groups cells that belong together; by default all of it."""
        return image_tokens

    def known_names(self, texts: list[str]) -> list[str]:
        """For each text the one that :meth:`encode_text` takes it for; by default itself.

        A text side that knows only some names may let one of them stand in for others.

        Raises:
            ValueError: the model cannot encode one of the texts.
        """
        return list(texts)

    @abstractmethod
    def encode_text(self, texts: list[str]) -> Tensor:
        """Encodes any number of texts: (len(texts), D), float32, not normalized.

        Raises:
            ValueError: the model cannot encode one of the texts.
        """


class RegionHead(nn.Module, Compilable, ABC):
    """Mask tokens, image tokens and boxes in, a vector in text space per region out.

    Attributes:
        reads_mask_tokens: False lets the localizer run only where masks are wanted.
        reads_boxes: whether :meth:`forward` looks at ``boxes``.
        reads_images: whether :meth:`forward` takes a keyword argument ``images``.
        mask_size: (h, w) of the masks that :meth:`forward` takes as a keyword argument ``masks``;
            None if it takes none.
        has_attention: whether :meth:`attention` tells where the head looks.
        renamed_parameters: parameter names in older files, and what they are called today.
        trained_on: which photos the weights were trained on, as ``data.datasets.trained_on`` notes
            it; {} if nobody knows.
    """

    reads_mask_tokens: bool = _required()
    reads_boxes: bool = _required()
    reads_images: bool = False
    mask_size: tuple[int, int] | None = None
    has_attention: bool = False
    renamed_parameters: ClassVar[Mapping[str, str]] = {}
    trained_on: Mapping[str, Any] = MappingProxyType({})

    @property
    def needs_localizer(self) -> bool:
        """Whether :meth:`forward` reads anything that the localizer finds."""
        return self.reads_mask_tokens or self.mask_size is not None

    @abstractmethod
    def forward(
        self, tokens: list[Tensor], image_tokens: Tensor, boxes: list[Tensor]
    ) -> list[Tensor]:
        """Embeds the regions of each image.

        A head that sets ``reads_images`` or ``mask_size`` takes one of these arguments more:
        ``images``, RGB, 0..255, each (3, H, W) of its own size; ``masks``, per image (R, h, w),
        bool, over the whole image.

        Args:
            tokens: per image the mask tokens (R, T), zeros if the head reads none. R may be 0.
            image_tokens: (B, L, W).
            boxes: per image (R, 4), XYXY in 0..1 of the image.

        Returns:
            Per image the region embeddings (R, D), rows of unit length.
        """

    def attention(self, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Where the head looks to name each region of one image (paper, Figure 4).

        Args:
            tokens: (R, T).
            image_tokens: (1, L, W).

        Returns:
            (R, L), rows sum to 1.

        Raises:
            ValueError: ``has_attention`` is False.
        """
        raise ValueError(f"{type(self).__name__} has no attention to the image.")


def image_size_of(image: Tensor) -> tuple[int, int]:
    """(H, W) of an image (..., H, W)."""
    return image.shape[-2], image.shape[-1]


def to_rgb(image: Tensor, channels: str) -> Tensor:
    """An image (3, H, W) with channels in the order "RGB" or "BGR", as the model wants it."""
    return image if channels == "RGB" else image.flip(0)
