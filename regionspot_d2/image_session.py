"""An image that is set once, and questions about its regions that need no vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .data.images import MAX_PIXELS, ImageLike, as_image_tensor
from .modeling.encoded import EncodedImages
from .modeling.questions import as_prompts
from .modeling.regionspot import RegionSpot


class ImageSession:
    """Answers about regions of one image after another, each of which is encoded once.

    Attributes:
        model: what answers.
        max_pixels: of image files; see ``INPUT.MAX_PIXELS``.
    """

    def __init__(self, model: RegionSpot, max_pixels: int = MAX_PIXELS) -> None:
        self.model = model.eval()
        self.max_pixels = max_pixels
        self._encoded: EncodedImages | None = None

    def set_image(self, image: ImageLike, *, channels: str = "RGB") -> None:
        """Encodes an image for the calls that follow.

        Args:
            image, channels: see :func:`~regionspot_d2.data.images.as_image_tensor`.
        """
        encoded = self.model.encode([self._pixels(image, channels)])
        # Now rather than in the first question: that is what "set once" promises.
        if not self.model.zoom:
            _ = encoded.image_tokens
        if self.model.region_head.needs_localizer or self.model.with_masks:
            _ = encoded.embeddings
        self._encoded = encoded

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the image that was set."""
        return self._image().image_sizes[0]

    @torch.no_grad()
    def region_embeddings(
        self,
        *,
        boxes: Any | None = None,
        points: Any | None = None,
        point_labels: Any | None = None,
        masks: Any | None = None,
        zoom: float | None = None,
    ) -> Tensor:
        """Embeds regions, given as for :meth:`predict`, in text space, for search and clustering.

        Returns:
            (R, D), rows of unit length.
        """
        prompts = as_prompts(
            self.image_size, boxes=boxes, points=points, point_labels=point_labels, masks=masks
        )
        [answer] = self.model.answer(self._image(), [prompts], with_masks=False, zoom=zoom)
        return answer.embeddings

    @torch.no_grad()
    def attention_maps(
        self,
        *,
        boxes: Any | None = None,
        points: Any | None = None,
        point_labels: Any | None = None,
        masks: Any | None = None,
    ) -> Tensor:
        """Where the region head looks in the whole image, whatever the zoom, to name regions.

        Returns:
            (R, rows, columns), see :meth:`RegionSpot.attention`.
        """
        prompts = as_prompts(
            self.image_size, boxes=boxes, points=points, point_labels=point_labels, masks=masks
        )
        return self.model.attention(self._image(), prompts)

    def _pixels(self, image: ImageLike, channels: str) -> Tensor:
        return as_image_tensor(image, channels, max_pixels=self.max_pixels).to(self.model.device)

    def _image(self) -> EncodedImages:
        if self._encoded is not None:
            return self._encoded
        raise ValueError("There is no image yet: call set_image first.")
