"""Arguments that cannot be meant are one clear error; odd ones that can be meant are right."""

from __future__ import annotations

import logging
from collections import Counter, deque
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BitMasks, Boxes, Instances, RotatedBoxes
from hypothesis import HealthCheck, given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from hypothesis.strategies import sampled_from
from PIL import Image
from torch import nn

from regionspot_d2 import RegionSpotPredictor, add_regionspot_config, wrap
from regionspot_d2.data.images import ImageReadError, as_image_tensor
from regionspot_d2.modeling import RegionSpotROIHeads, lazy_masks
from regionspot_d2.modeling.questions import as_boxes, as_masks, as_points

from .tiny import golden, tiny_model

pytestmark = pytest.mark.usefixtures("vocabularies")

RGB = np.random.RandomState(0).randint(2, 120, (6, 8, 3)).astype(np.uint8)
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


class Explains:
    """Fails with a long story."""

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise ValueError("it\nfailed\n\nhere")


@pytest.mark.parametrize(
    "given",
    [
        "boxes",
        b"1234",
        {"a": [1, 2, 3, 4]},
        {1, 2, 3, 4},
        object(),
        Explains(),
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
        with pytest.raises(ValueError, match="cannot be read as numbers|shape") as caught:
            check(given, SIZE)
        assert "\n" not in str(caught.value)


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


def test_a_vocabulary_of_one_name_is_warned_of_once(predictor, caplog, monkeypatch):
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())  # of other tests
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


@pytest.mark.parametrize(
    "image",
    [
        *(RGB.astype(kind) for kind in ("i2", ">i2", ">f4", "u2", "u8", "f2", "f8", "longdouble")),
        RGB[::-1, ::-1].copy()[::-1, ::-1],
        np.asfortranarray(RGB),
        np.ma.masked_array(RGB),
        torch.from_numpy(RGB).permute(2, 0, 1),
        torch.from_numpy(RGB.astype("u2")).permute(2, 0, 1),
        torch.from_numpy(RGB).permute(2, 0, 1).bfloat16().requires_grad_(),
    ],
)
def test_images_of_any_type(image):
    found = as_image_tensor(image, "RGB")
    assert torch.equal(found.float(), torch.from_numpy(RGB).permute(2, 0, 1).float())
    assert found.dtype in (torch.uint8, torch.float32) and found.is_contiguous()
    assert not found.requires_grad
    assert torch.equal(as_image_tensor(image, "BGR"), found.flip(0))


@pytest.mark.parametrize(
    "image",
    [
        *(RGB.astype(kind) for kind in ("O", "U3", "S3", "M8[s]", "m8[s]", "V3", "complex")),
        np.zeros((6, 8, 3), [("red", "u1")]),
        np.ma.masked_array(RGB, RGB > 50),
        torch.from_numpy(RGB).permute(2, 0, 1).to_sparse(),
        torch.zeros(6, 8).to_sparse_csr(),
        torch.zeros(3, 6, 8, device="meta"),
        torch.zeros(3, 6, 8, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.zeros(3, 6, 8), 1.0, 0, torch.quint8),
        np.where(RGB > 50, np.nan, RGB),
        np.where(RGB > 50, np.inf, RGB),
        RGB > 50,
        np.zeros((6, 8, 4), np.uint8),
        RGB[None],
        RGB.tolist(),
        np.array("photo.jpg"),
        b"photo.jpg",
        None,
        Image.fromarray(np.zeros((4, 4), np.float32)),
    ],
)
def test_images_that_are_none(predictor, image):
    size = predictor.image_size
    with pytest.raises(ValueError, match="^The (PIL image|image|pixels) "):
        predictor.set_image(image)
    assert predictor.image_size == size and len(predictor.predict(boxes=BOX)) == 1


@pytest.mark.parametrize("name", ["a\udc80.jpg", "a\0.jpg", "", ".", "x" * 5000])
@pytest.mark.parametrize("kind", [str, Path])
def test_names_of_no_image_file(predictor, name, kind):
    for read in (predictor.set_image, lambda path: predictor.predict_batch([path], [BOX])):
        with pytest.raises(ImageReadError, match="^The image file '") as error:
            read(kind(name))
        assert "\n" not in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("channels", ["rgb", "L", None, 3, ["RGB"], np.array(["RGB", "BGR"])])
def test_channels_that_do_not_exist(predictor, channels):
    with pytest.raises(ValueError, match="channels is .*'RGB' or 'BGR'"):
        predictor.set_image(RGB, channels=channels)
    with pytest.raises(ValueError, match="input_format is .*'RGB' or 'BGR'"):
        wrap(nn.Identity(), predictor.model, vocabulary=WORDS, input_format=channels)


@given(
    arrays(
        sampled_from(["?", "u1", "i2", ">i4", "u8", "f2", ">f8", "c8", "U2", "M8[s]", "O"]),
        array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_array_is_understood_or_refused(values):
    for read in (
        lambda: as_image_tensor(values, "RGB"),
        lambda: as_boxes(values, SIZE),
        lambda: as_points(values, None, SIZE),
        lambda: as_points([[1, 2]], values, SIZE),
        lambda: as_masks(values, SIZE),
    ):
        try:
            read()
        except ValueError as error:
            assert str(error)[0].isupper() and "\n" not in str(error)


@pytest.mark.parametrize("given", [{0: [1, 2]}, {(1, 2)}, "12", b"12", 3, None])
def test_points_and_labels_that_are_no_lists(given):
    with pytest.raises(ValueError, match="points are .* a list with an entry per region"):
        as_points(given, None, SIZE)
    if given is not None:
        with pytest.raises(ValueError, match="labels are .* a list with an entry per region"):
            as_points([[1, 2]], given, SIZE)


def test_ranges_are_not_written_out():
    huge = range(10**12)
    for points in ([huge], [[huge, huge]], np.array([None, huge], dtype=object)[1:]):
        with pytest.raises(ValueError, match="points cannot be read as numbers: .* type range"):
            as_points(points, None, SIZE)
    with pytest.raises(ValueError, match="boxes cannot be read as numbers"):
        as_boxes([huge], SIZE)


def test_masks_of_zeros_are_empty():
    for kind in ("?", "u1", "f4"):
        with pytest.raises(ValueError, match="mask of region 3 is empty"):
            as_masks(np.zeros(SIZE, kind), SIZE, 3)


@pytest.mark.parametrize("name", ["predict", "region_embeddings", "attention_maps"])
def test_unknown_arguments_name_the_method(predictor, name):
    with pytest.raises(TypeError, match=rf"\b{name}\(\) .*'box'"):
        getattr(predictor, name)(box=BOX)
    with pytest.raises(ValueError, match="no regions"):
        getattr(predictor, name)()


@pytest.mark.parametrize(
    "model", [None, "config.yaml", Path("config.yaml"), 7, {}, nn.Linear(1, 1), RegionSpotPredictor]
)
def test_what_is_no_model(model):
    with pytest.raises(ValueError, match="model is of the type .* a config, .* or a RegionSpot"):
        RegionSpotPredictor(model)


@pytest.mark.parametrize("model", ["GeneralizedRCNN", "Nothing", "PanopticFPN"])
def test_configs_of_other_models(model):
    cfg = get_cfg()
    for incomplete in (cfg, CfgNode(), CfgNode({"MODEL": None}), CfgNode({"MODEL": "RegionSpot"})):
        with pytest.raises(ValueError, match="no MODEL.LOCALIZER.*add_regionspot_config"):
            RegionSpotPredictor(incomplete)
    add_regionspot_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = model
    with pytest.raises(ValueError, match=f"META_ARCHITECTURE is '{model}'; 'RegionSpot'"):
        RegionSpotPredictor(cfg)


def batches() -> list[tuple[Any, Any]]:
    image = golden()["image"]
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return [
        ({"photo.jpg": 1}, [BOX]),
        ({"photo.jpg"}, [BOX]),
        (image, [BOX] * len(image)),
        (pixels, [BOX] * 3),
        (image[..., 0], [BOX] * len(image)),
        ("abc", [BOX] * 3),
        (b"abc", [BOX] * 3),
        (Path("photo.jpg"), [BOX]),
        (Image.fromarray(image), [BOX]),
        (None, [BOX]),
        ([image], iter([BOX])),
        ([image], {0: BOX}),
        ([image], Boxes(torch.tensor(BOX))),
        ([image], "a"),
        ([image], None),
        ([image] * 4, np.array(BOX[0])),
        ([image], [BOX, BOX]),
        (iter([image, image]), [BOX]),
        (iter([]), [BOX]),
        ([image], [None]),
        ([image, None], [BOX, BOX]),
        ([image, image], [BOX, [[9, 9, 1, 1]]]),
    ]


@pytest.mark.parametrize("case", range(len(batches())))
def test_batches_that_are_no_lists(predictor, case):
    images, boxes = batches()[case]
    with pytest.raises(
        ValueError, match="^(images|boxes) is .* a list|^There are .* boxes|^Image [01]: "
    ):
        predictor.predict_batch(images, boxes, vocabulary=["plane", "cat"])
    assert predictor.vocabulary == WORDS and predictor.image_size == (90, 120)


def test_batches_of_any_kind(predictor):
    image = golden()["image"]
    expected = predictor.predict(boxes=BOX).scores
    for images in (image[None], iter([image]), deque([image]), [Image.fromarray(image)]):
        for boxes in ([BOX], [Boxes(torch.tensor(BOX))], np.array([BOX]), torch.tensor([BOX])):
            images, copy = tee(images)
            torch.testing.assert_close(predictor.predict_batch(copy, boxes)[0].scores, expected)


class Found(nn.Module):
    """A detector that gives the same for every image."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, batched_inputs: Any) -> list[Any]:
        return [self.output for _ in batched_inputs]


def detections(boxes: Any, **fields: Any) -> dict[str, Instances]:
    return {"instances": Instances((90, 120), pred_boxes=boxes, **fields)}


def test_wrapping_what_cannot_be_wrapped(predictor):
    for detector in (None, len, "mask_rcnn.yaml"):
        with pytest.raises(ValueError, match="detector is of the type .*nn.Module"):
            wrap(detector, predictor.model, vocabulary=WORDS)
    for model in (predictor, None, nn.Identity()):
        with pytest.raises(ValueError, match="regionspot is of the type .*RegionSpotPredictor"):
            wrap(nn.Identity(), model, vocabulary=WORDS)
        with pytest.raises(ValueError, match="regionspot is of the type"):
            RegionSpotROIHeads(
                regionspot=model, host=None, pixel_mean=[0] * 3, pixel_std=[1] * 3, input_format=""
            )
    model = wrap(nn.Identity(), predictor.model, vocabulary=WORDS)
    for names in ("cat", None, {"cat": 1}, [], ["cat", "word " * 99], np.array("cat")):
        with pytest.raises(ValueError, match="vocabulary|token"):
            model.set_vocabulary(names)
        assert model.vocabulary == WORDS


@pytest.mark.parametrize(
    "output",
    [
        None,
        [],
        {},
        {"instances": [1]},
        detections(Boxes(torch.tensor(BOX))),
        detections(RotatedBoxes(torch.ones(1, 5)), scores=torch.ones(1)),
        detections(Boxes(torch.full((1, 4), torch.nan)), scores=torch.ones(1)),
        detections(Boxes(torch.tensor(BOX)), scores=torch.tensor([-2.0])),
        detections(Boxes(torch.tensor(BOX)), scores=torch.tensor([torch.nan])),
    ],
)
def test_outputs_that_are_no_detections(predictor, output):
    model = wrap(Found(output), predictor.model, vocabulary=WORDS)
    with pytest.raises(ValueError, match="detector gives no|of input 0 "):
        model([{"image": torch.zeros(3, 90, 120)}])


@pytest.mark.parametrize(
    "x", ["photo.jpg", {}, *({"image": image} for image in (None, RGB, torch.from_numpy(RGB)))]
)
def test_inputs_that_are_no_images(predictor, x):
    model = wrap(Found(detections(Boxes(torch.tensor(BOX)))), predictor.model, vocabulary=WORDS)
    for ask in (predictor.model, model):
        with pytest.raises(ValueError, match=r"^Input 0 .* is expected"):
            ask([x])


def proposals(**fields: Any) -> dict[str, Any]:
    found = Instances((90, 120), **fields)
    return {"image": torch.zeros(3, 90, 120), "proposals": found, "file_name": "a.jpg"}


def test_proposals_that_are_none(predictor):
    boxes = Boxes(torch.tensor(BOX))
    for x in (
        proposals(proposal_boxes=boxes),
        proposals(objectness_logits=torch.ones(1)),
        {**proposals(), "proposals": BOX},
        proposals(proposal_boxes=torch.tensor(BOX), objectness_logits=torch.ones(1)),
        proposals(proposal_boxes=RotatedBoxes(torch.ones(1, 5)), objectness_logits=torch.ones(1)),
    ):
        with pytest.raises(ValueError, match=r"of input 0 \(a.jpg\) are .*Boxes|not Instances"):
            predictor.model([x])


@pytest.mark.parametrize("score", [6.0, -0.4, torch.nan, torch.inf])
def test_proposals_with_logits_are_refused(predictor, score):
    model, boxes = predictor.model, Boxes(torch.tensor(BOX * 3))
    scores = torch.tensor([0.5, score, 0.9])
    with pytest.raises(ValueError, match=r"input 0 \(a.jpg\) are from .* sigmoid"):
        model([proposals(proposal_boxes=boxes, objectness_logits=scores)])
    x = {"image": torch.zeros(3, 90, 120)}
    with pytest.raises(ValueError, match="scores of input 0 .* sigmoid"):
        model.inference([x], [Instances((90, 120), pred_boxes=boxes, scores=scores)])
    if scores.isfinite().all():
        [found] = model([proposals(proposal_boxes=boxes, objectness_logits=scores.sigmoid())])
        assert set(found["instances"].region_index.tolist()) == {0, 1, 2}
        assert found["instances"].scores.max() <= 1
