"""Tiny models of transformers' classes, built from their own configs; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from .tiny import fill_golden

SIDE = 128
_MAPS = [[32, 32], [16, 16], [8, 8]]
_PROMPTS = {"hidden_size": 32, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 16}
_DECODER = {
    "hidden_size": 32,
    "mlp_dim": 64,
    "num_attention_heads": 4,
    "iou_head_hidden_dim": 32,
}
_SAM_VISION = {
    "hidden_size": 48,
    "output_channels": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": 16,
    "window_size": 3,
    "global_attn_indexes": [1],
    "mlp_dim": 96,
    "num_pos_feats": 16,
}
_HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "image_size": [SIDE, SIDE],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 1, 2, 2],
    "window_size_per_stage": [4, 2, 2, 2],
    "global_attention_blocks": [3],
}
_TIMM = {
    "model_type": "timm_wrapper",
    "architecture": "test_resnet",
    "num_classes": 2,
    "model_args": {"features_only": True, "out_indices": [1, 2, 3, 4]},
}
_SAM3_VIT = {
    "model_type": "sam3_vit_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "pretrain_image_size": 64,
}
_PYRAMID = {"backbone_feature_sizes": _MAPS, "fpn_hidden_size": 32}

VISION: dict[str, dict[str, Any]] = {
    "SamModel": _SAM_VISION,
    "SamHQModel": _SAM_VISION,
    "Sam2Model": {
        "backbone_config": _HIERA,
        "backbone_channel_list": [64, 32, 16, 8],
        **_PYRAMID,
    },
    "EdgeTamModel": {
        "backbone_config": _TIMM,
        "backbone_channel_list": [96, 192, 48, 32],
        **_PYRAMID,
    },
    "Sam3TrackerModel": {
        "model_type": "sam3_vision_model",
        "backbone_config": _SAM3_VIT,
        **_PYRAMID,
    },
}


def tiny_transformers_sam(name: str) -> nn.Module:
    """A model of one of the classes in ``VISION``; skips the test if transformers lacks it."""
    transformers = pytest.importorskip("transformers")
    if name not in dir(transformers):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config_class = getattr(transformers, name).config_class
    decoder = {**_DECODER, "vit_dim": 48} if name == "SamHQModel" else _DECODER
    config = config_class(
        vision_config=VISION[name],
        prompt_encoder_config=_PROMPTS,
        mask_decoder_config=decoder,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for the buffers that no name fills
        return fill_golden(getattr(transformers, name)(config))
