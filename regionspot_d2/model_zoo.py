"""The configs that come with the package, by name, as in Detectron2's ``model_zoo``."""

from __future__ import annotations

import difflib
from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from .config import add_regionspot_config

#: Models by name: their config, and what they are.
MODELS: dict[str, tuple[str, str]] = {
    "mini": ("mini/regionspot_mini.yaml", "small; complete, nothing from a model hub"),
    "mini_pooled": ("mini/regionspot_mini_pooled.yaml", "small, without a trained head"),
    "regionspot_B": ("regionspot_B.yaml", "SAM ViT-B, CLIP ViT-B/16"),
    "regionspot_L": ("regionspot_L.yaml", "SAM ViT-B, CLIP ViT-L/14"),
    "regionspot_L_336": ("regionspot_L_336.yaml", "SAM ViT-B, CLIP ViT-L/14 at 336 pixels"),
    "published_B": ("published/regionspot_B.yaml", "regionspot_B as the published code runs it"),
    "published_L": ("published/regionspot_L.yaml", "regionspot_L as the published code runs it"),
    "published_L_336": (
        "published/regionspot_L_336.yaml",
        "regionspot_L_336 as the published code runs it",
    ),
}


def _folder() -> Path:
    """The configs: setup.py puts them into the package; in a checkout they are beside it."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def get_config_file(name: str) -> str:
    """The path of a config that comes with the package.

    Args:
        name: a name in :data:`MODELS`, or a path below ``configs/``, with or without ".yaml":
            "mini", "eval_lvis_gt", "published/eval_lvis_gt.yaml".

    Raises:
        ValueError: there is none of that name.
    """
    folder = _folder()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.yaml")}
    file = MODELS[name][0] if name in MODELS else f"{name.removesuffix('.yaml')}.yaml"
    if file in files:
        return str(files[file])
    names = [*MODELS, *(known.removesuffix(".yaml") for known in files)]
    close = difflib.get_close_matches(name, names, n=3)
    raise ValueError(
        f"There is no config {name!r:.80} in the model zoo. "
        + (f"Similar: {', '.join(close)}." if close else f"Models: {', '.join(MODELS)}.")
    )


def get_config(name: str) -> CfgNode:
    """A config that comes with the package, not frozen, on the GPU if there is one.

    Args:
        name: as for :func:`get_config_file`.

    Raises:
        ValueError: there is none of that name.
    """
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_file(get_config_file(name))
    return cfg
