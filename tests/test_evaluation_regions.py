"""Region classification: accuracies counted by hand."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from regionspot_d2.evaluation import RegionClassificationEvaluator

from . import synthetic_lvis as data

NAME = "synthetic_regions_val"

# (image id, class, XYWH box). Classes 0 and 1 are rare, 6 is frequent. The last box extends beyond
# the image.
TRUTH = [
    (1, 0, [10, 10, 50, 50]),
    (1, 1, [60.33, 20.7, 70.1, 90.9]),
    (1, 6, [10, 110, 20, 20]),
    (2, 6, [150, 150, 80, 80]),
]
# The names of each region by rank, from a model that names seven of the nine classes.
RANKED = {
    0: [0, 1, 2, 3, 4, 5, 6],
    1: [0, 2, 3, 4, 5, 6, 1],
    2: [1, 2, 6, 3, 4, 5, 0],
    3: [6, 1, 2, 3, 4, 5, 0],
}


@pytest.fixture(autouse=True)
def dataset(tmp_path: Path) -> Iterator[None]:
    content = data.annotations(np.random.default_rng(0), num_images=3)
    content["annotations"] = [
        {
            "id": i + 1,
            "image_id": image_id,
            "category_id": c + 1,
            "bbox": box,
            "area": 1,
            "segmentation": [[0, 0, 1, 0, 1, 1]],
        }
        for i, (image_id, c, box) in enumerate(TRUTH)
    ]
    data.register_lvis(NAME, content, tmp_path)
    yield
    data.forget(NAME)


def model_output(image_id: int, keep: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best ``keep`` pairs of regions in another order and size than the annotations."""
    numbers = [i for i, truth in enumerate(TRUTH) if truth[0] == image_id][::-1]
    boxes = torch.tensor([TRUTH[i][2] for i in numbers]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    proposals = Instances((3 * data.SIDE, 3 * data.SIDE))
    proposals.proposal_boxes = Boxes(3 * boxes)
    proposals.proposal_boxes.clip(proposals.image_size)
    image = torch.zeros(3, 3 * data.SIDE, 3 * data.SIDE)
    pairs = [
        (region, c, 1 / (2 + rank + 0.1 * region))
        for region, number in enumerate(numbers)
        for rank, c in enumerate(RANKED[number])
    ]
    pairs = sorted(pairs, key=lambda pair: -pair[2])[:keep]
    regions, classes, scores = zip(*pairs) if pairs else ((), (), ())
    found = data.instances(np.zeros((len(pairs), 4)), classes, scores)
    found.region_index = torch.tensor(regions, dtype=torch.int64)
    sizes = {"height": data.SIDE, "width": data.SIDE, "image": image}
    return {"image_id": image_id, "proposals": proposals, **sizes}, {"instances": found}


def evaluate(keep: int | None = None, **options: Any) -> dict[str, float]:
    evaluator = RegionClassificationEvaluator(NAME, **options)
    evaluator.reset()
    for image_id in (1, 2, 3):
        x, output = model_output(image_id, keep)
        evaluator.process([x], [output])
    return evaluator.evaluate()["region_classification"]


def test_accuracies_by_hand() -> None:
    found = evaluate()
    # The true names have the ranks 0, 6, 2, 0.
    assert found["regions"] == 4
    assert found["top1"] == 50 and found["top5"] == 75
    # Class means: class 0 has 1/1, class 1 has 0/1, class 6 has 1/2 at first and 2/2 among five.
    assert found["mAcc1"] == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert found["mAcc5"] == pytest.approx(100 * (1 + 0 + 1) / 3)
    assert found["top1r"] == 50 and found["mAcc1r"] == 50 and found["top5r"] == 50
    assert found["top1f"] == 50 and found["top5f"] == 100
    assert np.isnan(found["top1c"]) and np.isnan(found["mAcc5c"])
    assert found["decided1"] == found["decided5"] == 100


def test_calibration_error_by_hand(tmp_path: Path) -> None:
    # The best scores are 1 / 2 and 1 / (2 + 0.1 * region); regions come in reverse order. In ten
    # bins each region is alone: right, wrong, wrong, right.
    scores = np.array([1 / 2.2, 1 / 2.1, 1 / 2, 1 / 2])
    gaps = np.abs(scores - [1, 0, 0, 1])
    assert evaluate(output_dir=str(tmp_path))["ece"] == pytest.approx(100 * gaps.mean())
    assert (tmp_path / "reliability.png").is_file()
    assert np.isfinite(evaluate(keep=1)["ece"])


def test_groups_are_selections_of_classes() -> None:
    found = evaluate(groups={"seen": [1, 6], "unseen": [0]})
    assert found["top1seen"] == pytest.approx(100 / 3) and found["top1unseen"] == 100
    assert found["mAcc1seen"] == 25


def test_cut_off_results_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert evaluate(keep=None)["decided5"] == 100
    assert not caplog.messages

    # Image 1 keeps nine pairs, three of each region; image 2 all seven.
    found = evaluate(keep=9)
    # Ranks 0, 2 and 0 are known; for the second region five names are more than were kept.
    assert found["decided1"] == 100 and found["decided5"] == 75
    assert found["top1"] == 50 and found["top5"] == 75
    assert "TEST.DETECTIONS_PER_IMAGE" in caplog.text and "75.00 %" in caplog.text

    found = evaluate(keep=1)
    assert found["decided1"] == 50 and found["decided5"] == 25


def test_regions_that_are_not_annotated_do_not_count() -> None:
    evaluator = RegionClassificationEvaluator(NAME)
    evaluator.reset()
    x, output = model_output(1)
    x["proposals"].proposal_boxes.tensor += 1.0
    evaluator.process([x], [output])
    found = evaluator.evaluate()["region_classification"]
    assert found["regions"] == 3 and found["decided1"] == 0 and found["top1"] == 0


def test_oracle() -> None:
    evaluator = RegionClassificationEvaluator(NAME)
    evaluator.reset()
    for x, found in data.oracle_outputs(DatasetCatalog.get(NAME)[:1], 9):
        evaluator.process([x], [{"instances": found}])
    found = evaluator.evaluate()["region_classification"]
    assert found["regions"] == 3 and found["top1"] == 100 and found["mAcc1r"] == 100


def test_models_without_regions_are_refused() -> None:
    evaluator = RegionClassificationEvaluator(NAME)
    evaluator.reset()
    x, output = model_output(1)
    without_proposals = {key: value for key, value in x.items() if key != "proposals"}
    with pytest.raises(ValueError, match="TEST.REGION_CLASSIFICATION"):
        evaluator.process([without_proposals], [output])
    output["instances"].remove("region_index")
    with pytest.raises(ValueError, match="TEST.REGION_CLASSIFICATION"):
        evaluator.process([x], [output])
