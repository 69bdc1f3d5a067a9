"""The baselines of the paper's Table 1 as region heads, beside ``PooledRegionHead`` (RoI pooling).

They name regions with the vision-language model alone: from a crop of each region, from the image
tokens under its mask, or from either of them through a small trained adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from .interfaces import (
    REGION_HEAD_REGISTRY,
    Localizer,
    RegionHead,
    VisionLanguageModel,
    image_size_of,
)
from .region_head import TrainingFreeHead, box_cells

# Crops that the vision-language model sees together.
_CROP_BATCH = 32
# Rows and columns of the mask in a cell of the grid of image tokens.
_MASK_PIXELS_PER_CELL = 8


@REGION_HEAD_REGISTRY.register()
class CropRegionHead(TrainingFreeHead):
    """Each region is cut out and embedded as an image of its own.

    The crop is squashed to the size that the model takes, as any image. How a model pools is its
    own affair (:meth:`VisionLanguageModel.embed_images`): CLIP's ViTs answer with the class token,
    the mini model, which has none, with the mean of its grid.
    """

    reads_images = True

    def forward(  # type: ignore[override]
        self,
        tokens: list[Tensor],
        image_tokens: Tensor,
        boxes: list[Tensor],
        *,
        images: Sequence[Tensor],
    ) -> list[Tensor]:
        crops = [crop for image, box in zip(images, boxes) for crop in crops_of(image, box)]
        batches = [crops[i : i + _CROP_BATCH] for i in range(0, len(crops), _CROP_BATCH)]
        nothing = image_tokens.new_zeros(0, self.vision_language.text_dim)
        embeddings = torch.cat([nothing, *map(self.vision_language.embed_images, batches)])
        return list(F.normalize(embeddings, dim=-1).split([len(box) for box in boxes]))


def crops_of(image: Tensor, boxes: Tensor) -> list[Tensor]:
    """Cuts boxes (R, 4), XYXY in 0..1, out of an image (3, H, W), as views of its pixels.

    Edges go to the nearest pixel. A crop is cut at the edges of the image, and has one row and one
    column at least.
    """
    height, width = image_size_of(image)
    corners = (boxes * boxes.new_tensor([width, height] * 2)).round().long()
    crops = []
    for x0, y0, x1, y1 in corners.tolist():
        x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
        crops.append(image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)])
    return crops


@REGION_HEAD_REGISTRY.register()
class MaskPooledRegionHead(TrainingFreeHead):
    """The image tokens in text space, averaged under the localizer's mask of the region.

    A cell of the token grid counts by the share of it that the mask covers. Where the localizer
    finds an empty mask, the box takes its place.
    """

    @property
    def mask_size(self) -> tuple[int, int]:  # type: ignore[override]
        rows, columns = self.vision_language.grid_size
        return rows * _MASK_PIXELS_PER_CELL, columns * _MASK_PIXELS_PER_CELL

    def forward(  # type: ignore[override]
        self,
        tokens: list[Tensor],
        image_tokens: Tensor,
        boxes: list[Tensor],
        *,
        masks: Sequence[Tensor],
    ) -> list[Tensor]:
        model = self.vision_language
        grid = model.project(image_tokens[:, model.num_prefix_tokens :])
        regions = []
        for cells, mask, box in zip(grid, masks, boxes):
            share = F.avg_pool2d(mask.to(box.dtype)[:, None], _MASK_PIXELS_PER_CELL).flatten(1)
            total = share.sum(1, keepdim=True)
            weights = torch.where(total > 0, share, box_cells(box, model.grid_size))
            regions.append(F.normalize(weights.to(cells.dtype) @ cells, dim=-1))
        return regions


@REGION_HEAD_REGISTRY.register()
class AdapterRegionHead(RegionHead):
    """CLIP-Adapter (Gao et al., arXiv 2110.04544) on the embeddings of another head.

    Two layers with a bottleneck between them change an embedding; the result is a residual share of
    the changed one and the rest of the original. Only the two layers are trained, with RegionSpot's
    loss.
    """

    reads_mask_tokens = False
    reads_boxes = False

    @configurable
    def __init__(self, *, adapted: RegionHead, text_dim: int, share: float, reduction: int) -> None:
        """
        Args:
            adapted: gives the embeddings.
            text_dim: their width.
            share: of the adapted embedding in the result, 0 to 1 (the paper's alpha).
            reduction: ``text_dim`` divided by the width of the hidden layer.

        Raises:
            ValueError: ``share`` or ``reduction`` is outside its range.
        """
        super().__init__()
        keys = "MODEL.REGION_HEAD.ADAPTER_{} is {}; expected {}."
        if not 0 <= share <= 1:
            raise ValueError(keys.format("SHARE", share, "0 to 1"))
        if not 1 <= reduction <= text_dim:
            raise ValueError(keys.format("REDUCTION", reduction, f"1 to {text_dim}"))
        self.adapted = adapted
        self.reads_mask_tokens = adapted.reads_mask_tokens
        self.reads_boxes = adapted.reads_boxes
        self.reads_images = adapted.reads_images
        self.mask_size = adapted.mask_size
        self.share = share
        # Without biases the layers scale with their input, so that unit rows give the same
        # direction as CLIP's unnormalized embeddings, which the paper adapts.
        hidden = text_dim // reduction
        self.adapter = nn.Sequential(
            nn.Linear(text_dim, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, text_dim, bias=False),
        )

    @classmethod
    def from_config(
        cls, cfg: CfgNode, localizer: Localizer, vision_language: VisionLanguageModel
    ) -> dict[str, Any]:
        settings = cfg.MODEL.REGION_HEAD
        if settings.ADAPTED == settings.NAME:
            raise ValueError(
                f"MODEL.REGION_HEAD.ADAPTED is {settings.ADAPTED}, the adapter itself; expected a "
                "head that gives embeddings, such as CropRegionHead."
            )
        adapted = REGION_HEAD_REGISTRY.get(settings.ADAPTED)
        return {
            "adapted": adapted(cfg, localizer, vision_language),
            "text_dim": vision_language.text_dim,
            "share": settings.ADAPTER_SHARE,
            "reduction": settings.ADAPTER_REDUCTION,
        }

    def forward(
        self, tokens: list[Tensor], image_tokens: Tensor, boxes: list[Tensor], **more: Any
    ) -> list[Tensor]:
        """See :meth:`RegionHead.forward`; what the other head reads is passed on."""
        plain = self.adapted(tokens, image_tokens, boxes, **more)
        return [
            F.normalize(self.share * self.adapter(x) + (1 - self.share) * x, dim=-1) for x in plain
        ]
