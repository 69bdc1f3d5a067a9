"""Calibration: what it is measured by, how it is fitted, and that a predictor uses it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.calibration import (
    calibration_file,
    fit_sigmoid,
    fit_temperature,
    write_calibration,
)
from regionspot_d2.evaluation.calibration import (
    auroc,
    calibration_error,
    draw_reliability,
    reliability,
)
from regionspot_d2.pretrained import read_pretrained

from .tiny import golden, tiny_cfg
from .tools import load_tool

pytestmark = pytest.mark.usefixtures("vocabularies")

WORDS = ["cat", "dog", "bird"]
BOXES = golden()["boxes"]
NUMBERS = {"TEMPERATURE": 0.25, "SIGMOID_TEMPERATURE": 2.0, "SIGMOID_BIAS": -1.0}


def test_bins_of_as_many_regions_each_by_hand():
    bins = reliability([0.9, 0.1, 0.2, 0.8], [True, False, True, True], bins=2)
    assert [(b.accuracy, b.regions) for b in bins] == [(0.5, 2), (1.0, 2)]
    assert [b.score for b in bins] == pytest.approx([0.15, 0.85])
    assert calibration_error(bins) == pytest.approx((0.35 + 0.15) / 2)
    assert len(reliability([0.5], [True])) == 1
    assert np.isnan(calibration_error(reliability([], [])))


def test_auroc_counts_pairs():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 5, 40) / 5  # with ties
    positive = generator.random(40) < 0.4
    pairs = [(p > n) + (p == n) / 2 for p in scores[positive] for n in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(scores, np.ones(40, dtype=bool)))


def drawn(number: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits, and labels that are as likely as a softmax of them says."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(number, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def test_the_temperature_of_scores_is_found():
    few, many = drawn(4000, 5), drawn(4000, 50)
    questions = [2.5 * few[0], 2.5 * many[0]], [few[1], many[1]]
    temperature = fit_temperature(*questions)
    assert temperature == pytest.approx(2.5, rel=0.1)
    scores = [(part / temperature).softmax(1).max(1) for part in questions[0]]
    right = [part.indices == label for part, label in zip(scores, questions[1])]
    values = torch.cat([part.values for part in scores])
    assert calibration_error(reliability(values, torch.cat(right))) < 0.02
    with pytest.raises(ValueError, match="no labeled regions"):
        fit_temperature([], [])


def test_the_temperature_and_bias_of_sigmoids_are_found():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 4, generator=generator)
    # One name of each region is true; which, depends on its logit alone.
    labels = torch.multinomial((2 * logits).exp(), 1, generator=generator)[:, 0]
    temperature, bias = fit_sigmoid([3 * logits], [labels])
    scores = (3 * logits / temperature + bias).sigmoid()
    true = torch.nn.functional.one_hot(labels, 4)
    assert calibration_error(reliability(scores.flatten(), true.flatten())) < 0.03
    assert bias < 0 < temperature


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model as save_pretrained writes it, whose head has a calibration."""
    RegionSpotPredictor(tiny_cfg(), vocabulary=WORDS).save_pretrained(tmp_path / "model")
    path = write_calibration(tmp_path / "model/head.safetensors", NUMBERS, {"regions": 7})
    assert path == tmp_path / "model/head.calibration.json"
    return tmp_path / "model"


def load(folder: Path, **changes: bool) -> RegionSpotPredictor:
    """The model in a folder; its frozen models, which have no weights, are always the same."""
    cfg, words = read_pretrained(folder)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.NAMING.update(changes)
    torch.manual_seed(0)
    return RegionSpotPredictor(cfg, vocabulary=words)


def best_scores(predictor: RegionSpotPredictor, kind: str = "softmax") -> Tensor:
    predictor.set_image(golden()["image"])
    return predictor.predict(boxes=BOXES, scores=kind).scores


def test_a_predictor_uses_the_calibration_beside_its_head(folder):
    predictor = load(folder)
    predictor.set_image(golden()["image"])
    logits = predictor.model.score(predictor.region_embeddings(boxes=BOXES), WORDS)
    torch.testing.assert_close(best_scores(predictor), (logits / 0.25).softmax(1).amax(1))
    expected = (logits / 2 - 1).sigmoid().amax(1)
    torch.testing.assert_close(best_scores(predictor, "sigmoid"), expected)
    # Without: by a key of the config, or without the file.
    plain = best_scores(load(folder, CALIBRATED=False))
    (folder / "head.calibration.json").unlink()
    assert torch.equal(best_scores(load(folder)), plain)
    torch.testing.assert_close(plain, logits.softmax(1).amax(1))


def test_a_saved_predictor_keeps_its_calibration(folder, tmp_path):
    predictor = load(folder)
    predictor.save_pretrained(tmp_path / "copy")
    assert not calibration_file(tmp_path / "copy/head.safetensors").exists()
    again = best_scores(load(tmp_path / "copy"))
    assert torch.equal(again, best_scores(predictor))


@pytest.mark.parametrize(
    "content, message",
    [
        ({"naming": NUMBERS, "head_sha256": "0"}, "of another head"),
        ({"naming": {"TEMPERATURE": 1}, "head_sha256": "0"}, "a file of tools/calibrate.py"),
        ([], "a file of tools/calibrate.py"),
    ],
)
def test_a_calibration_of_something_else_is_refused(folder, content, message):
    (folder / "head.calibration.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        RegionSpotPredictor.from_pretrained(folder)


def test_the_tool_calibrates_a_model(folder, tmp_path, monkeypatch, capsys):
    (folder / "head.calibration.json").unlink()
    images, annotations = [], []
    for number in (1, 2, 3):
        Image.fromarray(np.roll(golden()["image"], number, 0)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 90, "width": 120})
        for place, (x0, y0, x1, y1) in enumerate(BOXES.tolist()):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotation = {"image_id": number, "category_id": 1 + place % 3, "bbox": box}
            more = {"id": len(annotations) + 1, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append({**annotation, **more})
    categories = [{"id": i, "name": name} for i, name in enumerate(WORDS, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    tool, command = load_tool("calibrate"), ["calibrate.py", "--model", folder, "--folds", "3"]
    command += ["--coco", tmp_path / "boxes.json", tmp_path, "--diagram", tmp_path / "trust.png"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    tool.main()
    printed = capsys.readouterr().out
    assert "21 boxes in 3 images" in printed and "softmax: ECE" in printed
    assert Image.open(tmp_path / "trust.png").size[0] > 100
    found = json.loads((folder / "head.calibration.json").read_text())
    scoring = RegionSpotPredictor.from_pretrained(folder).model.scoring
    assert scoring.temperature == pytest.approx(found["naming"]["TEMPERATURE"])
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--folds", "9"])
    with pytest.raises(SystemExit, match="do not make 9 folds"):
        tool.main()


def test_a_diagram_is_a_picture(tmp_path):
    draw_reliability(str(tmp_path / "trust.png"), reliability([0.2, 0.8], [0, 1]), "a model")
    assert Image.open(tmp_path / "trust.png").format == "PNG"
