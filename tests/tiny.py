"""Tiny towers of the real libraries' classes, with weights that are functions of their names.

``tests/golden/README.md`` describes them.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import Tensor, nn

from regionspot_d2 import add_regionspot_config
from regionspot_d2.modeling import BoxPrompts, RegionSpot, RegionSpotHead

SAM_PIXEL_MEAN = (123.675, 116.28, 103.53)
SAM_PIXEL_STD = (58.395, 57.12, 57.375)

# The two vocabularies that the fixture ``vocabularies`` registers.
WORDS = {"regionspot_pets": ["cat", "dog", "bird"], "regionspot_food": ["bread", "cup"]}

# As in the json files of open_clip's model_configs.
OPEN_CLIP_CONFIG = {
    "embed_dim": 40,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 64,
        "heads": 1,
        "layers": 2,
    },
}


def golden() -> dict[str, np.ndarray]:
    """The published model's arrays for these towers."""
    with np.load(Path(__file__).with_name("golden") / "tiny_random.npz") as arrays:
        return dict(arrays)


@torch.no_grad()
def fill_golden(module: nn.Module, prefix: str = "") -> nn.Module:
    """Fills a tower, or with ``prefix`` ("image_encoder.") a part of one; switches it to eval."""
    for name, parameter in module.named_parameters():
        name = prefix + name
        values = _normal(zlib.crc32(name.encode()), parameter.shape)
        if name == "logit_scale":
            values = np.array(math.log(20))
        elif parameter.ndim > 1:
            values = values / math.sqrt(parameter[0].numel())
        elif name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = 0.02 * values
        parameter.copy_(torch.as_tensor(values))
    for name, buffer in module.named_buffers():
        if name.endswith("positional_encoding_gaussian_matrix"):
            buffer.copy_(torch.as_tensor(_normal(7, buffer.shape)))
    return module.eval()


@cache
def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    # Remembered, for many tests build the same tower.
    return np.random.RandomState(seed).standard_normal(shape).astype("float32")


def tiny_sam() -> tuple[nn.Module, nn.Module, nn.Module]:
    """SAM's image encoder (128 px, stride 16, 32 channels), prompt encoder and mask decoder."""
    sam = build_tiny_sam()
    return sam.image_encoder, sam.prompt_encoder, sam.mask_decoder


def build_tiny_sam(checkpoint: str | None = None) -> nn.Module:
    """The same as a whole, as an entry of ``segment_anything.sam_model_registry``."""
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=128,
            patch_size=16,
            embed_dim=48,
            depth=2,
            num_heads=3,
            mlp_ratio=2,
            out_chans=32,
            qkv_bias=True,
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=32,
            image_embedding_size=(8, 8),
            input_image_size=(128, 128),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=4),
            transformer_dim=32,
            iou_head_depth=3,
            iou_head_hidden_dim=32,
        ),
        pixel_mean=list(SAM_PIXEL_MEAN),
        pixel_std=list(SAM_PIXEL_STD),
    )
    fill_golden(sam)
    if checkpoint is not None:
        sam.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    return sam


def tiny_open_clip() -> nn.Module:
    """CLIP of open_clip: ViT of 3 layers, width 64, 64 px, 4x4 patches; text space of 40."""
    import open_clip

    return fill_golden(open_clip.model.CLIP(**OPEN_CLIP_CONFIG))


def tiny_openai_clip() -> nn.Module:
    """The same CLIP of the ``clip`` package."""
    from clip.model import CLIP

    model = CLIP(
        embed_dim=40,
        image_resolution=64,
        vision_layers=3,
        vision_width=64,
        vision_patch_size=16,
        context_length=77,
        vocab_size=49408,
        transformer_width=64,
        transformer_heads=1,
        transformer_layers=2,
    )
    return fill_golden(model)


def published_checkpoint() -> dict[str, Tensor]:
    """Golden weights under the names of the authors' checkpoints, frozen towers and all."""
    head = RegionSpotHead(token_dim=32, image_dim=64, text_dim=40, ffn_dim=96)
    state = {f"model.{k}": v for k, v in fill_golden(head).state_dict().items()}
    state.update({f"model.sam.{k}": v for k, v in build_tiny_sam().state_dict().items()})
    state.update({f"model.clip_model.{k}": v for k, v in tiny_open_clip().state_dict().items()})
    return state


def register_tiny_models() -> None:
    """Lets configs name "tiny" as the architecture of SAM and of CLIP.

    A process that a test starts must call it too.
    """
    import segment_anything
    from open_clip import factory

    segment_anything.sam_model_registry["tiny"] = build_tiny_sam
    factory._MODEL_CONFIGS["tiny"] = OPEN_CLIP_CONFIG


@contextmanager
def registered_tiny_models() -> Iterator[None]:
    """:func:`register_tiny_models` within a ``with`` block."""
    import segment_anything
    from open_clip import factory

    register_tiny_models()
    yield
    del segment_anything.sam_model_registry["tiny"]
    factory._MODEL_CONFIGS.pop("tiny", None)


def tiny_cfg() -> CfgNode:
    """A config of tiny towers on the CPU. Building from it needs the fixture ``tiny_models``."""
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RegionSpot"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.LOCALIZER.ARCH = "tiny"
    cfg.MODEL.LOCALIZER.WEIGHTS = ""
    cfg.MODEL.VISION_LANGUAGE.ARCH = "tiny"
    cfg.MODEL.VISION_LANGUAGE.WEIGHTS = ""
    cfg.MODEL.REGION_HEAD.FFN_DIM = 96
    cfg.INPUT.FORMAT = "RGB"
    return cfg


def classify(model: RegionSpot, image: Tensor, boxes: Boxes, class_names: list[str]) -> Tensor:
    """Logits (R, C) of boxes on one image (3, H, W)."""
    [answer] = model.answer(model.encode([image]), [BoxPrompts(boxes)], with_masks=False)
    return model.score(answer.embeddings, class_names)


@cache
def _built_model() -> nn.Module:
    cfg = tiny_cfg()
    cfg.DATASETS.TEST = ("regionspot_pets",)
    cfg.MODEL.MASK_ON = True
    cfg.TEST.DETECTIONS_PER_IMAGE = -1
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_model(cfg)
    fill_golden(model.region_head)
    fill_golden(model.vision_language.model)
    return model.eval()


def tiny_model(**attributes: Any) -> nn.Module:
    """A RegionSpot of tiny towers with golden weights; needs the fixture ``vocabularies``.

    Args:
        attributes: attributes of the model to set, such as ``with_masks=False``.
    """
    built = _built_model()
    # The tokenizer is big, and nobody changes it.
    tokenizer = built.vision_language.tokenizer
    model = copy.deepcopy(built, {id(tokenizer): tokenizer})
    for name, value in attributes.items():
        assert hasattr(model, name)
        setattr(model, name, value)
    return model
