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


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits of any size, in their dtype."""
    return torch.from_numpy(np.asarray(logits, np.float64)).sigmoid().numpy().astype(logits.dtype)
