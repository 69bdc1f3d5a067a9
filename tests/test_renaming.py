"""Detections of any detector get RegionSpot's names, and keep everything else."""

from __future__ import annotations

import numpy as np
import pytest

from regionspot_d2 import RegionSpotPredictor

from .tiny import golden, tiny_model

supervision = pytest.importorskip("supervision")
pytestmark = pytest.mark.usefixtures("vocabularies")

WORDS = ["cat", "dog", "bird", "bus"]


@pytest.fixture
def predictor() -> RegionSpotPredictor:
    return RegionSpotPredictor(tiny_model(), vocabulary=WORDS)


@pytest.fixture
def image() -> np.ndarray:
    return golden()["image"]


def test_names_are_the_predictors_and_all_else_is_kept(predictor, image) -> None:
    boxes = golden()["boxes"]
    count = len(boxes)
    detections = supervision.Detections(
        xyxy=boxes,
        confidence=np.linspace(0.9, 0.1, count),
        class_id=np.full(count, 7),
        mask=np.ones((count, 90, 120), bool),
        tracker_id=np.arange(count) + 10,
        data={"class_name": np.array(["thing"] * count), "speed": np.arange(count)},
    )
    predictor.set_image(image)
    renamed = predictor.rename(detections, image)

    expected = predictor.predict(boxes=boxes)  # of the image that is still set
    assert renamed.class_id.tolist() == expected.pred_classes.tolist()
    wanted = expected.scores.numpy() * detections.confidence
    np.testing.assert_allclose(renamed.confidence, wanted, atol=1e-6)
    assert renamed.data["class_name"].tolist() == [WORDS[i] for i in expected.pred_classes]
    np.testing.assert_array_equal(renamed.xyxy, boxes)
    assert renamed.tracker_id.tolist() == detections.tracker_id.tolist()
    assert renamed.data["speed"].tolist() == detections.data["speed"].tolist()
    assert renamed.mask is detections.mask
    assert detections.data["class_name"][0] == "thing" and detections.class_id[0] == 7
    # What supervision's own tools do with it.
    assert len(renamed[renamed.confidence > wanted.min()]) == count - 1


def test_detections_without_scores_and_other_words(predictor, image) -> None:
    detections = supervision.Detections(xyxy=golden()["boxes"])
    renamed = predictor.rename(detections, image, vocabulary=["bread", "cup"])
    assert predictor.vocabulary == ["bread", "cup"]
    assert set(renamed.data["class_name"]) <= {"bread", "cup"}
    assert ((renamed.confidence >= 0.5) & (renamed.confidence <= 1)).all()


def test_no_detections(predictor, image) -> None:
    renamed = predictor.rename(supervision.Detections.empty(), image)
    assert len(renamed) == 0 and renamed.data["class_name"].shape == (0,)


@pytest.mark.parametrize(
    "box, score, message",
    [([5, 5, 20, 30], 3.0, "confidence has values outside"), ([300, 5, 320, 30], 0.5, "Box 0 is")],
)
def test_detections_that_make_no_sense(predictor, image, box, score, message) -> None:
    detections = supervision.Detections(
        xyxy=np.array([box], np.float32), confidence=np.array([score])
    )
    with pytest.raises(ValueError, match=message):
        predictor.rename(detections, image)
