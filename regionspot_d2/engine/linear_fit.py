"""Fits a LinearRegionHead in closed form: the same weights from the same data, in a second."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.region_head import LinearRegionHead


class RegionTargets(NamedTuple):
    """Regions and where they should lie in text space.

    Attributes:
        baseline: (R, D), unit rows, from :meth:`LinearRegionHead.describe`.
        features: (R, F), from there too.
        targets: (R, D), directions in text space.
        weights: (R,), how much each counts: 1 for a labelled region, less than 1 for others.
    """

    baseline: Tensor
    features: Tensor
    targets: Tensor
    weights: Tensor


def fit_linear_head(
    head: LinearRegionHead,
    regions: RegionTargets,
    *,
    share: float,
    prior: float,
    ridge: float,
    blocks: list[int],
) -> None:
    """Sets the weights of a head by ridge regression, in place.

    The head gives ``share * baseline + correction(features)``; the correction is fitted to what is missing from
    ``share * baseline`` to the targets. Parts of the features (text space, network, geometry) count the same whatever
    their widths and units.

    Args:
        head: gets the weights.
        regions: training data, from held-in images only.
        share: of the baseline that is kept.
        prior: what share of the mean correction of the labelled regions every region gets: how much a name that is frequent
            in training is expected.
        ridge: penalty on the correction; the larger it is, the closer the head stays to the baseline.
        blocks: widths of the parts of the features, in order.

    Raises:
        ValueError: if the blocks do not add up to the features, or no region has the weight 1.
    """
    baseline, features, targets, weights = (part.double() for part in regions)
    if sum(blocks) != features.shape[1]:
        raise ValueError(
            f"blocks {blocks} add up to {sum(blocks)}; there are {features.shape[1]} features."
        )
    portion = (weights / weights.sum())[:, None]
    mean = (portion * features).sum(0)
    deviation = (portion * (features - mean) ** 2).sum(0).sqrt()
    # One scale for a block of like features; the last block is geometry, where each has its own unit.
    scale = torch.cat(
        [part.mean().expand(len(part)) * len(part) ** 0.5 for part in deviation.split(blocks)[:-1]]
        + [deviation[-blocks[-1] :].clamp(min=1e-3) * blocks[-1] ** 0.5]
    )
    x = (features - mean) / scale
    missing = F.normalize(targets, dim=1) - share * baseline
    if not (weights >= 1).any():
        raise ValueError("There is no labelled region (one of weight 1) to fit to.")
    expected = prior * missing[weights >= 1].mean(0)
    missing = missing - expected
    root = weights.sqrt()[:, None]
    left, right = x * root, missing * root
    penalty = ridge * torch.eye(min(left.shape), dtype=torch.float64)
    if len(left) < left.shape[1]:
        solved = left.T @ torch.linalg.solve(left @ left.T + penalty, right)
    else:
        solved = torch.linalg.solve(left.T @ left + penalty, left.T @ right)
    weight = solved / scale[:, None]
    with torch.no_grad():
        head.share.fill_(share)
        head.correction.weight.copy_(weight.T)
        head.correction.bias.copy_(expected - mean @ weight)
