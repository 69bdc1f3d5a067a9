"""Image tokens and text embeddings of CLIP, by open_clip and by the clip package."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from regionspot_d2.modeling import VISION_LANGUAGE_REGISTRY, OpenAIClip, OpenClip
from regionspot_d2.modeling import clip as clip_module
from regionspot_d2.modeling.clip import ClipModel
from regionspot_d2.modeling.open_clip_entries import published_settings

from .tiny import OPEN_CLIP_CONFIG, fill_golden, golden, tiny_cfg, tiny_open_clip, tiny_openai_clip

OPENAI_URL = (
    "https://openaipublic.azureedge.net/clip/models/"
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt"
)


def open_clip_of(model: nn.Module) -> OpenClip:
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    return OpenClip(model=model, tokenizer=tokenizer, image_size=model.visual.image_size)


def build(library: str) -> ClipModel:
    if library == "OpenClip":
        return open_clip_of(tiny_open_clip())
    clip = pytest.importorskip("clip")
    tokenizer = partial(clip.tokenize, truncate=True)
    return OpenAIClip(model=tiny_openai_clip(), tokenizer=tokenizer, image_size=64)


@pytest.fixture(scope="module", params=["OpenClip", "OpenAIClip"])
def clip_model(request: pytest.FixtureRequest) -> ClipModel:
    return build(request.param)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    arrays = golden()
    names = arrays.pop("class_names").tolist()
    return {"class_names": names, **{k: torch.from_numpy(v) for k, v in arrays.items()}}


def close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, wanted, atol=tolerance, rtol=0)


def random_images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator).byte() for size in sizes]


# ---- the published model


def test_golden_images(clip_model, expected):
    image = expected["image"].permute(2, 0, 1)
    close(clip_model.preprocess_images([image])[0], expected["clip_input"], 1e-5)
    close(clip_model([image])[0], expected["clip_tokens"], 1e-4)


def test_golden_texts(clip_model, expected):
    assert len(clip_model.templates) == 81
    prompts = [t.format(name) for name in expected["class_names"] for t in clip_model.templates]
    embeddings = clip_model.encode_text(prompts).unflatten(0, (-1, 81)).mean(1)
    close(F.normalize(embeddings, dim=-1), expected["text_embeddings"], 1e-5)
    close(clip_model.logit_scale.exp(), torch.tensor(20.0), 1e-5)


def test_template_order():
    templates = build("OpenClip").templates
    assert templates[0] == "{}."
    assert templates[1] == "a bad photo of a {}."
    assert templates[-1] == "a tattoo of the {}."
    assert len(set(templates)) == 81
    assert all(template.count("{}") == 1 for template in templates)


# ---- shapes and spaces


def test_attributes(clip_model):
    assert (clip_model.image_dim, clip_model.text_dim) == (64, 40)
    assert (clip_model.grid_size, clip_model.num_prefix_tokens) == ((4, 4), 1)
    assert clip_model.logit_scale.shape == ()


def test_scale_and_bias_give_the_logits_that_siglip_takes_the_sigmoid_of(clip_model):
    assert clip_model.logit_bias is None
    siglip = open_clip.CLIP(**OPEN_CLIP_CONFIG, init_logit_bias=-10.0, nonscalar_logit_scale=True)
    model = open_clip_of(fill_golden(siglip))
    with torch.no_grad():
        siglip.logit_bias.fill_(-8.5)
    images, texts = random_images((64, 64), (40, 50)), ["cat", "dog", "bird"]
    cosines = F.normalize(model.embed_images(images)) @ F.normalize(model.encode_text(texts)).T
    wanted, _ = siglip.get_logits(model.preprocess_images(images), model.tokenizer(texts))
    assert model.logit_bias.shape == ()
    close(cosines * model.logit_scale.exp() + model.logit_bias, wanted.detach(), 1e-4)


def test_projected_cls_token_is_the_image_embedding(clip_model):
    images = random_images((64, 64), (64, 64))
    projected = clip_model.project(clip_model(images))
    assert projected.shape == (2, 17, 40)
    wanted = clip_model.model.encode_image(clip_model.preprocess_images(images))
    close(projected[:, 0], wanted, 1e-5)


def test_grid_is_row_by_row(clip_model):
    """A change in one patch moves that patch's token most."""
    (image,) = random_images((64, 64))
    changed = image.clone()
    changed[:, 16:32, 48:64] = 255 - changed[:, 16:32, 48:64]
    difference = (clip_model([changed]) - clip_model([image]))[0, 1:].norm(dim=-1)
    assert difference.argmax() == 1 * 4 + 3


def test_batch_of_sizes_is_the_same_as_one_by_one(clip_model):
    images = random_images((1, 1), (40, 300), (64, 64), (129, 65))
    together = clip_model(images)
    assert together.shape == (4, 17, 64)
    close(together, torch.cat([clip_model([image]) for image in images]), 1e-5)


def test_integer_and_float_images_are_the_same(clip_model):
    images = random_images((50, 70))
    close(clip_model(images), clip_model([image.double() for image in images]), 1e-6)


def test_no_images_and_no_texts(clip_model):
    assert clip_model([]).shape == (0, 17, 64)
    assert clip_model.project(clip_model([])).shape == (0, 17, 40)
    assert clip_model.encode_text([]).shape == (0, 40)


@pytest.mark.parametrize("shape", [(1, 32, 32), (32, 32, 3), (32, 32), (3, 0, 5)])
def test_bad_image(clip_model, shape):
    good = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="Image 1 has the shape"):
        clip_model([good, torch.zeros(shape)])


# ---- texts


def test_texts_in_many_batches(clip_model, monkeypatch):
    texts = [f"thing {i}" for i in range(20)]
    wanted = clip_model.encode_text(texts)
    monkeypatch.setattr(clip_module, "TEXTS_AT_A_TIME", 6)
    close(clip_model.encode_text(texts), wanted, 1e-5)


def test_longest_text_and_one_longer(clip_model):
    longest = " ".join(["dog"] * 75)  # and its start and end make 77
    assert clip_model.encode_text([longest]).shape == (1, 40)
    with pytest.raises(ValueError, match="more than the 77 tokens .* 'dog dog"):
        clip_model.encode_text(["cat", longest + " dog"])


def test_text_embeddings_ignore_autocast(clip_model):
    wanted = clip_model.encode_text(["a cat"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = clip_model.encode_text(["a cat"])
        tokens = clip_model(random_images((64, 64)))
    assert actual.dtype == torch.float32
    assert torch.equal(actual, wanted)
    # The image side follows autocast: close to full precision, but not equal.
    precise = clip_model(random_images((64, 64)))
    assert not torch.equal(tokens.float(), precise)
    close(tokens.float(), precise, 0.3)


# ---- frozen


def test_frozen(clip_model):
    parent = nn.ModuleDict({"clip": clip_model, "head": nn.Linear(2, 2)}).train()
    assert set(parent.state_dict()) == {"head.weight", "head.bias"}
    assert not any(module.training for module in clip_model.modules())
    assert not any(parameter.requires_grad for parameter in clip_model.parameters())
    assert {parameter.dtype for parameter in clip_model.parameters()} == {torch.float32}
    assert not clip_model(random_images((8, 8))).requires_grad


def test_copy_runs_on_its_own_weights():
    model = build("OpenClip")
    images = random_images((64, 64))
    before = model(images)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.model.visual.conv1.weight)
    assert torch.equal(model(images), before)
    assert not torch.equal(twin(images), before)


# ---- fingerprint


def test_fingerprint_follows_the_text_side(clip_model):
    fingerprint = clip_model.fingerprint
    changed = []
    for name, parameter in clip_model.model.named_parameters():
        twin = copy.copy(clip_model)
        twin.__dict__.pop("fingerprint", None)
        kept = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1e-3
        if twin.fingerprint != fingerprint:
            changed.append(name)
        parameter.data.copy_(kept)
    names = {name for name, _ in clip_model.model.named_parameters()}
    assert names - set(changed) == {n for n in names if n.startswith(("visual.", "logit_scale"))}


def test_fingerprint_tells_activations_apart():
    other = open_clip.CLIP(**{**OPEN_CLIP_CONFIG, "quick_gelu": False})
    model = tiny_open_clip()
    other.load_state_dict(model.state_dict())
    assert open_clip_of(model).fingerprint != open_clip_of(other).fingerprint


def test_fingerprint_is_the_same_in_another_process():
    fingerprint = build("OpenClip").fingerprint
    assert fingerprint == build("OpenClip").fingerprint
    if open_clip.__version__ == "3.3.0":
        # Found once; a hash that depends on the process would not find it again.
        assert fingerprint == "OpenClip-a4e202880547acd8"


# ---- other towers


def tiny_vision(**vision: object) -> nn.Module:
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()


def test_resnet():
    model = open_clip_of(tiny_vision(image_size=64, layers=[1, 1, 1, 1], width=8))
    for name, buffer in model.model.visual.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    assert (model.image_dim, model.grid_size, model.num_prefix_tokens) == (256, (2, 2), 0)
    images = random_images((64, 64), (30, 90))
    tokens = model(images)
    visual = model.model.visual
    pixels = model.preprocess_images(images)
    stages = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
    assert torch.equal(tokens[:, 3], stages[:, :, 1, 1])
    assert model.project(tokens).shape == (2, 4, 24)
    # Where all positions agree, attention has no choice: the pooled vector is the token's own.
    visual.attnpool.positional_embedding.zero_()
    pooled = visual.attnpool(tokens[:, 1, :, None, None].expand(-1, -1, 2, 2))
    close(model.project(tokens)[:, 1], pooled, 1e-5)


def test_resnet_of_both_libraries():
    ours, theirs = (
        tower_of(name, layers=[1, 1, 1, 1], width=8) for name in ("OpenClip", "OpenAIClip")
    )
    images = random_images((30, 90))
    close(ours(images), theirs(images), 1e-5)
    close(ours.project(ours(images)), theirs.project(theirs(images)), 1e-5)


def tower_of(library: str, **vision: object) -> ClipModel:
    """A model with a ViT or, if ``layers`` is a list, a ResNet that one of the libraries built."""
    model = fill_golden(tiny_vision(image_size=64, **vision))
    if library == "OpenClip":
        return open_clip_of(model)
    clip = pytest.importorskip("clip")
    layers = vision["layers"]
    layers = tuple(layers) if isinstance(layers, list) else layers
    args = 24, 64, layers, vision["width"], vision.get("patch_size"), 77, 49408, 32, 1, 1
    twin = clip.model.CLIP(*args)
    twin.load_state_dict(model.state_dict())
    return OpenAIClip(model=twin, tokenizer=clip.tokenize, image_size=64)


TOWERS = pytest.mark.parametrize(
    "vision",
    [
        {"layers": 3, "width": 64, "patch_size": 16},
        {"layers": [1, 2, 1, 1], "width": 8},
    ],
    ids=["ViT", "ResNet"],
)
LIBRARIES = pytest.mark.parametrize("library", ["OpenClip", "OpenAIClip"])


@LIBRARIES
@TOWERS
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_tokens_are_bit_for_bit_what_the_stock_tower_pools(library, vision, dtype):
    model = tower_of(library, **vision)
    images = random_images((64, 64), (30, 90))
    visual = model.model.visual
    last = visual.layer4 if isinstance(vision["layers"], list) else visual.transformer
    outputs = []
    hook = last.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        visual(model.preprocess_images(images))
        hook.remove()
        tokens = model(images)
    if outputs[0].ndim == 4:
        wanted = outputs[0].flatten(2).mT
    else:
        wanted = outputs[0] if library == "OpenClip" else outputs[0].transpose(0, 1)
    assert torch.equal(tokens, wanted)


@LIBRARIES
@TOWERS
def test_threads_share_a_model(library, vision):
    model = tower_of(library, **vision)
    images = [random_images((64, 64))[0], 255 - random_images((64, 64))[0]]
    wanted = [model([image]) for image in images]
    assert not torch.equal(*wanted)
    barrier = threading.Barrier(2)

    def same(place: int) -> int:
        barrier.wait()
        return sum(torch.equal(model([images[place]]), wanted[place]) for _ in range(50))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(same, range(2))) == [50, 50]


@pytest.mark.parametrize(
    ("trunk", "pool", "proj", "size", "grid", "prefix"),
    [
        ("test_vit", "token", None, 160, (10, 10), 1),
        ("test_vit2", "avg", "linear", 160, (10, 10), 1),
        ("test_vit3", "map", "none", 160, (10, 10), 1),
        ("test_convnext", "", "linear", 160, (5, 5), 0),
        ("test_efficientnet", "avg", None, 160, (5, 5), 0),
    ],
)
def test_timm_towers(trunk, pool, proj, size, grid, prefix):
    vision = {"timm_model_name": trunk, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    model = open_clip_of(tiny_vision(**vision))
    assert (model.grid_size, model.num_prefix_tokens) == (grid, prefix)
    tokens = model(random_images((64, 64), (30, 90)))
    assert tokens.shape == (2, prefix + grid[0] * grid[1], model.image_dim)
    # Where all tokens agree, the tower's embedding is any token's projection.
    visual = model.model.visual
    one = tokens[:, -1:]
    if prefix:
        features = one.expand(-1, tokens.shape[1], -1)
    else:
        features = one.mT.expand(-1, -1, grid[0] * grid[1]).unflatten(2, grid)
    wanted = visual.head(visual.trunk.forward_head(features))
    close(model.project(tokens)[:, -1], wanted, 1e-5)
    # And the tokens are what the tower pools.
    features = tokens if prefix else tokens.mT.unflatten(2, grid)
    pixels = model.preprocess_images(random_images((64, 64), (30, 90)))
    close(visual.head(visual.trunk.forward_head(features)), visual(pixels), 1e-5)


def test_attentional_pooler_has_tokens_but_no_projection():
    model = open_clip_of(
        tiny_vision(image_size=32, layers=1, width=64, patch_size=16, attentional_pool=True)
    )
    tokens = model(random_images((32, 32)))
    assert tokens.shape == (1, 5, 64)
    with pytest.raises(ValueError, match="attentional pooler"):
        model.project(tokens)


def test_tower_without_grid():
    model = tiny_open_clip()
    model.visual = nn.Flatten()
    with pytest.raises(ValueError, match="class Flatten has no known grid"):
        OpenClip(model=model, tokenizer=open_clip.get_tokenizer("ViT-B-16"), image_size=64)


# ---- from the config


def config(name: str = "OpenClip", **settings: object) -> CfgNode:
    cfg = tiny_cfg()
    cfg.MODEL.VISION_LANGUAGE.NAME = name
    for key, value in settings.items():
        cfg.MODEL.VISION_LANGUAGE[key] = value
    return cfg


def from_config(cfg: CfgNode) -> ClipModel:
    return VISION_LANGUAGE_REGISTRY.get(cfg.MODEL.VISION_LANGUAGE.NAME)(cfg)


def torchscript(path: Path) -> Path:
    """The tiny CLIP as OpenAI publishes CLIP: a TorchScript archive in half precision."""
    model = tiny_openai_clip()
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    inputs = (torch.zeros(1, 3, 64, 64), torch.zeros(1, 77, dtype=torch.long))
    torch.jit.trace(model, inputs, check_trace=False).half().save(path)
    return path


@pytest.fixture(scope="module")
def openai_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("clip")
    return torchscript(tmp_path_factory.mktemp("weights") / "openai.pt")


@pytest.mark.parametrize("name", ["OpenClip", "OpenAIClip"])
def test_openai_archive(name, tiny_models, openai_file, expected, monkeypatch):
    # The name asks for plain GELU; the file says better.
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS, "tiny", {**OPEN_CLIP_CONFIG, "quick_gelu": False}
    )
    model = from_config(config(name, WEIGHTS=str(openai_file)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    close(model([expected["image"].permute(2, 0, 1)])[0], expected["clip_tokens"], 2e-2)
    half = tiny_open_clip().half().float()
    wanted = open_clip_of(half)([expected["image"].permute(2, 0, 1)])
    close(model([expected["image"].permute(2, 0, 1)]), wanted, 1e-5)


@pytest.mark.parametrize("name", ["OpenClip", "OpenAIClip"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_state_dict(name, suffix, tiny_models, tmp_path, expected):
    pytest.importorskip("clip")
    path = tmp_path / f"clip{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": tiny_open_clip().state_dict()}, path)
    else:
        from safetensors.torch import save_file

        save_file(tiny_open_clip().state_dict(), path)
    model = from_config(config(name, WEIGHTS=str(path)))
    close(model([expected["image"].permute(2, 0, 1)])[0], expected["clip_tokens"], 1e-4)


@pytest.mark.parametrize("name", ["OpenClip", "OpenAIClip"])
def test_random_weights(name, tiny_models, caplog):
    pytest.importorskip("clip")
    model = from_config(config(name))
    assert model(random_images((9, 9))).shape == (1, 17, 64)
    assert "MODEL.VISION_LANGUAGE.WEIGHTS is empty" in caplog.text


@pytest.mark.parametrize("name", ["OpenClip", "OpenAIClip"])
@pytest.mark.parametrize("content", ["text", "other model", "cut short"])
def test_file_of_something_else(name, content, tiny_models, tmp_path, openai_file):
    path = tmp_path / "clip.pt"
    if content == "text":
        path.write_text("<html>not found</html>")
    elif content == "other model":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(openai_file.read_bytes()[:100_000])
    with pytest.raises(
        ValueError, match="weights of tiny .*MODEL.VISION_LANGUAGE.WEIGHTS and ARCH"
    ):
        from_config(config(name, WEIGHTS=str(path)))


def test_weights_are_not_unpickled(tiny_models, tmp_path):
    path = tmp_path / "clip.pt"
    torch.save({"state_dict": tiny_open_clip().state_dict(), "args": Path("x")}, path)
    with pytest.raises(ValueError, match="does not hold weights"):
        from_config(config(WEIGHTS=str(path)))


@pytest.mark.parametrize("name", ["OpenClip", "OpenAIClip"])
def test_unknown_architecture(name):
    pytest.importorskip("clip")
    with pytest.raises(ValueError, match="ARCH is 'ViT-B-61', .* Did you mean .*ViT-B-16"):
        from_config(config(name, ARCH="ViT-B-61"))


def test_tokenizer_of_a_missing_package(monkeypatch):
    def get_tokenizer(name: str) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(open_clip, "get_tokenizer", get_tokenizer)
    with pytest.raises(ImportError, match="ViT-B-16-SigLIP.* pip install transformers"):
        from_config(config(ARCH="ViT-B-16-SigLIP"))


def test_clip_package_has_only_its_own_architectures():
    pytest.importorskip("clip")
    with pytest.raises(ValueError, match="EVA02-B-16.*ViT-B/16.*use OpenClip"):
        from_config(config("OpenAIClip", ARCH="EVA02-B-16"))


@pytest.mark.parametrize("name", ["OpenClip", "OpenAIClip"])
@pytest.mark.parametrize(
    ("arch", "width", "text_dim", "tokens"),
    [
        ("ViT-B/16", 768, 512, 197),
        ("ViT-L-14-quickgelu", 1024, 768, 257),
        ("ViT-L/14@336px", 1024, 768, 577),
        ("ViT-L-14-336", 1024, 768, 577),
        ("RN50", 2048, 1024, 49),
    ],
)
def test_published_sizes(name, arch, width, text_dim, tokens, monkeypatch):
    """Both spellings lead to the real architectures; built without memory for their weights."""
    pytest.importorskip("clip")
    monkeypatch.setattr(
        open_clip, "create_model", lambda n, **_: open_clip.CLIP(**open_clip.get_model_config(n))
    )
    monkeypatch.setattr(ClipModel, "encode_text", lambda self, texts: torch.zeros(1, text_dim))
    with torch.device("meta"):
        model = from_config(config(name, ARCH=arch))
    rows, columns = model.grid_size
    assert (model.image_dim, model.num_prefix_tokens + rows * columns) == (width, tokens)
    assert model.model.text_projection.shape[1] == text_dim


@pytest.mark.parametrize(
    ("arch", "source", "quick_gelu", "mean"),
    [
        ("ViT-L-14", OPENAI_URL, True, 0.48145466),
        (
            "ViT-L-14",
            "https://huggingface.co/laion/CLIP-ViT-L-14-laion2B-s32B-b82K/resolve/main/model.bin",
            False,
            0.5,
        ),
        ("ViT-B-16-SigLIP", "siglip.safetensors", False, 0.5),
        ("ViT-L-14", "mine.pt", False, 0.48145466),
        ("tiny", "", False, 0.48145466),
    ],
)
def test_what_open_clip_knows_of_weights(tiny_models, arch, source, quick_gelu, mean):
    found = published_settings(arch, source)
    assert found["mean"][0] == mean
    assert found.get("quick_gelu", False) == quick_gelu


@pytest.mark.parametrize(
    ("arch", "source", "interpolation"),
    [
        ("ViT-L-14", OPENAI_URL, None),
        # A file of a name that nobody knows may be OpenAI's.
        ("ViT-L-14", "mine.pt", None),
        ("ViT-L-14", "https://huggingface.co/timm/vit_large_patch14_clip_224.openai/x", None),
        ("ViT-L-14", "https://huggingface.co/laion/CLIP-ViT-L-14-laion2B-s32B-b82K/x", "bicubic"),
        ("ViT-B-16-SigLIP2", "mine.safetensors", "bicubic"),
        ("MobileCLIP2-S2", "", "bilinear"),
        ("tiny", "", None),
    ],
)
def test_only_openai_weights_are_resized_as_published(tiny_models, arch, source, interpolation):
    assert published_settings(arch, source)["interpolation"] == interpolation


@pytest.mark.parametrize("way", ["bilinear", "bicubic"])
def test_other_weights_are_resized_as_they_were_trained(way):
    plain = open_clip_of(tiny_open_clip())
    model = OpenClip(
        model=tiny_open_clip(), tokenizer=plain.tokenizer, image_size=64, interpolation=way
    )
    (image,) = random_images((256, 200))
    from PIL import Image

    resample = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[way]
    pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((64, 64), resample)
    levels = torch.from_numpy(np.array(pil)).permute(2, 0, 1)

    def values(model: ClipModel) -> Tensor:
        return 255 * (model.preprocess_images([image])[0] * model.pixel_std + model.pixel_mean)

    assert (values(model) - levels).abs().max() < 1.5
    assert (values(plain) - levels).abs().max() > 20
    assert plain.resizes_plainly and not model.resizes_plainly


# ---- larger images


def test_a_larger_image_interpolates_the_positions(tiny_models, tmp_path, openai_file, caplog):
    path = tmp_path / "clip.pt"
    torch.save({"state_dict": tiny_open_clip().state_dict()}, path)
    images = random_images((96, 96))
    tokens = []
    with caplog.at_level("INFO"):
        for source in (path, openai_file):
            model = from_config(config(WEIGHTS=str(source), IMAGE_SIZE=96))
            assert (model.image_size, model.grid_size) == ((96, 96), (6, 6))
            tokens.append(model(images))
    assert tokens[0].shape == (1, 37, 64)
    close(tokens[0], tokens[1], 5e-2)  # OpenAI's file is in half precision
    assert "tiny takes images of 96 instead of 64 pixels: 2.2 times the image tokens" in caplog.text
    # The positions of corners and center stay those of corners and center.
    small = from_config(config(WEIGHTS=str(path))).model.visual.positional_embedding
    large = model.model.visual.positional_embedding
    assert large.shape == (37, 64)
    assert F.cosine_similarity(small[1], large[1], dim=0) > 0.8


@pytest.mark.parametrize(
    ("name", "arch", "size", "message"),
    [
        ("OpenClip", "tiny", 100, "IMAGE_SIZE is 100; a multiple of 16"),
        ("OpenClip", "RN50", 288, "IMAGE_SIZE is 288; 'RN50' is not a ViT"),
        ("OpenAIClip", "tiny", 96, "IMAGE_SIZE is 96, which only OpenClip"),
    ],
)
def test_an_image_size_that_cannot_be(tiny_models, name, arch, size, message):
    with pytest.raises(ValueError, match=message):
        from_config(config(name, ARCH=arch, IMAGE_SIZE=size))
