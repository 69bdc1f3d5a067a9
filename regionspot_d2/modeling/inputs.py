"""Detectron2's dicts as the model takes them: images, and the regions that are asked about."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..logits import look_like_logits
from .interfaces import to_rgb


def input_images(
    batched_inputs: list[dict[str, Any]], channels: str, device: torch.device
) -> list[Tensor]:
    """The images of inputs as RGB (3, H, W) on a device; ``channels`` is their own order."""
    # Moved after it is cast: Apple's GPUs have no float64.
    images = [x["image"] for x in batched_inputs]
    images = [x.float() if x.dtype == torch.float64 else x for x in images]
    return [to_rgb(image.to(device), channels) for image in images]


def input_regions(
    batched_inputs: list[dict[str, Any]],
    detected_instances: list[Instances] | None,
    device: torch.device,
) -> list[tuple[Boxes, Tensor]]:
    """The boxes of each image, XYXY in pixels of it, and how sure their source was of each (R,).

    Raises:
        ValueError: an input has no regions, boxes that are not finite, or scores outside 0..1.
    """
    detected = detected_instances or [None] * len(batched_inputs)
    regions = []
    for i, (x, found) in enumerate(zip(batched_inputs, detected)):
        where = f"input {i} ({x.get('file_name', 'no file name')})"
        if found is not None:
            boxes = found.pred_boxes
            ones = boxes.tensor.new_ones(len(boxes))
            scores = found.scores if found.has("scores") else ones
        elif "proposals" in x:
            boxes, scores = x["proposals"].proposal_boxes, x["proposals"].objectness_logits
        else:
            raise ValueError(
                f"I{where[1:]} has no regions: it needs 'proposals' (MODEL.LOAD_PROPOSALS: True "
                "with DATASETS.PROPOSAL_FILES_TEST), or detected_instances."
            )
        bad = (~boxes.tensor.isfinite()).any(1).nonzero()[:, 0].tolist()
        if bad:
            values = boxes.tensor[bad[0]].tolist()
            raise ValueError(f"Box {bad[0]} of {where} is not finite: {values}.")
        if not scores.isfinite().all() or look_like_logits(scores.detach().cpu()):
            # One image cannot tell: all of its logits may lie in 0..1. A file can, see data/.
            raise ValueError(
                f"The scores of the regions of {where} go from {float(scores.min()):g} to "
                f"{float(scores.max()):g}; probabilities are expected. Take the sigmoid of logits."
            )
        regions.append((boxes.to(device), scores.float().to(device)))
    return regions
