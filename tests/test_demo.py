"""The demo: pictures, results, and what it says when its input is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .test_regionspot import tiny_model, vocabularies  # noqa: F401 (fixture)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def demo(monkeypatch):
    """Runs demo.py with arguments, on tiny towers; returns its exit status."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "demo" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from regionspot_d2 import RegionSpotPredictor

    def tiny_predictor(cfg, vocabulary):
        return RegionSpotPredictor(tiny_model(), vocabulary=vocabulary)

    monkeypatch.setattr(module, "RegionSpotPredictor", tiny_predictor)

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["demo.py", *map(str, arguments)])
        return module.main()

    return run


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in [("a.png", (40, 60)), ("b.jpg", (50, 30))]:
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_pictures_table_and_coco_results(demo, photos, tmp_path, capsys):
    output = tmp_path / "out"
    boxes = ["2,3,20,25", "0,-5,1000,30"]
    arguments = ["--input", photos, "--output", output, "--boxes", *boxes, "--topk", 2]
    assert demo(*arguments, "--vocabulary", "cat, dog,bird") == 0
    results = json.loads((output / "results.json").read_text())
    assert [(i["width"], i["height"]) for i in results["images"]] == [(60, 40), (30, 50)]
    assert [c["name"] for c in results["categories"]] == ["cat", "dog", "bird"]
    annotations = results["annotations"]
    assert len(annotations) == 2 * 2 * 2 and len({a["id"] for a in annotations}) == 8
    assert annotations[0]["bbox"] == [2, 3, 18, 22]
    assert annotations[2]["bbox"] == [0, 0, 60, 30]  # cut at the edge
    assert annotations[0]["score"] >= annotations[1]["score"]
    for name, size in [("a.png.png", (60, 40)), ("b.jpg.png", (30, 50))]:
        assert Image.open(output / name).size == size
    table = capsys.readouterr().out
    assert "2, 3, 20, 25" in table and "2 pictures" in table


def test_proposals_with_scores_and_a_threshold(demo, photos, tmp_path):
    file = tmp_path / "boxes.json"
    entry = {"boxes": [[0, 0, 9, 9], [5, 5, 20, 20]], "scores": [0.9, 0.0]}
    file.write_text(json.dumps({"a.png": entry}))
    output = tmp_path / "out"
    arguments = ["--input", photos / "a.png", "--output", output, "--proposals", file]
    assert demo(*arguments, "--vocabulary", "cat,dog", "--confidence-threshold", 0.1) == 0
    [annotation] = json.loads((output / "results.json").read_text())["annotations"]
    assert annotation["bbox"] == [0, 0, 9, 9] and 0.45 <= annotation["score"] <= 0.9


def test_an_unreadable_image_is_told_and_the_others_are_done(demo, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes((photos / "b.jpg").read_bytes()[:200])
    arguments = ["--input", photos, "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 1
    assert "broken.jpg" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [Path(i["file_name"]).name for i in results["images"]] == ["a.png", "b.jpg"]


def test_images_of_one_name_do_not_overwrite_each_other(demo, photos, tmp_path):
    (photos / "other").mkdir()
    Image.new("RGB", (33, 44)).save(photos / "other" / "a.png")
    inputs = [photos / "a.png", photos / "other"]
    arguments = ["--input", *inputs, "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 0
    assert Image.open(tmp_path / "out" / "a.png.png").size == (60, 40)
    assert Image.open(tmp_path / "out" / "a.png-2.png").size == (33, 44)


def test_a_vocabulary_file(demo, photos, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("fire hydrant\n\nsmall, red cup\n")
    arguments = ["--input", photos / "*.jpg", "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    assert demo(*arguments, "--vocabulary", words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [c["name"] for c in results["categories"]] == ["fire hydrant", "small, red cup"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--boxes", "1,2,3"], "--boxes 1,2,3: four numbers"),
        (["--boxes", "1,2,3,x"], "four numbers"),
        (["--boxes", "0,0,9,9", "--input", "nowhere/*.jpg"], "nowhere.*no image"),
        (["--boxes", "0,0,9,9", "--vocabulary", "cat,,dog"], "Name 1"),
        (["--boxes", "0,0,9,9", "--vocabulary", "cat,cat"], "twice"),
        (["--boxes", "0,0,9,9", "--opts", "MODEL.NO_SUCH_KEY", "1"], "NO_SUCH_KEY"),
        (["--boxes", "0,0,9,9", "--config-file", "no.yaml"], "no.yaml"),
        (["--proposals", "no.json"], "no.json"),
    ],
)
def test_wrong_arguments_give_one_line(demo, photos, tmp_path, arguments, message):
    base = ["--input", photos / "a.png", "--output", tmp_path / "out", "--vocabulary", "cat,dog"]
    with pytest.raises(SystemExit, match=message):
        demo(*base, *arguments)


def test_wrong_boxes_name_the_image_and_the_box(demo, photos, tmp_path, capsys):
    arguments = ["--input", photos, "--output", tmp_path / "out", "--boxes", "0,0,9,9", "35,0,50,9"]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 1
    error = capsys.readouterr().err
    assert "b.jpg" in error and "Box 1" in error and "30 x 50" in error
