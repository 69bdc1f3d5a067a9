"""COCO format: AP equals pycocotools'; a perfect model has AP 100, on ODinW's files too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from regionspot_d2.data.datasets import register_coco_format
from regionspot_d2.evaluation import COCOAPEvaluator

from . import synthetic_lvis as data

NAME = "synthetic_coco_val"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture
def content(tmp_path: Path) -> Iterator[dict[str, Any]]:
    made = data.annotations(np.random.default_rng(0))
    made["annotations"][3]["iscrowd"] = 1
    data.register_coco(NAME, made, tmp_path)
    yield made
    data.forget(NAME)


def by_pycocotools(json_file: str, results_file: Path, task: str) -> dict[str, float]:
    truth = COCO(json_file)
    results = json.loads(results_file.read_text())
    for result in results:
        # Areas of masks are those of the masks.
        result.pop("bbox" if task == "segm" else "segmentation", None)
    evaluation = COCOeval(truth, truth.loadRes(results), task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(METRICS, 100 * evaluation.stats[:6]))


@pytest.mark.parametrize("backend", ["hotcoco", "reference"])
def test_ap_is_that_of_pycocotools(content: dict[str, Any], tmp_path: Path, backend: str) -> None:
    outputs = data.random_outputs(content, np.random.default_rng(1), masks=True)
    evaluator = COCOAPEvaluator(NAME, output_dir=str(tmp_path), backend=backend)
    found = data.run(evaluator, content, outputs)
    for task in ("bbox", "segm"):
        expected = by_pycocotools(
            MetadataCatalog.get(NAME).json_file, tmp_path / "coco_instances_results.json", task
        )
        assert 5 < expected["AP"] < 80
        assert [found[task][metric] for metric in METRICS] == pytest.approx(
            list(expected.values()), abs=1e-6
        )
        classes = [found[task][f"AP-{name}"] for name, _, _ in data.CATEGORIES]
        assert np.nanmean(classes) == pytest.approx(expected["AP"], abs=1e-6)


@pytest.mark.parametrize("masks", [False, True])
def test_oracle(content: dict[str, Any], masks: bool) -> None:
    del content["annotations"][3]
    evaluator = COCOAPEvaluator(NAME)
    evaluator.reset()
    for x, found in data.oracle_outputs(DatasetCatalog.get(NAME), 9, masks=masks):
        evaluator.process([x], [{"instances": found}])
    found = evaluator.evaluate()
    assert found.keys() == ({"bbox", "segm"} if masks else {"bbox"})
    assert found["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("backend", ["hotcoco", "reference"])
def test_oracle_on_the_layout_of_odinw(
    content: dict[str, Any], tmp_path: Path, empty_cache: Path, backend: str
) -> None:
    """A background class 0 would be one class too many, annotation id 0 a missed object."""
    name = f"odinw_like_{backend}"
    content["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    for number, annotation in enumerate(content["annotations"]):
        annotation.update(id=number, segmentation=[], iscrowd=0)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    register_coco_format([[name, str(path), str(tmp_path)]])
    records = DatasetCatalog.get(name)
    evaluator = COCOAPEvaluator(name, backend=backend)
    evaluator.reset()
    classes = len(MetadataCatalog.get(name).thing_classes)
    for x, found in data.oracle_outputs(records, classes, masks=True):
        evaluator.process([x], [{"instances": found}])
    found = evaluator.evaluate()
    # Only boxes: these annotations have no masks.
    assert found.keys() == {"bbox"}
    assert found["bbox"]["AP"] == pytest.approx(100)
    data.forget(name)


def test_without_annotations_results_are_only_written(
    content: dict[str, Any], tmp_path: Path
) -> None:
    content["annotations"].clear()
    Path(MetadataCatalog.get(NAME).json_file).write_text(json.dumps(content))
    outputs = [data.instances([[1, 2, 3, 4]], [0], [0.5]) for _ in content["images"]]
    evaluator = COCOAPEvaluator(NAME, output_dir=str(tmp_path))
    assert data.run(evaluator, content, outputs) == {}
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(results) == 20 and results[0]["bbox"] == [1, 2, 2, 2]


def test_no_results(content: dict[str, Any]) -> None:
    nothing = [data.instances([], [], []) for _ in content["images"]]
    assert np.isnan(data.run(COCOAPEvaluator(NAME), content, nothing)["bbox"]["AP"])
