"""A region head for a few hundred labelled boxes and no GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ..modeling.interfaces import REGION_HEAD_REGISTRY, VisionLanguageModel
from ..modeling.region_head import PooledRegionHead

_GEOMETRY_DIM = 10


@REGION_HEAD_REGISTRY.register()
class KernelRegionHead(PooledRegionHead):
    """The training-free baseline with a learned correction.

    A region is described by its averaged image tokens, its size and its place. Its embedding is a share of the baseline's,
    plus a linear function of the description, plus what regions of training with a like description lacked (radial basis
    functions around them). Untrained it is the baseline. Regions do not see each other.
    """

    share: Tensor
    width: Tensor
    mean: Tensor
    scale: Tensor
    centres: Tensor

    @configurable
    def __init__(self, *, vision_language: VisionLanguageModel, num_centres: int) -> None:
        """
        Args:
            vision_language: brings image tokens into text space. It stays the property of the model beside.
            num_centres: regions of training that others are compared with; 0 leaves the linear part alone.

        Raises:
            ValueError: ``num_centres`` is negative.
        """
        if num_centres < 0:
            raise ValueError(
                f"MODEL.REGION_HEAD.NUM_CENTRES is {num_centres}; it must be 0 or more, as many as the weights have."
            )
        super().__init__(vision_language=vision_language)
        described, text_dim = vision_language.image_dim + _GEOMETRY_DIM, vision_language.text_dim
        self.correction = nn.Linear(described, text_dim)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)
        self.memory = nn.Parameter(torch.zeros(text_dim, num_centres))
        # What belongs to the correction as fitted: how much of the baseline's unit vector is kept, what makes descriptions
        # comparable, the descriptions of training, and how fast likeness fades with the square of the distance.
        self.register_buffer("share", torch.tensor(1.0))
        self.register_buffer("mean", torch.zeros(described))
        self.register_buffer("scale", torch.ones(described))
        self.register_buffer("centres", torch.zeros(num_centres, described))
        self.register_buffer("width", torch.tensor(1.0))

    @classmethod
    def from_config(cls, cfg: CfgNode, localizer: Any, vision_language: Any) -> dict[str, Any]:
        return {
            "vision_language": vision_language,
            "num_centres": cfg.MODEL.REGION_HEAD.NUM_CENTRES,
        }

    def describe(
        self, image_tokens: Tensor, boxes: list[Tensor] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """What the correction is a function of.

        Args:
            image_tokens: (B, L, W).
            boxes: per image (R, 4), XYXY in 0..1 of the image.

        Returns:
            Per image the baseline's embeddings (R, D), rows of unit length, and the descriptions (R, W + 10).
        """
        cells = image_tokens[:, self.vision_language.num_prefix_tokens :]
        baseline = super().forward([], image_tokens, boxes)
        pooled = self.pool(cells, boxes)
        return [
            (base, torch.cat([tokens, _geometry(box).to(tokens.dtype)], dim=1))
            for base, tokens, box in zip(baseline, pooled, boxes or [])
        ]

    def forward(
        self, tokens: list[Tensor], image_tokens: Tensor, boxes: list[Tensor] | None = None
    ) -> list[Tensor]:
        return [self.embed(*described) for described in self.describe(image_tokens, boxes)]

    def embed(self, baseline: Tensor, descriptions: Tensor) -> Tensor:
        """From what :meth:`describe` tells of R regions to their embeddings (R, D), rows of unit length."""
        x = (descriptions - self.mean) / self.scale
        likeness = radial_basis(x, self.centres, self.width)
        learned = self.correction(x) + F.linear(likeness, self.memory)
        return F.normalize(self.share * baseline + learned, dim=-1)


def radial_basis(x: Tensor, centres: Tensor, width: Tensor | float) -> Tensor:
    """Likeness of descriptions (R, F) to others (N, F): exp(-width * squared distance), (R, N) in 0..1."""
    return torch.exp(-width * torch.cdist(x, centres) ** 2)


def _geometry(boxes: Tensor) -> Tensor:
    """Size and place of boxes, XYXY in 0..1 of the image: (R, 4) -> (R, 10)."""
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.01).log()
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    area, shape = size.sum(1, keepdim=True), size[:, :1] - size[:, 1:]
    return torch.cat([size, area, shape, centre, (centre - 0.5) ** 2, size**2], dim=1)
