"""What every detector is to RegionSpot: an image in, boxes and scores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np


class Detected(NamedTuple):
    """What a detector finds in one image.

    Attributes:
        boxes: float32 (R, 4), XYXY, pixels of the image.
        scores: float32 (R,), in 0..1.
        names: R class names in the detector's own words.
    """

    boxes: np.ndarray
    scores: np.ndarray
    names: list[str]


class RegionDetector(ABC):
    """Finds regions of one image after another."""

    @abstractmethod
    def __call__(self, image: np.ndarray) -> Detected:
        """Finds the regions of an image (H, W, 3), uint8, RGB."""
