"""Arguments that cannot be meant are one clear error; odd ones that can be meant are right."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.modeling import lazy_masks
from regionspot_d2.modeling.questions import as_boxes, as_masks, as_points

from .tiny import golden, tiny_model

pytestmark = pytest.mark.usefixtures("vocabularies")

SIZE = (60, 90)  # height, width
WORDS = ["cat", "dog", "bird", "bus"]
BOX = [[10, 10, 50, 40]]


@pytest.fixture
def predictor() -> RegionSpotPredictor:
    predictor = RegionSpotPredictor(tiny_model(), vocabulary=WORDS)
    predictor.set_image(golden()["image"])
    return predictor


@pytest.mark.parametrize(
    "boxes", [[[0.1, 0.2, 0.5, 0.9]], [[0, 0, 1, 1]], np.array([[0, 0, 0.5, 1], [0.2, 0.2, 1, 1]])]
)
def test_boxes_in_fractions(boxes):
    with pytest.raises(ValueError, match="fractions of the image; pixels .* x by 90 and y by 60"):
        as_boxes(boxes, SIZE)


def test_boxes_that_only_begin_like_fractions():
    boxes = [[0.1, 0.2, 0.5, 0.9], [1, 2, 3, 4]]
    assert len(as_boxes(boxes, SIZE)) == 2
    assert as_boxes([[0, 0, 1, 1]], (2, 2)).tensor.tolist() == [[0, 0, 1, 1]]


def test_points_in_fractions():
    for points in ([[0.5, 0.25]], [[[0.5, 0.25], [1, 1]]], [[[0.1, 0.1]], [[0.9, 0.9]]]):
        with pytest.raises(ValueError, match="points lie between 0 and 1"):
            as_points(points, None, SIZE)
    assert len(as_points([[0, 1], [1, 1]], None, SIZE)) == 2


@pytest.mark.parametrize(
    "values, message",
    [
        ([0, 0.5], "0.5; 0 and 1 are expected. Threshold"),
        ([0.3, 0.3], "hold 0.3"),
        ([0, 1, 2], "label map"),
        ([-3.0, 4.5], "hold -3"),
        ([-1, 0], "hold -1"),
        ([1, np.nan], "hold nan|hold 1"),
        ([np.inf, 1], "hold 1"),
    ],
)
@pytest.mark.parametrize("of_torch", [False, True])
def test_masks_that_are_not_of_two_values(values, message, of_torch):
    masks = np.resize(np.array(values), SIZE)
    with pytest.raises(ValueError, match=message):
        as_masks(torch.from_numpy(masks) if of_torch else masks, SIZE)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int8", "uint16", "int64", "float16", ">f4"])
def test_masks_of_any_type(dtype):
    masks = np.zeros((2, *SIZE), dtype=dtype)
    masks[:, 3:9, 4:20] = 1
    assert as_masks(masks[:, ::-1], SIZE).boxes(SIZE).tensor.tolist() == [[4, 51, 20, 57]] * 2
    masks.flags.writeable = False
    assert as_masks(masks, SIZE).masks.dtype == torch.bool


@pytest.mark.parametrize(
    "boxes",
    [
        torch.tensor([[1, 2, 3, 4]]),
        torch.tensor([[1, 2, 3, 4]], dtype=torch.float16),
        torch.tensor([[1.0, 2, 3, 4]], requires_grad=True),
        [np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4])][:1],
        np.array([[4, 3, 2, 1]])[:, ::-1],
        np.array([[1, 2, 3, 4]], dtype=">i4"),
        np.array([[1, 2, 3, 4]], dtype=np.uint16),
        np.array([[1, 2, 3, 4]], dtype=np.longdouble),
        ((1, 2, 3, 4),),
        [[np.float64(1), np.int8(2), 3, torch.tensor(4)]],
    ],
)
def test_boxes_of_any_type(boxes):
    assert as_boxes(boxes, SIZE).tensor.tolist() == [[1, 2, 3, 4]]
    assert as_boxes(boxes, SIZE).tensor.dtype == torch.float32


def test_huge_numbers_are_cut_at_the_edge():
    assert as_boxes([[-1e30, 0, 1e30, 1e30]], SIZE).tensor.tolist() == [[0, 0, 90, 60]]
    for value in (1e300, float("inf"), 10**400, 2**80):
        with pytest.raises(ValueError, match="Box 0 is .* finite|cannot be read"):
            as_boxes([[0, 0, value, value]], SIZE) if value != 2**80 else as_boxes([[value]], SIZE)


def nested(depth: int) -> list:
    values: list = [1]
    for _ in range(depth):
        values = [values]
    return values


@pytest.mark.parametrize(
    "given",
    [
        "boxes",
        b"1234",
        {"a": [1, 2, 3, 4]},
        {1, 2, 3, 4},
        object(),
        [[1, 2, 3, None]],
        [[1, 2, 3], [1, 2]],
        [[1, 2, 3, "4"]],
        [[1, 2, 3, 4j]],
        torch.tensor([[1, 2, 3, 4j]]),
        torch.eye(4).to_sparse(),
        iter([[1, 2, 3, 4]]),
        [torch.zeros(4), torch.zeros(3)],
        nested(2000),
        7,
        float("nan"),
    ],
)
def test_boxes_and_masks_that_are_no_numbers(given):
    for check in (as_boxes, as_masks):
        with pytest.raises(ValueError, match="cannot be read as numbers|shape"):
            check(given, SIZE)


def test_points_as_people_have_them():
    rows = np.array([[10, 20], [30, 40]])
    assert as_points(rows[:, ::-1], None, SIZE).points[:, 0].tolist() == [[20, 10], [40, 30]]
    prompts = as_points([[[1, 2], [3, 4]]], [[True, False]], SIZE)
    assert prompts.labels.tolist() == [[1, 0]]
    for value in (np.nan, np.inf, -np.inf, 1e30):
        with pytest.raises(ValueError, match="Region 0 has the point .* outside"):
            as_points([[[value, 2]]], None, SIZE)
    for labels in ([["a"]], [[None]], [[float("nan")]], "1", [[[1]], [[1]]]):
        with pytest.raises(ValueError, match="label"):
            as_points([[[1, 2]]], labels, SIZE)


@pytest.mark.parametrize("topk", [1.5, True, np.True_, "2", None, [1], 0, -1, float("nan")])
def test_topk_that_is_no_number_of_names(predictor, topk):
    with pytest.raises(ValueError, match="topk is .*; a whole number"):
        predictor.predict(boxes=BOX, topk=topk)
    with pytest.raises(ValueError, match="batch_size is .*; a whole number"):
        predictor.predict_batch([golden()["image"]], [BOX], batch_size=topk)


def test_whole_numbers_of_any_type(predictor):
    for topk in (2, np.int64(2), np.uint8(2), torch.tensor(2)):
        assert len(predictor.predict(boxes=BOX, topk=topk)) == 2
    assert len(predictor.predict_batch([golden()["image"]], [BOX], batch_size=np.int32(3))) == 1


@pytest.mark.parametrize(
    "vocabulary",
    [
        {"cat": 1, "dog": 2},
        {"cat", "dog"},
        (name for name in WORDS),
        map(str, WORDS),
        "cat",
        b"cat",
        7,
        [],
        ["cat", None],
        ["cat", ["dog"]],
        ["cat", "  "],
        ["hot_dog", "Hot dog"],
        np.array([1, 2]),
        [b"cat"],
    ],
)
def test_vocabularies_that_cannot_be_meant(predictor, vocabulary):
    for ask in (predictor.set_vocabulary, lambda v: predictor.predict(boxes=BOX, vocabulary=v)):
        with pytest.raises(ValueError, match="[Vv]ocabulary"):
            ask(vocabulary)
        assert predictor.vocabulary == WORDS


def test_vocabularies_in_any_sequence(predictor):
    expected = predictor.predict(boxes=BOX).scores
    for vocabulary in (tuple(WORDS), np.array(WORDS)):
        assert torch.equal(predictor.predict(boxes=BOX, vocabulary=vocabulary).scores, expected)


def test_a_vocabulary_of_one_name_is_warned_of_once(predictor, caplog):
    with caplog.at_level(logging.WARNING):
        for name in ("cat", "dog"):
            assert predictor.predict(boxes=BOX, vocabulary=[name]).scores.tolist() == [1.0]
    assert caplog.text.count("The vocabulary has one name") == 1


@pytest.mark.parametrize(
    "question",
    [
        {"boxes": [[9, 9, 1, 1]]},
        {"boxes": BOX, "topk": 1.5},
        {"points": [[5000, 1]]},
        {"masks": np.zeros((90, 120))},
        {"boxes": BOX, "vocabulary": ["plane", "word " * 99]},
        {},
    ],
)
def test_a_refused_question_leaves_the_vocabulary(predictor, question):
    with pytest.raises(ValueError):
        predictor.predict(**{"vocabulary": ["plane"], **question})
    assert predictor.vocabulary == WORDS


def test_a_refused_batch_leaves_the_vocabulary(predictor):
    image = golden()["image"]
    for images, boxes in [
        ([image], [[[9, 9, 1, 1]]]),
        ("photo.jpg", [BOX]),
        (image, 5),
        (7, [BOX]),
    ]:
        with pytest.raises(ValueError):
            predictor.predict_batch(images, boxes, vocabulary=["plane"])
        assert predictor.vocabulary == WORDS


def test_more_regions_than_the_limit_are_named_in_groups(predictor, caplog):
    boxes = np.random.default_rng(0).integers(0, 40, (23, 4)) + [0, 0, 45, 45]
    together = predictor.predict(boxes=boxes)
    predictor.model.max_regions = 23
    assert torch.equal(predictor.predict(boxes=boxes).scores, together.scores)
    predictor.model.max_regions = 8
    with caplog.at_level(logging.WARNING):
        found = predictor.predict(boxes=boxes)
        predictor.predict(boxes=boxes)
    assert caplog.text.count("MODEL.REGION_HEAD.MAX_REGIONS (8)") == 1
    predictor.model.max_regions = 1000
    groups = [predictor.predict(boxes=part) for part in np.array_split(boxes, 3)]
    torch.testing.assert_close(found.scores, Instances.cat(groups).scores)
    assert torch.equal(found.pred_boxes.tensor, together.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, together.pred_masks)


def test_groups_of_mixed_regions(predictor):
    masks = np.zeros((3, 90, 120), dtype=bool)
    masks[:, 20:50, 30:70] = True
    question = {"boxes": BOX * 3, "points": [[30, 30], [60, 60]], "masks": masks}
    together = predictor.predict(**question, topk=2)
    predictor.model.max_regions = 3
    found = predictor.predict(**question, topk=2)
    assert torch.equal(found.region_index, together.region_index)
    torch.testing.assert_close(found.pred_boxes.tensor, together.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, together.pred_masks)
    with pytest.raises(ValueError, match="at most 3 .MODEL.REGION_HEAD.MAX_REGIONS"):
        predictor.attention_maps(**question)


def test_ten_thousand_boxes(predictor):
    corners = np.random.default_rng(0).uniform(0, 60, (10_000, 2))
    found = predictor.predict(boxes=np.concatenate([corners, corners + 20], axis=1))
    assert len(found) == 10_000 and found.scores.isfinite().all()


@pytest.mark.parametrize("bytes_held", [0, 90 * 120 * 8])
def test_masks_that_are_many_are_made_when_they_are_read(predictor, monkeypatch, bytes_held):
    boxes = golden()["boxes"]
    plain = predictor.predict(boxes=boxes, topk=3).pred_masks
    assert type(plain) is torch.Tensor
    monkeypatch.setattr(lazy_masks, "MAX_MASK_BYTES", bytes_held)
    found = predictor.predict(boxes=boxes, topk=3)
    lazy = found.pred_masks
    assert isinstance(lazy, lazy_masks.LazyMasks) and isinstance(lazy, torch.Tensor)
    assert lazy.shape == plain.shape and lazy.dtype == torch.bool and len(lazy) == 21
    assert torch.equal(lazy, plain) and torch.equal(torch.stack(list(lazy)), plain)
    assert torch.equal(lazy[4], plain[4]) and torch.equal(lazy[-1], plain[-1])
    for index in (
        slice(2, 9),
        torch.tensor([5, 1]),
        plain.flatten(1).any(1),
        [3, 0],
        np.array([2]),
    ):
        assert torch.equal(lazy[index], plain[index])
    assert torch.equal(lazy[:, 3:5], plain[:, 3:5])
    assert torch.equal(found[found.region_index == 2].pred_masks, plain[6:9])
    assert torch.equal(found.to("cpu").pred_masks.cpu(), plain)
    assert (np.asarray(lazy) == plain.numpy()).all() and (lazy.numpy() == plain.numpy()).all()
    assert torch.equal(lazy.float().sum((1, 2)), plain.float().sum((1, 2)))
    assert torch.equal(BitMasks(lazy).tensor, plain)
    assert torch.equal(Instances.cat([found, found]).pred_masks, torch.cat([plain, plain]))
    for change in (lambda: lazy.zero_(), lambda: lazy.__setitem__(0, False)):
        with pytest.raises(TypeError, match="clone"):
            change()
    lazy.clone()[0] = True


def test_numbers_that_apples_gpus_do_not_have(predictor):
    model = predictor.model
    proposals = Instances((90, 120))
    proposals.proposal_boxes = Boxes(torch.tensor(BOX, dtype=torch.float64))
    proposals.objectness_logits = torch.ones(1, dtype=torch.float64)
    image = torch.from_numpy(golden()["image"]).permute(2, 0, 1).double()
    x = {"image": image, "proposals": proposals, "dataset_name": "regionspot_pets"}
    found = model([x])[0]["instances"]
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
