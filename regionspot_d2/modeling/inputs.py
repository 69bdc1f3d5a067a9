"""Detectron2's dicts as the model takes them: images, and the regions that are asked about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import Boxes, Instances, RotatedBoxes
from torch import Tensor

from ..logits import check_probabilities
from .interfaces import to_rgb


def input_images(
    batched_inputs: list[dict[str, Any]], channels: str, device: torch.device
) -> list[Tensor]:
    """The images of inputs as RGB (3, H, W) on a device; ``channels`` is their own order.

    Raises:
        ValueError: an input is no dict with such an image.
    """
    images = [given_image(i, x) for i, x in enumerate(batched_inputs)]
    # Moved after it is cast: Apple's GPUs have no float64.
    images = [x.float() if x.dtype == torch.float64 else x for x in images]
    return [to_rgb(image.to(device, non_blocking=True), channels) for image in images]


def input_regions(
    batched_inputs: list[dict[str, Any]],
    detected_instances: list[Instances] | None,
    device: torch.device,
) -> list[tuple[Boxes, Tensor]]:
    """What :func:`given_regions` finds in each input, on a device."""
    regions = [
        given_regions(i, x, None if detected_instances is None else detected_instances[i])
        for i, x in enumerate(batched_inputs)
    ]
    return [(boxes.to(device), scores.to(device)) for boxes, scores in regions]


def given_image(i: int, x: Any) -> Tensor:
    """The image (3, H, W) of input ``i``, one of Detectron2's dicts; ValueError if it has none."""
    if not isinstance(x, Mapping):
        kind = type(x).__name__
        raise ValueError(
            f"Input {i} is of the type {kind}; a list of dicts with 'image' is expected."
        )
    image = x.get("image")
    if not isinstance(image, Tensor) or image.dim() != 3 or len(image) != 3 or not image.numel():
        kind = str(tuple(image.shape)) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"Input {_place(i, x)} has the 'image' {kind}; a tensor (3, H, W), 0..255, is expected."
        )
    return image


def given_regions(
    i: int, x: Mapping[str, Any], detected: Instances | None = None
) -> tuple[Boxes, Tensor]:
    """The boxes of input ``i`` and how sure their source is of each.

    Args:
        i, x: number and dict of the input; its ``proposals`` are read if there is no ``detected``.
        detected: ``pred_boxes`` and, unless all are 1, ``scores``.

    Returns:
        R boxes, XYXY in pixels of the image, and scores (R,), float32, 0..1.

    Raises:
        ValueError: there are none, a box is not four finite numbers, or a score is not in 0..1.
    """
    what = f"input {_place(i, x)}"
    found: Any = x.get("proposals") if detected is None else detected
    names = ["proposal_boxes", "objectness_logits"] if detected is None else ["pred_boxes"]
    if found is None:
        raise ValueError(
            f"Input {_place(i, x)} has no regions: it needs 'proposals' (MODEL.LOAD_PROPOSALS: "
            "True with DATASETS.PROPOSAL_FILES_TEST), or detected_instances."
        )
    if not isinstance(found, Instances) or not all(map(found.has, names)):
        raise ValueError(f"The regions of {what} are not Instances with {' and '.join(names)}.")
    boxes = found.get(names[0])
    if not isinstance(boxes, Boxes) or isinstance(boxes, RotatedBoxes):
        kind = type(boxes).__name__
        raise ValueError(f"The {names[0]} of {what} are {kind}; Boxes are expected.")
    bad = (~boxes.tensor.isfinite()).any(1).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(f"Box {bad[0]} of {what} is not finite: {boxes.tensor[bad[0]].tolist()}.")
    of_scores = "scores" if detected is not None else names[1]
    if not found.has(of_scores):
        return boxes, boxes.tensor.new_ones(len(boxes), dtype=torch.float32)
    scores = found.get(of_scores).float()
    check_probabilities(scores, f"The {of_scores} of {what}")
    return boxes, scores


def _place(i: int, x: Mapping[str, Any]) -> str:
    return f"{i} ({x.get('file_name', 'no file name')})"


def detected_regions(i: int, x: dict[str, Any], output: Any) -> Instances:
    """What a detector found on input ``i``; ValueError if it is not what Detectron2's find."""
    found = output.get("instances") if isinstance(output, dict) else None
    if not isinstance(found, Instances) or not found.has("scores"):
        raise ValueError("The detector gives no {'instances': Instances} with 'scores'.")
    given_regions(i, x, found)
    return found
