"""Models of the Hugging Face hub, by a stand-in of its cache: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from detectron2.config import CfgNode
from open_clip import pretrained
from safetensors.torch import save_file

from regionspot_d2.files import WeightsNotFoundError
from regionspot_d2.hub import is_hub_id
from regionspot_d2.modeling import OpenAIClip, OpenClip
from regionspot_d2.modeling.clip import CLIP_TEMPLATES, OPEN_TEMPLATES, ClipModel

from .tiny import OPEN_CLIP_CONFIG, tiny_cfg, tiny_open_clip

STATISTICS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def repository(folder: Path, preprocess: object = STATISTICS, **model: object) -> Path:
    """The tiny CLIP in the files that open_clip pushes to the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": {**OPEN_CLIP_CONFIG, **model}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(tiny_open_clip().state_dict(), folder / "open_clip_model.safetensors")
    return folder


def config(arch: str, weights: str = "") -> CfgNode:
    cfg = tiny_cfg()
    cfg.MODEL.VISION_LANGUAGE.ARCH = arch
    cfg.MODEL.VISION_LANGUAGE.WEIGHTS = weights
    return cfg


def assert_is_the_tiny_one(model: ClipModel) -> None:
    expected = tiny_open_clip().state_dict()
    found = model.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# ---- the model's own config


@pytest.mark.parametrize("place", ["hf-hub:someone/small-clip", "local-dir:{}"])
def test_a_name_brings_config_weights_and_preprocessing(place, hub, tmp_path):
    repository(hub("someone/small-clip"))
    folder = repository(tmp_path / "small-clip")
    model = OpenClip(config(place.format(folder)))
    assert_is_the_tiny_one(model)
    assert model.pixel_mean.flatten().tolist() == [0.5] * 3
    assert model.pixel_std.flatten().tolist() == [0.25] * 3
    # What a config leaves out is open_clip's default.
    assert model.interpolation == "bicubic" and model.templates == OPEN_TEMPLATES
    assert model.identity == "CLIP small-clip"  # the same on the hub and in a folder
    assert model.encode_text(["cat"]).shape == (1, 40)


def test_openclip_gets_the_name_as_it_is(hub, monkeypatch):
    repository(hub("someone/small-clip"))
    asked = []
    for function in ("create_model", "get_tokenizer"):
        real = getattr(open_clip, function)
        monkeypatch.setattr(
            open_clip, function, lambda name, real=real, **o: asked.append(name) or real(name, **o)
        )
    OpenClip(config("hf-hub:someone/small-clip"))
    assert asked == ["hf-hub:someone/small-clip"] * 2


def test_openais_weights_are_treated_as_the_published_heads_ask_for(hub):
    repository(hub("timm/vit_base_patch16_clip_224.openai"), {"interpolation": "bicubic"})
    model = OpenClip(config("hf-hub:timm/vit_base_patch16_clip_224.openai"))
    assert model.interpolation is None and model.templates == CLIP_TEMPLATES


def test_weights_in_torchs_format_are_not_unpickled(tmp_path):
    folder = repository(tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": tiny_open_clip().state_dict()}, folder / "pytorch_model.bin")
    assert_is_the_tiny_one(OpenClip(config(f"local-dir:{folder}")))
    torch.save({"state_dict": {}, "code": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not hold weights of local-dir"):
        OpenClip(config(f"local-dir:{folder}"))


def test_a_tokenizer_cannot_bring_code(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    text = {
        **OPEN_CLIP_CONFIG["text_cfg"],
        "hf_tokenizer_name": "someone/evil",
        "tokenizer_kwargs": {"trust_remote_code": True},
    }
    folder = repository(tmp_path / "clip", text_cfg=text)
    asked = []

    def from_pretrained(name: str, **options: object) -> None:
        asked.append(options["trust_remote_code"])
        raise OSError("stopped")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="stopped"):
        OpenClip(config(f"local-dir:{folder}"))
    assert asked == [False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "ARCH is 'local-dir:.*', where there is no open_clip_config.json"),
        ("[", "open_clip_config.json is not a json file"),
        ([], "has no section model_cfg"),
        ({"model_cfg": {"vision_cfg": {}}}, "has no section model_cfg.text_cfg"),
        (
            {"model_cfg": OPEN_CLIP_CONFIG, "preprocess_cfg": {"mean": [0.5, "x", 1]}},
            r"preprocess_cfg.mean is \[0.5, 'x', 1\]; three numbers",
        ),
        ({"model_cfg": {**OPEN_CLIP_CONFIG, "embed_dim": 48}}, "does not hold weights of local-d"),
    ],
)
def test_folders_that_are_refused(tmp_path, content, message):
    folder = repository(tmp_path / "clip")
    file = folder / "open_clip_config.json"
    file.unlink()
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises((ValueError, WeightsNotFoundError), match=message) as caught:
        OpenClip(config(f"local-dir:{folder}"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_no_random_model(tmp_path):
    folder = repository(tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="Required pretrained weights"):
        OpenClip(config(f"local-dir:{folder}"))


def test_weights_come_with_the_name(tmp_path):
    with pytest.raises(ValueError, match="WEIGHTS is 'openai', but .* come with it: set it to ''"):
        OpenClip(config("hf-hub:someone/small-clip", "openai"))
    with pytest.raises(ValueError, match="ARCH is 'hf-hub:someone/clip', which only OpenClip"):
        OpenAIClip(config("hf-hub:someone/clip"))


def test_a_repository_that_is_not_there(hub, empty_cache):
    with pytest.raises(WeightsNotFoundError, match="ARCH names 'no/such' on the .*hub") as caught:
        OpenClip(config("hf-hub:no/such"))
    assert str(empty_cache) in str(caught.value) and "\n" not in str(caught.value)


# ---- tags


@pytest.fixture
def tagged(tiny_models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tags for the architecture "tiny", as open_clip lists its own."""
    shared = {"std": (0.25,) * 3, "resize_mode": "squash", "quick_gelu": True}
    entries = {
        "openai": {
            **shared,
            "url": "https://openaipublic.azureedge.net/clip/models/tiny.pt",
            "hf_hub": "timm/tiny.openai/",
            "mean": (0.4,) * 3,
            "interpolation": "bicubic",
        },
        "laion_s1b": {
            **shared,
            "url": "",
            "hf_hub": "laion/tiny-s1B/",
            "mean": (0.5,) * 3,
            "interpolation": "bilinear",
        },
    }
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", entries)


@pytest.mark.parametrize("tag", ["laion_s1b", "LAION-s1b"])
def test_a_tag_is_resolved_into_the_cache(tag, hub, tagged):
    repository(hub("laion/tiny-s1B"))
    model = OpenClip(config("tiny", tag))
    assert_is_the_tiny_one(model)
    assert model.pixel_mean.flatten().tolist() == [0.5] * 3
    assert model.interpolation == "bilinear" and model.templates == OPEN_TEMPLATES
    assert model.identity == "CLIP tiny"


@pytest.mark.parametrize("kind", [OpenClip, OpenAIClip])
def test_openais_tag_is_openais_file(kind, empty_cache, tagged):
    pytest.importorskip("clip")
    file = empty_cache / "weights/openaipublic.azureedge.net/clip/models/tiny.pt"
    file.parent.mkdir(parents=True)
    torch.save(tiny_open_clip().state_dict(), file)
    model = kind(config("tiny", "openai"))
    assert_is_the_tiny_one(model)
    assert model.interpolation is None and model.templates == CLIP_TEMPLATES


@pytest.mark.parametrize(
    ("arch", "tag", "message"),
    [
        ("tiny", "laion2b", "WEIGHTS is 'laion2b', .* tags of tiny: it has openai, laion_s1b."),
        ("ViT-L-14-quickgelu", "laion2b_s32b_b82k", "tags of ViT-L-14-quickgelu: .*metaclip"),
        ("ViT-B-16-SigLIP", "openai", "tags of ViT-B-16-SigLIP: it has webli."),
    ],
)
def test_an_unknown_tag_is_told_with_those_that_exist(arch, tag, message, tagged):
    with pytest.raises(WeightsNotFoundError, match=message) as caught:
        OpenClip(config(arch, tag))
    assert "\n" not in str(caught.value)


def test_a_file_of_that_name_goes_first(tagged, tmp_path, monkeypatch):
    torch.save(tiny_open_clip().state_dict(), tmp_path / "openai")
    monkeypatch.chdir(tmp_path)
    assert_is_the_tiny_one(OpenClip(config("tiny", "openai")))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("someone/model-v1.0", True),
        ("published/regionspot_L.yaml", False),
        ("../model", False),
        ("a/b/c", False),
        ("mini", False),
        ("/model", False),
    ],
)
def test_what_looks_like_the_hub(value, expected):
    assert is_hub_id(value) is expected
