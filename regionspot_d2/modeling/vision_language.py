"""Frozen vision-language models: images become grids of tokens, words become vectors."""

from __future__ import annotations

from abc import abstractmethod

from fvcore.common.registry import Registry
from torch import Tensor

from .frozen import FrozenModule

VISION_LANGUAGE_REGISTRY = Registry("VISION_LANGUAGE")
VISION_LANGUAGE_REGISTRY.__doc__ = """
Vision-language models, called with the config: ``VISION_LANGUAGE_REGISTRY.get(name)(cfg)``.
A registered object is a :class:`VisionLanguageModel`.
"""


class VisionLanguageModel(FrozenModule):
    """What the rest of the project asks of a vision-language model.

    Attributes:
        image_dim: W, the width of an image token.
        text_dim: D, the width of a text embedding.
        grid_size: rows and columns of the grid of image tokens. The image is squashed to the
            model's size, so the grid covers the whole image.
        num_prefix_tokens: tokens before the grid, 1 for a CLS token.
            L = num_prefix_tokens + rows * columns.
        templates: the prompt templates that suit the text side, with one ``{}`` for the class name.
        logit_scale: scalar tensor; cosines are multiplied by its exponential.
        fingerprint: a short text that changes when the text side changes, a key for embeddings
            kept on disk.
    """

    image_dim: int
    text_dim: int
    grid_size: tuple[int, int]
    num_prefix_tokens: int
    templates: tuple[str, ...]
    logit_scale: Tensor
    fingerprint: str

    @abstractmethod
    def forward(self, images: list[Tensor]) -> Tensor:
        """Turns images into tokens.

        Args:
            images: RGB images in 0..255, each of shape (3, H, W), any sizes and any dtype.

        Returns:
            Tokens of shape (B, L, W): the prefix tokens, then the grid, row by row.
        """

    @abstractmethod
    def project(self, image_tokens: Tensor) -> Tensor:
        """Takes image tokens to the space of the text embeddings.

        Args:
            image_tokens: of shape (B, L, W), from :meth:`forward`.

        Returns:
            Vectors of shape (B, L, D), not normalised.
        """

    @abstractmethod
    def encode_text(self, texts: list[str]) -> Tensor:
        """Encodes texts.

        Args:
            texts: any number of texts.

        Returns:
            Embeddings of shape (len(texts), D), not normalised.

        Raises:
            ValueError: the model cannot encode one of the texts.
        """
