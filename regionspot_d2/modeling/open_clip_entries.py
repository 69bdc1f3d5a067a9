"""What open_clip knows of its models: architectures, published weights, and what they take."""

from __future__ import annotations

import difflib
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.pretrained import (
    download_pretrained,
    get_pretrained_cfg,
    list_pretrained,
    list_pretrained_tags_by_model,
)
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor

from ..files import WeightsNotFoundError, local_weights
from ..hub import fetched, hub_file, hub_folder
from ..safe_loading import read_json

logger = logging.getLogger(__name__)

ARCH_KEY = "MODEL.VISION_LANGUAGE.ARCH"
WEIGHTS_KEY = "MODEL.VISION_LANGUAGE.WEIGHTS"
_HUB, _FOLDER = "hf-hub:", "local-dir:"
_CONFIG = "open_clip_config.json"
_TAG = re.compile(r"[\w-]+")


class Entry(NamedTuple):
    """A model of open_clip: how it is built, and what it takes.

    Attributes:
        name: as ``open_clip.create_model`` takes it.
        config: of the architecture, as in open_clip's json files.
        weights: the file, or a folder that has it; None for random weights.
        settings: as :func:`published_settings` finds them.
        cache: the folder for what open_clip itself gets from the hub; None for its own choice.
    """

    name: str
    config: dict[str, Any]
    weights: Path | None
    settings: dict[str, Any]
    cache: Path | None = None

    @property
    def comes_whole(self) -> bool:
        """Whether open_clip finds config and weights by the name."""
        return self.name.startswith((_HUB, _FOLDER))

    @property
    def pretrained(self) -> str | None:
        """What ``open_clip.create_model`` has to be told of the weights."""
        # Whole, for it takes a bare word for a tag.
        weights = None if self.comes_whole else self.weights
        return None if weights is None else os.path.abspath(weights)

    @property
    def short_name(self) -> str:
        """The name of the model, which is the same on the hub and in a folder."""
        return os.path.basename(self.name.rstrip("/")) if self.comes_whole else self.name


def find_entry(arch: str, weights: str) -> Entry:
    """Finds a model, and makes sure that its weights are on this machine.

    Args:
        arch: open_clip's name of an architecture, or OpenAI's; or "hf-hub:" and the id of a
            repository on the Hugging Face hub; or "local-dir:" and a folder with the same files.
        weights: as for :func:`find_weights`; of a hub or a folder only "", for they come with it.

    Raises:
        ValueError: there is no such architecture, or a config makes no sense.
        WeightsNotFoundError: something is not on this machine and cannot be downloaded.
    """
    if not arch.startswith((_HUB, _FOLDER)):
        name, config = architecture(arch)
        return Entry(name, config, *find_weights(name, weights))
    if weights:
        raise ValueError(
            f"{WEIGHTS_KEY} is '{weights}', but the weights of '{arch}' come with it: set it to ''."
        )
    if arch.startswith(_FOLDER):
        folder = Path(arch.removeprefix(_FOLDER)).expanduser()
        if not (folder / _CONFIG).is_file():
            raise WeightsNotFoundError(f"{ARCH_KEY} is '{arch}', where there is no {_CONFIG}.")
        settings, config = _read_config(folder / _CONFIG)
        return Entry(f"{_FOLDER}{folder}", config, folder, settings)
    repository = arch.removeprefix(_HUB)
    settings, config = _read_config(hub_file(repository, _CONFIG, ARCH_KEY))
    if any(e["hf_hub"] == f"{repository}/" for e in _entries_of_openai()):
        settings["interpolation"] = None
    file = _from_hub(f"{repository}/", ARCH_KEY)
    return Entry(arch, config, file, settings, hub_folder())


def find_weights(name: str, weights: str) -> tuple[Path | None, dict[str, Any]]:
    """Makes sure that weights of an architecture are on this machine.

    Args:
        name: open_clip's name of the architecture.
        weights: a file, a URL, one of open_clip's tags of the architecture, such as "openai" or
            "laion2b_s34b_b88k", or "" for random weights.

    Returns:
        The file, or None for random weights, and what :func:`published_settings` finds.

    Raises:
        WeightsNotFoundError: there is no such file or tag, or it cannot be downloaded.
    """
    if not _TAG.fullmatch(weights) or os.path.isfile(weights):
        return local_weights(weights, WEIGHTS_KEY), published_settings(name, weights)
    tags, tag = list_pretrained_tags_by_model(name), weights.lower().replace("-", "_")
    if tag not in tags:
        raise WeightsNotFoundError(
            f"{WEIGHTS_KEY} is '{weights}', which is neither a file nor one of open_clip's tags of "
            f"{name}: it has {', '.join(tags) or 'none'}."
        )
    entry = get_pretrained_cfg(name, tag)
    # The URL of OpenAI's files promises their sha256, and our configs have it.
    if tag == "openai" or not entry["hf_hub"]:
        file = local_weights(entry["url"], WEIGHTS_KEY)
    else:
        file = _from_hub(entry["hf_hub"], WEIGHTS_KEY)
    return file, published_settings(name, tag)


def _from_hub(place: str, config_key: str) -> Path:
    """Weights as open_clip's entries place them: a repository, "/", and a file if it is named."""

    def download(folder: Path) -> str:
        # It takes a safetensors file where there is one.
        return download_pretrained({"hf_hub": place}, cache_dir=str(folder))

    return fetched(download, os.path.dirname(place), config_key)


def _entries_of_openai() -> list[dict[str, Any]]:
    return [get_pretrained_cfg(name, tag) for name, tag in list_pretrained() if tag == "openai"]


def _read_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the architecture in the config of a repository or a folder."""
    content = read_json(str(file))
    for path in ("model_cfg", "model_cfg.vision_cfg", "model_cfg.text_cfg"):
        if not isinstance(_at(content, path), dict):
            raise ValueError(f"'{file}' has no section {path}.")
    own = _at(content, "preprocess_cfg")  # of old ones mean and std, or nothing
    found = merge_preprocess_dict(PreprocessCfg(), own if isinstance(own, dict) else {})
    for key in ("mean", "std"):
        values = found[key]
        if not _are_three_numbers(values):
            raise ValueError(
                f"'{file}': preprocess_cfg.{key} is {values!r:.60}; three numbers are expected."
            )
    # As open_clip reads it.
    way = "bilinear" if found["interpolation"] == "bilinear" else "bicubic"
    return {**found, "interpolation": way}, content["model_cfg"]


def _are_three_numbers(value: Any) -> bool:
    numbers = isinstance(value, (list, tuple)) and all(type(x) in (int, float) for x in value)
    return numbers and len(value) == 3


def _at(content: Any, path: str) -> Any:
    """What a json has under keys that are joined by dots; None if there is no such thing."""
    for key in path.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content


def architecture(arch: str) -> tuple[str, dict[str, Any]]:
    """open_clip's name and config of an architecture, from its own name or OpenAI's.

    Raises:
        ValueError: open_clip does not have it.
    """
    if arch.startswith((_HUB, _FOLDER)):
        raise ValueError(f"{ARCH_KEY} is '{arch}', which only OpenClip can load.")
    name = arch.replace("/", "-").replace("@", "-").removesuffix("px")
    if name not in open_clip.list_models():
        close = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), n=5))
        hint = f"Did you mean {close}?" if close else "See open_clip.list_models()."
        raise ValueError(f"{ARCH_KEY} is '{arch}', which open_clip does not have. {hint}")
    return name, open_clip.get_model_config(name)


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
        source: the file or URL of the weights, a tag, or "". Where open_clip does not know it, only
            mean, std and interpolation are given: those that all entries agree on, or OpenAI's.

    Returns:
        The entry. Its ``interpolation`` is None for OpenAI's weights, or where they could be those:
        the published heads were trained on images that were not resized in CLIP's own way, and
        with a template of their own.
    """
    entries = {tag: get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)}
    for tag, entry in entries.items():
        hub = "/".join(entry.get("hf_hub", "").split("/")[:2])
        known = source in (tag, entry.get("url")) or (hub and f"/{hub}/" in source)
        if source and known:
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
