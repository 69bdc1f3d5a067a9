"""Region heads: mask tokens and image tokens in, region embeddings in text space out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from .vision_language import VisionLanguageModel

REGION_HEAD_REGISTRY = Registry("REGION_HEAD")
REGION_HEAD_REGISTRY.__doc__ = """
Region heads, built as ``REGION_HEAD_REGISTRY.get(name)(cfg, localizer, vision_language)``.
One that never reads mask tokens says so with ``uses_mask_tokens = False``; the localizer then runs for masks alone.
"""


@REGION_HEAD_REGISTRY.register()
class RegionSpotHead(nn.Module):
    """The trained part of RegionSpot (paper, section 3.2): mask tokens query the image tokens.

    Parameter names are those of the published checkpoints.
    """

    uses_mask_tokens = True

    @configurable
    def __init__(
        self,
        *,
        token_dim: int,
        image_dim: int,
        text_dim: int,
        depth: int = 3,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        with_image_tokens: bool = True,
    ) -> None:
        """
        Args:
            token_dim: width of the mask tokens.
            image_dim: width W of the image tokens, and of the decoder.
            text_dim: width D of the text embeddings.
            depth: layers of the decoder.
            num_heads: attention heads of each layer.
            ffn_dim: width of the feed-forward part of each layer.
            dropout: of each layer.
            with_image_tokens: False leaves the cross-attention out, for the ablation: regions then see each other
                alone. (The paper does not say how it took the image tokens away; this is the plainest way.)
        """
        super().__init__()
        self.to_clip = nn.Linear(token_dim, image_dim)
        sizes = {"dim_feedforward": ffn_dim, "dropout": dropout, "batch_first": True}
        norm = nn.LayerNorm(image_dim)
        self.decoder: nn.TransformerDecoder | nn.TransformerEncoder
        if with_image_tokens:
            layer = nn.TransformerDecoderLayer(image_dim, num_heads, **sizes)
            self.decoder = nn.TransformerDecoder(layer, depth, norm=norm)
        else:
            self_attention = nn.TransformerEncoderLayer(image_dim, num_heads, **sizes)
            self.decoder = nn.TransformerEncoder(
                self_attention, depth, norm=norm, enable_nested_tensor=False
            )
        self.projector = nn.Linear(image_dim, text_dim)
        for parameter in self.decoder.parameters():
            # Torch copies one layer; each starts from weights of its own.
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @classmethod
    def from_config(cls, cfg: CfgNode, localizer: Any, vision_language: Any) -> dict[str, Any]:
        return {
            "token_dim": localizer.token_dim,
            "image_dim": vision_language.image_dim,
            "text_dim": vision_language.text_dim,
            "depth": cfg.MODEL.REGION_HEAD.DEPTH,
            "num_heads": cfg.MODEL.REGION_HEAD.NUM_HEADS,
            "ffn_dim": cfg.MODEL.REGION_HEAD.FFN_DIM,
            "dropout": cfg.MODEL.REGION_HEAD.DROPOUT,
            "with_image_tokens": cfg.MODEL.REGION_HEAD.IMAGE_TOKENS,
        }

    def forward(
        self, tokens: list[Tensor], image_tokens: Tensor, boxes: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Embeds the regions of each image.

        The regions of an image attend to each other, so an answer depends on which others are asked with it.

        Args:
            tokens: per image the mask tokens (R, token_dim); R differs and may be 0.
            image_tokens: (B, L, W).
            boxes: not used: a mask token knows its place.

        Returns:
            Per image the region embeddings (R, D), rows of unit length.
        """
        counts = [len(token) for token in tokens]
        longest = max(counts, default=0)
        if longest == 0:
            # Still a function of the parameters: every process of a distributed run needs gradients for all.
            zero = sum(parameter.sum() for parameter in self.parameters()) * 0.0
            return [self.projector.weight.new_zeros(0, self.projector.out_features) + zero] * len(
                counts
            )
        queries = torch.stack([F.pad(token, (0, 0, 0, longest - len(token))) for token in tokens])
        places = torch.arange(longest, device=queries.device)
        lengths = torch.tensor(counts, device=queries.device)
        # Padding is hidden from the regions. An image without any keeps one visible row, or its softmax
        # would be over nothing; that row is dropped below.
        padding = places[None] >= lengths.clamp(min=1)[:, None]
        hidden = padding if padding.any() else None
        queries = self.to_clip(queries)
        if isinstance(self.decoder, nn.TransformerEncoder):
            decoded = self.decoder(queries, src_key_padding_mask=hidden)
        else:
            decoded = self.decoder(queries, image_tokens, tgt_key_padding_mask=hidden)
        regions = self.projector(decoded)
        return [F.normalize(region[:count], dim=-1) for region, count in zip(regions, counts)]

    @torch.no_grad()
    def attention(self, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Where the regions of an image look: the last layer's attention to the image tokens (paper, Figure 4).

        Args:
            tokens: (R, token_dim).
            image_tokens: (1, L, W).

        Returns:
            (R, L), averaged over the heads; rows sum to 1.

        Raises:
            ValueError: if the head was built without image tokens.
        """
        if isinstance(self.decoder, nn.TransformerEncoder):
            raise ValueError("A head with MODEL.REGION_HEAD.IMAGE_TOKENS: False looks at no image.")
        if len(tokens) == 0:
            return image_tokens.new_zeros(0, image_tokens.shape[1])
        attend = self.decoder.layers[-1].multihead_attn
        seen: list[Tensor] = []
        hook = attend.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:3]))
        try:
            self([tokens], image_tokens)
        finally:
            hook.remove()
        # The layer itself does not ask for the weights: without them attention is faster.
        return attend(*seen, need_weights=True)[1][0]


@REGION_HEAD_REGISTRY.register()
class PooledRegionHead(nn.Module):
    """The training-free baseline: the image tokens in text space, averaged over the box.

    A cell of the token grid counts by the share of it that the box covers, so that every box of positive area,
    however small, has an answer.
    """

    uses_mask_tokens = False

    @configurable
    def __init__(self, *, vision_language: VisionLanguageModel) -> None:
        """
        Args:
            vision_language: brings image tokens into text space. It stays the property of the model beside.
        """
        super().__init__()
        # In a list, so that it is not a sub-module twice.
        self._vision_language = [vision_language]

    @classmethod
    def from_config(cls, cfg: CfgNode, localizer: Any, vision_language: Any) -> dict[str, Any]:
        return {"vision_language": vision_language}

    def forward(
        self, tokens: list[Tensor], image_tokens: Tensor, boxes: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Embeds the regions of each image.

        Args:
            tokens: not used.
            image_tokens: (B, L, W).
            boxes: per image (R, 4), XYXY in 0..1 of the image.

        Returns:
            Per image the region embeddings (R, D), rows of unit length.

        Raises:
            ValueError: if there are no boxes.
        """
        model = self._vision_language[0]
        pooled = self.pool(model.project(image_tokens[:, model.num_prefix_tokens :]), boxes)
        return [F.normalize(region, dim=-1) for region in pooled]

    def pool(self, grid: Tensor, boxes: list[Tensor] | None) -> list[Tensor]:
        """Averages the cells of a grid over boxes.

        Args:
            grid: (B, rows * columns, C), row by row.
            boxes: per image (R, 4), XYXY in 0..1 of the image.

        Returns:
            Per image (R, C).

        Raises:
            ValueError: if there are no boxes.
        """
        if boxes is None:
            raise ValueError(
                f"{type(self).__name__} averages over boxes and was given none; "
                "MODEL.REGION_HEAD.NAME: RegionSpotHead works on mask tokens alone."
            )
        rows, columns = self._vision_language[0].grid_size
        pooled = []
        for cells, box in zip(grid, boxes):
            across = _coverage(box[:, 0], box[:, 2], columns)
            down = _coverage(box[:, 1], box[:, 3], rows)
            weights = torch.einsum("rh,rw->rhw", down, across).flatten(1)
            pooled.append(weights.to(cells.dtype) @ cells)
        return pooled


def _coverage(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Shares of ``cells`` equal parts of 0..1 that lie in [start, end]: (R,), (R,) -> (R, cells), sums 1."""
    edges = torch.linspace(0, 1, cells + 1, device=start.device, dtype=start.dtype)
    # A box without area keeps the cell it lies in.
    middle = ((start + end) / 2).clamp(0.5 / cells, 1 - 0.5 / cells)
    least = 1e-3 / cells
    start = torch.minimum(start.clamp(0, 1), middle - least)
    end = torch.maximum(end.clamp(0, 1), middle + least)
    overlap = torch.minimum(end[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    overlap = overlap.clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True)
