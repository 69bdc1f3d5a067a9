"""Names by example on the command line: folders, COCO json, files of Exemplars, and mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from regionspot_cli import parse_name
from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.app import main as app
from regionspot_d2.data.images import ImageLike, read_image
from regionspot_d2.detection import build_detector
from regionspot_d2.exemplars import Exemplars

from .test_exemplars import SYMBOLS, photo
from .tiny import tiny_model
from .tiny_detectors import tiny_detector

BOXES = {"form A": [4, 4, 40, 40], "form B": [50, 10, 88, 58]}


@pytest.fixture
def model(vocabularies: None) -> Any:
    return tiny_model()


@pytest.fixture
def demo(model: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the demo on tiny towers; returns its exit status."""
    monkeypatch.setattr(
        app,
        "RegionSpotPredictor",
        lambda cfg, vocabulary: RegionSpotPredictor(model, vocabulary=vocabulary),
    )
    return lambda *arguments: app.main([*map(str, arguments), "--no-pictures"])


def noise(path: Path, seed: int, shade: int = 0) -> Path:
    """A photo of 90 x 60 pixels of noise; the shade changes it a little."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 200, (60, 90, 3)) * generator.random(3) + shade
    Image.fromarray(pixels.astype(np.uint8)).save(path, "PNG")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two names with two images each, and what is left out."""
    for place, name in enumerate(BOXES):
        for i in range(2):
            noise(tmp_path / "shown" / name / f"{i}.png", place, shade=i)
    noise(tmp_path / "shown" / ".thumbnails" / "x.png", 9)
    noise(tmp_path / "shown" / "form A" / "._0.png", 9)
    (tmp_path / "shown" / "form B" / "notes.txt").touch()
    return tmp_path / "shown"


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A COCO json of an image beside it and of one in images/."""
    noise(tmp_path / "coco" / "a.png", 0)
    noise(tmp_path / "coco" / "images" / "b.png", 0, shade=1)
    (x0, y0, x1, y1), (u0, v0, u1, v1) = BOXES.values()
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": i, "name": name} for i, name in enumerate([*BOXES, "unseen"], 3)],
        "annotations": [
            {"image_id": 1, "category_id": 4, "bbox": [u0, v0, u1 - u0, v1 - v0]},
            {"image_id": 1, "category_id": 3, "bbox": [x0, y0, x1 - x0, y1 - y0]},
            {"image_id": 2, "category_id": 3, "bbox": [x0, y0, x1 - x0, y1 - y0]},
            {"image_id": 2, "category_id": 5, "bbox": [0, 0, 60, 60], "iscrowd": 1},
        ],
    }
    file = tmp_path / "coco" / "shown.json"
    file.write_text(json.dumps(content))
    return file, content


def results_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def names_of(output: Path) -> list[str]:
    """The best name of each region."""
    results = results_of(output)
    names = {category["id"]: category["name"] for category in results["categories"]}
    return [names[annotation["category_id"]] for annotation in results["annotations"]]


def box(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def test_a_folder_of_images_for_each_name(demo, folder, tmp_path, capsys):
    for name, image in [("form A", "0.png"), ("form B", "1.png")]:
        given = ["--input", folder / name / image, "--boxes", "0,0,90,60"]
        assert demo(*given, "--output", tmp_path / name, "--examples", folder) == 0
        assert names_of(tmp_path / name) == [name]
        # Without --vocabulary there are no names beside those of the examples.
        assert [c["name"] for c in results_of(tmp_path / name)["categories"]] == list(BOXES)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 2 and "(1 .txt)" in lines[0] and lines[0].startswith("--examples ")


def test_boxes_of_a_coco_json(demo, dataset, tmp_path, capsys):
    file, _ = dataset
    for name, numbers in BOXES.items():  # one by one, as regions of one call see each other
        given = ["--input", file.parent / "a.png", "--boxes", box(numbers)]
        assert demo(*given, "--output", tmp_path / name, "--examples", file) == 0
        assert names_of(tmp_path / name) == [name]
    told = capsys.readouterr().err
    assert "1 of 3 categories have no box and are left out, such as 'unseen'" in told


def test_a_file_of_exemplars_is_that_of_its_regions(demo, model, dataset, tmp_path, monkeypatch):
    file, _ = dataset
    predictor = RegionSpotPredictor(model)
    examples = Exemplars(predictor)
    images: list[ImageLike] = [file.parent / "a.png", file.parent / "images" / "b.png"]
    for image in images:
        examples.add("form A", image, boxes=BOXES["form A"])
    examples.add("form B", images[0], boxes=BOXES["form B"])
    examples.save(tmp_path / "shown.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["--input", images[0], "--boxes", *map(box, BOXES.values()), "--topk", 2]
    for output, source in [("saved", "~/shown.safetensors"), ("json", file)]:
        assert demo(*given, "--output", tmp_path / output, "--examples", source) == 0
    saved, other = (results_of(tmp_path / name) for name in ("saved", "json"))
    assert saved["categories"] == other["categories"]
    for one, two in zip(saved["annotations"], other["annotations"], strict=True):
        assert one["category_id"] == two["category_id"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-5)


def test_names_of_text_and_of_examples_are_one_vocabulary(demo, folder, tmp_path, capsys):
    given = ["--input", folder / "form A" / "0.png", "--boxes", "0,0,90,60", "--topk", 9]
    given += ["--examples", folder, "--output", tmp_path / "out"]
    assert demo(*given, "--vocabulary", "cat") == 0
    assert [c["name"] for c in results_of(tmp_path / "out")["categories"]] == ["cat", *BOXES]
    assert names_of(tmp_path / "out")[0] == "form A"
    assert "single name" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told", "names"),
    [
        ("cat,Form_a", "'form A' is in --vocabulary and keeps its text; its", ["form B"]),
        ("form-a,form b", "'form A', 'form B' are in --vocabulary and keep their text; their", []),
    ],
)
def test_a_name_that_has_a_text_keeps_it(demo, folder, tmp_path, capsys, words, told, names):
    given = ["--input", folder / "form A" / "0.png", "--boxes", "0,0,90,60", "--topk", 9]
    assert demo(*given, "--vocabulary", words, "--output", tmp_path / "text") == 0
    assert "keep" not in capsys.readouterr().err
    given += ["--vocabulary", words, "--output", tmp_path / "both", "--examples", folder]
    assert demo(*given) == 0
    assert f"--examples: {told} examples are left out." in capsys.readouterr().err.splitlines()
    found = [c["name"] for c in results_of(tmp_path / "both")["categories"]]
    assert found == [*words.split(","), *names]
    if not names:
        text, both = (results_of(tmp_path / name)["annotations"] for name in ("text", "both"))
        assert text == both


def test_a_single_name_is_told(demo, folder, tmp_path, capsys):
    shutil.rmtree(folder / "form B")
    given = ["--input", folder / "form A", "--boxes", "0,0,90,60", "--output", tmp_path / "out"]
    assert demo(*given, "--examples", folder) == 0
    told = "--examples has a single name, 'form A': the score of every region is 1.0."
    assert told in capsys.readouterr().err.splitlines()


def test_an_empty_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_name(["--input", "a.jpg", "--examples", ""])
    assert "--examples is empty; a folder or a file is expected" in capsys.readouterr().err


def test_what_the_vocabulary_is_by_default():
    given = ["--input", "a.jpg"]
    assert parse_name(given).vocabulary == "lvis"
    assert parse_name([*given, "--examples", "x"]).vocabulary is None
    assert parse_name([*given, "--examples", "x", "--vocabulary", "coco"]).vocabulary == "coco"


def missing(folder: Path) -> str:
    return str(folder / "nowhere")


def with_a_loose_image(folder: Path) -> str:
    noise(folder / "loose.png", 5)
    return str(folder)


def with_an_empty_folder(folder: Path) -> str:
    (folder / "form C").mkdir()
    return str(folder)


def without_folders(folder: Path) -> str:
    for name in BOXES:
        shutil.rmtree(folder / name)
    return str(folder)


def with_a_name_twice(folder: Path) -> str:
    noise(folder / "Form_A" / "0.png", 5)
    return str(folder)


def with_a_damaged_image(folder: Path) -> str:
    (folder / "form B" / "1.png").write_bytes(b"\x89PNG")
    return str(folder)


def with_no_name(folder: Path) -> str:
    noise(folder / "_" / "0.png", 5)
    return str(folder)


def of_another_kind(folder: Path) -> str:
    return str(folder / "form B" / "notes.txt")


def damaged_vectors(folder: Path) -> str:
    (folder / "x.safetensors").write_bytes(b"damaged")
    return str(folder / "x.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "there is no such file or folder; a folder with a folder of images for each"),
        (with_a_loose_image, "the image 'loose.png' is in no folder of a name; a folder with"),
        (with_an_empty_folder, "the folder 'form C' has no image; at least one is expected."),
        (without_folders, "there are no folders in it; a folder with a folder of images"),
        (with_a_name_twice, "'Form_A' and 'form A' are one name; rename or join them."),
        (with_a_damaged_image, "1.png' "),
        (with_no_name, "is '_': give non-empty text."),
        (of_another_kind, "it is no folder, json or .safetensors file; a folder with"),
        (damaged_vectors, "is no file of examples, or is damaged"),
    ],
)
def test_what_is_wrong_with_a_folder_or_a_file_is_one_line(demo, folder, tmp_path, make, message):
    image, source = noise(tmp_path / "input.png", 7), make(folder)
    given = ["--input", image, "--boxes", "0,0,9,9", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        demo(*given, "--examples", source)
    line = str(stop.value.code)
    assert line.startswith(f"error: --examples {source}: ") and message in line
    assert "\n" not in line and not list((tmp_path / "out").glob("results*"))


ONE = {"image_id": 1, "category_id": 3, "bbox": [4, 4, 30, 30]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": 5}, "it has no lists images, annotations and categories; a folder"),
        ({"categories": [{"id": 3}]}, "category 0 (counted from 0) has no id or no name."),
        ({"categories": [{"id": 3, "name": " "}]}, "category 0 (counted from 0) has no id or no"),
        (
            {
                "categories": [{"id": 3, "name": "cup"}, {"id": 4, "name": "cup"}],
                "annotations": [ONE, {**ONE, "category_id": 4}],
            },
            "'cup' and 'cup' are one name",
        ),
        ({"images": [{"id": 1}]}, "image 0 (counted from 0) has no id or no file_name."),
        ({"annotations": []}, "it has no annotation that is no crowd"),
        ({"annotations": [ONE, {**ONE, "image_id": 9}]}, "annotation 1 (counted from 0) has no im"),
        ({"annotations": [{**ONE, "category_id": 9}]}, "annotation 0 (counted from 0) has the cat"),
        ({"annotations": [{**ONE, "category_id": [3]}]}, "has the category_id [3]; that of one of"),
        ({"annotations": [{**ONE, "bbox": [4, 4]}]}, "annotation 0 (counted from 0) has the box"),
        ({"annotations": [{**ONE, "bbox": [4, 4, 0, 9]}]}, "a.png, 'form A': Box 0 is (4, 4, 4,"),
        ({"annotations": [{**ONE, "bbox": [400, 4, 9, 9]}]}, "it lies outside the image of 90 x"),
        ({"images": [{"id": 1, "file_name": "gone.png"}]}, "the image 'gone.png' is neither"),
    ],
)
def test_what_is_wrong_with_a_json_is_one_line(demo, dataset, tmp_path, change, message):
    file, content = dataset
    content["annotations"] = [ONE]
    file.write_text(json.dumps({**content, **change}))
    given = ["--input", file.parent / "a.png", "--boxes", "0,0,9,9", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        demo(*given, "--examples", file)
    line = str(stop.value.code)
    assert line.startswith(f"error: --examples {file}: ") and message in line and "\n" not in line


def test_a_vocabulary_of_more_than_names_is_refused(demo, folder, tmp_path):
    given = ["--input", folder / "form A", "--boxes", "0,0,9,9", "--output", tmp_path / "out"]
    (tmp_path / "words.yaml").write_text("pet: [cat, dog]\nbird:\n")
    (tmp_path / "names.yaml").write_text("[cat, dog]\n")
    given += ["--examples", folder, "--vocabulary"]
    with pytest.raises(SystemExit, match="^error: --examples: .* a plain list of names is expec"):
        demo(*given, tmp_path / "words.yaml")
    assert demo(*given, tmp_path / "names.yaml") == 0
    found = [c["name"] for c in results_of(tmp_path / "out")["categories"]]
    assert found == ["cat", "dog", *BOXES]


def test_examples_of_another_model_are_refused(demo, model, folder, tmp_path):
    examples = Exemplars(RegionSpotPredictor(model))
    examples.add("form A", folder / "form A" / "0.png", boxes=[0, 0, 90, 60])
    examples.model = "another"
    examples.save(tmp_path / "shown.safetensors")
    given = ["--input", folder / "form A", "--boxes", "0,0,9,9", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match="^error: --examples .*was made with another model"):
        demo(*given, "--examples", tmp_path / "shown.safetensors")


def test_a_run_continues_only_with_the_same_examples(demo, folder, tmp_path):
    image = noise(tmp_path / "input.png", 7)
    given = ["--input", image, "--boxes", "0,0,60,60", "--output", tmp_path / "out", "--resume"]
    assert demo(*given, "--examples", folder) == 0
    before = results_of(tmp_path / "out")
    # Elsewhere they are the same.
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert demo(*given, "--examples", moved) == 0
    noise(moved / "form B" / "1.png", 8)
    for examples in (["--examples", moved], ["--vocabulary", "form A,form B"]):
        with pytest.raises(SystemExit, match="--resume: .*results.jsonl .*another .*--examples"):
            demo(*given, *examples)
    (moved / "form B" / "1.png").unlink()
    with pytest.raises(SystemExit, match="another --examples"):
        demo(*given, "--examples", moved)
    assert results_of(tmp_path / "out") == before


def test_outputs_never_replace_an_example(demo, dataset, folder, tmp_path):
    file, content = dataset
    # The picture of x would be called x.png, which is an example.
    example = noise(folder / "form A" / "x.png", 3)
    image = noise(folder / "form A" / "x", 7)
    before = example.read_bytes()
    given = ["--input", image, "--boxes", "0,0,60,60", "--output", example.parent]
    assert app.main([*map(str, given), "--examples", str(folder)]) == 0
    assert example.read_bytes() == before and (example.parent / "x-2.png").is_file()

    output = tmp_path / "coco"
    file.rename(output / "results.json")
    given = ["--input", output / "a.png", "--boxes", "0,0,9,9", "--output", output]
    with pytest.raises(SystemExit, match="its results.json is an input of this command"):
        demo(*given, "--examples", output / "results.json")
    assert json.loads((output / "results.json").read_text()) == content


def test_a_zero_shot_detector_looks_for_the_names_that_are_shown(demo, folder, tmp_path):
    pytest.importorskip("transformers")
    tiny_detector("grounding-dino", tmp_path)
    source, image = f"hf:{tmp_path}", folder / "form A" / "0.png"
    given = ["--input", image, "--output", tmp_path / "out", "--confidence-threshold", 0]
    assert demo(*given, "--detector", source, "--vocabulary", "cat", "--examples", folder) == 0
    found = build_detector(source, class_names=["cat", *BOXES])(read_image(image))
    assert len(names_of(tmp_path / "out")) == len(found.scores) > 0


def test_tracks_are_named_by_examples(demo, folder, tmp_path):
    pytest.importorskip("trackers")
    pixels = read_image(folder / "form B" / "0.png")
    writer = cv2.VideoWriter(
        str(tmp_path / "x.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, pixels.shape[1::-1]
    )
    for _ in range(3):
        writer.write(pixels[:, :, ::-1])
    writer.release()
    boxes = {f"x.avi#{i}": {"boxes": [[0, 0, 90, 60]], "scores": [0.9]} for i in range(3)}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    given = ["--input", tmp_path / "x.avi", "--proposals", tmp_path / "boxes.json", "--track"]
    given += ["--confidence-threshold", 0, "--output", tmp_path / "out", "--examples", folder]
    assert demo(*given) == 0
    assert len(set(names_of(tmp_path / "out"))) == 1 and len(names_of(tmp_path / "out")) == 3


def test_symbols_are_named_among_words_by_images_of_them(mini_predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(
        app,
        "RegionSpotPredictor",
        lambda cfg, vocabulary: RegionSpotPredictor(mini_predictor.model, vocabulary=vocabulary),
    )
    for seed in range(4):
        image, boxes = photo(seed)
        if seed < 2:
            for name, (x0, y0, x1, y1) in zip(SYMBOLS, boxes):
                path = tmp_path / "shown" / name / f"{seed}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.crop((x0, y0, x1 + 1, y1 + 1)).save(path)
            continue
        image.save(tmp_path / "x.png")
        given = ["--input", tmp_path / "x.png", "--output", tmp_path / str(seed), "--no-pictures"]
        given += ["--vocabulary", "coco", "--examples", tmp_path / "shown", "--boxes"]
        assert app.main([*map(str, given), *map(box, boxes)]) == 0
    found = names_of(tmp_path / "2") + names_of(tmp_path / "3")
    assert sum(one == two for one, two in zip(found, SYMBOLS * 2)) >= 5  # of 6
