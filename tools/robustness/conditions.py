"""Regions under worse conditions: other boxes around them, or a worse image."""

from __future__ import annotations

import zlib
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from detectron2.structures import Boxes
from robustness.kinds import BOX_NOISE, CORRUPTIONS, LOOSE_BOXES
from torch import Tensor

_SMALLEST_SIDE = 32  # imagecorruptions' limit


class Regions(NamedTuple):
    """The labeled regions of one image, on the CPU.

    Attributes:
        key: tells this image from others; random numbers follow from it.
        image: (3, H, W), RGB, uint8.
        boxes: (R, 4), XYXY, pixels of the image; R is at least 1.
        labels: (R,), int64.
    """

    key: str
    image: Tensor
    boxes: Tensor
    labels: Tensor


def seed_of(*parts: object) -> int:
    """A seed that is the same in every run, and another one for each image and condition."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


def disturbed(regions: Regions, kind: str, strength: float, seed: int = 0) -> Regions:
    """Regions under a condition of ``STRENGTHS`` other than the attack, each time the same."""
    size = (regions.image.shape[1], regions.image.shape[2])
    seed = seed_of(seed, regions.key, kind, strength)
    if kind == BOX_NOISE:
        return regions._replace(boxes=moved_boxes(regions.boxes, size, strength, seed))
    if kind == LOOSE_BOXES:
        return regions._replace(boxes=loose_boxes(regions.boxes, size, strength))
    if min(size) < _SMALLEST_SIDE:
        raise ValueError(
            f"The image {regions.key} is {size[1]} x {size[0]}; corruptions need sides of at least "
            f"{_SMALLEST_SIDE} pixels. Leave the image out, or choose other --kinds."
        )
    return regions._replace(image=corrupted(regions.image, CORRUPTIONS[kind], int(strength), seed))


def moved_boxes(boxes: Tensor, size: tuple[int, int], noise: float, seed: int) -> Tensor:
    """Moves centers by up to ``noise`` of the side, and changes sides by up to as much.

    Args:
        boxes: (R, 4), XYXY, pixels of an image (H, W), at whose edges the result is cut.
    """
    low, high = boxes.chunk(2, dim=1)
    draw = torch.rand(2, len(boxes), 2, generator=torch.Generator().manual_seed(seed))
    shift, growth = noise * (high - low) * (2 * draw - 1)
    return _cut(torch.cat([low + shift - growth / 2, high + shift + growth / 2], dim=1), size)


def loose_boxes(boxes: Tensor, size: tuple[int, int], factor: float) -> Tensor:
    """Makes the sides of boxes longer around their centers; for the rest see moved_boxes."""
    low, high = boxes.chunk(2, dim=1)
    more = (factor - 1) * (high - low) / 2
    return _cut(torch.cat([low - more, high + more], dim=1), size)


def _cut(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    inside = Boxes(boxes)
    inside.clip(size)
    return inside.tensor


def corrupted(image: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Corrupts an image (3, H, W), uint8, as ImageNet-C does.

    Args:
        name: of the package imagecorruptions.
        severity: 1 to 5.
    """
    from imagecorruptions import corrupt  # optional, and slow to import

    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        # Its fog asks for float64 by a name that NumPy 2 no longer has.
        with patch.object(np, "float_", np.float64, create=True):
            found = corrupt(pixels, severity, name)
    finally:
        np.random.set_state(state)
    return torch.tensor(found).permute(2, 0, 1)
