"""Scores of regions that are logits rather than probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# Scores that are probabilities in all but rounding.
_ROUNDING = 1e-3
LOGITS = "some scores are below 0 or above 1, so all are taken for logits (sigmoid)."


def look_like_logits(scores: Any) -> bool:
    """Whether finite scores (N,) of a file cannot all be probabilities."""
    values = np.asarray(scores, dtype=np.float64)
    return bool(values.size and (values.min() < -_ROUNDING or values.max() > 1 + _ROUNDING))


def check_probabilities(scores: torch.Tensor, what: str) -> None:
    """Checks that scores (N,), which are multiplied by those of names, are probabilities.

    One image does not show whether the scores of all are logits, so they are not converted here.

    Raises:
        ValueError: one is not in 0..1; ``what`` says whose scores they are.
    """
    values = scores.detach().float().cpu()
    if not values.isfinite().all() or look_like_logits(values):
        low, high = (float(value) for value in values.aminmax())
        raise ValueError(
            f"{what} are from {low:g} to {high:g}; 0..1 is expected. If they are logits, take "
            "their sigmoid, of all images alike."
        )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits of any size, in their dtype."""
    return torch.from_numpy(np.asarray(logits, np.float64)).sigmoid().numpy().astype(logits.dtype)
