"""Fits a KernelRegionHead in closed form: the same weights from the same data, in seconds."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernel_head import KernelRegionHead, radial_basis


class RegionTargets(NamedTuple):
    """Regions and where they should lie in text space.

    Attributes:
        baseline: (R, D), unit rows, from :meth:`KernelRegionHead.describe`.
        descriptions: (R, F), from there too.
        targets: (R, D), directions in text space.
        weights: (R,), how much each counts: 1 for a labelled region, less for others; those of weight 0 do not.
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

    The head learns what is missing from ``share * baseline`` to the targets. Its kernel is a mixture of a linear one, which
    carries far, and a radial one, which remembers. Parts of the descriptions (text space, network, geometry) count the same
    whatever their widths and units.

    Args:
        head: gets the weights, and a centre for each region.
        regions: training data, from held-in images only.
        share: of the baseline that is kept.
        ridge: penalty on the correction; the larger it is, the closer the head stays to the baseline.
        width: of the radial kernel, exp(-width * squared distance); descriptions are scaled so that a block's parts have
            a variance of 1 together.
        radial_share: of the radial kernel in the mixture, 0 to 1.
        reserve: how much the names of training are held back where a region is like none of training: so many times
            the mean of what labelled regions lack. Without it, names that are frequent in training push out others.
        blocks: widths of the parts of the descriptions, in order; the last is geometry, whose numbers each have a unit of
            their own.

    Raises:
        ValueError: if the blocks do not add up to the descriptions, or no region counts.
    """
    baseline, descriptions, targets, weights = (part.double() for part in regions)
    if sum(blocks) != descriptions.shape[1]:
        raise ValueError(
            f"blocks {blocks} add up to {sum(blocks)}; the descriptions have {descriptions.shape[1]} parts."
        )
    counted = weights > 0
    if not counted.any():
        raise ValueError("There is no region of positive weight to fit to.")
    baseline, descriptions, targets, weights = (
        part[counted] for part in (baseline, descriptions, targets, weights)
    )
    portion = (weights / weights.sum())[:, None]
    mean = (portion * descriptions).sum(0)
    deviation = (portion * (descriptions - mean) ** 2).sum(0).sqrt().clamp(min=1e-3)
    # One scale for a block of like features, whose differences in spread mean something.
    scale = torch.cat(
        [part.mean().expand(len(part)) * len(part) ** 0.5 for part in deviation.split(blocks)[:-1]]
        + [deviation[-blocks[-1] :] * blocks[-1] ** 0.5]
    )
    x = (descriptions - mean) / scale
    missing = F.normalize(targets, dim=1) - share * baseline
    labelled = weights >= 1
    held_back = -reserve * missing[labelled].sum(0) / labelled.sum().clamp(min=1)
    # Divided by the width, both kernels have about the same slope where regions are alike.
    radial = radial_share / width
    kernel = (1 - radial_share) * x @ x.T + radial * radial_basis(x, x, width)
    dual = torch.linalg.solve(kernel + ridge * torch.diag(1 / weights), missing - held_back)
    head.centres = x.to(head.centres)
    head.memory = nn.Parameter((radial * dual.T).to(head.memory))
    with torch.no_grad():
        head.share.fill_(share)
        head.width.fill_(width)
        head.mean.copy_(mean)
        head.scale.copy_(scale)
        head.correction.bias.copy_(held_back)
        head.correction.weight.copy_((1 - radial_share) * dual.T @ x)
