"""Checkpoints: written whole or not at all, read in common formats, refused if they do not fit."""

from __future__ import annotations

import json
import logging
import math
import resource

import pytest
import torch
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import nn

from regionspot_d2.checkpoint import RegionSpotCheckpointer, pair_of
from regionspot_d2.files import WeightsNotFoundError
from regionspot_d2.modeling import RegionSpotHead

from . import tiny


def head(image_dim: int = 16) -> RegionSpotHead:
    return RegionSpotHead(
        token_dim=12, image_dim=image_dim, text_dim=10, depth=1, num_heads=4, ffn_dim=24
    )


class Model(nn.Module):
    def __init__(self, image_dim: int = 16) -> None:
        super().__init__()
        self.region_head = head(image_dim)


class Detector(nn.Module):
    """The head inside another model that has parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 2)
        self.roi_heads = Model()


def assert_loaded(model: nn.Module, expected: RegionSpotHead) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[f"region_head.{name}"], value)


def test_round_trip_with_other_state(tmp_path):
    model, optimizer = Model(), torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.5)
    RegionSpotCheckpointer(model, str(tmp_path), optimizer=optimizer).save("last", iteration=7)
    other, fresh = Model(), torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=0.1)
    checkpointer = RegionSpotCheckpointer(other, str(tmp_path), optimizer=fresh)
    rest = checkpointer.resume_or_load("", resume=True)
    assert_loaded(other, model.region_head)
    assert rest["iteration"] == 7 and fresh.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("prefix", ["", "region_head."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_of_only_a_head(tmp_path, prefix, suffix):
    trained = head()
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    path = tmp_path / f"head{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    model, detector = Model(), Detector()
    RegionSpotCheckpointer(model).load(str(path))
    assert_loaded(model, trained)
    RegionSpotCheckpointer(detector).load(str(path))
    assert_loaded(detector.roi_heads, trained)


def test_half_precision_files_load(tmp_path):
    trained = head().half()
    save_file(trained.state_dict(), tmp_path / "head.safetensors")
    model = Model()
    RegionSpotCheckpointer(model).load(str(tmp_path / "head.safetensors"))
    assert_loaded(model, trained.float())


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    model = Model()
    checkpointer = RegionSpotCheckpointer(model, str(tmp_path))
    checkpointer.save("model", iteration=1)
    before = (tmp_path / "model.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="Cannot save '.*model.pth'.*--resume"):
            checkpointer.save("model", iteration=2)
        with pytest.raises(OSError, match="Cannot save '.*other.pth'"):
            checkpointer.save("other", iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == before
    found = RegionSpotCheckpointer(Model(), str(tmp_path)).resume_or_load("", resume=True)
    assert found["iteration"] == 1


def test_a_head_of_another_size_is_refused(tmp_path):
    save_file(head(32).state_dict(), tmp_path / "head.safetensors")
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"to_clip.weight is \(32, 12\) in the file and \(16, 12\)"
    ):
        RegionSpotCheckpointer(model).load(str(tmp_path / "head.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.fill_(math.nan),
        lambda value: value.index_fill_(0, torch.tensor([1]), math.inf),
        lambda value: (100 * value).to(torch.int8),
        lambda value: value > 0,
    ],
)
def test_a_head_that_holds_no_numbers_is_refused(tmp_path, change):
    state = head().state_dict()
    state["to_clip.weight"] = change(state["to_clip.weight"].clone())
    save_file(state, tmp_path / "head.safetensors")
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="head.safetensors' is damaged: .*to_clip.weight has the"):
        RegionSpotCheckpointer(model).load(str(tmp_path / "head.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_without_the_whole_head_is_refused(tmp_path):
    state = head().state_dict()
    del state["projector.bias"]
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="region_head.projector.bias not in it"):
        RegionSpotCheckpointer(Model()).load(str(tmp_path / "head.safetensors"))
    torch.save({"model": {"backbone.weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="It holds backbone.weight"):
        RegionSpotCheckpointer(Model()).load(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("name", ["head.safetensors", "head.pth", "head.pkl"])
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    torch.save(head().state_dict(), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{name}' does not hold a checkpoint, or is damaged"):
        RegionSpotCheckpointer(Model()).load(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        WeightsNotFoundError, match="MODEL.WEIGHTS names a weights file that does not"
    ):
        RegionSpotCheckpointer(Model()).load(str(tmp_path / "head.pth"))


def test_no_file_warns_of_an_untrained_head(caplog):
    with caplog.at_level(logging.WARNING):
        RegionSpotCheckpointer(Model()).load("")
        assert "starts untrained" in caplog.text
        caplog.clear()
        RegionSpotCheckpointer(nn.Linear(2, 2)).load("")
        assert not caplog.text


# ---- the pair of frozen models that a head was trained with


@pytest.fixture
def trained(tmp_path, vocabularies):
    """A RegionSpot, and the file of its head."""
    model = tiny.tiny_model()
    RegionSpotCheckpointer(model, str(tmp_path)).save_model("head")
    return model, tmp_path / "head.pth"


def test_the_pair_is_recorded(trained):
    model, path = trained
    pair = torch.load(path, weights_only=True)["pair"]
    assert pair == {"vision_language": "CLIP tiny", "localizer": "SamLocalizer tiny"}
    other = tiny.tiny_model()
    nn.init.zeros_(other.region_head.to_clip.weight)
    RegionSpotCheckpointer(other).load(str(path))
    assert torch.equal(other.region_head.to_clip.weight, model.region_head.to_clip.weight)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("localizer", "the localizer 'SamLocalizer tiny', and .* 'SamLocalizer vit_h'.*LOCALIZER"),
        ("vision_language", "the vision-language model 'CLIP tiny', and .* 'SamLocalizer vit_h'"),
    ],
)
def test_a_head_of_another_pair_is_refused(trained, part, message):
    model, path = trained
    getattr(model, part).identity = "SamLocalizer vit_h"
    with pytest.raises(ValueError, match=f"head.pth' was trained with {message}"):
        RegionSpotCheckpointer(model).load(str(path))


def test_files_without_the_record_load(trained):
    model, path = trained
    content = torch.load(path, weights_only=True)
    del content["pair"]
    torch.save(content, path)
    model.localizer.identity = "another"
    RegionSpotCheckpointer(model).load(str(path))


def test_what_a_head_was_trained_on_goes_along(trained, tmp_path):
    model, path = trained
    assert tiny.tiny_model().region_head.trained_on == {}
    note = {"datasets": ["mine"], "photos": "0123456789ab"}
    model.region_head.trained_on = note
    RegionSpotCheckpointer(model, str(tmp_path)).save_model("head")
    state = {key: part.clone() for key, part in model.region_head.state_dict().items()}
    files = {tmp_path / "head.pth": note}
    for i, (text, expected) in enumerate(
        [(json.dumps(note), note), ("not json", {}), ('{"datasets": [1], "photos": ""}', {})]
    ):
        files[tmp_path / f"{i}.safetensors"] = expected
        save_file(state, tmp_path / f"{i}.safetensors", {"trained_on": text})
    for file, expected in files.items():
        other = tiny.tiny_model()
        RegionSpotCheckpointer(other).load(str(file))
        assert other.region_head.trained_on == expected


def test_a_head_that_reads_no_mask_tokens_goes_with_any_localizer(tmp_path, vocabularies):
    cfg = tiny.tiny_cfg()
    cfg.MODEL.REGION_HEAD.NAME = "PooledRegionHead"
    model = build_model(cfg)
    assert "localizer" not in pair_of(model)
    RegionSpotCheckpointer(model, str(tmp_path)).save_model("head")
    model.localizer.identity = "another"
    RegionSpotCheckpointer(model).load(str(tmp_path / "head.pth"))
