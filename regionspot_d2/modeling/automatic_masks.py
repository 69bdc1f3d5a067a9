"""Regions without prompts: SAM's automatic mask generator on the weights of a localizer."""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from segment_anything.utils.amg import MaskData, rle_to_mask
from torch import Tensor

from .sam import SamLocalizer

# The numbers that ``SamAutomaticMaskGenerator`` takes, and its defaults, made for SAM ViT-H.
AUTOMATIC_MASK_SETTINGS: dict[str, int | float] = {
    name: parameter.default
    for name, parameter in signature(SamAutomaticMaskGenerator).parameters.items()
    if isinstance(parameter.default, int | float)
}
# 256 MB of floats: more only where one point takes more.
_MAX_BATCH_PIXELS = 2**26


def automatic_boxes(
    localizer: SamLocalizer, image: Tensor, *, with_masks: bool = False, **settings: Any
) -> Instances:
    """Finds the regions of an image that a localizer with SAM's parts can segment.

    Args:
        localizer: a ``SamLocalizer``; TypeError if not.
        image: (3, H, W) RGB, 0..255.
        with_masks: whether to return the masks too.
        **settings: some of ``AUTOMATIC_MASK_SETTINGS``; TypeError if SAM does not have one.

    Returns:
        On the CPU, best first: ``pred_boxes`` (XYXY, pixels of the image), ``scores`` (predicted
        IoU x stability, in 0..1) and, if asked for, ``pred_masks`` (bool, R x H x W). A box
        encloses all pixels of its mask, as COCO's do; the generator's own ends one pixel earlier.
    """
    if not isinstance(localizer, SamLocalizer):
        raise TypeError(
            f"MODEL.LOCALIZER.NAME: {type(localizer).__name__} has no automatic mask generator; "
            "it must be a SamLocalizer."
        )
    # The localizer's own modules, in the form that the generator expects. Nothing is copied.
    parts = localizer.image_encoder, localizer.prompt_encoder, localizer.mask_decoder
    statistics = (x.flatten().tolist() for x in (localizer.pixel_mean, localizer.pixel_std))
    sam = Sam(*parts, *statistics).to(localizer.pixel_mean.device)
    height, width = image.shape[-2:]
    # The generator holds three masks of each point of a batch, as floats at the image's size.
    batch = settings.pop("points_per_batch", AUTOMATIC_MASK_SETTINGS["points_per_batch"])
    batch = min(batch, max(1, _MAX_BATCH_PIXELS // (3 * height * width)))
    run_lengths = {"points_per_batch": batch, "output_mode": "uncompressed_rle"}
    generator = _Generator(sam, **run_lengths, **settings)
    pixels = image.detach().cpu().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    # With a stability threshold of 0, masks without a pixel come through; their stability is NaN.
    found = [mask for mask in generator.generate(np.ascontiguousarray(pixels)) if mask["area"] > 0]
    found.sort(key=_score, reverse=True)
    regions = Instances((height, width))
    xywh = torch.tensor([mask["bbox"] for mask in found], dtype=torch.float32).reshape(-1, 4)
    regions.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:] + 1], dim=1))
    regions.scores = torch.tensor([_score(mask) for mask in found], dtype=torch.float32)
    if with_masks:
        masks = np.zeros((len(found), height, width), dtype=bool)
        for mask, region in zip(masks, found):
            mask[:] = rle_to_mask(region["segmentation"])
        regions.pred_masks = torch.from_numpy(masks)
    return regions


def _score(mask: dict[str, Any]) -> float:
    # The predicted IoU is a regression and may leave 0..1 a little.
    return min(max(mask["predicted_iou"], 0.0), 1.0) * mask["stability_score"]


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
