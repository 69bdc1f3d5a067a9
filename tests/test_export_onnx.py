"""An exported model gives torch's answers, and the demo gives them where there is no torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from PIL import Image

from regionspot_d2.modeling import BoxPrompts, PooledRegionHead, RegionSpot, RegionSpotHead
from regionspot_d2.modeling.baselines import CropRegionHead
from regionspot_d2.modeling.views import ViewFinder, Zoom

from . import tiny
from .tools import ROOT, load_script, load_tool

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

export_onnx = load_tool("export_onnx")
demo = load_script("demo/onnx_inference.py")

DEMO = ROOT / "demo" / "onnx_inference.py"
NAMES = ["cat", "dog", "bird", "cup"]
# Runs a script where importing these fails, as it does where they are not installed.
WITHOUT_TORCH = """
import runpy, sys
absent = "torch torchvision detectron2 regionspot_d2 fvcore open_clip segment_anything cv2".split()
sys.modules.update(dict.fromkeys(absent))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def tiny_built(tmp_path_factory) -> RegionSpot:
    with pytest.MonkeyPatch.context() as patch, tiny.registered_tiny_models():
        patch.setenv("REGIONSPOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = build_model(tiny.tiny_cfg())
        tiny.fill_golden(model.region_head)
        tiny.fill_golden(model.vision_language.model)
    return model.eval()


@pytest.fixture(scope="module")
def tiny_folder(tiny_built, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_onnx")
    found = export_onnx.export_model(tiny_built, NAMES, folder)
    assert len(found) == 4 and max(found.values()) < 1e-4
    return folder


@pytest.fixture(scope="module")
def mini_built(mini_predictor) -> RegionSpot:
    return mini_predictor.model


@pytest.fixture(scope="module")
def mini_folder(mini_built, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini_onnx")
    export_onnx.export_model(mini_built, NAMES, folder)
    return folder


@pytest.fixture(scope="module")
def cat_photo() -> Path:
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-image, which has the photo, is not installed")
    return Path(spec.origin).parent / "data" / "chelsea.png"


def changed(folder: Path, output: Path, **settings: object) -> Path:
    """A copy of an exported folder with other settings in its ``model.json``."""
    shutil.copytree(folder, output)
    manifest = json.loads((folder / "model.json").read_text())
    (output / "model.json").write_text(json.dumps(manifest | settings))
    return output


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def some_boxes(count: int, height: int, width: int) -> np.ndarray:
    corners = np.random.default_rng(1).random((count, 2, 2)) * [width, height]
    return np.sort(corners, axis=1).reshape(-1, 4).astype(np.float32)


@torch.no_grad()
def torch_logits(model: RegionSpot, image: np.ndarray, boxes: np.ndarray, **how) -> np.ndarray:
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()
    prompts = BoxPrompts(Boxes(torch.from_numpy(boxes)))
    [answer] = model.answer(model.encode([pixels]), [prompts], with_masks=False, **how)
    return model.score(answer.embeddings, NAMES).numpy()


@pytest.mark.parametrize("size", [(90, 130), (600, 401)])
@pytest.mark.parametrize("zoom", [0.0, 2.0])
@pytest.mark.parametrize("count", [1, 40])
def test_the_demo_equals_torch(tiny_built, tiny_folder, tmp_path, size, zoom, count):
    boxes, image = some_boxes(count, *size), photo(*size)
    # More boxes than views share the views of a pyramid.
    settings = {"factor": zoom, "max_views": 30}
    found = demo.OnnxRegionSpot(changed(tiny_folder, tmp_path / "model", zoom=settings))
    expected = torch_logits(tiny_built, image, boxes, zoom=zoom, max_views=30)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found.logits(image, boxes), expected, atol=1e-4)


def test_many_regions_are_named_in_the_groups_of_torch(
    tiny_built, tiny_folder, tmp_path, monkeypatch
):
    head = json.loads((tiny_folder / "model.json").read_text())["head"]
    folder = changed(tiny_folder, tmp_path / "model", head=head | {"max_regions": 4})
    boxes, image = some_boxes(10, 90, 130), photo(90, 130)
    together = torch_logits(tiny_built, image, boxes)
    monkeypatch.setattr(tiny_built, "max_regions", 4)
    expected = torch_logits(tiny_built, image, boxes)
    assert np.abs(together - expected).max() > 1e-3
    found = demo.OnnxRegionSpot(folder).logits(image, boxes)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_no_boxes(tiny_folder):
    model = demo.OnnxRegionSpot(tiny_folder)
    assert model.logits(photo(20, 30), np.zeros((0, 4))).shape == (0, len(NAMES))
    assert model.name(photo(20, 30), np.zeros((0, 4))) == []


def test_the_decoder_gives_the_masks_too(tiny_built, tiny_folder):
    localizer = tiny_built.localizer
    boxes, image = some_boxes(5, 128, 100), photo(128, 100)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    [embedding] = localizer.encode_images([pixels])
    expected = localizer.decode(
        embedding, (128, 100), BoxPrompts(Boxes(torch.from_numpy(boxes))), with_masks=True
    )
    encode, decode = (
        onnxruntime.InferenceSession(str(tiny_folder / f"localizer_{half}.onnx"))
        for half in ("encoder", "decoder")
    )
    [found] = encode.run(None, {"image": pixels.float().numpy()})
    for value, right in zip(decode.run(None, {"embedding": found, "boxes": boxes}), expected):
        np.testing.assert_allclose(value, right.numpy(), atol=1e-4)


def test_the_mini_model_equals_torch(mini_built, mini_folder, cat_photo):
    image = np.asarray(Image.open(cat_photo).convert("RGB"))
    boxes = np.array([[15, 0, 451, 300], [130, 60, 330, 200], [170, 90, 200, 120]], np.float32)
    found = demo.OnnxRegionSpot(mini_folder).logits(image, boxes)
    assert mini_built.zoom == 2.0
    np.testing.assert_allclose(found, torch_logits(mini_built, image, boxes), atol=1e-4)
    assert NAMES[found[0].argmax()] == "cat"
    # Its head reads no mask tokens.
    assert not list(mini_folder.glob("localizer*"))


@pytest.mark.parametrize("model", ["tiny", "mini"])
def test_the_demo_runs_without_torch(model, request, cat_photo, tmp_path):
    folder = request.getfixturevalue(f"{model}_folder")
    boxes = ["15,0,451,300", "-5,10,60.5,200"]
    command = [str(DEMO), "--model", str(folder), "--input", str(cat_photo), "--topk", "4"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command, "--boxes", *boxes],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{cat_photo} {box}" for box in boxes]
    built = request.getfixturevalue(f"{model}_built")
    image = np.asarray(Image.open(cat_photo).convert("RGB"))
    values = np.array([[float(x) for x in box.split(",")] for box in boxes], np.float32)
    expected = torch.from_numpy(torch_logits(built, image, values)).softmax(1)
    for line, row in zip(lines, expected):
        found = dict(re.findall(r"(\w+) (\d\.\d+)", line.partition(": ")[2]))
        assert list(found) == [NAMES[place] for place in row.argsort(descending=True)]
        for name, score in found.items():
            assert float(score) == pytest.approx(float(row[NAMES.index(name)]), abs=2e-4)


@pytest.mark.parametrize("count", [1, 9, 200])
def test_views_are_those_of_the_package(count):
    for size in [(480, 640), (40, 300), (1200, 333), (47, 47)]:
        for factor, max_views in [(1.0, 64), (2.0, 8), (3.5, 100)]:
            boxes = some_boxes(count, *size)
            boxes[0] = [-20, 5, size[1] + 9, 30]  # over the edges
            views, places = demo.find_views(size, boxes, factor, max_views)
            expected = ViewFinder(Zoom(factor, max_views), size, count)(
                Boxes(torch.from_numpy(boxes))
            )
            assert list(map(tuple, views.tolist())) == expected.views
            assert places.tolist() == expected.view_of_region.tolist()


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("size", [(30, 41), (300, 7), (1, 64)])
def test_resizing_is_torch_s(smooth, size):
    image = torch.rand(1, 3, *size)
    rows, columns = (export_onnx.resize_weights(length, 32, smooth) for length in size)
    expected = F.interpolate(image, (32, 32), mode="bilinear", antialias=smooth)
    torch.testing.assert_close(rows @ image @ columns.T, expected, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def head() -> RegionSpotHead:
    torch.manual_seed(0)
    sizes = {"token_dim": 12, "image_dim": 16, "text_dim": 10, "depth": 2}
    return RegionSpotHead(**sizes, num_heads=4, ffn_dim=24).eval()


@pytest.fixture(scope="module")
def exported(head, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "head.onnx"
    scored = export_onnx.ScoredHead(head, torch.tensor(3.0), 12)
    examples = export_onnx.head_examples(scored, torch.randn(50, 16), 10)
    assert export_onnx.export(scored, examples, path) < 1e-4
    assert [p.name for p in path.parent.iterdir()] == ["head.onnx"]
    return path


def test_a_head_equals_torch_for_any_sizes(head, exported):
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    for regions, tokens, words in [(1, 1, 1), (2, 9, 30), (40, 5, 3)]:
        inputs = [torch.randn(regions, 12), torch.randn(tokens, 16), torch.randn(words, 10)]
        names = ["mask_tokens", "image_tokens", "text"]
        [found] = session.run(None, {n: x.numpy() for n, x in zip(names, inputs)})
        with torch.no_grad():
            [embeddings] = head([inputs[0]], inputs[1][None])
        expected = embeddings @ inputs[2].T * np.exp(3.0)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_a_training_free_head_equals_torch(tiny_built, tmp_path):
    tower = tiny_built.vision_language
    scored = export_onnx.ScoredHead(PooledRegionHead(vision_language=tower), torch.tensor(3.0), 32)
    with torch.no_grad():
        [image_tokens] = tower([torch.rand(3, 50, 60) * 255])
    examples = export_onnx.head_examples(scored, image_tokens, tower.text_dim)
    assert export_onnx.export(scored, examples, tmp_path / "head.onnx") < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "head.onnx"))
    assert [port.name for port in session.get_inputs()] == ["image_tokens", "boxes", "text"]


def test_a_graph_that_differs_is_not_kept(exported, tmp_path, monkeypatch):
    def copy(model, inputs, path, **options):
        shutil.copy(exported, path)

    monkeypatch.setattr(torch.onnx, "export", copy)
    other = RegionSpotHead(
        token_dim=12, image_dim=16, text_dim=10, depth=2, num_heads=4, ffn_dim=24
    )
    scored = export_onnx.ScoredHead(other, torch.tensor(3.0), 12)
    examples = export_onnx.head_examples(scored, torch.randn(50, 16), 10)
    with pytest.raises(RuntimeError, match="differs from torch"):
        export_onnx.export(scored, examples, tmp_path / "head.onnx")
    assert list(tmp_path.iterdir()) == []


def test_heads_that_cannot_be_exported_say_why(tiny_built):
    crops = CropRegionHead(vision_language=tiny_built.vision_language)
    with pytest.raises(ValueError, match="CropRegionHead, which reads images"):
        export_onnx.ScoredHead(crops, torch.tensor(3.0), 32)
    blind = RegionSpotHead(token_dim=12, image_dim=16, text_dim=10, with_image_tokens=False)
    with pytest.raises(ValueError, match="IMAGE_TOKENS is False"):
        export_onnx.ScoredHead(blind, torch.tensor(3.0), 12)


def test_the_command_writes_one_folder_or_nothing(tiny_models, empty_cache, tmp_path, monkeypatch):
    config, output = tmp_path / "tiny.yaml", tmp_path / "out" / "model"
    cfg = tiny.tiny_cfg()
    cfg.MODEL.REGION_HEAD.NAME = "PooledRegionHead"
    config.write_text(cfg.dump())
    command = f"export_onnx.py --config-file {config} --vocabulary cat,dog --output {output}"
    monkeypatch.setattr(sys, "argv", command.split())
    with monkeypatch.context() as patch:
        patch.setattr(export_onnx, "TOLERANCE", -1.0)
        with pytest.raises(SystemExit, match="differs from torch"):
            export_onnx.main()
    assert list(output.parent.iterdir()) == []
    export_onnx.main()
    assert list(output.parent.iterdir()) == [output]
    assert demo.OnnxRegionSpot(output).names == ["cat", "dog"]
    for path, said in [(output, "a new or empty"), (tmp_path / "head.onnx", "a folder")]:
        monkeypatch.setattr(sys, "argv", [*command.split()[:-1], str(path)])
        with pytest.raises(SystemExit, match=f"{path}: .*{said}") as error:
            export_onnx.main()
        assert "\n" not in str(error.value)


def run_demo(*arguments: str) -> str:
    """The line in which the demo's command ends."""
    done = subprocess.run([sys.executable, str(DEMO), *arguments], capture_output=True, text=True)
    assert done.returncode and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_mistakes_are_told_in_a_line(tiny_folder, tmp_path):
    Image.fromarray(photo(20, 30)).save(tmp_path / "photo.png")
    (tmp_path / "no.jpg").write_text("no")
    asked = ["--boxes", "1,2,9,9", "--input", f"{tmp_path}/photo.png", "--model"]
    assert "model.json is missing" in run_demo(*asked, str(tmp_path))
    old = changed(tiny_folder, tmp_path / "old", format=0)
    assert "not of format 1" in run_demo(*asked, str(old))
    model = str(tiny_folder)
    assert "no.jpg" in run_demo(*asked, model, "--input", f"{tmp_path}/no.jpg")
    assert "'1,2': X0,Y0,X1,Y1" in run_demo(*asked, model, "--boxes", "1,2")
    outside = run_demo(*asked, model, "--boxes", "1,2,9,9", "40,2,50,9")
    assert "Box 1" in outside and "30 x 20 pixels" in outside


def test_a_damaged_folder_is_refused(tiny_folder, tmp_path):
    folder = changed(tiny_folder, tmp_path / "model")
    (folder / "names.json").write_text(json.dumps(["cat"]))
    with pytest.raises(ValueError, match="text.npy has 4 rows for 1 class names"):
        demo.OnnxRegionSpot(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(ValueError, match="model.json is not json"):
        demo.OnnxRegionSpot(folder)


@pytest.mark.parametrize(
    ("boxes", "said"),
    [([1, 2, 3, 4], "shape"), ([[5, 5, 5, 9]], "no area"), ([[0, 0, np.nan, 9]], "no area")],
)
def test_boxes_that_make_no_sense(tiny_folder, boxes, said):
    with pytest.raises(ValueError, match=said):
        demo.OnnxRegionSpot(tiny_folder).logits(photo(20, 30), np.array(boxes))
