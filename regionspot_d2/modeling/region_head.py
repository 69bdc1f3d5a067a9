"""Region heads: mask tokens and image tokens in, region embeddings out; and their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from .interfaces import REGION_HEAD_REGISTRY, Localizer, RegionHead, VisionLanguageModel


@REGION_HEAD_REGISTRY.register()
class RegionSpotHead(RegionHead):
    """The trained part of RegionSpot (paper, section 3.2): mask tokens query the image tokens.

    Parameter names are those of the published checkpoints.
    """

    reads_mask_tokens = True
    reads_boxes = False
    has_attention = True

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
        copied_layers: bool = False,
    ) -> None:
        """
        Args:
            token_dim, image_dim, text_dim: widths of mask tokens, image tokens (and of the
                decoder) and text embeddings.
            depth: layers of the decoder.
            num_heads, ffn_dim, dropout: of each layer.
            with_image_tokens: False leaves the cross-attention out, for the ablation: regions then
                see only each other. (The paper does not say how it took the image tokens away; this
                is the plainest way.)
            copied_layers: whether the layers start as copies of one, as torch makes them; else each
                starts from weights of its own.
        """
        super().__init__()
        self.has_attention = with_image_tokens
        self.to_clip = nn.Linear(token_dim, image_dim)
        sizes: dict[str, Any] = {"dim_feedforward": ffn_dim, "dropout": dropout}
        sizes["batch_first"] = True
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
            if parameter.dim() > 1 and not copied_layers:
                nn.init.xavier_uniform_(parameter)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, localizer: Localizer, vision_language: VisionLanguageModel
    ) -> dict[str, Any]:
        return {
            "token_dim": localizer.token_dim,
            "image_dim": vision_language.image_dim,
            "text_dim": vision_language.text_dim,
            "depth": cfg.MODEL.REGION_HEAD.DEPTH,
            "num_heads": cfg.MODEL.REGION_HEAD.NUM_HEADS,
            "ffn_dim": cfg.MODEL.REGION_HEAD.FFN_DIM,
            "dropout": cfg.MODEL.REGION_HEAD.DROPOUT,
            "with_image_tokens": cfg.MODEL.REGION_HEAD.IMAGE_TOKENS,
            "copied_layers": cfg.MODEL.REGION_HEAD.COPIED_LAYERS,
        }

    def forward(
        self, tokens: list[Tensor], image_tokens: Tensor, boxes: list[Tensor] | None = None
    ) -> list[Tensor]:
        """See :meth:`RegionHead.forward`; a mask token knows its place, so boxes are not read.

        The regions of an image attend to each other: an answer depends on which others are asked
        with it.
        """
        counts = [len(token) for token in tokens]
        longest = max(counts, default=0)
        if longest == 0:
            # Still a function of the parameters: every process of a distributed run needs
            # gradients for all of them.
            zero = sum(parameter.sum() for parameter in self.parameters()) * 0.0
            empty = self.projector.weight.new_zeros(0, self.projector.out_features) + zero
            return [empty] * len(counts)
        queries = torch.stack(
            [F.pad(self.to_clip(token), (0, 0, 0, longest - len(token))) for token in tokens]
        )
        places = torch.arange(longest, device=queries.device)
        lengths = torch.tensor(counts, device=queries.device)
        # Padding is hidden from the regions. An image without any keeps one visible row, or its
        # softmax would be over nothing; that row is dropped below.
        padding = places[None] >= lengths.clamp(min=1)[:, None]
        hidden = padding if min(counts) < longest else None
        if isinstance(self.decoder, nn.TransformerEncoder):
            decoded = self.decoder(queries, src_key_padding_mask=hidden)
        else:
            decoded = self.decoder(queries, image_tokens, tgt_key_padding_mask=hidden)
        regions = self.projector(decoded)
        return [F.normalize(region[:count], dim=-1) for region, count in zip(regions, counts)]

    def layers_to_compile(self) -> list[nn.Module]:
        return list(self.decoder.layers)

    @torch.no_grad()
    def attention(self, tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """The last layer's attention to the image tokens, averaged over its heads."""
        if not self.has_attention:
            raise ValueError("A head with MODEL.REGION_HEAD.IMAGE_TOKENS: False looks at no image.")
        if len(tokens) == 0:
            return image_tokens.new_zeros(0, image_tokens.shape[1])
        *layers, last = self.decoder.layers
        queries = self.to_clip(tokens[None])
        for layer in layers:
            queries = layer(queries, image_tokens)
        # The layer itself does not ask for the weights: without them attention is faster.
        seen = last.self_attn(queries, queries, queries, need_weights=False)[0]
        queries = last.norm1(queries + seen)
        return last.multihead_attn(queries, image_tokens, image_tokens)[1][0]


class TrainingFreeHead(RegionHead):
    """A head that has the vision-language model answer for the regions, and nothing to train."""

    reads_mask_tokens = False
    reads_boxes = True

    @configurable
    def __init__(self, *, vision_language: VisionLanguageModel) -> None:
        """
        Args:
            vision_language: brings image tokens into text space. The model owns it.
        """
        super().__init__()
        # In a tuple, so that it is not a sub-module twice.
        self._shared = (vision_language,)

    @property
    def vision_language(self) -> VisionLanguageModel:
        return self._shared[0]

    @classmethod
    def from_config(
        cls, cfg: CfgNode, localizer: Localizer, vision_language: VisionLanguageModel
    ) -> dict[str, Any]:
        return {"vision_language": vision_language}


@REGION_HEAD_REGISTRY.register()
class PooledRegionHead(TrainingFreeHead):
    """The training-free baseline: the image tokens in text space, averaged over the box.

    A cell of the token grid counts by the share of it that the box covers, so that every box of
    positive area, however small, has an answer. That is RoI pooling with exact shares; RoIAlign
    would sample points in the box, and blur over its edges.
    """

    def forward(
        self, tokens: list[Tensor], image_tokens: Tensor, boxes: list[Tensor]
    ) -> list[Tensor]:
        model = self.vision_language
        pooled = self.pool(model.project(image_tokens[:, model.num_prefix_tokens :]), boxes)
        return [F.normalize(region, dim=-1) for region in pooled]

    def pool(self, grid: Tensor, boxes: list[Tensor]) -> list[Tensor]:
        """Averages the cells of a grid over boxes.

        Args:
            grid: (B, rows * columns, C), row by row.
            boxes: per image (R, 4), XYXY in 0..1 of the image.

        Returns:
            Per image (R, C).
        """
        size = self.vision_language.grid_size
        return [box_cells(box, size).to(cells.dtype) @ cells for cells, box in zip(grid, boxes)]


def box_cells(boxes: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """How boxes (R, 4), XYXY in 0..1, spread over the cells of a grid: (R, cells), rows sum to 1.

    A box without area, or outside the image, counts as the cell that is nearest to it.
    """
    rows, columns = grid_size
    across = _coverage(boxes[:, 0], boxes[:, 2], columns)
    down = _coverage(boxes[:, 1], boxes[:, 3], rows)
    return torch.einsum("rh,rw->rhw", down, across).flatten(1)


def _coverage(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """How [start, end] spreads over equal parts of 0..1: (R,), (R,) -> (R, cells), sums 1."""
    edges = torch.linspace(0, 1, cells + 1, device=start.device, dtype=start.dtype)
    # A box without area keeps the cell it lies in.
    middle = ((start + end) / 2).clamp(0.5 / cells, 1 - 0.5 / cells)
    least = 1e-3 / cells
    start = torch.minimum(start.clamp(0, 1), middle - least)
    end = torch.maximum(end.clamp(0, 1), middle + least)
    overlap = torch.minimum(end[:, None], edges[1:]) - torch.maximum(start[:, None], edges[:-1])
    overlap = overlap.clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True)


@dataclass(frozen=True)
class FocalLoss:
    """Sigmoid focal loss, summed over class names.

    Attributes:
        alpha: weight of the true names against the others.
        gamma: how much less a name counts that is clear already.
        reduction: "regions" averages over the regions of all images, so that each region counts
            alike. "images" is the published way: the average over the regions of each image, summed
            over the images of the process, so that regions count less where there are many.

    Raises:
        ValueError: ``reduction`` is neither.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    reduction: str = "regions"

    def __post_init__(self) -> None:
        if self.reduction not in ("regions", "images"):
            raise ValueError(
                f"MODEL.REGION_HEAD.LOSS_REDUCTION is '{self.reduction}'; it must be 'regions' or "
                "'images'."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> FocalLoss:
        head = cfg.MODEL.REGION_HEAD
        return cls(head.FOCAL_ALPHA, head.FOCAL_GAMMA, head.LOSS_REDUCTION)

    def __call__(self, logits: list[Tensor], gt_classes: list[Tensor]) -> Tensor:
        """Compares logits, per image (R, C), with classes, per image (R,); R and C may differ.

        The gradient reaches every parameter, even if no image has regions.
        """
        counts = [len(classes) for classes in gt_classes]
        losses = [
            sigmoid_focal_loss(
                logit,
                F.one_hot(classes, logit.shape[1]).to(logit.dtype),
                alpha=self.alpha,
                gamma=self.gamma,
                reduction="sum",
            )
            for logit, classes in zip(logits, gt_classes)
        ]
        if has_event_storage():
            correct = sum(int((x.argmax(1) == y).sum()) for x, y in zip(logits, gt_classes))
            get_event_storage().put_scalar("[metric]accuracy", correct / max(sum(counts), 1))
        if self.reduction == "images":
            return torch.stack([loss / max(n, 1) for loss, n in zip(losses, counts)]).sum()
        return torch.stack(losses).sum() / _regions_per_process(sum(counts), logits[0].device)


def _regions_per_process(count: int, device: torch.device) -> float:
    """With it, averaged gradients are those of one process with the images of all."""
    if comm.get_world_size() == 1:
        return max(count, 1)
    total = torch.tensor(float(count), device=device)
    torch.distributed.all_reduce(total)
    return max(total.item(), 1.0) / comm.get_world_size()
