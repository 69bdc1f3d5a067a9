"""What open_clip knows of its models: architectures, published weights, and what they take."""

from __future__ import annotations

import difflib
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor

logger = logging.getLogger(__name__)

ARCH_KEY = "MODEL.VISION_LANGUAGE.ARCH"


def architecture(arch: str) -> tuple[str, dict[str, Any]]:
    """open_clip's name and config of an architecture, from its own name or OpenAI's."""
    name = arch.replace("/", "-").replace("@", "-").removesuffix("px")
    config = open_clip.get_model_config(name)
    if config is None:
        close = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), n=5))
        hint = f"Did you mean {close}?" if close else "See open_clip.list_models()."
        raise ValueError(f"{ARCH_KEY} is '{arch}', which open_clip does not have. {hint}")
    return name, config


def openai_state_dict(path: Path | None) -> dict[str, Tensor] | None:
    """The weights in a TorchScript archive, as OpenAI publishes them; None for any other file."""
    if path is None or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return None
    state = torch.jit.load(path, map_location="cpu").state_dict()
    for number in ("input_resolution", "context_length", "vocab_size"):
        state.pop(number, None)
    return state


def published_settings(name: str, source: str) -> dict[str, Any]:
    """Finds open_clip's entry, with mean, std and quick_gelu, for weights of an architecture.

    Args:
        name: open_clip's name of the architecture.
        source: the file or URL of the weights, or "". Where it is not a URL that open_clip knows,
            only mean, std and interpolation are given: those that all entries agree on, or
            OpenAI's.

    Returns:
        The entry. Its ``interpolation`` is None for OpenAI's weights, or where they could be those:
        the published heads were trained on images that were not resized in CLIP's own way.
    """
    entries = {tag: get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)}
    for tag, entry in entries.items():
        hub = "/".join(entry.get("hf_hub", "").split("/")[:2])
        if source and (source == entry.get("url") or (hub and f"/{hub}/" in source)):
            return {**entry, "interpolation": None if tag == "openai" else entry["interpolation"]}
    statistics = {(entry["mean"], entry["std"]) for entry in entries.values()}
    ways = {None} if "openai" in entries else {e["interpolation"] for e in entries.values()}
    if len(statistics) > 1:
        logger.warning("The published pixel means of %s differ; OpenAI's are used.", name)
    openai = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = statistics.pop() if len(statistics) == 1 else openai
    return {"mean": mean, "std": std, "interpolation": ways.pop() if len(ways) == 1 else None}


def larger_side(name: str, config: Mapping[str, Any], side: int) -> int | None:
    """Checks ``MODEL.VISION_LANGUAGE.IMAGE_SIZE`` and logs what it costs.

    Args:
        name, config: of the architecture.
        side: 0 for the size that the model was trained with.

    Returns:
        ``side`` for open_clip, which interpolates the position embeddings; None for 0.

    Raises:
        ValueError: the tower is a ResNet, whose pooling has no such grid, or ``side`` is no
            multiple of its patches' side.
    """
    if not side:
        return None
    vision = config["vision_cfg"]
    trained, patch = vision.get("image_size", 224), vision.get("patch_size", 1)
    if isinstance(vision.get("layers"), list):
        raise ValueError(f"MODEL.VISION_LANGUAGE.IMAGE_SIZE is {side}; '{name}' is not a ViT.")
    if side < patch or side % patch:
        raise ValueError(
            f"MODEL.VISION_LANGUAGE.IMAGE_SIZE is {side}; a multiple of {patch} is expected, the "
            f"side of a patch of '{name}'."
        )
    ratio = (side / trained) ** 2
    logger.info(
        "%s takes images of %d instead of %d pixels: %.1f times the image tokens, at least as many "
        "times the time and, in each attention, %.0f times the products.",
        *(name, side, trained, ratio, ratio**2),
    )
    return side
