"""Models in a folder: a config, the trained head and class names, for this machine or another."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from safetensors.torch import save

from .checkpoint import TRAINED_ON
from .config import add_regionspot_config
from .engine.config import explained, load_config
from .files import WeightsNotFoundError, write_atomically
from .hub import hub_snapshot, is_hub_id
from .model_zoo import MODELS, get_config_file
from .modeling.interfaces import RegionHead
from .modeling.members import Vocabulary
from .modeling.word_files import plain_words, words_of
from .safe_loading import read_json, read_yaml

logger = logging.getLogger(__name__)

_CONFIG, _HEAD, _VOCABULARY = "config.yaml", "head.safetensors", "vocabulary.json"
# Of a repository on the hub; the last two are frozen weights that somebody put beside the rest.
_OF_A_REPOSITORY = (_CONFIG, _HEAD, _VOCABULARY, "*.pth", "*.pt")
# What a model is made of. Other sections are about training, evaluation and this machine.
_SECTIONS = ("MODEL", "INPUT", "TEST")
_OF_THIS_MACHINE = (
    ("MODEL", "DEVICE"),
    ("MODEL", "COMPILE"),
    ("INPUT", "TOKEN_CACHE"),
    ("INPUT", "MAX_PIXELS"),
)
_FROZEN = ("LOCALIZER", "VISION_LANGUAGE")
# A path, or the name of a file of weights; not a tag such as "openai".
_FILE = re.compile(r"[/\\]|\.(pth|pt|bin|pkl|safetensors)$")


def read_pretrained(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    zoom: float | None = None,
) -> tuple[CfgNode, Vocabulary | None]:
    """Reads what a predictor is built from.

    A folder may be anybody's: nothing in it can run code, and it cannot raise the limit for image
    files (``INPUT.MAX_PIXELS``).

    Args:
        source: a name of :mod:`~regionspot_d2.model_zoo`, which goes before a folder of that name;
            a config file; a folder that :func:`write_pretrained` wrote; or "owner/name", a
            repository with the files of such a folder on the Hugging Face hub.
        device: where the model runs; None for the config's, by default the GPU if there is one.
        precision: "float32", "bfloat16", "float16" or "auto", of the frozen models; None for the
            config's.
        zoom: see :meth:`RegionSpot.answer`; None for the config's.

    Returns:
        The config, frozen, and the vocabulary, if the folder has one.

    Raises:
        ValueError: there is no such model, the folder is not as it is written, or the device cannot
            be used.
        OSError: a file is missing, or cannot be downloaded.
    """
    opts, names, path = [], None, os.path.expanduser(os.fspath(source))
    folder, path = _place(path)
    if folder is not None:
        opts += _weights_in(folder)
        names = _words_in(folder / _VOCABULARY)
    keywords = {"DEVICE": device, "PRECISION": precision, "ZOOM": zoom}
    for key, value in keywords.items():
        if value is not None:
            opts += [f"MODEL.{key}", str(value)]
    if folder is not None:
        opts += ["MODEL.NAMING.WORDS", ""]  # a file of this machine, which no folder may name
    cfg = load_config(path, opts, training=False, testing=False)
    check_device(cfg.MODEL.DEVICE)
    return cfg if folder is None else _within_limits(cfg, path), names


def _place(source: str) -> tuple[Path | None, str]:
    """The folder that is meant, from the hub if it is not here, or None; and the config."""
    if source not in MODELS and os.path.exists(source):
        folder = Path(source).absolute() if os.path.isdir(source) else None
        return folder, source if folder is None else str(folder / _CONFIG)
    try:
        return None, get_config_file(source)
    except ValueError as error:
        if not is_hub_id(source):
            message = f"{error} A config file or a folder of that name is not there."
            raise ValueError(message) from None
    folder = hub_snapshot(source, _OF_A_REPOSITORY, "from_pretrained")
    return folder, str(folder / _CONFIG)


def _within_limits(cfg: CfgNode, path: str) -> CfgNode:
    """A folder's config with the limits of this machine, which only its user may raise."""
    limit = _defaults().INPUT.MAX_PIXELS
    if cfg.INPUT.MAX_PIXELS <= limit:
        return cfg
    logger.warning(
        "INPUT.MAX_PIXELS %s in '%s' is ignored: the limit for image files stays %s. Set "
        "predictor.max_pixels to raise it.",
        *(f"{cfg.INPUT.MAX_PIXELS:,}", path, f"{limit:,}"),
    )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MAX_PIXELS = limit
    cfg.freeze()
    return cfg


def _defaults() -> CfgNode:
    defaults = get_cfg()
    add_regionspot_config(defaults)
    return defaults


def check_device(device: str) -> None:
    """Raises a ValueError if PyTorch cannot use a device."""
    if str(device).startswith("meta"):  # which has shapes and no numbers
        raise ValueError(f"MODEL.DEVICE {device}: nothing is computed there.")
    try:
        torch.empty(0, device=device)
    # PyTorch raises AssertionError where it was built without CUDA.
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"MODEL.DEVICE {device}: {str(error).splitlines()[0]}") from error


def _weights_in(folder: Path) -> list[str]:
    """Options by which a config in a folder finds its weights."""
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(
            f"'{folder}' has no {_CONFIG}: a folder of RegionSpotPredictor.save_pretrained is "
            "expected."
        )
    with explained(CfgNode(), str(folder / _CONFIG)):
        content = read_yaml(str(folder / _CONFIG), bases=False)
    for section in content:
        if section not in (*_SECTIONS, "VERSION"):
            raise ValueError(
                f"'{folder / _CONFIG}' has the key {section:.80}; in a folder only "
                f"{', '.join(_SECTIONS)} are expected."
            )
    model = content.get("MODEL")
    model = model if isinstance(model, dict) else {}
    opts, head = [], model.get("WEIGHTS", "")
    if head not in ("", _HEAD):
        raise ValueError(
            f"'{folder / _CONFIG}': MODEL.WEIGHTS is {head!r:.80}; {_HEAD}, which lies beside it, "
            "or '' is expected."
        )
    if head:
        if not (folder / _HEAD).is_file():
            raise WeightsNotFoundError(f"'{folder}' has no {_HEAD}, the trained head.")
        opts += ["MODEL.WEIGHTS", str(folder / _HEAD)]
    return opts + _frozen_weights_in(folder, model)


def _frozen_weights_in(folder: Path, model: dict[str, Any]) -> list[str]:
    """The same for files of the machine that the folder comes from."""
    opts = []
    for key in _FROZEN:
        part = model.get(key)
        value = part.get("WEIGHTS", "") if isinstance(part, dict) else ""
        if not isinstance(value, str) or "://" in value or not _FILE.search(value):
            continue  # a URL, a name, nothing; or the config's own reader says what is wrong
        beside = folder / os.path.basename(value)
        if beside.is_file():
            opts += [f"MODEL.{key}.WEIGHTS", str(beside)]
        elif not os.path.isabs(value) or not os.path.isfile(value):
            raise WeightsNotFoundError(
                f"'{folder / _CONFIG}': MODEL.{key}.WEIGHTS is '{value}', which is not on this "
                f"machine; put '{beside.name}' into the folder, or change the config."
            )
    return opts


def _words_in(file: Path) -> Vocabulary | None:
    if not file.is_file():
        return None
    try:
        return words_of(read_json(str(file)))
    except ValueError as error:
        raise ValueError(
            f"'{file}': a list of class names is expected, or a dict of them. {error}"
        ) from error


def write_pretrained(
    folder: str | os.PathLike[str],
    cfg: CfgNode | None,
    head: RegionHead,
    vocabulary: Vocabulary | None,
) -> None:
    """Writes a model for :func:`read_pretrained`; files of the same names are replaced.

    ``config.yaml`` has what differs from the defaults, ``head.safetensors`` the region head, if it
    has parameters, ``vocabulary.json`` the vocabulary, if there is one. The frozen models stay
    where the config says: URLs and packages as they are; files of this machine by their paths, and
    on another machine they are looked for in the folder.

    Raises:
        ValueError: there is no config, or the vocabulary has vectors.
        OSError: it cannot be written.
    """
    if cfg is None:
        raise ValueError(
            "This predictor was made of a model, so there is no config to write: make it of a "
            "config, or by from_pretrained, and load the head into predictor.model.region_head."
        )
    words = None if vocabulary is None else plain_words(vocabulary)
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    # A copy each: safetensors refuses tensors that share memory.
    state = {key: each.cpu().clone().contiguous() for key, each in head.state_dict().items()}
    metadata = {"format": "pt"}
    if head.trained_on:
        metadata[TRAINED_ON] = json.dumps(dict(head.trained_on))
    if state:
        with write_atomically(folder / _HEAD) as file:
            file.write(save(state, metadata))
    else:
        (folder / _HEAD).unlink(missing_ok=True)
    if words:
        with write_atomically(folder / _VOCABULARY, "w") as file:
            json.dump(words, file, ensure_ascii=False, indent=1)
    else:
        (folder / _VOCABULARY).unlink(missing_ok=True)
    found = _differences(cfg, _defaults())
    content = {key: found[key] for key in _SECTIONS if key in found}
    for section, key in _OF_THIS_MACHINE:
        content.get(section, {}).pop(key, None)
    model = content.setdefault("MODEL", {})
    model["WEIGHTS"] = _HEAD if state else ""
    model.get("NAMING", {}).pop("WORDS", None)  # a file of this machine; the vocabulary has them
    for part in _FROZEN:
        weights = cfg.MODEL[part].WEIGHTS
        if os.path.isfile(os.path.expanduser(weights)):
            model[part]["WEIGHTS"] = os.path.abspath(os.path.expanduser(weights))
    # Last: a folder with a config is complete.
    with write_atomically(folder / _CONFIG, "w") as file:
        yaml.safe_dump({**content, "VERSION": cfg.VERSION}, file)


def _differences(cfg: CfgNode, defaults: CfgNode) -> dict[str, Any]:
    """What a config has in another way than the defaults, as nested dicts."""
    found: dict[str, Any] = {}
    for key, value in cfg.items():
        known = defaults.get(key)
        if isinstance(value, CfgNode) and isinstance(known, CfgNode):
            if inner := _differences(value, known):
                found[key] = inner
        elif key not in defaults or value != known:
            found[key] = value
    return found
