"""A checkpoint in the authors' layout converts, loads, and gives the golden arrays."""

from __future__ import annotations

import open_clip
import pytest
import torch
from detectron2.structures import Boxes

from regionspot_d2.checkpoint import RegionSpotCheckpointer
from regionspot_d2.modeling import RegionSpot, RegionSpotHead, SamLocalizer
from regionspot_d2.modeling.clip import OpenClip
from regionspot_d2.modeling.vocabulary import TextEmbedder

from . import tiny
from .tools import load_tool

convert_checkpoint = load_tool("convert_checkpoint")
convert, read_state_dict = convert_checkpoint.convert, convert_checkpoint.read_state_dict


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
    convert_checkpoint.main()


def test_converted_head_gives_the_golden_arrays(tmp_path, monkeypatch, capsys):
    torch.save({"model": tiny.published_checkpoint(), "iteration": 9}, tmp_path / "published.pth")
    run(monkeypatch, tmp_path / "published.pth", tmp_path / "head.safetensors")
    out = capsys.readouterr().out
    assert "sam" in out and "clip_model" in out and "of no published size" in out

    arrays = tiny.golden()
    parts = dict(zip(("image_encoder", "prompt_encoder", "mask_decoder"), tiny.tiny_sam()))
    vision_language = OpenClip(
        model=tiny.tiny_open_clip(),
        tokenizer=open_clip.get_tokenizer("ViT-B-32"),
        image_size=64,
    )
    model = RegionSpot(
        localizer=SamLocalizer(
            **parts, pixel_mean=list(tiny.SAM_PIXEL_MEAN), pixel_std=list(tiny.SAM_PIXEL_STD)
        ),
        vision_language=vision_language,
        region_head=RegionSpotHead(token_dim=32, image_dim=64, text_dim=40, ffn_dim=96),
        text_embedder=TextEmbedder(vision_language),
    ).eval()
    RegionSpotCheckpointer(model).load(str(tmp_path / "head.safetensors"))
    image = torch.from_numpy(arrays["image"]).permute(2, 0, 1)
    with torch.no_grad():
        boxes = Boxes(torch.from_numpy(arrays["boxes"]))
        logits = tiny.classify(model, image, boxes, list(arrays["class_names"]))
    expected = torch.from_numpy(arrays["logits"])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("image_dim, text_dim, name", [(768, 512, "-BB"), (1024, 768, "-BL@336")])
def test_published_sizes_are_recognized(image_dim, text_dim, name):
    head = RegionSpotHead(token_dim=256, image_dim=image_dim, text_dim=text_dim)
    state = {f"module.model.{key}": value for key, value in head.state_dict().items()}
    conversion = convert(state)
    assert conversion.dropped == [] and len(conversion.used) == len(state)
    assert name in convert_checkpoint.report(conversion)
    assert conversion.head.keys() == head.state_dict().keys()


def test_every_key_has_a_fate():
    state = tiny.published_checkpoint() | {"model.something_else": torch.zeros(3)}
    conversion = convert(state)
    assert sorted(conversion.used + conversion.dropped) == sorted(state)
    assert conversion.unknown == ["model.something_else"]
    assert "model.something_else" in convert_checkpoint.report(conversion)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.projector.bias"), "missing: projector.bias"),
        (lambda s: s.pop("model.to_clip.weight"), "not a RegionSpot checkpoint"),
        (lambda s: s.update({"model.projector.bias": torch.zeros(3)}), r"projector.bias: \(3,\)"),
        (lambda s: s.update({"model.decoder.odd": torch.zeros(3)}), "unknown: decoder.odd"),
    ],
)
def test_an_incomplete_head_is_refused(change, message):
    state = tiny.published_checkpoint()
    change(state)
    with pytest.raises(convert_checkpoint.ConversionError, match=message):
        convert(state)


def test_damaged_and_foreign_files_give_one_line(tmp_path, monkeypatch):
    torch.save(tiny.published_checkpoint(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in [
        ("cut.pth", "cut.pth' does not hold a checkpoint of tensors, or is damaged"),
        ("list.pth", "holds no state dict"),
        ("none.pth", "does not exist"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, tmp_path / name, tmp_path / "head.safetensors")
        assert not (tmp_path / "head.safetensors").exists()


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="trap.pth' does not hold a checkpoint of tensors"):
        read_state_dict(tmp_path / "trap.pth")
