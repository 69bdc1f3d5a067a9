"""A region head that is fitted to a few hundred labeled boxes without a GPU."""

from __future__ import annotations

from typing import Any, ClassVar

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

    A region is described by its averaged image tokens, its size and its position. Its embedding is
    a share of the baseline's, plus a linear function of the description, plus the corrections that
    similar training regions needed (radial basis functions around them). Untrained it is the
    baseline. Regions do not see each other.

    Attributes:
        renamed_parameters: parameter names in files before version 0.2, and today's.
    """

    renamed_parameters: ClassVar[dict[str, str]] = {"centres": "centers"}

    share: Tensor
    width: Tensor
    mean: Tensor
    scale: Tensor
    centers: Tensor

    @configurable
    def __init__(self, *, vision_language: VisionLanguageModel, num_centers: int) -> None:
        """
        Args:
            vision_language: brings image tokens into text space. It is not registered as a
                submodule.
            num_centers: training regions that others are compared with; 0 leaves only the linear
                part.

        Raises:
            ValueError: ``num_centers`` is negative.
        """
        if num_centers < 0:
            raise ValueError(
                f"MODEL.REGION_HEAD.NUM_CENTERS is {num_centers}; it must be 0 or more, the number "
                "that the weights have."
            )
        super().__init__(vision_language=vision_language)
        described, text_dim = vision_language.image_dim + _GEOMETRY_DIM, vision_language.text_dim
        self.correction = nn.Linear(described, text_dim)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)
        self.memory = nn.Parameter(torch.zeros(text_dim, num_centers))
        # Set by the fit: how much of the baseline's unit vector is kept, the normalization of the
        # descriptions, the descriptions of training, and how fast similarity fades with the squared
        # distance.
        self.register_buffer("share", torch.tensor(1.0))
        self.register_buffer("mean", torch.zeros(described))
        self.register_buffer("scale", torch.ones(described))
        self.register_buffer("centers", torch.zeros(num_centers, described))
        self.register_buffer("width", torch.tensor(1.0))

    @classmethod
    def from_config(cls, cfg: CfgNode, localizer: Any, vision_language: Any) -> dict[str, Any]:
        return {
            "vision_language": vision_language,
            "num_centers": cfg.MODEL.REGION_HEAD.NUM_CENTERS,
        }

    def describe(self, image_tokens: Tensor, boxes: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The baseline, and the descriptions that the correction is a function of.

        Args:
            image_tokens: (B, L, W).
            boxes: per image (R, 4), XYXY in 0..1 of the image.

        Returns:
            Per image the baseline's embeddings (R, D), rows of unit length, and the descriptions
            (R, W + 10).
        """
        cells = image_tokens[:, self.vision_language.num_prefix_tokens :]
        baseline = super().forward([], image_tokens, boxes)
        pooled = self.pool(cells, boxes)
        return [
            (base, torch.cat([tokens, _geometry(box).to(tokens.dtype)], dim=1))
            for base, tokens, box in zip(baseline, pooled, boxes)
        ]

    def forward(
        self, tokens: list[Tensor], image_tokens: Tensor, boxes: list[Tensor]
    ) -> list[Tensor]:
        return [self.embed(*described) for described in self.describe(image_tokens, boxes)]

    def embed(self, baseline: Tensor, descriptions: Tensor) -> Tensor:
        """Embeds the R regions of :meth:`describe`: (R, D), rows of unit length."""
        x = (descriptions - self.mean) / self.scale
        similarity = radial_basis(x, self.centers, self.width)
        learned = self.correction(x) + F.linear(similarity, self.memory)
        return F.normalize(self.share * baseline + learned, dim=-1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for old, new in self.renamed_parameters.items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args)


def radial_basis(x: Tensor, centers: Tensor, width: Tensor | float) -> Tensor:
    """exp(-width * squared distance) of descriptions (R, F) to others (N, F): (R, N) in 0..1."""
    # By one formula whatever R and N, as an exported graph must have it; torch's own choice of two
    # is the same beyond 25 of either.
    distances = torch.cdist(x, centers, compute_mode="use_mm_for_euclid_dist")
    return torch.exp(-width * distances**2)


def _geometry(boxes: Tensor) -> Tensor:
    """Size and position of boxes, XYXY in 0..1 of the image: (R, 4) -> (R, 10)."""
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.01).log()
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    area, shape = size.sum(1, keepdim=True), size[:, :1] - size[:, 1:]
    return torch.cat([size, area, shape, center, (center - 0.5) ** 2, size**2], dim=1)
