"""LVIS: AP equals that of the package lvis, Fixed AP equals its definition."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

from regionspot_d2.data.datasets.vocabularies import class_groups, find_training_names, spellings
from regionspot_d2.evaluation import LVISAPEvaluator, lvis
from regionspot_d2.evaluation.coco import lvis_library

from . import synthetic_lvis as data

NAME = "synthetic_lvis_val"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")


@pytest.fixture
def content(tmp_path: Path) -> Iterator[dict[str, Any]]:
    made = data.annotations(np.random.default_rng(0))
    data.register_lvis(NAME, made, tmp_path)
    yield made
    data.forget(NAME)


def by_the_library(json_file: str, results: list[dict[str, Any]], task: str) -> dict[str, float]:
    """AP by the package lvis itself, in percent."""
    reference = pytest.importorskip("lvis")
    if "float" not in vars(np):
        np.float = float
    unwanted = "bbox" if task == "segm" else "segmentation"
    results = [{k: v for k, v in result.items() if k != unwanted} for result in results]
    truth = reference.LVIS(json_file)
    evaluation = reference.LVISEval(truth, reference.LVISResults(truth, results), task)
    evaluation.run()
    return {metric: 100 * evaluation.get_results()[metric] for metric in METRICS}


@pytest.mark.parametrize("limit", [300, 20])
def test_standard_ap_is_that_of_the_library(
    content: dict[str, Any], tmp_path: Path, limit: int
) -> None:
    outputs = data.random_outputs(content, np.random.default_rng(1), masks=True)
    evaluator = LVISAPEvaluator(NAME, output_dir=str(tmp_path), max_dets_per_image=limit)
    found = data.run(evaluator, content, outputs)
    results = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    per_image = np.bincount([result["image_id"] for result in results])
    assert per_image.max() == min(limit, 48)
    for task in ("bbox", "segm"):
        expected = by_the_library(MetadataCatalog.get(NAME).json_file, results, task)
        assert 5 < expected["AP"] < 80
        for metric in METRICS:
            if expected[metric] < 0:
                assert np.isnan(found[task][metric])
            else:
                assert found[task][metric] == pytest.approx(expected[metric], abs=1e-6)


def iou(a: list[float], b: list[float]) -> float:
    """IoU of two XYWH boxes."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def match(
    results: list[dict[str, Any]],
    objects: list[dict[str, Any]],
    threshold: float,
    exhaustive: bool,
) -> list[tuple[float, bool]]:
    """Score and success of each result that counts in an image and class, best first."""
    free, outcomes = list(objects), []
    for result in results:
        overlaps = [iou(result["bbox"], a["bbox"]) for a in free]
        if overlaps and max(overlaps) >= threshold:
            free.pop(int(np.argmax(overlaps)))
            outcomes.append((result["score"], True))
        elif exhaustive:
            outcomes.append((result["score"], False))
    return outcomes


def slow_fixed_ap(
    content: dict[str, Any], results: list[dict[str, Any]], per_class: int
) -> dict[int, float]:
    """Fixed box AP of each category that has objects, in percent, by its definition."""
    ap = {}
    for category_id in (category["id"] for category in content["categories"]):
        truth = [a for a in content["annotations"] if a["category_id"] == category_id]
        if not truth:
            continue
        best = [result for result in results if result["category_id"] == category_id]
        best = sorted(best, key=lambda result: -result["score"])[:per_class]
        precisions = []
        for threshold in np.linspace(0.5, 0.95, 10):
            outcomes = []
            for image in content["images"]:
                objects = [a for a in truth if a["image_id"] == image["id"]]
                if objects or category_id in image["neg_category_ids"]:
                    exhaustive = category_id not in image["not_exhaustive_category_ids"]
                    found = [result for result in best if result["image_id"] == image["id"]]
                    outcomes += match(found, objects, threshold, exhaustive)
            outcomes.sort(key=lambda outcome: -outcome[0])
            hits = np.cumsum([hit for _, hit in outcomes])
            recall = hits / len(truth)
            precision = hits / np.arange(1, len(hits) + 1)
            for wanted in np.linspace(0, 1, 101):
                reached = precision[recall >= wanted]
                precisions.append(reached.max() if len(reached) else 0.0)
        ap[category_id] = 100 * float(np.mean(precisions))
    return ap


@pytest.mark.parametrize("per_class", [10_000, 40, 7])
def test_fixed_ap_is_that_of_its_definition(
    content: dict[str, Any], tmp_path: Path, per_class: int
) -> None:
    rng = np.random.default_rng(2)
    outputs = data.random_outputs(content, rng)
    for found in outputs:
        # No ties: the order among equal scores is undefined.
        found.scores[:] = found.scores.new_tensor(rng.random(len(found)))
    evaluator = LVISAPEvaluator(
        NAME,
        output_dir=str(tmp_path),
        fixed_ap=True,
        max_dets_per_image=5,
        max_dets_per_class=per_class,
    )
    scores = data.run(evaluator, content, outputs)
    results = [
        result
        for image, found in zip(content["images"], outputs)
        for result in lvis_results(image["id"], found)
    ]
    expected = slow_fixed_ap(content, results, per_class)
    assert scores["bbox_fixed"]["AP"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    for group, members in class_groups(NAME).items():
        mean = np.mean([ap for category_id, ap in expected.items() if category_id - 1 in members])
        assert scores["bbox_fixed"][f"AP{group}"] == pytest.approx(mean, abs=1e-6)
    assert scores["bbox_fixed"]["AP"] != scores["bbox"]["AP"]


def lvis_results(image_id: int, found: Any) -> list[dict[str, Any]]:
    boxes = found.pred_boxes.tensor.numpy().copy()
    boxes[:, 2:] -= boxes[:, :2]
    rows = zip(boxes.tolist(), found.pred_classes.tolist(), found.scores.tolist())
    return [{"image_id": image_id, "category_id": c + 1, "bbox": b, "score": s} for b, c, s in rows]


def test_reference_backend_gives_the_same(content: dict[str, Any]) -> None:
    pytest.importorskip("lvis")
    outputs = data.random_outputs(content, np.random.default_rng(3), masks=True)
    options = {"fixed_ap": True, "max_dets_per_class": 30, "max_dets_per_image": 25}
    fast, slow = (
        data.run(LVISAPEvaluator(NAME, backend=backend, **options), content, outputs)
        for backend in ("hotcoco", "reference")
    )
    assert fast.keys() == slow.keys() == {"bbox", "segm", "bbox_fixed", "segm_fixed"}
    for task, metrics in slow.items():
        assert fast[task] == pytest.approx(metrics, abs=1e-6, nan_ok=True)


def test_dropping_results_early_changes_nothing(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = data.random_outputs(content, np.random.default_rng(4))
    options = {"fixed_ap": True, "max_dets_per_class": 20, "max_dets_per_image": 5}
    runs, collected = [], []
    for every in (10_000, 50):
        monkeypatch.setattr(lvis, "PRUNE_EVERY", every)
        evaluator = LVISAPEvaluator(NAME, output_dir=str(tmp_path), **options)
        scores = data.run(evaluator, content, outputs)
        runs.append((repr(scores), (tmp_path / "lvis_instances_results.json").read_text()))
        buffer = lvis.ResultBuffer(num_classes=9, per_image=5, per_class=20)
        for image, found in zip(content["images"], outputs):
            buffer.add(image["id"], found)
        collected.append(len(buffer.results))
    assert collected[1] < collected[0] / 2
    assert runs[1] == runs[0]


def test_oracle(content: dict[str, Any]) -> None:
    evaluator = LVISAPEvaluator(NAME, fixed_ap=True)
    evaluator.reset()
    for x, found in data.oracle_outputs(DatasetCatalog.get(NAME), 9, masks=True):
        evaluator.process([x], [{"instances": found}])
    found = evaluator.evaluate()
    for task in ("bbox", "bbox_fixed", "segm", "segm_fixed"):
        assert found[task]["AP50"] == pytest.approx(100)
        assert found[task]["APr"] == found[task]["APc"] == found[task]["AP"]
    assert found["bbox"]["AP"] == pytest.approx(100)
    assert found["bbox_fixed"]["AP"] == pytest.approx(100)


def test_category_ids_are_those_of_the_file(content: dict[str, Any], tmp_path: Path) -> None:
    name = "synthetic_lvis_gaps"
    for item in content["categories"]:
        item["id"] *= 10
    for item in content["annotations"]:
        item["category_id"] *= 10
    for item in content["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            item[key] = [10 * category_id for category_id in item[key]]
    data.register_lvis(name, content, tmp_path)
    metadata = MetadataCatalog.get(name)
    metadata.thing_dataset_id_to_contiguous_id = {10 * i: i - 1 for i in range(1, 10)}
    outputs = data.random_outputs(
        data.annotations(np.random.default_rng(0)), np.random.default_rng(5)
    )
    expected = data.run(LVISAPEvaluator(NAME), content, outputs)
    evaluator = LVISAPEvaluator(name, output_dir=str(tmp_path))
    assert data.run(evaluator, content, outputs)["bbox"] == pytest.approx(
        expected["bbox"], nan_ok=True
    )
    results = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    assert {result["category_id"] % 10 for result in results} == {0}
    data.forget(name)


def test_no_results_and_no_masks(content: dict[str, Any], tmp_path: Path) -> None:
    nothing = [data.instances([], [], []) for _ in content["images"]]
    found = data.run(LVISAPEvaluator(NAME, fixed_ap=True), content, nothing)
    assert np.isnan(found["bbox"]["AP"]) and np.isnan(found["bbox_fixed"]["APr"])

    # Annotations that only have boxes, such as MDETR's minival, cannot be compared with masks.
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    Path(MetadataCatalog.get(NAME).json_file).write_text(json.dumps(content))
    outputs = data.random_outputs(content, np.random.default_rng(6), masks=True)
    assert data.run(LVISAPEvaluator(NAME), content, outputs).keys() == {"bbox"}


def test_seen_and_unseen_names(content: dict[str, Any]) -> None:
    groups = class_groups(NAME, find_training_names(["objects365_v1_train"]))
    # "shelving_unit" is Objects365's "cabinet/shelf" by its synonym.
    assert groups["seen"] == {0, 3, 6, 8}
    assert groups["unseen"] == {1, 2, 4, 5, 7}
    assert groups["r"] == {0, 1, 2}

    outputs = data.random_outputs(content, np.random.default_rng(7))
    found = data.run(LVISAPEvaluator(NAME, groups=groups), content, outputs)["bbox"]
    # The last class has no objects: three seen classes and five unseen ones count.
    assert 3 * found["APseen"] + 5 * found["APunseen"] == pytest.approx(8 * found["AP"])
    single = {str(i): [i] for i in range(9)}
    each = data.run(LVISAPEvaluator(NAME, groups=single), content, outputs)["bbox"]
    assert found["APseen"] == pytest.approx((each["AP0"] + each["AP3"] + each["AP6"]) / 3)
    assert np.isnan(each["AP8"])


def test_spellings() -> None:
    assert spellings("Bat_(animal)") == {"bat"}
    assert spellings("Cutting/chopping Board") == {"cutting", "chopping board"}
    assert spellings("T-shirt") == spellings("t_shirt") == {"t shirt"}


@pytest.mark.parametrize(
    "dataset, counts",
    [("objects365_v1_train", (10, 62, 145)), ("openimages_v6_train", (28, 96, 159))],
)
def test_overlap_of_lvis_with_the_training_names(
    dataset: str, counts: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rare, common and frequent LVIS classes have a name of a training set."""
    names = find_training_names([dataset])
    found = {
        frequency: sum(
            names.contain([category["name"]])
            for category in LVIS_CATEGORIES
            if category["frequency"] == frequency
        )
        for frequency in "rcf"
    }
    assert tuple(found.values()) == counts


def test_training_names_come_from_registered_data(content: dict[str, Any]) -> None:
    assert find_training_names([]) is None
    names = find_training_names([NAME, "v3det_train"])
    assert names.known == (NAME,) and names.unknown == ("v3det_train",)
    assert names.contain(["Gargoyle"]) and names.contain(["nothing", "bat"])
    assert not names.contain(["sofa"])


@pytest.mark.parametrize(
    ("flag", "backend"),
    [("iscrowd", "hotcoco"), ("ignore", "hotcoco"), ("iscrowd", "reference")],
)
def test_flags_that_the_libraries_treat_differently(
    content: dict[str, Any], tmp_path: Path, flag: str, backend: str
) -> None:
    pytest.importorskip("lvis")
    outputs = data.random_outputs(content, np.random.default_rng(1))
    unflagged = data.run(LVISAPEvaluator(NAME, backend="reference"), content, outputs)
    path = Path(MetadataCatalog.get(NAME).json_file)
    for annotation in content["annotations"][4:40:3]:
        annotation[flag] = 1
    path.write_text(json.dumps(content))
    if backend == "hotcoco":
        message = f"{path.name}: 12 annotations, the first with id 5,.*BACKEND: reference"
        with pytest.raises(ValueError, match=message):
            LVISAPEvaluator(NAME, backend=backend)
    else:
        # The package lvis does not know crowds.
        found = data.run(LVISAPEvaluator(NAME, backend=backend), content, outputs)
        assert found["bbox"] == pytest.approx(unflagged["bbox"], nan_ok=True)


def test_the_reference_honors_ignore(content: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("lvis")
    for annotation in content["annotations"][::3]:
        annotation["ignore"] = 1
    path = Path(MetadataCatalog.get(NAME).json_file)
    path.write_text(json.dumps(content))
    outputs = data.random_outputs(content, np.random.default_rng(1))
    evaluator = LVISAPEvaluator(NAME, output_dir=str(tmp_path), backend="reference")
    found = data.run(evaluator, content, outputs)["bbox"]
    results = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    expected = by_the_library(str(path), results, "bbox")
    assert [found[m] for m in ("AP", "AP50")] == pytest.approx(
        [expected[m] for m in ("AP", "AP50")], abs=1e-6
    )


def test_library_is_chosen_by_the_backend_and_nothing_else_changes() -> None:
    modules, float_before = dict(sys.modules), vars(np).get("float")
    with lvis_library("hotcoco") as chosen:
        assert chosen.__name__ == "hotcoco"
    assert sys.modules == modules
    pytest.importorskip("lvis")
    with lvis_library("reference") as chosen:
        assert chosen.__name__ == "lvis" and np.float is float
    assert vars(np).get("float") is float_before
    with pytest.raises(ValueError, match="TEST.EVALUATION_BACKEND is 'fast'"):
        LVISAPEvaluator(NAME, backend="fast")


def test_reference_library_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("importlib").import_module

    def import_module(name: str) -> Any:
        if name == "lvis":
            raise ModuleNotFoundError("No module named 'lvis'")
        return real(name)

    monkeypatch.setattr("importlib.import_module", import_module)
    message = "pip install --no-deps lvis==0.5.3"
    with pytest.raises(ImportError, match=message), lvis_library("reference"):
        pass
