"""Detectors as sources of regions: Detectron2's, transformers', torchvision's, or your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .fixed_classes import load_detectron2_detector, load_torchvision_detector
from .interface import Detected, RegionDetector
from .zero_shot import load_zero_shot_detector

__all__ = ["DETECTORS", "Detected", "RegionDetector", "build_detector"]

# What builds the detectors of each prefix, as ``build(name, weights, class_names, device)``. A
# detector of your own is an entry more.
DETECTORS: dict[
    str, Callable[[str, str | None, Sequence[str], torch.device | str], RegionDetector]
] = {
    "detectron2": load_detectron2_detector,
    "hf": load_zero_shot_detector,
    "torchvision": load_torchvision_detector,
}


def build_detector(
    source: str,
    *,
    weights: str | None = None,
    class_names: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> RegionDetector:
    """Builds a detector, which finds regions for RegionSpot to name.

    Example::

        detector = build_detector("hf:IDEA-Research/grounding-dino-tiny", class_names=["cat"])
        found = detector(image)
        named = predictor.predict(boxes=found.boxes)

    Args:
        source: "detectron2:CONFIG", a config file or a name in Detectron2's model zoo; "hf:ID", a
            zero-shot detector of transformers, by its name on the Hugging Face hub or its folder;
            or "torchvision:NAME", one of ``torchvision.models.detection``.
        weights: a file or a URL; None for the published ones. None for "hf:", whose weights come
            with the model.
        class_names: what a zero-shot detector shall find; the others find their own classes.
        device: where it runs.

    Raises:
        ValueError: there is no such detector, or the weights are not its.
        WeightsNotFoundError: the weights are neither on disk nor reachable.
        ImportError: "hf:" without transformers.
    """
    prefix, colon, name = source.partition(":")
    if not colon or not name or prefix not in DETECTORS:
        raise ValueError(f"{', '.join(f'{known}:NAME' for known in DETECTORS)} is expected.")
    return DETECTORS[prefix](name, weights, class_names, device)
