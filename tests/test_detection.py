"""Detectors as sources of regions: what they give equals the stock models, box by box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torchvision.ops import nms

from regionspot_d2.detection import DETECTORS, Detected, RegionDetector, build_detector
from regionspot_d2.files import WeightsNotFoundError

from .detectors import RETINANET, zoo_cfg
from .tiny_detectors import MAX_TEXT_LEN, tiny_detector

NAMES = [
    "cat",
    "Traffic_light",
    "red car",
    "dog",
    "no. 5",
    "bird",
    "red traffic light car dog bird cat",
]
SSD = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (60, 90, 3), dtype=np.uint8)


def zero_shot(kind: str, folder: Path, names: list[str] | None = None) -> tuple[Any, Any]:
    """A random detector that drops nothing, and the stock model."""
    pytest.importorskip("transformers")
    model = tiny_detector(kind, folder)
    detector: Any = build_detector(f"hf:{folder}", class_names=names or NAMES)
    detector.score_thresh, detector.nms_thresh = 0.0, 1.0
    return detector, model


def rows(boxes: Any, scores: Any, names: Any) -> list[list[Any]]:
    numbers = np.concatenate([np.asarray(scores)[:, None], np.asarray(boxes)], axis=1).round(2)
    return sorted([name, *row] for name, row in zip(names, numbers.tolist()))


@pytest.mark.parametrize("kind", ["grounding-dino", "mm-grounding-dino"])
@torch.no_grad()
def test_names_in_chunks_below_the_text_limit(kind, tmp_path, image) -> None:
    """Each name gets its own tokens' score, whichever sentence it stands in."""
    detector, model = zero_shot(kind, tmp_path)
    found = detector(image)

    tokenizer = detector.processor.tokenizer
    # In words: sentences of up to nine tokens with what parts them, the last name cut to fit.
    sentences = [["cat", "traffic light"], ["red car", "dog"], ["no 5", "bird"]]
    sentences += [["red traffic light car dog bird"]]
    pixels = detector.processor.image_processor(images=image, return_tensors="pt")
    expected = []
    for number, words in enumerate(sentences):
        text = tokenizer(". ".join(words) + ".", return_offsets_mapping=True)
        ids = torch.tensor([text["input_ids"]])
        assert ids.shape[1] <= MAX_TEXT_LEN
        output = model(**pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
        scores = []
        for place in range(len(words)):
            first = len(". ".join(words[:place])) + 2 * (place > 0)
            last = first + len(words[place])
            own = [i for i, (a, b) in enumerate(text["offset_mapping"]) if first <= a < b <= last]
            scores.append(output.logits[0, :, own].sigmoid().mean(1))
        best, places = torch.stack(scores, 1).max(1)
        x, y, w, h = output.pred_boxes[0].unbind(1)
        boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        boxes = boxes * torch.tensor([90.0, 60.0, 90.0, 60.0])
        boxes[:, 0::2].clamp_(0, 90)
        boxes[:, 1::2].clamp_(0, 60)
        expected += rows(boxes, best, [NAMES[2 * number + p] for p in places.tolist()])
    assert rows(*found) == sorted(expected) and len(set(found.names)) > 3


@pytest.mark.parametrize("kind", ["owlv2", "owlvit"])
@torch.no_grad()
def test_names_that_are_texts_of_their_own(kind, tmp_path, image) -> None:
    detector, model = zero_shot(kind, tmp_path, ["cat", "dog", "traffic_light", "bird"])
    found = detector(image)

    texts = [["a photo of a cat", "a photo of a dog", "a photo of a traffic light"]]
    texts[0].append("a photo of a bird")
    inputs = detector.processor(
        text=texts, images=image, return_tensors="pt", truncation=True, max_length=16
    )
    output = model(**inputs)
    [stock] = detector.processor.image_processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[image.shape[:2]]
    )
    boxes = stock["boxes"]
    boxes[:, 0::2].clamp_(0, 90)
    boxes[:, 1::2].clamp_(0, 60)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    names = [detector.class_names[label] for label in stock["labels"][inside].tolist()]
    assert rows(*found) == rows(boxes[inside], stock["scores"][inside], names)
    assert len(found.names) > 5


def test_what_chunks_find_again_is_found_once(tmp_path, image) -> None:
    detector, _ = zero_shot("grounding-dino", tmp_path)
    everything = detector(image)
    detector.score_thresh, detector.nms_thresh = 0.3, 0.2
    found = detector(image)
    good = everything.scores >= 0.3
    boxes, scores = everything.boxes[good], everything.scores[good]
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.2).numpy()
    np.testing.assert_array_equal(found.boxes, boxes[kept])
    assert 0 < len(kept) < good.sum() < len(everything.scores)


def test_a_photo_in_which_nothing_is_found(tmp_path, image) -> None:
    detector, _ = zero_shot("grounding-dino", tmp_path)
    detector.score_thresh = 2.0
    found = detector(image)
    assert found.boxes.shape == (0, 4) and found.scores.shape == (0,) and found.names == []


@pytest.mark.parametrize(
    "source, weights, error, message",
    [
        ("hf:{folder}/none", None, WeightsNotFoundError, "no detector in the folder or on the hub"),
        ("hf:{folder}", None, ValueError, "a model of type 'bert'; one of grounding-dino"),
        ("hf:{folder}", "x.pth", ValueError, "leave out --detector-weights"),
        ("torchvision:resnet50", None, ValueError, "no such detector; it has fasterrcnn"),
        (f"torchvision:{SSD}", "{folder}/none.pth", WeightsNotFoundError, "--detector-weights"),
        (
            f"torchvision:{SSD}",
            "{folder}/config.json",
            ValueError,
            f"weights of torchvision's {SSD}",
        ),
        ("detectron2:none.yaml", None, ValueError, "neither a file nor a name"),
        ("yolo:v8", None, ValueError, "detectron2:NAME, hf:NAME, torchvision:NAME is expected"),
        ("resnet50", None, ValueError, "is expected"),
    ],
)
def test_what_is_no_detector(tmp_path, source, weights, error, message) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    weights = weights and weights.format(folder=tmp_path)
    with pytest.raises(error, match=message) as caught:
        build_detector(source.format(folder=tmp_path), weights=weights, class_names=["cat"])
    assert "\n" not in str(caught.value)


# torchvision


@pytest.fixture(scope="module")
def ssd() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(
        SSD, weights=None, weights_backbone=None, num_classes=4
    ).eval()


@torch.no_grad()
def same_as(model: torch.nn.Module, found: Detected, image: np.ndarray) -> bool:
    [stock] = model([torch.from_numpy(image).permute(2, 0, 1) / 255.0])
    np.testing.assert_allclose(found.boxes, stock["boxes"].numpy(), atol=1e-4)
    np.testing.assert_allclose(found.scores, stock["scores"].numpy(), atol=1e-5)
    return len(found.scores) > 3 and found.names == [f"class {i}" for i in stock["labels"].tolist()]


@pytest.mark.parametrize("nested", [False, True])
def test_weights_of_any_number_of_classes(ssd, tmp_path, image, nested) -> None:
    # Batch norms that stood still in training leave no counters.
    state = {k: v for k, v in ssd.state_dict().items() if "num_batches_tracked" not in k}
    torch.save({"model": state, "epoch": 3} if nested else state, tmp_path / "mine.pth")
    detector = build_detector(f"torchvision:{SSD}", weights=str(tmp_path / "mine.pth"))
    assert same_as(ssd, detector(image), image)


def test_weights_by_torchvision(monkeypatch, image) -> None:
    model = torchvision.models.get_model(SSD, weights=None, weights_backbone=None)
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: model.state_dict()
    )
    found = build_detector(f"torchvision:{SSD}")(image)
    with torch.no_grad():
        [stock] = model.eval()([torch.from_numpy(image).permute(2, 0, 1) / 255.0])
    categories = torchvision.models.get_model_weights(SSD).DEFAULT.meta["categories"]
    assert found.names == [categories[label] for label in stock["labels"].tolist()] != []


def test_weights_of_another_architecture(ssd, tmp_path) -> None:
    torch.save(ssd.state_dict(), tmp_path / "mine.pth")
    with pytest.raises(ValueError, match="not hold the weights of torchvision's retinanet"):
        build_detector("torchvision:retinanet_resnet50_fpn", weights=str(tmp_path / "mine.pth"))


# Detectron2, and others


def test_a_detectron2_config(tmp_path, image) -> None:
    cfg = zoo_cfg(RETINANET)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "detector.pth")
    (tmp_path / "detector.yaml").write_text(cfg.dump())
    weights = str(tmp_path / "detector.pth")
    found = build_detector(f"detectron2:{tmp_path}/detector.yaml", weights=weights)(image)
    assert found.boxes.shape == (6, 4) and len(found.names) == 6
    assert (np.diff(found.scores) <= 0).all()


def test_a_detector_of_your_own(monkeypatch, image) -> None:
    class Whole(RegionDetector):
        def __call__(self, image: np.ndarray) -> Detected:
            height, width = image.shape[:2]
            return Detected(np.array([[0, 0, width, height]]), np.ones(1), ["image"])

    monkeypatch.setitem(DETECTORS, "whole", lambda name, weights, class_names, device: Whole())
    assert build_detector("whole:any")(image).boxes.tolist() == [[0, 0, 90, 60]]
