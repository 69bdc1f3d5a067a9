"""Fits a KernelRegionHead in closed form, in seconds: the same data give the same weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .head import KernelRegionHead, radial_basis


class RegionTargets(NamedTuple):
    """Regions, and where they should lie in text space.

    Attributes:
        baseline: (R, D), unit rows, from :meth:`KernelRegionHead.describe`.
        descriptions: (R, F), from there too.
        targets: (R, D), directions in text space.
        weights: (R,), how much each counts: 1 for a labeled region, less for others, 0 for none.
    """

    baseline: Tensor
    descriptions: Tensor
    targets: Tensor
    weights: Tensor


def fit_kernel_head(
    head: KernelRegionHead,
    regions: RegionTargets,
    *,
    share: float,
    ridge: float,
    width: float,
    radial_share: float,
    reserve: float,
    blocks: list[int],
) -> None:
    """Sets the weights of a head by kernel ridge regression, in place.

    The head learns the difference between the targets and ``share * baseline``. Its kernel mixes a
    linear one, which extrapolates, and a radial one, which memorizes. The blocks of a description
    (text space, network features, geometry) count equally, whatever their widths and units.

    Args:
        head: receives the weights, and a center for each region of positive weight.
        regions: training data.
        share: how much of the baseline is kept.
        ridge: penalty on the correction; a larger one keeps the head closer to the baseline.
        width: of the radial kernel, exp(-width * squared distance); descriptions are scaled so that
            each block has a total variance of 1.
        radial_share: of the radial kernel in the mixture, 0 to 1.
        reserve: holds back the training names where a region resembles no training region, by this
            multiple of the mean correction of labeled regions. Without it, names that are frequent
            in training displace others.
        blocks: widths of the blocks of a description, in order; the last is geometry, each number
            of which has its own unit.

    Raises:
        ValueError: the blocks do not add up to the descriptions, or all weights are 0.
    """
    baseline, descriptions, targets, weights = (part.double() for part in regions)
    if sum(blocks) != descriptions.shape[1]:
        raise ValueError(
            f"blocks {blocks} add up to {sum(blocks)}; "
            f"the descriptions have {descriptions.shape[1]} numbers."
        )
    counted = weights > 0
    if not counted.any():
        raise ValueError("There is no region of positive weight to fit the head to.")
    baseline, descriptions, targets, weights = (
        part[counted] for part in (baseline, descriptions, targets, weights)
    )
    portion = (weights / weights.sum())[:, None]
    mean = (portion * descriptions).sum(0)
    deviation = (portion * (descriptions - mean) ** 2).sum(0).sqrt().clamp(min=1e-3)
    # One scale per block of network features: differences in spread within a block carry meaning.
    scale = torch.cat(
        [part.mean().expand(len(part)) * len(part) ** 0.5 for part in deviation.split(blocks)[:-1]]
        + [deviation[-blocks[-1] :] * blocks[-1] ** 0.5]
    )
    x = (descriptions - mean) / scale
    missing = F.normalize(targets, dim=1) - share * baseline
    labeled = weights >= 1
    held_back = -reserve * missing[labeled].sum(0) / labeled.sum().clamp(min=1)
    # Dividing by the width gives both kernels about the same slope at small distances.
    radial = radial_share / width
    # Kernel ridge regression; weighting a region by w divides its ridge by w. Solved in the dual:
    # the linear kernel's part folds into one weight matrix, the radial part keeps every center.
    kernel = (1 - radial_share) * x @ x.T + radial * radial_basis(x, x, width)
    dual = torch.linalg.solve(kernel + ridge * torch.diag(1 / weights), missing - held_back)
    head.centers = x.to(head.centers)
    head.memory = nn.Parameter((radial * dual.T).to(head.memory))
    with torch.no_grad():
        head.share.fill_(share)
        head.width.fill_(width)
        head.mean.copy_(mean)
        head.scale.copy_(scale)
        head.correction.bias.copy_(held_back)
        head.correction.weight.copy_((1 - radial_share) * dual.T @ x)
