"""How far scores can be trusted: calibration error, reliability diagram, telling unknown names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..files import write_atomically


class Bin(NamedTuple):
    """Regions of similar score.

    Attributes:
        score: the mean of their scores.
        accuracy: the share of them whose name is right.
        regions: how many they are.
    """

    score: float
    accuracy: float
    regions: int


def reliability(scores: Any, right: Any, bins: int = 10) -> list[Bin]:
    """Compares scores with accuracies, in bins of as many regions each.

    Bins of equal width would leave most of them nearly empty, and their accuracies to chance.

    Args:
        scores: (R,) in 0..1, of the name that each region got.
        right: (R,), whether it is right.
        bins: of them are made, as far as there are regions.
    """
    scores, right = np.asarray(scores, dtype=float), np.asarray(right, dtype=float)
    order = np.argsort(scores, kind="stable")
    parts = np.array_split(order, min(bins, len(order))) if len(order) else []
    return [Bin(float(scores[p].mean()), float(right[p].mean()), len(p)) for p in parts]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error, 0..1: how far scores and accuracies are apart, on average.

    A finite number of regions alone makes it larger than 0: about 0.03 for 768 regions in ten bins.
    """
    total = sum(part.regions for part in bins)
    gaps = (part.regions * abs(part.score - part.accuracy) for part in bins)
    return sum(gaps) / total if total else float("nan")


def auroc(scores: Any, positive: Any) -> float:
    """How often a positive scores more than a negative: 0.5 by chance, NaN if there are not both.

    Args:
        scores: (R,).
        positive: (R,) bool.
    """
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    _, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]  # equal scores share their mean rank
    ones = int(positive.sum())
    pairs = ones * (len(scores) - ones)
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / pairs) if pairs else float("nan")


def draw_reliability(path: str, bins: Sequence[Bin], title: str) -> None:
    """Draws accuracies over scores as a PNG; on the diagonal a score is a probability."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot(
        xlim=(0, 1), ylim=(0, 1), xlabel="score", ylabel="share of right names", title=title
    )
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1)
    axes.plot([part.score for part in bins], [part.accuracy for part in bins], marker="o")
    with write_atomically(path) as file:
        FigureCanvasAgg(figure).print_png(file)
