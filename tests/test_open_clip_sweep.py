"""Every architecture of the installed open_clip: grid, width, projection and tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import open_clip
import pytest
import torch

from regionspot_d2.modeling.image_towers import open_clip_tower

from .tools import ROOT

ARCHITECTURES = open_clip.list_models()
# Text towers are built apart from image towers; a tiny one will do here.
_TEXT = {"context_length": 77, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1}
# Their towers end in an attentional pooler: they have tokens, and no way to project one of them.
NO_PROJECTION = {"coca_ViT-B-32", "coca_ViT-L-14"}
# One of each kind of tower.
KINDS = {
    "RN50": ((7, 7), 0, 2048),
    "ViT-L-14-336": ((24, 24), 1, 1024),
    "ViT-B-16-SigLIP2": ((14, 14), 0, 768),
    "ViT-SO400M-14-SigLIP2-378": ((27, 27), 0, 1152),
    "EVA02-B-16": ((14, 14), 1, 768),
    "convnext_base": ((7, 7), 0, 1024),
    "MobileCLIP2-S2": ((8, 8), 0, 1280),
    "PE-Core-B-16": ((14, 14), 1, 768),
    "ViT-H-14-worldwide": ((16, 16), 1, 1280),
    "vit_medium_patch16_gap_256": ((16, 16), 0, 512),
}


class Swept(NamedTuple):
    grid: tuple[int, int]
    prefix: int
    width: int
    projects: bool


@torch.no_grad()
def sweep(name: str) -> Swept:
    """Runs the image tower on the meta device: shapes without weights."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], _TEXT).eval()
        size = model.visual.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        tower = open_clip_tower(model.visual, size)
        tokens = tower.tokens(torch.zeros(2, 3, *size))
        rows, columns = tower.grid_size
        assert tokens.shape == (2, tower.num_prefix_tokens + rows * columns, tower.width)
        try:
            projected = tower.project(tokens)
        except ValueError:
            return Swept(tower.grid_size, tower.num_prefix_tokens, tower.width, False)
        assert projected.shape == (*tokens.shape[:2], config["embed_dim"])
    return Swept(tower.grid_size, tower.num_prefix_tokens, tower.width, True)


def tokenizer_package(name: str) -> str:
    """Where the tokenizer of an architecture comes from."""
    text = open_clip.get_model_config(name)["text_cfg"]
    return "transformers" if text.get("hf_tokenizer_name") else "open_clip"


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_tower(name):
    if name not in ARCHITECTURES:
        pytest.skip(f"open_clip {open_clip.__version__} has no {name}")
    assert sweep(name) == (*KINDS[name], True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name):
    assert sweep(name).projects == (name not in NO_PROJECTION)


def test_the_model_zoo_counts_them():
    if open_clip.__version__ != "3.3.0":
        pytest.skip("the table is of open_clip 3.3.0")
    text = (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8")
    table = text[text.index("## Other towers") :]
    counts = Counter(map(tokenizer_package, ARCHITECTURES))
    for what, count in {
        "all of open_clip 3.3.0": len(ARCHITECTURES),
        "that give a grid of tokens": len(ARCHITECTURES),
        "whose tokens project to text space": len(ARCHITECTURES) - len(NO_PROJECTION),
        "whose tokenizer comes with open_clip": counts["open_clip"],
        "whose tokenizer needs transformers and the hub": counts["transformers"],
    }.items():
        assert re.search(rf"\| {re.escape(what)} \| {count} \|", table), (what, count)
    assert all(f"`{name}`" in table for name in NO_PROJECTION)
