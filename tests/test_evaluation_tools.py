"""The pictures and plots of results, and the benchmark of the LVIS evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from regionspot_d2.evaluation import COCOAPEvaluator, LVISAPEvaluator

from . import synthetic_lvis as data
from .tools import load_tool

benchmark_lvis_evaluation = load_tool("benchmarks/evaluation")
visualize_results = load_tool("visualize_results")

LVIS, COCO = "synthetic_tools_lvis", "synthetic_tools_coco"


@pytest.fixture
def content(tmp_path: Path) -> Iterator[dict[str, Any]]:
    made = data.annotations(np.random.default_rng(0), num_images=3)
    data.register_lvis(LVIS, made, tmp_path)
    data.register_coco(COCO, made, tmp_path)
    # load_lvis looks for val2017/, load_coco_json only for the file name.
    (tmp_path / "val2017").mkdir()
    for image in made["images"]:
        blank = Image.new("RGB", (data.SIDE, data.SIDE), "gray")
        blank.save(tmp_path / image["file_name"])
        blank.save(tmp_path / "val2017" / image["file_name"])
    yield made
    data.forget(LVIS, COCO)


def results_of(evaluator: Any, content: dict[str, Any], masks: bool, seed: int) -> None:
    outputs = data.random_outputs(content, np.random.default_rng(seed), masks=masks)
    data.run(evaluator, content, outputs)


def test_two_runs_on_lvis(content: dict[str, Any], tmp_path: Path) -> None:
    for seed, run in enumerate(("ours", "theirs")):
        evaluator = LVISAPEvaluator(LVIS, output_dir=str(tmp_path / run))
        results_of(evaluator, content, masks=False, seed=seed)
    files = [str(tmp_path / run / "lvis_instances_results.json") for run in ("ours", "theirs")]
    assert visualize_results.titles(files) == ["ours", "theirs"]
    output = tmp_path / "pictures"
    arguments = ["--dataset", LVIS, "--input", files[0], "--compare", files[1]]
    visualize_results.main([*arguments, "--output", str(output), "--images", "1"])
    (picture,) = output.glob("*.jpg")
    width, height = Image.open(picture).size
    # Ground truth, ours, theirs.
    assert width == 3 * data.SIDE and height > data.SIDE
    plots = {"precision_recall.png", "tide_errors.png", "top_confusions.png"}
    for folder in ("input", "compare"):
        assert {path.name for path in (output / folder).iterdir()} == plots
    assert (output / "ap_by_group.png").stat().st_size > 1000


def test_chosen_images_of_one_run_with_masks(content: dict[str, Any], tmp_path: Path) -> None:
    evaluator = COCOAPEvaluator(COCO, output_dir=str(tmp_path))
    results_of(evaluator, content, masks=True, seed=0)
    output = tmp_path / "pictures"
    arguments = ["--dataset", COCO, "--input", str(tmp_path / "coco_instances_results.json")]
    arguments += ["--output", str(output), "--task", "segm", "--threshold", "0"]
    visualize_results.main([*arguments, "--image-id", "2"])
    assert [path.name for path in output.glob("*.jpg")] == ["2.jpg"]
    picture = np.array(Image.open(output / "2.jpg"))
    assert picture.shape[1] == 2 * data.SIDE
    # Something was drawn on the gray image.
    assert len(np.unique(picture[-data.SIDE :, data.SIDE :])) > 50
    assert not (output / "compare").exists()


@pytest.mark.parametrize("text_ids", [False, True])
def test_datasets_of_a_function_and_text_ids(
    content: dict[str, Any], tmp_path: Path, text_ids: bool
) -> None:
    name = "synthetic_tools_own"
    if text_ids:
        for image in content["images"]:
            image["id"] = f"image {image['id']}"
        for annotation in content["annotations"]:
            annotation["image_id"] = f"image {annotation['image_id']}"
        data.register_coco(name, content, tmp_path)
    else:
        records = DatasetCatalog.get(COCO)
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).thing_classes = MetadataCatalog.get(COCO).thing_classes
    try:
        evaluator = COCOAPEvaluator(name, output_dir=str(tmp_path))
        results_of(evaluator, content, masks=False, seed=0)
        arguments = ["--dataset", name, "--input", str(tmp_path / "coco_instances_results.json")]
        arguments += ["--output", str(tmp_path / "pictures"), "--images", "2"]
        visualize_results.main(arguments)
        assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 2
        assert (tmp_path / "pictures" / "input" / "precision_recall.png").is_file()
        assert (MetadataCatalog.get(name).get("json_file") is None) != text_ids
        with pytest.raises(SystemExit, match="^visualize_results.py: .*INPUT.MAX_PIXELS"):
            visualize_results.main([*arguments, "INPUT.MAX_PIXELS", "100"])
        with pytest.raises(SystemExit, match="entry 0 has no 'segmentation'"):
            visualize_results.main([*arguments, "--task", "segm"])
    finally:
        data.forget(name)


def test_best_name_of_each_region() -> None:
    def result(box: list[float], category_id: int, score: float) -> dict[str, Any]:
        return {"image_id": 1, "bbox": box, "category_id": category_id, "score": score}

    first, second = [0.0, 0.0, 5.0, 5.0], [1.0, 0.0, 5.0, 5.0]
    results = [
        result(first, 1, 0.2),
        result(first, 2, 0.6),
        result(second, 3, 0.1),
        result(first, 3, 0.5),
    ]
    assert visualize_results.best_names(results, 0.05) == [results[1], results[2]]
    assert visualize_results.best_names(results, 0.3) == [results[1]]


def test_confusions_leave_out_the_background(content: dict[str, Any]) -> None:
    import hotcoco

    truth = hotcoco.COCO(content)
    # Every object is found and called by the next name, then, less surely, by its own.
    results = [
        {**annotation, "category_id": annotation["category_id"] % 9 + 1, "score": 0.9}
        for annotation in content["annotations"]
    ]
    results += [{**annotation, "score": 0.8} for annotation in content["annotations"]]
    for result in results:
        for key in ("area", "iscrowd", "segmentation", "id"):
            result.pop(key)
    matrix = visualize_results.confusions(truth, results, "bbox")["matrix"]
    count = np.bincount([a["category_id"] - 1 for a in content["annotations"]], minlength=9)
    expected = np.zeros((10, 10))
    expected[np.arange(9), (np.arange(9) + 1) % 9] = count
    assert np.array_equal(matrix, expected)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="results.json is not a results json"):
        visualize_results.read_results(str(path))
    path.write_text("[]")
    with pytest.raises(ValueError, match="results.json has no results"):
        visualize_results.read_results(str(path))
    path.write_text("[")
    with pytest.raises(ValueError, match="results.json is not a json file"):
        visualize_results.read_results(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mien"], "--dataset: there is no dataset 'mien'"),
        (["--dataset", COCO], "no_results.json"),
        (["--dataset", COCO, "DATASETS.COCO_FORMT", "[]"], "no config key DATASETS.COCO_FORMT"),
        (
            ["--dataset", "m", "DATASETS.COCO_FORMAT", "[['m', 'no.json', '.']]"],
            "no annotation file 'no.json'",
        ),
    ],
)
def test_mistakes_end_in_one_line(
    content: dict[str, Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    paths = ["--input", str(tmp_path / "no_results.json"), "--output", str(tmp_path / "pictures")]
    with pytest.raises(SystemExit, match=f"visualize_results.py: .*{message}"):
        visualize_results.main([*paths, *arguments])
    assert not (tmp_path / "pictures").exists()


def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lvis")
    arguments = ["lvis", "--images", "3", "--detections-per-image", "20"]
    assert benchmark_lvis_evaluation.main(arguments) == 0
    assert "3 images, 60 detections" in capsys.readouterr().out
