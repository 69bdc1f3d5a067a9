"""Heads for the pairs of configs/towers: extraction, training and evaluation on real photos.

The image towers and text towers are the architectures themselves, the localizers tiny models of the
real classes; all weights are random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot_d2 import add_regionspot_config
from regionspot_d2.checkpoint import RegionSpotCheckpointer, pair_of
from regionspot_d2.data.datasets import register_coco_format
from regionspot_d2.engine import RegionSpotTrainer

from . import tiny
from .datasets_on_disk import TINYCOCO
from .tiny_transformers import tiny_transformers_sam
from .tools import ROOT, load_tool

TOWERS = sorted((ROOT / "configs" / "towers").glob("*.yaml"))
# The classes of transformers that the hub's models are of.
CLASSES = {
    "facebook/sam2.1-hiera-base-plus": "Sam2Model",
    "syscv-community/sam-hq-vit-base": "SamHQModel",
    "yonigozlan/EdgeTAM-hf": "EdgeTamModel",
}


def towers_cfg(file: Path, folder: Path) -> CfgNode:
    """The config, with random weights, for twenty steps on tinycoco."""
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_file(str(file))
    localizer = cfg.MODEL.LOCALIZER
    if localizer.NAME == "TransformersSam":
        model = tiny_transformers_sam(CLASSES[localizer.ARCH])
        localizer.ARCH = str(folder / "localizer")
        model.save_pretrained(localizer.ARCH)
    else:
        localizer.ARCH, localizer.WEIGHTS = "tiny", str(folder / "sam.pth")
        torch.save(tiny.build_tiny_sam().state_dict(), localizer.WEIGHTS)
    cfg.MODEL.VISION_LANGUAGE.WEIGHTS = ""
    cfg.MODEL.VISION_LANGUAGE.TEMPLATES = ["{}"]
    cfg.MODEL.DEVICE, cfg.MODEL.MASK_ON = "cpu", False
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("tinycoco",)
    cfg.DATASETS.PROPOSAL_FILES_TEST = ("ground_truth://tinycoco",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.TOKEN_CACHE = str(folder / "tokens")
    cfg.OUTPUT_DIR = str(folder)
    cfg.SOLVER.AMP.ENABLED = False
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 4, 20, ()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 2e-4, 0
    return cfg


@pytest.mark.slow
@pytest.mark.skipif(not TINYCOCO.is_dir(), reason="the COCO photos of the developers are not here")
@pytest.mark.parametrize("file", TOWERS, ids=lambda file: file.stem)
def test_a_head_learns_in_twenty_steps(file, tmp_path, monkeypatch, tiny_models, empty_cache):
    pytest.importorskip("transformers")
    cfg = towers_cfg(file, tmp_path)
    text = open_clip.get_model_config(cfg.MODEL.VISION_LANGUAGE.ARCH)["text_cfg"]
    if text.get("hf_tokenizer_name"):  # on the hub
        tokenizer = open_clip.SimpleTokenizer(context_length=text["context_length"])
        monkeypatch.setattr(open_clip, "get_tokenizer", lambda *args, **options: tokenizer)
    register_coco_format([["tinycoco", f"{TINYCOCO}/instances.json", f"{TINYCOCO}/images"]])
    try:
        tool = load_tool("extract_tokens")
        tool.main(tool.argument_parser().parse_args([]), cfg)
        torch.manual_seed(0)
        trainer: Any = RegionSpotTrainer(cfg)
        trainer.resume_or_load(resume=False)
        results = trainer.train() or RegionSpotTrainer.test(cfg, trainer.model)
        values = [value for value, _ in trainer.storage.history("total_loss").values()]
    finally:
        DatasetCatalog.remove("tinycoco")
        MetadataCatalog.remove("tinycoco")
    first, last = np.mean(values[:5]), np.mean(values[-5:])
    print(f"{file.stem}: loss {first:.4f} -> {last:.4f}, AP {results['bbox']['AP']:.2f}")
    assert len(values) == 20 and last < 0.8 * first
    assert results["bbox"]["AP"] >= 0  # it is NaN where nothing was evaluated

    # The head is of this pair.
    saved = str(tmp_path / "model_final.pth")
    RegionSpotCheckpointer(trainer.model).load(saved)
    pair = pair_of(trainer.model)
    assert torch.load(saved, weights_only=True)["pair"] == pair
    trainer.model.localizer.identity = "another"
    with pytest.raises(ValueError, match=f"'{pair['localizer']}', and .* do not carry over"):
        RegionSpotCheckpointer(trainer.model).load(saved)
