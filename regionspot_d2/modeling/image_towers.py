"""Where the grid of image tokens is inside the image towers of CLIP-like models.

The libraries give one vector per image; regions need the grid before it is pooled. The towers are
told apart by their parts, so that the same code serves open_clip's classes and the clip package's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ImageTower(ABC):
    """A view of a tower: its tokens, and their way to the space of the text embeddings.

    It owns no parameters; the model that holds the tower does.

    Attributes:
        width: W, the width of a token.
        grid_size: rows and columns of the grid.
        num_prefix_tokens: tokens before the grid.
    """

    width: int
    grid_size: tuple[int, int]
    num_prefix_tokens: int

    @abstractmethod
    def tokens(self, pixels: Tensor) -> Tensor:
        """Takes normalized images (B, 3, H, W) of the tower's size to tokens (B, L, W)."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Takes tokens (B, L, W) to text space (B, L, D), each by itself, not normalized."""


def image_tower(
    visual: nn.Module, image_size: tuple[int, int], *, sequence_first: bool = False
) -> ImageTower:
    """Finds the grid of an image tower, the ``visual`` part of a CLIP-like model.

    Args:
        visual: the tower.
        image_size: height and width of the images it takes.
        sequence_first: a ViT's transformer gives (L, B, W), as in the clip package, not (B, L, W).

    Raises:
        ValueError: the tower has no grid that is known here.
    """
    if hasattr(visual, "transformer") and hasattr(visual, "ln_post"):
        return _ViT(visual, image_size, sequence_first)
    if hasattr(visual, "layer4") and hasattr(visual, "attnpool"):
        return _ResNet(visual, image_size)
    if hasattr(visual, "trunk") and hasattr(visual.trunk, "feature_info"):
        return _Timm(visual, image_size)
    raise ValueError(
        f"An image tower of class {type(visual).__name__} has no known grid of image tokens: "
        "use a ViT, a CLIP ResNet or a timm model."
    )


class _ViT(ImageTower):
    """Tokens after the last block, CLS first, before the final norm and the projection."""

    num_prefix_tokens = 1

    def __init__(self, visual: Any, image_size: tuple[int, int], sequence_first: bool) -> None:
        self._visual = visual
        self._sequence_first = sequence_first
        self.width = visual.conv1.out_channels
        rows, columns = visual.conv1.stride
        self.grid_size = (image_size[0] // rows, image_size[1] // columns)

    def tokens(self, pixels: Tensor) -> Tensor:
        tokens = _output_of(self._visual.transformer, lambda: self._visual(pixels))
        return tokens.transpose(0, 1) if self._sequence_first else tokens

    def project(self, tokens: Tensor) -> Tensor:
        if getattr(self._visual, "attn_pool", None) is not None:
            raise ValueError(
                "This image tower ends in an attentional pooler: its tokens cannot be projected to "
                "text space one by one. Use a region head that does not need it."
            )
        return self._visual.ln_post(tokens) @ self._visual.proj


class _ResNet(ImageTower):
    """The map of the last stage, flattened."""

    num_prefix_tokens = 0

    def __init__(self, visual: Any, image_size: tuple[int, int]) -> None:
        self._visual = visual
        self.width = visual.attnpool.v_proj.in_features
        self.grid_size = (image_size[0] // 32, image_size[1] // 32)

    def tokens(self, pixels: Tensor) -> Tensor:
        return _output_of(self._visual.layer4, lambda: self._visual(pixels)).flatten(2).mT

    def project(self, tokens: Tensor) -> Tensor:
        # What the attention pool gives for a token that attends to itself alone, without its
        # position: the usual dense reading of CLIP's ResNets (MaskCLIP, arXiv 2112.01071).
        pool = self._visual.attnpool
        return pool.c_proj(pool.v_proj(tokens))


class _Timm(ImageTower):
    """What a timm trunk gives before pooling, its final norm included where it has one."""

    def __init__(self, visual: Any, image_size: tuple[int, int]) -> None:
        self._visual = visual
        trunk = visual.trunk
        self.width = trunk.num_features
        # ViTs give (B, L, W), most others (B, W, h, w), Swin (B, h, w, W).
        self._is_sequence = hasattr(trunk, "num_prefix_tokens")
        self._channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        self.num_prefix_tokens = trunk.num_prefix_tokens if self._is_sequence else 0
        # A list of dicts, or timm's FeatureInfo over one.
        stride = getattr(trunk.feature_info, "info", trunk.feature_info)[-1]["reduction"]
        self.grid_size = (image_size[0] // stride, image_size[1] // stride)

    def tokens(self, pixels: Tensor) -> Tensor:
        features = self._visual.trunk.forward_features(pixels)
        if self._is_sequence:
            return features
        return features.flatten(1, 2) if self._channels_last else features.flatten(2).mT

    def project(self, tokens: Tensor) -> Tensor:
        flat = tokens.flatten(0, 1)
        if self._is_sequence:
            # Copies of a token pool to that token, whatever the trunk's pooling is.
            features = flat[:, None].expand(-1, self.num_prefix_tokens + 1, -1)
        else:
            features = flat[:, None, None] if self._channels_last else flat[..., None, None]
        projected = self._visual.head(self._visual.trunk.forward_head(features))
        return projected.unflatten(0, tokens.shape[:2])


def _output_of(part: nn.Module, run: Callable[[], object]) -> Tensor:
    """Runs something and gives what ``part`` put out meanwhile."""
    outputs: list[Tensor] = []
    handle = part.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        run()
    finally:
        handle.remove()
    return outputs[0]
