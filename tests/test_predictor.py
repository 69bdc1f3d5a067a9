"""RegionSpotPredictor: any image, any prompts, any vocabulary, in any order of calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from PIL import Image

from regionspot_d2 import RegionSpotPredictor

from .tiny import classify, golden, tiny_cfg, tiny_model

pytestmark = pytest.mark.usefixtures("vocabularies")

WORDS = ["cat", "dog", "bird", "bus"]


@pytest.fixture
def image() -> np.ndarray:
    return golden()["image"]


@pytest.fixture
def boxes() -> np.ndarray:
    return golden()["boxes"]


@pytest.fixture
def predictor(image) -> RegionSpotPredictor:
    predictor = RegionSpotPredictor(tiny_model(), vocabulary=WORDS)
    predictor.set_image(image)
    return predictor


def test_results_come_in_the_order_of_the_regions(predictor, boxes):
    found = predictor.predict(boxes=boxes, topk=2)
    assert found.region_index.tolist() == [i for i in range(7) for _ in range(2)]
    torch.testing.assert_close(found.pred_boxes.tensor[::2], torch.from_numpy(boxes))
    assert (found.scores[::2] >= found.scores[1::2]).all()
    assert found.pred_masks.shape == (14, 90, 120) and found.image_size == (90, 120)
    everything = predictor.predict(boxes=boxes, topk=99)
    torch.testing.assert_close(everything.scores.view(7, 4).sum(1), torch.ones(7))


def test_the_same_scores_as_the_model(predictor, boxes, image):
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    logits = classify(predictor.model, tensor, Boxes(torch.from_numpy(boxes)), WORDS)
    found = predictor.predict(boxes=boxes)
    torch.testing.assert_close(found.scores, logits.softmax(1).max(1).values)
    assert torch.equal(found.pred_classes, logits.argmax(1))


def test_all_kinds_of_images_are_the_same_image(predictor, boxes, image, tmp_path):
    expected = predictor.predict(boxes=boxes).scores
    Image.fromarray(image).save(tmp_path / "image.png")
    for given, channels in [
        (tmp_path / "image.png", "RGB"),
        (str(tmp_path / "image.png"), "RGB"),
        (Image.fromarray(image), "RGB"),
        (torch.from_numpy(image).permute(2, 0, 1), "RGB"),
        (image[..., ::-1], "BGR"),
    ]:
        predictor.set_image(given, channels=channels)
        torch.testing.assert_close(predictor.predict(boxes=boxes).scores, expected)


def test_gray_arrays(predictor, boxes, image):
    predictor.set_image(np.repeat(image[..., :1], 3, 2))
    expected = predictor.predict(boxes=boxes).scores
    predictor.set_image(image[..., 0])
    torch.testing.assert_close(predictor.predict(boxes=boxes).scores, expected)


@pytest.mark.parametrize("shape", [(90, 120, 4), (0, 5, 3), (3, 90, 120), (5,)])
def test_images_of_another_shape(predictor, shape):
    with pytest.raises(ValueError, match="shape"):
        predictor.set_image(np.zeros(shape, dtype=np.uint8))


def test_many_calls_equal_single_runs(predictor, boxes, image):
    for count, words in [(7, WORDS), (2, ["cup", "bread"]), (1, WORDS[:3]), (4, WORDS)]:
        found = predictor.predict(boxes=boxes[:count], vocabulary=words)
        alone = RegionSpotPredictor(tiny_model())
        alone.set_image(image)
        expected = alone.predict(boxes=boxes[:count], vocabulary=words)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=0)
        assert predictor.vocabulary == words


def test_mixed_prompts_are_one_question(predictor, boxes):
    mask = np.zeros((1, 90, 120), dtype=bool)
    mask[0, 20:50, 30:70] = True
    points, labels = [[[60, 60], [20, 50]], [[80, 30]]], [[1, 0], [1]]
    found = predictor.predict(boxes=boxes[:2], points=points, point_labels=labels, masks=mask)
    assert found.region_index.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(found.pred_boxes.tensor[:2], torch.from_numpy(boxes[:2]))
    assert found.pred_boxes.tensor[4].tolist() == [30, 20, 70, 50]
    # Every region sees the others: by itself, each has another score.
    alone = predictor.predict(masks=mask)
    assert (alone.scores[0] - found.scores[4]).abs() > 1e-6


def test_boxes_of_points_are_those_of_their_masks(predictor):
    found = predictor.predict(points=[[60, 60], [80, 30]])
    for box, mask in zip(found.pred_boxes.tensor, found.pred_masks):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (box - torch.stack(expected)).abs().max() <= 1


def test_region_embeddings_have_unit_length(predictor, boxes):
    embeddings = predictor.region_embeddings(boxes=boxes)
    assert embeddings.shape == (7, 40)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(7))


def test_attention_maps_cover_the_grid(predictor, boxes):
    maps = predictor.attention_maps(boxes=boxes)
    assert maps.shape == (7, 4, 4)
    # The class token takes the rest.
    assert (maps > 0).all() and (maps.sum((1, 2)) < 1).all()


def test_zero_boxes(predictor):
    found = predictor.predict(boxes=[])
    assert len(found) == 0 and found.pred_masks.shape == (0, 90, 120)


def test_calls_out_of_order_say_what_is_missing():
    predictor = RegionSpotPredictor(tiny_model())
    with pytest.raises(ValueError, match="set_image"):
        predictor.predict(boxes=[[0, 0, 1, 1]], vocabulary=WORDS)
    predictor.set_image(np.zeros((9, 9, 3), dtype=np.uint8))
    predictor.vocabulary = []
    with pytest.raises(ValueError, match="vocabulary"):
        predictor.predict(boxes=[[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="boxes=, points= or masks="):
        predictor.predict(vocabulary=WORDS)
    with pytest.raises(ValueError, match="topk is 0"):
        predictor.predict(boxes=[[0, 0, 1, 1]], topk=0)
    with pytest.raises(ValueError, match="twice"):
        predictor.predict(boxes=[[0, 0, 1, 1]], vocabulary=["cat", "Cat"])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_predict_batch_equals_single_runs(predictor, boxes, image, batch_size):
    images = [image, image[:40, :70].copy(), image, image[::-1].copy(), image]
    regions = [boxes[:3], [[5, 5, 60, 30]], [], boxes, boxes[4:]]
    results = predictor.predict_batch(iter(images), regions, topk=2, batch_size=batch_size)
    assert [found.image_size for found in results] == [i.shape[:2] for i in images]
    # The image that was set before is still the one that is asked.
    before = predictor.predict(boxes=boxes[:3], topk=2)
    assert torch.equal(results[0].scores, before.scores) or batch_size > 1
    for picture, region, found in zip(images, regions, results):
        predictor.set_image(picture)
        alone = predictor.predict(boxes=region, topk=2)
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-5, rtol=0)
        assert torch.equal(found.pred_classes, alone.pred_classes)
        assert torch.equal(found.region_index, alone.region_index)
        assert torch.equal(found.pred_boxes.tensor, alone.pred_boxes.tensor)
        assert torch.equal(found.pred_masks, alone.pred_masks)


def test_predict_batch_names_the_image_that_is_wrong(predictor, boxes, image):
    fine = [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match="Image 1: Box 0 is .* outside"):
        predictor.predict_batch([image, image], [fine, [[500, 2, 600, 4]]])
    with pytest.raises(ValueError, match="Image 2: The image is of the type NoneType"):
        predictor.predict_batch([image, image, None], [fine, fine, fine])
    with pytest.raises(ValueError, match="2 images but boxes for 1"):
        predictor.predict_batch([image, image], [fine])
    with pytest.raises(ValueError, match="more images than the 1"):
        predictor.predict_batch((image for _ in range(2)), [fine])
    with pytest.raises(ValueError, match="1 images but boxes for 2"):
        predictor.predict_batch((image for _ in range(1)), [fine, fine])
    with pytest.raises(ValueError, match="batch_size is 0"):
        predictor.predict_batch([image], [fine], batch_size=0)
    assert predictor.predict_batch([], []) == []


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "type NoneType"),
        ([[1, 2], [3, 4]], "type list"),
        (np.random.default_rng(0).random((9, 9, 3)), "Multiply by 255"),
        (np.full((9, 9, 3), -1), "from -1 to -1; 0..255 is expected"),
        (np.full((9, 9, 3), np.nan), "0..255 is expected"),
        (torch.full((3, 9, 9), 256), "0..255 is expected"),
    ],
)
def test_impossible_images_are_refused(predictor, given, message):
    with pytest.raises(ValueError, match=message):
        predictor.set_image(given)


def test_channels_that_do_not_exist(predictor, image):
    with pytest.raises(ValueError, match="channels is 'bgr'"):
        predictor.set_image(image, channels="bgr")


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16])
def test_pixels_of_any_type(predictor, boxes, image, dtype):
    expected = predictor.predict(boxes=boxes).scores
    predictor.set_image(image.astype(dtype))
    found = predictor.predict(boxes=boxes).scores
    # Resizing rounds only integers.
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-3 if np.issubdtype(dtype, np.floating) else 1e-6
    )


def test_the_image_may_be_drawn_on_afterwards(predictor, boxes, image):
    expected = predictor.region_embeddings(boxes=boxes)
    for given in (image.copy(), torch.from_numpy(image).permute(2, 0, 1).clone()):
        predictor.set_image(given)
        given[:] = 0
        assert torch.equal(predictor.region_embeddings(boxes=boxes), expected)


def test_a_vocabulary_that_was_refused_is_refused_again(predictor, boxes):
    for _ in range(2):
        with pytest.raises(ValueError, match="twice"):
            predictor.predict(boxes=boxes, vocabulary=["cat", "cat"])
    assert predictor.vocabulary == WORDS
    for _ in range(2):
        with pytest.raises(ValueError, match="Name 1 of the vocabulary is 3"):
            predictor.predict(boxes=boxes, vocabulary=["cat", 3])


def test_a_config_bounds_the_pixels_of_image_files(tmp_path, vocabularies):
    cfg = tiny_cfg()
    cfg.INPUT.MAX_PIXELS = 20 * 30
    predictor = RegionSpotPredictor(cfg)
    for height, name in ((20, "fits.png"), (21, "large.png")):
        Image.new("RGB", (30, height)).save(tmp_path / name)
    predictor.set_image(tmp_path / "fits.png")
    with pytest.raises(OSError, match="30 x 21 pixels .* 600.*INPUT.MAX_PIXELS"):
        predictor.set_image(tmp_path / "large.png")
    with pytest.raises(OSError, match="INPUT.MAX_PIXELS"):
        predictor.predict_batch([tmp_path / "large.png"], [[]], vocabulary=WORDS)
