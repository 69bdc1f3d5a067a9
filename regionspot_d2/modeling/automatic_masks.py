"""Regions without prompts: SAM's automatic mask generator on the weights of a localizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from segment_anything.utils.amg import MaskData
from torch import Tensor

from .sam import SamLocalizer


@dataclass(frozen=True)
class AutomaticMaskSettings:
    """The settings of ``SamAutomaticMaskGenerator`` and its defaults, chosen for SAM ViT-H.

    Its documentation explains each; ``points_per_batch`` only bounds the memory.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0


def automatic_boxes(
    localizer: SamLocalizer, image: Tensor, *, with_masks: bool = False, **settings: Any
) -> Instances:
    """Finds the regions of an image that a localizer with SAM's parts can segment.

    Args:
        localizer: finds them.
        image: (3, H, W) RGB, 0..255.
        with_masks: whether to return the masks too.
        **settings: the fields of :class:`AutomaticMaskSettings`.

    Returns:
        On the CPU, best first: ``pred_boxes`` (XYXY, pixels of the given image), ``scores``
        (predicted IoU x stability, in 0..1) and, if asked for, ``pred_masks`` (bool, R x H x W).
        There may be none. A box encloses all pixels of its mask, as COCO's and Detectron2's do; the
        generator's own ends one pixel earlier.

    Raises:
        TypeError: the localizer lacks SAM's parts, or a setting is unknown.
    """
    if not isinstance(localizer, SamLocalizer):
        raise TypeError(
            f"MODEL.LOCALIZER.NAME: {type(localizer).__name__} has no automatic mask generator; it "
            "must be a SamLocalizer."
        )
    generator = _Generator(_as_sam(localizer), **asdict(AutomaticMaskSettings(**settings)))
    pixels = image.detach().cpu().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    # With a stability threshold of 0, masks without a pixel come through; their stability is NaN.
    found = [mask for mask in generator.generate(np.ascontiguousarray(pixels)) if mask["area"] > 0]
    found.sort(key=_score, reverse=True)

    height, width = image.shape[-2:]
    regions = Instances((height, width))
    xywh = torch.tensor([mask["bbox"] for mask in found], dtype=torch.float32).reshape(-1, 4)
    regions.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:] + 1], dim=1))
    regions.scores = torch.tensor([_score(mask) for mask in found], dtype=torch.float32)
    if with_masks:
        masks = [torch.from_numpy(mask["segmentation"]) for mask in found]
        regions.pred_masks = (
            torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)
        )
    return regions


def _score(mask: dict[str, Any]) -> float:
    # The predicted IoU is a regression and may leave 0..1 a little.
    return min(max(mask["predicted_iou"], 0.0), 1.0) * mask["stability_score"]


def _as_sam(localizer: SamLocalizer) -> Sam:
    """The localizer's own modules, in the form the generator wants. Nothing is copied."""
    return Sam(
        localizer.image_encoder,
        localizer.prompt_encoder,
        localizer.mask_decoder,
        localizer.pixel_mean.flatten().tolist(),
        localizer.pixel_std.flatten().tolist(),
    ).to(localizer.pixel_mean.device)


class _Generator(SamAutomaticMaskGenerator):
    def _generate_masks(self, image: np.ndarray) -> MaskData:
        # It creates the categories for its NMS on the default device, which fails on a GPU.
        with torch.device(self.predictor.device):
            return super()._generate_masks(image)

    def _process_crop(self, *args: Any, **kwargs: Any) -> MaskData:
        data = super()._process_crop(*args, **kwargs)
        # It forgets the shape of no boxes, and fails when no crop has a mask.
        data["crop_boxes"] = data["crop_boxes"].reshape(-1, 4)
        return data
