"""The demo: pictures, videos, results, resuming, and what it says when its input is wrong."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.app import main as app
from regionspot_d2.app.drawing import draw_attention, draw_regions, side_by_side
from regionspot_d2.app.results import OtherResults
from regionspot_d2.app.run import automatic_threshold
from regionspot_d2.app.video import video_writer
from regionspot_d2.detection import build_detector
from regionspot_d2.modeling import REGION_HEAD_REGISTRY, PooledRegionHead
from regionspot_d2.modeling.clip import ClipModel
from regionspot_d2.modeling.everything import Search
from regionspot_d2.modeling.sam import SamLocalizer
from regionspot_d2.modeling.scoring import Scoring

from .detectors import FASTER_RCNN, zoo_cfg
from .tiny import tiny_model
from .tiny_detectors import tiny_detector
from .tools import ROOT, load_script

pytestmark = pytest.mark.usefixtures("vocabularies")
HEAD_WITH_ATTENTION = ["--opts", "MODEL.REGION_HEAD.NAME", "RegionSpotHead"]


@pytest.fixture
def demo(monkeypatch):
    """Runs demo.py with arguments, on tiny towers; returns its exit status."""

    def tiny_predictor(cfg, vocabulary):
        model = tiny_model()
        if REGION_HEAD_REGISTRY.get(cfg.MODEL.REGION_HEAD.NAME) is PooledRegionHead:
            model.region_head = PooledRegionHead(vision_language=model.vision_language)
        return RegionSpotPredictor(model, vocabulary=vocabulary)

    monkeypatch.setattr(app, "RegionSpotPredictor", tiny_predictor)

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["demo.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "demo" / "demo.py"), run_name="__main__")
        if stop.value.code not in (0, 1, 130):
            raise stop.value
        return stop.value.code

    return run


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in [("a.png", (40, 60)), ("b.jpg", (50, 30))]:
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return folder


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


@pytest.fixture
def video(tmp_path) -> Path:
    """Three frames, 48 x 32, 10 per second."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
    for shade in (60, 120, 180):
        writer.write(np.full((32, 48, 3), shade, dtype=np.uint8))
    writer.release()
    return path


@pytest.fixture
def detector(tmp_path) -> tuple[str, str, DefaultPredictor]:
    """The config and the weights of a random detector, which wants RGB, and the detector."""
    cfg = zoo_cfg(FASTER_RCNN)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST = 160
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "detector.pth")
    (tmp_path / "detector.yaml").write_text(cfg.dump())
    cfg.MODEL.WEIGHTS = str(tmp_path / "detector.pth")
    return str(tmp_path / "detector.yaml"), cfg.MODEL.WEIGHTS, DefaultPredictor(cfg)


def test_pictures_table_and_coco_results(demo, photos, tmp_path, capsys):
    output = tmp_path / "out"
    boxes = ["2,3,20,25", "-5,-5,1000,30"]
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
    for name, size in [("a.png.png", (60, 40)), ("b.jpg.jpg", (30, 50))]:
        assert Image.open(output / name).size == size
    table = capsys.readouterr().out
    assert "2, 3, 20, 25" in table and "2 pictures" in table


def test_photos_that_were_jpeg_get_jpeg_pictures(demo, photos, tmp_path):
    output = tmp_path / "out"
    arguments = ["--input", photos, "--output", output, "--boxes", "2,3,20,25"]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 0
    formats = {path.name: Image.open(path).format for path in output.glob("*.*g")}
    assert formats == {"a.png.png": "PNG", "b.jpg.jpg": "JPEG"}


def test_nothing_is_drawn_where_only_results_are_wanted(
    demo, photos, video, tmp_path, monkeypatch, images_encoded, capsys
):
    monkeypatch.setattr("regionspot_d2.app.run.draw_regions", lambda *_, **__: pytest.fail("drawn"))
    output = tmp_path / "out"
    arguments = ["--input", photos / "a.png", video, "--output", output, "--boxes", "2,3,20,25"]
    arguments += ["--vocabulary", "cat,dog", "--no-pictures"]
    assert demo(*arguments) == 130  # images_encoded stops it
    assert demo(*arguments, "--resume") == 0 and len(images_encoded) == 5
    assert {path.name for path in output.iterdir()} == {"results.json", "results.jsonl"}
    assert len(results_of(output)["images"]) == 4
    assert "picture" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        demo(*arguments, "--attention")
    assert "--attention is a picture" in capsys.readouterr().err


def test_formats_hold_the_same_boxes(demo, photos, video, tmp_path, capsys):
    supervision = pytest.importorskip("supervision")
    (photos / "other").mkdir()
    Image.new("RGB", (33, 44)).save(photos / "other" / "a.jpg")
    Image.new("RGB", (20, 20)).save(photos / "empty.png")
    file = tmp_path / "boxes.json"
    boxes = {name: {"boxes": [[2, 3, 20, 25], [0, 0, 9, 9]]} for name in ("a.png", "a.jpg")}
    boxes |= {"b.jpg": boxes["a.png"], "empty.png": {"boxes": []}}
    boxes |= {f"clip.avi#{i}": {"boxes": [[0, 0, 9, 9]]} for i in range(3)}
    file.write_text(json.dumps(boxes))
    output = tmp_path / "out"
    arguments = ["--input", photos, photos / "other", video, "--output", output, "--topk", 2]
    arguments += ["--proposals", file, "--vocabulary", "cat,dog & <bird>"]
    assert demo(*arguments, "--format", "yolo", "voc", "csv") == 0
    assert "its boxes are in a-2.txt" in capsys.readouterr().err
    expected = results_of(output)
    best = {}
    for annotation in expected["annotations"]:
        region = (annotation["image_id"], annotation["region"])
        best.setdefault(region, annotation["category_id"] - 1)

    paths = {"images_directory_path": str(photos)}
    yolo = supervision.DetectionDataset.from_yolo(
        **paths, annotations_directory_path=output / "labels", data_yaml_path=output / "data.yaml"
    )
    voc = supervision.DetectionDataset.from_pascal_voc(
        **paths, annotations_directory_path=str(output / "annotations")
    )
    assert yolo.classes == ["cat", "dog & <bird>"] and set(voc.classes) <= set(yolo.classes)
    for dataset in (yolo, voc):
        found = {Path(path).name: each for path, each in dataset.annotations.items()}
        assert set(found) == {"a.png", "b.jpg", "empty.png"}
        names = [dataset.classes[i] for i in found["a.png"].class_id]
        assert names == [yolo.classes[best[1, region]] for region in (0, 1)]
        np.testing.assert_allclose(found["a.png"].xyxy, [[2, 3, 20, 25], [0, 0, 9, 9]], atol=1)
        assert len(found["empty.png"]) == 0
    assert (output / "labels" / "clip.avi#2.txt").is_file()

    with (output / "results.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == len(expected["annotations"]) == 2 * (3 * 2 + 3)
    for row, annotation in zip(rows, expected["annotations"]):
        assert row["class_name"] == yolo.classes[annotation["category_id"] - 1]
        assert float(row["confidence"]) == pytest.approx(annotation["score"])
        x0, y0, width, height = annotation["bbox"]
        assert float(row["x_max"]) == pytest.approx(x0 + width)
        assert int(row["region"]) == annotation["region"]


def test_formats_without_supervision(demo, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    arguments = ["--input", photos, "--output", tmp_path / "out", "--boxes", "2,3,20,25"]
    with pytest.raises(SystemExit, match=r"--format csv: the package supervision is missing: pip"):
        demo(*arguments, "--format", "csv")
    assert not (tmp_path / "out").exists()
    assert demo(*arguments, "--vocabulary", "cat,dog") == 0


def test_proposals_with_scores_and_a_threshold(demo, photos, tmp_path):
    file = tmp_path / "boxes.json"
    entry = {"boxes": [[0, 0, 9, 9], [5, 5, 20, 20]], "scores": [0.9, 0.0]}
    file.write_text(json.dumps({"a.png": entry}))
    output = tmp_path / "out"
    arguments = ["--input", photos / "a.png", "--output", output, "--proposals", file]
    assert demo(*arguments, "--vocabulary", "cat,dog", "--confidence-threshold", 0.1) == 0
    [annotation] = json.loads((output / "results.json").read_text())["annotations"]
    assert annotation["bbox"] == [0, 0, 9, 9] and 0.45 <= annotation["score"] <= 0.9


def test_regions_of_no_name_are_drawn_and_left_out_of_the_results(
    demo, photos, tmp_path, monkeypatch, capsys
):
    model = tiny_model(scoring=Scoring(threshold=1.0))
    words: list = []

    def predictor(cfg, vocabulary):
        words.append(vocabulary)
        return RegionSpotPredictor(model, vocabulary=vocabulary)

    monkeypatch.setattr(app, "RegionSpotPredictor", predictor)
    (tmp_path / "words.yaml").write_text("pet: [cat, dog]\nbird:\n")
    boxes = ["--boxes", "5,5,50,30", "--vocabulary", tmp_path / "words.yaml"]
    arguments = ["--input", photos / "a.png", "--output", tmp_path / "out", *boxes]
    assert demo(*arguments, "--format", "csv") == 0
    assert words[0].names == ("pet", "bird") and words[0].texts == ("cat", "dog", "bird")
    assert "none of these" in capsys.readouterr().out
    results = results_of(tmp_path / "out")
    assert results["annotations"] == []
    assert [category["name"] for category in results["categories"]] == ["pet", "bird"]
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 1  # its header
    drawn = pixels(tmp_path / "out" / "a.png.png")
    assert (drawn != pixels(photos / "a.png")).any()
    # A continued run finds them in its journal.
    (tmp_path / "out" / "a.png.png").unlink()
    assert demo(*arguments, "--resume") == 0
    assert (pixels(tmp_path / "out" / "a.png.png") == drawn).all()


def test_the_automatic_threshold_falls_as_the_vocabulary_grows(demo, photos, tmp_path):
    assert [round(automatic_threshold(n), 4) for n in (1, 2, 80, 1203)] == [0, 0.3, 0.25, 0.0166]
    file = tmp_path / "boxes.json"
    entry = {"boxes": [[0, 0, 9, 9], [5, 5, 20, 20]], "scores": [0.9, 0.01]}
    file.write_text(json.dumps({"a.png": entry}))
    arguments = ["--input", photos / "a.png", "--vocabulary", "cat,dog"]

    def named(output: str, *options: object) -> int:
        assert demo(*arguments, "--output", tmp_path / output, *options) == 0
        return len(results_of(tmp_path / output)["annotations"])

    assert named("scored", "--proposals", file) == 1
    assert named("all", "--proposals", file, "--confidence-threshold", 0) == 2
    assert named("given", "--boxes", "0,0,9,9", "5,5,20,20") == 2


def test_an_unreadable_image_is_reported_and_the_others_are_named(demo, photos, tmp_path, capsys):
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


def test_folders_inside_a_folder_are_kept_and_a_second_run_takes_the_same_photos(
    demo, photos, tmp_path, capsys
):
    pytest.importorskip("supervision")
    for name in ("b/a.png", "B/a.png", ".hidden/a.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (33, 44)).save(photos / name)
    (photos / "b" / "again").symlink_to(photos)
    expected = ["a.png", "b.jpg", "B/a.png", "b/a.png"]

    def named(*arguments: object) -> list[str]:
        assert demo(*arguments, "--boxes", "0,0,9,9", "--vocabulary", "cat,dog") == 0
        images = results_of(arguments[arguments.index("--output") + 1])["images"]
        return [str(Path(image["file_name"]).relative_to(photos)) for image in images]

    formats = ["--format", "yolo", "voc"]
    for output in (photos / "out", photos, photos):
        assert named("--input", photos, "--output", output, *formats) == expected
        assert (output / "a.png.png").is_file() and (output / "labels" / "a.txt").is_file()
        # On some disks, B and b are one folder.
        assert {path.name for path in output.glob("B/a.png*.png")} == {"a.png.png", "a.png-2.png"}
    # As a shell does it, and as glob does.
    in_folder = [str(path) for path in sorted(photos.iterdir()) if path.is_file()]
    for inputs in (in_folder, [photos / "*.*"]):
        assert named("--input", *inputs, "--output", tmp_path / "out") == expected[:2]
    assert "of an earlier run" in capsys.readouterr().err
    assert named("--input", photos / "a.png.png", "--output", tmp_path / "out") == ["a.png.png"]


def test_regions_go_round_through_the_formats_that_are_written(demo, photos, tmp_path):
    pytest.importorskip("supervision")
    first, again = tmp_path / "first", tmp_path / "again"
    arguments = ["--input", photos, "--vocabulary", "cat,dog", "--no-pictures"]
    boxes = ["--boxes", "2,3,20,25", "0,0,9,9", "--topk", 2]
    assert demo(*arguments, *boxes, "--output", first, "--format", "csv", "yolo") == 0
    expected = [annotation["bbox"] for annotation in results_of(first)["annotations"][::2]]
    for name in ("results.json", "results.csv", "labels"):
        proposals = ["--proposals", first / name, "--confidence-threshold", 0]
        assert demo(*arguments, *proposals, "--output", again) == 0
        found = [annotation["bbox"] for annotation in results_of(again)["annotations"]]
        np.testing.assert_allclose(found, expected, atol=0.01)
    before = (first / "labels" / "a.txt").read_bytes()
    output = ["--output", first, "--format", "yolo", "--proposals", first / "labels"]
    assert demo(*arguments, *output) == 0
    assert (first / "labels" / "a.txt").read_bytes() == before


def test_a_vocabulary_file(demo, photos, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("fire hydrant\n\nsmall, red cup\n", encoding="utf-8-sig")
    arguments = ["--input", photos / "*.jpg", "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    assert demo(*arguments, "--vocabulary", words) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [c["name"] for c in results["categories"]] == ["fire hydrant", "small, red cup"]


def test_a_vocabulary_file_that_is_not_utf8(demo, photos, tmp_path):
    words = tmp_path / "words.txt"
    words.write_bytes("café".encode("latin-1"))
    arguments = ["--input", photos, "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    with pytest.raises(SystemExit, match="--vocabulary .*words.txt: byte 3 is not UTF-8"):
        demo(*arguments, "--vocabulary", words)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--boxes", "1,2,3"], "--boxes 1,2,3: four numbers"),
        (["--boxes", "1,2,3,x"], "four numbers"),
        (["--points", "1,2;3"], "--points 1,2;3: x,y or x,y,label"),
        (["--points", "1,2,2"], "label 1 is on the region, 0 beside it"),
        (["--points", "1,2,0;3,4,0"], "--points 1,2,0;3,4,0: at least one point on the region"),
        (["--boxes", "0,0,9,9", "--input", "nowhere/*.jpg"], "nowhere.*no image"),
        (["--boxes", "0,0,9,9", "--vocabulary", "cat,,dog"], "Name 1"),
        (["--boxes", "0,0,9,9", "--vocabulary", "cat,cat"], "twice"),
        (["--boxes", "0,0,9,9", "--opts", "MODEL.NO_SUCH_KEY", "1"], "NO_SUCH_KEY"),
        (["--boxes", "0,0,9,9", "--config-file", "no.yaml"], "no.yaml"),
        (["--proposals", "no.json"], "no.json"),
        (
            ["--boxes", "0,0,9,9", "--opts", "MODEL.DEVICE", "no"],
            "MODEL.DEVICE no: Expected one of",
        ),
        (
            ["--boxes", "0,0,9,9", "--attention", "--opts", "MODEL.REGION_HEAD.NAME", "no"],
            "^error: MODEL.REGION_HEAD.NAME is 'no'; it must be one of RegionSpotHead, ",
        ),
    ],
)
def test_wrong_arguments_give_one_line(demo, photos, tmp_path, arguments, message):
    base = ["--input", photos / "a.png", "--output", tmp_path / "out", "--vocabulary", "cat,dog"]
    with pytest.raises(SystemExit, match=message):
        demo(*base, *arguments)


def test_an_output_that_cannot_be_written(demo, photos, tmp_path):
    arguments = ["--input", photos, "--boxes", "0,0,9,9", "--vocabulary", "cat,dog", "--output"]
    with pytest.raises(SystemExit, match="--output: a folder is expected: .*a.png"):
        demo(*arguments, photos / "a.png")
    (tmp_path / "out" / "results.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit, match="--output: a folder to write to .*results.jsonl"):
        demo(*arguments, tmp_path / "out")


@pytest.mark.parametrize(
    "entry, message",
    [
        ('{"boxes": null}', "has no list 'boxes'"),
        ('{"boxes": 5}', "has no list 'boxes'"),
        ('{"boxes": [1, 2, 9, 9]}', r"has the box 1 \(region 0\)"),
        ('{"boxes": [[1, 2, 9, 9], [1, 2, 9]]}', r"has the box \[1, 2, 9\] \(region 1\)"),
        ('{"boxes": [[1, 2, 9, 9]], "scores": 1}', "needs one score per box"),
        ('{"boxes": [[1, 2, 9, 9]], "scores": []}', "needs one score per box"),
        ('{"boxes": [[1, 2, 9, 9]], "scores": [[0.5]]}', r"has the score \[0.5\] \(region 0\)"),
        ('{"boxes": [[1, 2, 9, 9]], "scores": [NaN]}', r"has the score nan \(region 0\)"),
    ],
)
def test_proposals_of_another_form(demo, photos, tmp_path, entry, message):
    file = tmp_path / "boxes.json"
    file.write_text(f'{{"a.png": {entry}}}')
    arguments = ["--input", photos / "a.png", "--output", tmp_path / "out", "--proposals", file]
    with pytest.raises(SystemExit, match=f"--proposals .*boxes.json: 'a.png' {message}"):
        demo(*arguments, "--vocabulary", "cat,dog")


def test_wrong_boxes_name_the_image_and_the_box(demo, photos, tmp_path, capsys):
    arguments = ["--input", photos, "--output", tmp_path / "out", "--boxes", "0,0,9,9", "35,0,50,9"]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 1
    error = capsys.readouterr().err
    assert "b.jpg" in error and "Box 1" in error and "30 x 50" in error


def test_boxes_and_points_are_one_question(demo, photos, tmp_path, capsys):
    photo = photos / "a.png"
    arguments = ["--input", photo, "--output", tmp_path / "out", "--vocabulary", "cat,dog"]
    assert demo(*arguments, "--boxes", "2,3,20,25", "--points", "9,9", "30,9,1;5,35,0") == 0
    predictor = RegionSpotPredictor(tiny_model(), vocabulary=["cat", "dog"])
    predictor.set_image(photo)
    expected = predictor.predict(
        boxes=[[2, 3, 20, 25]], points=[[[9, 9]], [[30, 9], [5, 35]]], point_labels=[[1], [1, 0]]
    )
    annotations = results_of(tmp_path / "out")["annotations"]
    assert [a["region"] for a in annotations] == [0, 1, 2]
    assert [a["score"] for a in annotations] == pytest.approx(expected.scores.tolist())
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor, atol=1e-4)


def test_an_empty_mask_leaves_the_point(demo, photos, tmp_path, monkeypatch):
    def empty_masks(self, mask_logits, image_size, output_size=None):
        return torch.zeros(len(mask_logits), *(output_size or image_size), dtype=torch.bool)

    monkeypatch.setattr(SamLocalizer, "full_size_masks", empty_masks)
    arguments = ["--input", photos / "a.png", "--output", tmp_path / "out"]
    assert demo(*arguments, "--points", "30,9;5,35,0", "--vocabulary", "cat,dog") == 0
    [annotation] = results_of(tmp_path / "out")["annotations"]
    assert annotation["bbox"] == [30, 9, 1, 1]


def test_a_detector_finds_the_regions(demo, photos, tmp_path, detector):
    config, weights, reference = detector
    arguments = ["--input", photos / "a.png", "--output", tmp_path / "out"]
    detectors = ["--detector-config", config, "--detector-weights", weights]
    # The softmax over one name is 1, and leaves the detector's score.
    assert demo(*arguments, *detectors, "--vocabulary", "cat") == 0
    found = reference(cv2.imread(str(photos / "a.png")))["instances"]
    assert len(found) > 0
    annotations = results_of(tmp_path / "out")["annotations"]
    assert [a["score"] for a in annotations] == pytest.approx(found.scores.tolist())
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
    np.testing.assert_allclose(boxes, found.pred_boxes.tensor, atol=1e-3)


def test_a_zero_shot_detector_looks_for_the_vocabulary(demo, photos, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "model").mkdir()
    tiny_detector("grounding-dino", tmp_path / "model")
    source = f"hf:{tmp_path / 'model'}"
    arguments = ["--input", photos / "a.png", "--output", tmp_path / "out", "--detector", source]
    arguments += ["--vocabulary", "cat,traffic light,dog", "--confidence-threshold", 0]
    assert demo(*arguments) == 0
    names = ["cat", "traffic light", "dog"]
    image = np.asarray(Image.open(photos / "a.png").convert("RGB"))
    found = build_detector(source, class_names=names)(image)
    assert len(found.scores) > 0
    boxes = [
        [x, y, x + w, y + h]
        for x, y, w, h in (a["bbox"] for a in results_of(tmp_path / "out")["annotations"])
    ]
    np.testing.assert_allclose(boxes, found.boxes, atol=1e-3)


@pytest.mark.parametrize(
    "detectors, message",
    [
        (["--detector", "yolo:x"], "--detector yolo:x: detectron2:NAME, hf:NAME, .* is expected"),
        (["--detector", "torchvision:vit"], "--detector torchvision:vit: .* no such detector"),
        (["--detector-config", "no.yaml"], "no.yaml: neither a file nor a name"),
        (["--detector-config", "{config}"], "give --detector-weights"),
        (["--detector-config", "{photo}", "--detector-weights", "x"], "--detector-config .*a.png"),
        (["--detector-config", FASTER_RCNN], "--detector-weights names .* cannot be downloaded"),
        (["--detector-config", FASTER_RCNN, "--detector-weights", "x.pkl"], "weights.*x.pkl"),
        (["--detector-config", "{config}", "--detector-weights", "{photo}"], "weights .*a.png"),
    ],
)
def test_detectors_that_cannot_be_built(
    demo, photos, tmp_path, monkeypatch, detector, detectors, message
):
    def unreachable(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    places = {"config": detector[0], "photo": photos / "a.png"}
    arguments = ["--input", photos, "--output", tmp_path / "out", "--vocabulary", "cat,dog"]
    with pytest.raises(SystemExit, match=message):
        demo(*arguments, *(text.format(**places) for text in detectors))


@pytest.mark.parametrize("option, by_masks", [([], None), (["--proposals", "sam"], True)])
def test_whatever_is_found_is_named(demo, photos, tmp_path, monkeypatch, capsys, option, by_masks):
    # Masks of random weights pass no test of their quality.
    loose = partial(Search, points_per_side=2, pred_iou_thresh=-10.0, stability_thresh=0.0)
    monkeypatch.setattr("regionspot_d2.app.sources.Search", loose)
    monkeypatch.setattr("regionspot_d2.app.run.Search", Search)
    monkeypatch.setattr(SamLocalizer, "masks_are_fine", bool(by_masks))
    arguments = ["--input", photos, "--output", tmp_path / "out", *option, "--topk", 2]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 0
    messages = capsys.readouterr().err.splitlines()
    said = [line for line in messages if line.startswith("No regions are given")]
    assert len(said) == (not option)
    predictor = RegionSpotPredictor(tiny_model(), vocabulary=["cat", "dog"])
    expected = []
    for name in ("a.png", "b.jpg"):
        predictor.set_image(photos / name)
        found = predictor.everything(search=loose(by_masks=bool(by_masks)), topk=2, max_regions=8)
        expected += found.scores.tolist()
    scores = [a["score"] for a in results_of(tmp_path / "out")["annotations"]]
    assert len(scores) > 0 or by_masks
    assert scores == pytest.approx(expected)
    assert (tmp_path / "out" / "a.png.png").exists()


@pytest.mark.parametrize(
    "regions",
    [
        ["--boxes", "0,0,9,9", "--proposals", "sam"],
        ["--points", "3,3", "--detector-config", FASTER_RCNN],
        ["--boxes", "0,0,9,9", "--detector-weights", "x.pkl"],
        ["--boxes", "0,0,9,9", "--every", "0"],
        ["--boxes", "0,0,9,9", "--topk", "0"],
    ],
)
def test_options_that_do_not_go_together(demo, photos, tmp_path, capsys, regions):
    with pytest.raises(SystemExit):
        demo("--input", photos, "--output", tmp_path / "out", *regions)
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_image_without_regions_is_not_a_failure(demo, photos, tmp_path, capsys):
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"a.png": {"boxes": []}, "b.jpg": {"boxes": [[1, 2, 9, 9]]}}))
    arguments = ["--input", photos, "--output", tmp_path / "out", "--proposals", file]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 0
    assert "a.png: there is no region" in capsys.readouterr().err
    np.testing.assert_array_equal(
        pixels(tmp_path / "out" / "a.png.png")[..., :3], pixels(photos / "a.png")
    )
    results = results_of(tmp_path / "out")
    assert len(results["images"]) == 2 and [a["image_id"] for a in results["annotations"]] == [2]


def test_attention_has_a_panel_for_each_region(demo, photos, tmp_path):
    arguments = ["--input", photos / "a.png", "--output", tmp_path / "out", "--attention"]
    boxes = ["--boxes", "2,3,20,25", "--points", "40,20"]
    assert demo(*arguments, *boxes, "--vocabulary", "cat,dog", *HEAD_WITH_ATTENTION) == 0
    height, width = pixels(tmp_path / "out" / "a.png.attention.png").shape[:2]
    assert height > 40 and 3 * 60 < width < 4 * 60


def test_heat_is_where_the_head_looks():
    maps = np.zeros((1, 4, 4), dtype=np.float32)
    maps[0, 2, 0] = 1
    # The box of the first region is blue, the strongest heat red.
    annotation = {"region": 0, "bbox": [70, 2, 20, 10], "score": 1, "category_id": 1}
    picture = draw_attention(np.full((80, 120, 3), 128, np.uint8), maps, [annotation], {1: "cat"})
    blank = np.zeros((80, 120, 3), np.uint8)
    is_panel = (side_by_side([("", blank), ("", blank)]) == 0).all(2)
    assert picture.shape[:2] == is_panel.shape
    left = np.flatnonzero(is_panel.any(0))[120]
    top = np.flatnonzero(is_panel.any(1))[0]
    panel = picture[top : top + 80, left : left + 120].astype(int)
    y, x = np.unravel_index((panel[..., 0] - panel[..., 2]).argmax(), (80, 120))
    assert 40 <= y < 60 and 0 <= x < 30


def test_attention_needs_a_trained_head(demo, photos, video, tmp_path):
    arguments = ["--output", tmp_path / "out", "--boxes", "0,0,9,9", "--attention"]
    arguments += ["--vocabulary", "cat,dog"]
    pooled = ["--opts", "MODEL.REGION_HEAD.NAME", "PooledRegionHead"]
    with pytest.raises(SystemExit, match="--attention: PooledRegionHead"):
        demo(*arguments, "--input", photos, *pooled)
    with pytest.raises(SystemExit, match="--attention: .*clip.avi is a video"):
        demo(*arguments, "--input", video, *HEAD_WITH_ATTENTION)


def test_other_results_are_on_the_left(demo, photos, tmp_path):
    Image.open(photos / "b.jpg").save(photos / "b.bmp")
    (photos / "b.jpg").unlink()  # its picture would be jpeg, which changes pixels
    common = ["--input", photos, "--vocabulary"]
    assert demo(*common, "cat,dog", "--boxes", "2,3,20,25", "--output", tmp_path / "other") == 0
    assert demo(*common, "bird,bus", "--boxes", "9,9,29,39", "--output", tmp_path / "plain") == 0
    file = tmp_path / "other" / "results.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "elsewhere/a.png"
    content["images"].pop()  # b.bmp is not in it
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 1]
    file.write_text(json.dumps(content))

    both = [*common, "bird,bus", "--boxes", "9,9,29,39", "--output", tmp_path / "both"]
    assert demo(*both, "--compare", file) == 0
    for name, left in [("a.png", tmp_path / "other" / "a.png.png"), ("b.bmp", photos / "b.bmp")]:
        picture = pixels(tmp_path / "both" / f"{name}.png")
        left_half, right_half = np.split(picture, 2, axis=1)
        assert contains(left_half, pixels(left)[..., :3])
        assert contains(right_half, pixels(tmp_path / "plain" / f"{name}.png")[..., :3])


def contains(picture: np.ndarray, part: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(picture, part.shape)
    return bool((windows == part).all(axis=(-3, -2, -1)).any())


@pytest.mark.parametrize("content", ["[]", '{"images": []}', "no json"])
def test_other_results_of_another_form(demo, photos, tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    arguments = ["--input", photos, "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    with pytest.raises(SystemExit, match="--compare .*other.json"):
        demo(*arguments, "--compare", tmp_path / "other.json")


def ground_truth(**changes) -> dict:
    annotation = {"image_id": 1, "category_id": 7, "bbox": [2, 3, 20, 25]}
    return {
        "images": [{"id": 1, "file_name": "a.png"}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [annotation, {**annotation, **changes}],
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"score": "high"}, "has the score high; a number"),
        ({"category_id": 8}, "has the category_id 8; the id of a category"),
        ({"image_id": 2}, "has the image_id 2; the id of an image"),
        ({"bbox": [1, 2, 3]}, r"has the bbox \[1, 2, 3\]; x, y, width, height"),
        ({"bbox": None}, "has the bbox None"),
        ({"region": "left"}, "has the region left"),
        ({"segmentation": "all"}, "has the segmentation all; polygons or"),
        ({"segmentation": [[1, 2, 3]]}, "has the segmentation"),
        ({"segmentation": {"size": [40, 60], "counts": [7]}}, "has the segmentation"),
    ],
)
def test_other_results_name_what_cannot_be_drawn(demo, photos, tmp_path, changes, message):
    (tmp_path / "other.json").write_text(json.dumps(ground_truth(**changes)))
    arguments = ["--input", photos, "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    with pytest.raises(SystemExit, match=f"--compare .*other.json: annotation 1 .*{message}"):
        demo(*arguments, "--compare", tmp_path / "other.json")


@pytest.mark.parametrize(
    "segmentation",
    [
        [[5, 5, 40, 5, 40, 30, 5, 30]],
        # The columns from 5 on, of this image and of one of another size.
        {"size": [40, 60], "counts": [200, 2200]},
        {"size": [60, 40], "counts": [300, 2100]},
    ],
)
def test_ground_truth_is_drawn_without_scores(demo, photos, tmp_path, segmentation):
    file = tmp_path / "other.json"
    content = ground_truth(segmentation=segmentation, bbox=[5, 5, 35, 25])
    file.write_text(json.dumps(content))
    image = pixels(photos / "a.png")
    other = OtherResults(str(file))
    drawn = draw_regions(image, other.of("a.png"), other.names)
    # Inside the second box, away from its edge and from the first one's.
    inside = (slice(12, 26), slice(25, 37))
    assert (drawn[inside] != image[inside]).any(axis=2).mean() > 0.9
    arguments = ["--input", photos, "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    assert demo(*arguments, "--vocabulary", "cat", "--compare", file) == 0


def test_a_video_becomes_a_video(demo, video, tmp_path, capsys):
    arguments = ["--input", video, "--output", tmp_path / "out", "--boxes", "2,3,20,25"]
    assert demo(*arguments, "--vocabulary", "cat,dog", "--every", 2) == 0
    results = results_of(tmp_path / "out")
    assert [i["file_name"] for i in results["images"]] == [f"{video}#0", f"{video}#2"]
    assert [a["bbox"] for a in results["annotations"]] == [[2, 3, 18, 22]] * 2
    table = capsys.readouterr().out
    assert "clip.avi#0" in table and "clip.avi#2" in table
    written = cv2.VideoCapture(str(tmp_path / "out" / "clip.avi.mp4"))
    assert written.get(cv2.CAP_PROP_FPS) == 5
    (tmp_path / "frames").mkdir()
    for shade in (60, 180):
        Image.new("RGB", (48, 32), (shade,) * 3).save(tmp_path / "frames" / f"{shade:03}.png")
    arguments[1:4:2] = [tmp_path / "frames", tmp_path / "stills"]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 0
    for still in ("060.png.png", "180.png.png"):
        whole, frame = written.read()
        # The codec has color at half the resolution, so letters are compared without it.
        still = cv2.cvtColor(pixels(tmp_path / "stills" / still), cv2.COLOR_RGB2GRAY)
        difference = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) - still.astype(float)
        assert whole and np.abs(difference).mean() < 10
    assert not written.read()[0]
    assert [path.name for path in (tmp_path / "out").glob("*.mp4")] == ["clip.avi.mp4"]


def test_a_video_with_tracks(demo, video, tmp_path, capsys):
    pytest.importorskip("trackers")
    boxes = {f"clip.avi#{n}": {"boxes": [[2 + n, 3, 20 + n, 25]]} for n in range(3)}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    arguments = ["--input", video, "--output", tmp_path / "out", "--vocabulary", "cat,dog"]
    arguments += ["--proposals", tmp_path / "boxes.json", "--track", "--format", "csv"]
    assert demo(*arguments) == 0
    table, results = capsys.readouterr().out, results_of(tmp_path / "out")
    found = results["annotations"]
    assert [a["track_id"] for a in found] == [1, 1, 1] and len({a["score"] for a in found}) == 1
    written = cv2.VideoCapture(str(tmp_path / "out" / "clip.avi.mp4"))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert ",1," in (tmp_path / "out" / "results.csv").read_text().splitlines()[1]
    (tmp_path / "out" / "clip.avi.mp4").unlink()
    assert demo(*arguments, "--resume") == 0
    assert (capsys.readouterr().out, results_of(tmp_path / "out")) == (table, results)
    assert (tmp_path / "out" / "clip.avi.mp4").exists()
    with pytest.raises(SystemExit, match="--resume: .*another --track"):
        demo(*[a for a in arguments if a != "--track"], "--resume")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match="--track: there is no video"):
        demo(*arguments, "--input", tmp_path / "a.png")


def test_a_video_that_cannot_be_read(demo, photos, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    inputs = ["--input", broken, photos / "a.png"]
    arguments = [*inputs, "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 1
    assert "broken.mp4: " in capsys.readouterr().err
    assert len(results_of(tmp_path / "out")["images"]) == 1


def test_a_video_that_is_cut_off(demo, tmp_path, capsys):
    whole, cut = tmp_path / "whole.avi", tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
    # Noise, so that the frames are most of the file.
    for frame in np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8):
        writer.write(frame)
    writer.release()
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    arguments = ["--output", tmp_path / "out", "--boxes", "0,0,9,9", "--vocabulary", "cat,dog"]
    assert demo("--input", whole, *arguments, "--every", 5) == 0
    assert demo("--input", cut, *arguments, "--every", 5) == 1
    assert "of its 20 frames can be read" in capsys.readouterr().err
    # What could be read is there.
    assert 0 < len(results_of(tmp_path / "out")["images"]) < 4
    assert (tmp_path / "out" / "cut.avi.mp4").exists()


@pytest.mark.parametrize("fps, pictures", [(1 / 16, 3), (0.0004, 1), (29.97 / 7, 9), (200 / 3, 9)])
def test_a_video_of_any_rate_lasts_as_long_as_it_should(tmp_path, fps, pictures):
    with video_writer(tmp_path / "slow.mp4", fps) as write:
        for _ in range(pictures):
            write(np.zeros((32, 48, 3), dtype=np.uint8))
    written = cv2.VideoCapture(str(tmp_path / "slow.mp4"))
    seconds = written.get(cv2.CAP_PROP_FRAME_COUNT) / written.get(cv2.CAP_PROP_FPS)
    assert seconds == pytest.approx(pictures / fps, rel=2e-3)


def test_a_single_named_frame_lasts_as_long_as_the_video(demo, video, tmp_path):
    arguments = ["--input", video, "--output", tmp_path / "out", "--boxes", "2,3,20,25"]
    assert demo(*arguments, "--vocabulary", "cat,dog", "--every", 10**9) == 0
    written = cv2.VideoCapture(str(tmp_path / "out" / "clip.avi.mp4"))
    assert written.get(cv2.CAP_PROP_FPS) == pytest.approx(10 / 3, abs=1e-3)
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 1


def test_a_video_that_cannot_be_written(demo, photos, video, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "regionspot_d2.app.video.cv2.VideoWriter.open", lambda *arguments: False, raising=False
    )
    monkeypatch.setitem(sys.modules, "av", None)
    inputs = ["--input", video, photos / "a.png"]
    arguments = [*inputs, "--output", tmp_path / "out", "--boxes", "0,0,9,9"]
    assert demo(*arguments, "--vocabulary", "cat,dog") == 1
    assert "clip.avi: OpenCV cannot write the video" in capsys.readouterr().err
    assert (tmp_path / "out" / "a.png.png").exists()


@pytest.fixture
def images_encoded(monkeypatch):
    """The shapes of the images that were encoded; the third encoding stops the run."""
    encoded: list[tuple] = []
    set_image = RegionSpotPredictor.set_image

    def spy(self, image, **options):
        encoded.append(image.shape[:2])
        if len(encoded) == 3:
            raise KeyboardInterrupt
        set_image(self, image, **options)

    monkeypatch.setattr(RegionSpotPredictor, "set_image", spy)
    return encoded


def test_a_stopped_run_continues(demo, photos, video, tmp_path, images_encoded, capsys):
    def run(output, *options):
        common = ["--input", photos / "a.png", video, photos / "b.jpg", "--boxes", "2,3,20,25"]
        return demo(*common, "--vocabulary", "cat,dog", "--output", tmp_path / output, *options)

    assert run("out", "--resume") == 130  # there is nothing yet to go on with
    stopped = capsys.readouterr().err
    assert "Stopped after 1 of 3 images" in stopped and "--resume goes on" in stopped
    record = tmp_path / "out" / "results.jsonl"
    with record.open("a") as file:
        file.write('{"file_name": "torn')
    so_far = results_of(tmp_path / "out")["images"]
    assert [Path(image["file_name"]).name for image in so_far] == ["a.png", "clip.avi#0"]
    assert not list((tmp_path / "out").rglob("*.mp4"))

    assert run("out", "--resume") == 0
    # a.png and the first frame are not encoded again.
    assert images_encoded[3:] == [(32, 48), (32, 48), (50, 30)]
    resumed = capsys.readouterr().out
    assert run("anew") == 0 and len(images_encoded) == 11
    assert results_of(tmp_path / "out") == results_of(tmp_path / "anew")
    assert resumed.replace("/out", "/anew") == capsys.readouterr().out
    for name in ("a.png.png", "clip.avi.mp4", "b.jpg.jpg"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "anew" / name).read_bytes()

    assert run("out", "--resume") == 0 and len(images_encoded) == 11
    assert run("out") == 0 and len(images_encoded) == 16


def test_resuming_draws_what_was_deleted(demo, photos, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--input", photos, "--output", output, "--boxes", "2,3,20,25", "--attention"]
    arguments += ["--vocabulary", "cat,dog", "--resume", *HEAD_WITH_ATTENTION]
    assert demo(*arguments) == 0
    before, results = capsys.readouterr().out, results_of(output)
    pictures = {path: path.read_bytes() for path in output.glob("*.png")}
    (output / "a.png.png").unlink()
    (output / "b.jpg.attention.jpg").unlink()
    assert demo(*arguments) == 0
    assert {path: path.read_bytes() for path in output.glob("*.png")} == pictures
    assert (capsys.readouterr().out, results_of(output)) == (before, results)


@pytest.mark.parametrize(
    "damage, line",
    [
        (lambda lines: [lines[0], lines[1][:30] + b"\n", lines[2]], 2),
        (lambda lines: [lines[0][:30], *lines[1:]], 1),
        (lambda lines: [lines[0], b"{}\n", lines[2]], 2),
        (lambda lines: [lines[0], b"\xff\n", lines[2]], 2),
        # A killed run leaves these: a last line without its end, cut in a letter, or with zeros
        # for what was not yet on the disk.
        (lambda lines: [*lines[:2], lines[2].rstrip()], None),
        (lambda lines: [*lines[:2], lines[2][:30] + b"\n"], None),
        (lambda lines: [*lines[:2], bytes(30)], None),
        (lambda lines: [lines[0][:30]], None),
    ],
)
def test_resuming_from_a_damaged_journal(demo, photos, tmp_path, damage, line):
    record = tmp_path / "out" / "results.jsonl"
    arguments = ["--input", photos, "--output", record.parent, "--boxes", "2,3,20,25"]
    arguments += ["--vocabulary", "cat,dog", "--resume"]
    assert demo(*arguments) == 0
    before = record.read_bytes()
    record.write_bytes(b"".join(damage(before.splitlines(keepends=True))))
    if line is None:
        assert demo(*arguments) == 0 and record.read_bytes() == before
    else:
        with pytest.raises(SystemExit, match=f"--resume: .*results.jsonl, line {line} is not what"):
            demo(*arguments)


@pytest.mark.parametrize(
    "options",
    [
        ["--vocabulary", "cat,bird"],
        ["--topk", "2"],
        ["--boxes", "0,0,9,9"],
        ["--points", "3,3"],
        ["--confidence-threshold", "0.1"],
        ["--opts", "MODEL.REGION_HEAD.NAME", "PooledRegionHead"],
    ],
)
def test_a_run_does_not_continue_with_other_settings(demo, photos, tmp_path, options):
    common = ["--input", photos / "a.png", "--output", tmp_path / "out"]
    common += ["--boxes", "0,0,9,8", "--vocabulary", "cat,dog"]
    assert demo(*common) == 0
    before = results_of(tmp_path / "out")
    with pytest.raises(SystemExit, match=f"--resume: .*results.jsonl .*another .*{options[0]}"):
        demo(*common, "--resume", *options)
    assert results_of(tmp_path / "out") == before


def test_it_says_which_known_names_stand_in(demo, photos, tmp_path, capsys, monkeypatch):
    arguments = ["--input", photos / "a.png", "--boxes", "0,0,9,9", "--output", tmp_path / "out"]
    assert demo(*arguments, "--vocabulary", "cat,two dogs") == 0
    assert "stand in" not in capsys.readouterr().err
    # As a text side that knows only some names.
    monkeypatch.setattr(ClipModel, "known_names", lambda self, texts: [t[-3:] for t in texts])
    assert demo(*arguments, "--vocabulary", "cat,red dog") == 0
    lines = capsys.readouterr().err.splitlines()
    assert "--vocabulary: known names stand in: 'dog' for 'red dog'." in lines


def test_a_contact_sheet_keeps_what_is_in_the_boxes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "demo")
    sheet = load_script("demo/contact_sheet.py")
    colors = {"chelsea.png": (200, 0, 0), "coffee.png": (0, 200, 0), "rocket.jpg": (0, 0, 200)}
    known = {}
    for place, (name, color) in enumerate(colors.items()):
        photo = Image.new("RGB", (640, 427 + 300 * place))
        photo.paste(color, (320, 100, 480, 400))
        photo.save(tmp_path / name, quality=100)
        known[name] = {"boxes": [[320, 100, 480, 400]]}
    (tmp_path / "boxes.json").write_text(json.dumps(known))
    monkeypatch.setattr(sheet, "BOXES", tmp_path / "boxes.json")
    monkeypatch.setattr(sheet, "COLUMNS", 2)
    picture, boxes = sheet.contact_sheet([tmp_path / name for name in colors])
    assert picture.size == (2 * sheet.CELL[0], 2 * sheet.CELL[1])
    for box, color in zip(boxes, colors.values(), strict=True):
        x0, y0, x1, y1 = map(round, box)
        inside = np.asarray(picture.crop((x0 + 3, y0 + 3, x1 - 3, y1 - 3))).astype(int)
        assert np.abs(inside - color).max() < 10
        for outside in ((x0 - 3, y0), (x1 + 3, y0), (x0, y0 - 3), (x0, y1 + 3)):
            assert max(picture.getpixel(outside)) < 30
