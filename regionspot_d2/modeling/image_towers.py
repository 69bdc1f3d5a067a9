"""The image towers of CLIP-like models, read before they pool: regions need the grid of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn


class ImageTower(ABC):
    """A view of a tower: its tokens, and their way to the space of the text embeddings.

    It owns no parameters and changes nothing in the tower, so threads may share one. Tokens are W
    wide; ``num_prefix_tokens`` of them come before a grid of rows and columns.
    """

    width: int
    grid_size: tuple[int, int]
    num_prefix_tokens: int

    @abstractmethod
    def tokens(self, pixels: Tensor) -> Tensor:
        """Takes normalized images (B, 3, H, W) of the tower's size to tokens (B, L, W)."""

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """The layers that ``torch.compile`` may take: those that are alike."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Takes tokens (B, L, W) to text space (B, L, D), each by itself, not normalized."""


def open_clip_tower(visual: nn.Module, image_size: tuple[int, int]) -> ImageTower:
    """Views ``visual`` of an open_clip model; ValueError if it has no known grid of tokens."""
    if isinstance(visual, VisionTransformer):
        return _ViT(visual, image_size)
    if isinstance(visual, ModifiedResNet):
        return _ResNet(visual, image_size)
    if isinstance(visual, TimmModel) and hasattr(visual.trunk, "feature_info"):
        return _Timm(visual, image_size)
    raise ValueError(
        f"An image tower of class {type(visual).__name__} has no known grid of image tokens: use a "
        "ViT, a CLIP ResNet or a timm model."
    )


def openai_tower(visual: nn.Module, image_size: tuple[int, int]) -> ImageTower:
    """Like :func:`open_clip_tower`, for the two towers of the clip package."""
    from clip.model import VisionTransformer as OpenAIVisionTransformer

    is_vit = isinstance(visual, OpenAIVisionTransformer)
    return _OpenAIViT(visual, image_size) if is_vit else _ResNet(visual, image_size)


class _OpenAIViT(ImageTower):
    """Tokens after the last block, CLS first, before the final norm and the projection."""

    num_prefix_tokens = 1

    def __init__(self, visual: Any, image_size: tuple[int, int]) -> None:
        self._visual = visual
        self.width = visual.conv1.out_channels
        rows, columns = visual.conv1.stride
        self.grid_size = (image_size[0] // rows, image_size[1] // columns)

    def tokens(self, pixels: Tensor) -> Tensor:
        visual = self._visual
        grid = visual.conv1(pixels).flatten(2).mT
        cls = visual.class_embedding.to(grid.dtype).expand(len(grid), 1, -1)
        x = torch.cat([cls, grid], dim=1) + visual.positional_embedding.to(grid.dtype)
        # The transformer of the clip package takes and gives (L, B, W).
        return visual.transformer(visual.ln_pre(x).transpose(0, 1)).transpose(0, 1)

    def layers(self) -> list[nn.Module]:
        return list(self._visual.transformer.resblocks)

    def project(self, tokens: Tensor) -> Tensor:
        return self._visual.ln_post(tokens) @ self._visual.proj


class _ViT(_OpenAIViT):
    def tokens(self, pixels: Tensor) -> Tensor:
        last = self._visual.forward_intermediates(
            pixels, indices=1, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
        )
        return torch.cat(last["image_intermediates_prefix"] + last["image_intermediates"], dim=1)

    def project(self, tokens: Tensor) -> Tensor:
        if self._visual.attn_pool is not None:
            raise ValueError(
                "This image tower ends in an attentional pooler: its tokens cannot be projected to "
                "text space one by one. Use a region head that does not need it."
            )
        return super().project(tokens)


class _ResNet(ImageTower):
    """The map of the last stage, flattened."""

    num_prefix_tokens = 0

    def __init__(self, visual: Any, image_size: tuple[int, int]) -> None:
        self._visual = visual
        self.width = visual.attnpool.v_proj.in_features
        self.grid_size = (image_size[0] // 32, image_size[1] // 32)

    def tokens(self, pixels: Tensor) -> Tensor:
        # Both libraries register a ResNet's parts in the order in which they run, the pool last.
        for part in list(self._visual.children())[:-1]:
            pixels = part(pixels)
        return pixels.flatten(2).mT

    def layers(self) -> list[nn.Module]:
        return []  # no two stages are alike: with another batch size, more graphs than torch keeps

    def project(self, tokens: Tensor) -> Tensor:
        # What the attention pool gives for a token that attends only to itself, without its
        # position: the usual dense reading of CLIP's ResNets (MaskCLIP, arXiv 2112.01071).
        pool = self._visual.attnpool
        return pool.c_proj(pool.v_proj(tokens))


class _Timm(ImageTower):
    """What a timm trunk gives before pooling, its final norm included where it has one."""

    def __init__(self, visual: Any, image_size: tuple[int, int]) -> None:
        self._visual, trunk = visual, visual.trunk
        self.width = trunk.num_features
        # timm's models share no class: ViTs give (B, L, W), most others (B, W, h, w), Swin
        # (B, h, w, W), and feature_info is a list of dicts, or timm's FeatureInfo over one.
        self._is_sequence = hasattr(trunk, "num_prefix_tokens")
        self.num_prefix_tokens = trunk.num_prefix_tokens if self._is_sequence else 0
        self._channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        stride = getattr(trunk.feature_info, "info", trunk.feature_info)[-1]["reduction"]
        self.grid_size = (image_size[0] // stride, image_size[1] // stride)

    def tokens(self, pixels: Tensor) -> Tensor:
        features = self._visual.trunk.forward_features(pixels)
        if self._is_sequence:
            return features
        return features.flatten(1, 2) if self._channels_last else features.flatten(2).mT

    def layers(self) -> list[nn.Module]:
        return list(self._visual.trunk.blocks) if self._is_sequence else []

    def project(self, tokens: Tensor) -> Tensor:
        flat = tokens.flatten(0, 1)
        if self._is_sequence:
            # Copies of a token pool to that token, whatever the trunk's pooling is.
            features = flat[:, None].expand(-1, self.num_prefix_tokens + 1, -1)
        else:
            features = flat[:, None, None] if self._channels_last else flat[..., None, None]
        projected = self._visual.head(self._visual.trunk.forward_head(features))
        return projected.unflatten(0, tokens.shape[:2])
