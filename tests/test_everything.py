"""Every region of an image: found without prompts, named once, and as panoptic segments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.modeling import BoxPrompts, Localizer, PointPrompts, PooledRegionHead
from regionspot_d2.modeling.everything import Search, distinct_regions, regions_of_points
from regionspot_d2.modeling.grouping import grouped_boxes
from regionspot_d2.modeling.panoptic import panoptic_segments
from regionspot_d2.modeling.views import ViewFinder, Zoom, pyramid_views

from .tiny import golden, tiny_model

pytestmark = pytest.mark.usefixtures("vocabularies")

WORDS = ["cat", "dog", "bird", "bus"]
# Random masks are neither good nor stable.
LOOSE = Search(
    by_masks=True,
    points_per_side=3,
    pred_iou_thresh=-10,
    stability_thresh=0,
    box_nms_thresh=1,
    name_nms_thresh=1,
)


class Blobs(Localizer):
    """A localizer that is not SAM: a point's region is a disk around it."""

    token_dim = 2

    def encode_images(self, images):
        return [None] * len(images)

    def decode(self, embedding, image_size, prompts, *, with_masks):
        assert isinstance(prompts, PointPrompts)
        points, (height, width) = prompts.points[:, 0], image_size
        ys = torch.arange(height)[:, None] + 0.5
        xs = torch.arange(width)[None] + 0.5
        distance = (xs - points[:, 0, None, None]) ** 2 + (ys - points[:, 1, None, None]) ** 2
        # Steep edges, but for points on the left: their disks grow with the threshold.
        steepness = torch.where(points[:, 0] < width / 2, 0.05, 10.0)
        return points, (100 - distance)[:, None] * steepness[:, None, None, None]

    def full_size_masks(self, mask_logits, image_size, output_size=None):
        return mask_logits[:, 0] > 0


@pytest.fixture
def image() -> np.ndarray:
    return golden()["image"]


@pytest.fixture
def predictor(image) -> RegionSpotPredictor:
    model = tiny_model()
    decoder = model.localizer.mask_decoder
    with torch.no_grad():  # of random weights, the masks are unstable and their IoUs below 0
        decoder.iou_prediction_head.layers[-1].bias += 1.5
        for parameter in decoder.output_hypernetworks_mlps[0].layers[-1].parameters():
            parameter *= 200
    predictor = RegionSpotPredictor(model, vocabulary=WORDS)
    predictor.set_image(image)
    return predictor


def sam_regions(predictor, image, search=LOOSE):
    model = predictor.model
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    [embedding] = model.localizer.encode_images([tensor])
    size = tensor.shape[1:]
    return embedding, regions_of_points(model.localizer, embedding, size, model.device, search)


def test_tokens_and_masks_are_those_of_the_points(predictor, image):
    embedding, found = sam_regions(predictor, image)
    points = torch.tensor([[x, y] for y in (15.0, 45.0, 75.0) for x in (20.0, 60.0, 100.0)])
    prompts = PointPrompts(points[:, None], torch.ones(9, 1, dtype=torch.int64))
    localizer = predictor.model.localizer
    tokens, logits = localizer.decode(embedding, (90, 120), prompts, with_masks=True)
    masks = localizer.full_size_masks(logits, (90, 120))
    assert 1 < len(found.scores) <= 9
    assert (found.scores.diff() <= 0).all() and 0 <= found.scores.min() <= found.scores.max() <= 1
    for token, logit, box in zip(found.tokens, found.mask_logits, found.boxes.tensor):
        place = int((tokens - token).abs().sum(1).argmin())
        torch.testing.assert_close(token, tokens[place])
        torch.testing.assert_close(logit, logits[place])
        ys, xs = masks[place].nonzero().unbind(1)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_no_region_passes(predictor, image):
    search = Search(by_masks=True, points_per_side=2, stability_thresh=1)
    found = predictor.everything(search=search)
    assert len(found) == 0 and found.pred_masks.shape == (0, 90, 120)
    segmentation, segments = predictor.everything(search=search, panoptic=True)
    assert segments == [] and not segmentation.any()


def test_any_localizer_is_asked(image):
    search = Search(points_per_side=4, pred_iou_thresh=0.9, stability_thresh=0.9)
    found = regions_of_points(Blobs(), None, (90, 120), torch.device("cpu"), search)
    # Unstable regions on the left are dropped; it predicts no IoU, which then decides nothing.
    assert len(found.boxes) == 8 and found.tokens[:, 0].min() > 60
    sides = found.boxes.tensor[:, 2:] - found.boxes.tensor[:, :2]
    assert ((sides - 20).abs() <= 1).all() and (found.scores > 0.9).all()


def test_a_name_comes_from_the_token_of_the_mask(predictor, image):
    found = predictor.everything(search=LOOSE)
    _, regions = sam_regions(predictor, image)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    model = predictor.model
    [answer] = model.answer(
        model.encode([tensor]),
        [BoxPrompts(regions.boxes)],
        with_masks=False,
        mask_tokens=[regions.tokens],
    )
    expected = model.name(answer, WORDS, region_scores=regions.scores, topk=1)
    for box, score, name in zip(found.pred_boxes.tensor, found.scores, found.pred_classes):
        here = (expected.pred_boxes.tensor == box).all(1) & (expected.pred_classes == name)
        assert (expected.scores[here] - score).abs().min() < 1e-6
    assert len(found) > 0 and (found.scores.diff() <= 0).all()
    assert found.region_index.tolist() == list(range(len(found)))
    for mask, box in zip(found.pred_masks, found.pred_boxes.tensor):
        ys, xs = mask.nonzero().unbind(1)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_no_two_regions_share_a_name_and_a_place():
    boxes = Boxes(
        torch.tensor(
            [
                [0.0, 0, 100, 100],
                [0, 0, 100, 60],  # overlaps
                [0, 0, 100, 60],  # another name
                [50, 50, 100, 105],  # a part, hardly outside
                [50, 50, 60, 60],  # inside, but so small that it is another object
                [90, 90, 190, 190],  # beside
            ]
        )
    )
    scores, classes = torch.tensor([0.8, 0.7, 0.6, 0.5, 0.4, 0.9]), torch.tensor([0, 0, 1, 0, 0, 0])
    assert distinct_regions(boxes, scores, classes, 0.5).tolist() == [5, 0, 2, 4]
    assert distinct_regions(boxes[:0], scores[:0], classes[:0], 0.5).tolist() == []


def test_how_many_regions_and_names_are_kept(predictor):
    predictor.set_vocabulary([*WORDS, "cup", "bread", "tree", "road", "sky", "hat", "shoe", "lamp"])
    found = predictor.everything(search=Search(by_masks=False))
    assert len(found) > 2
    few = predictor.everything(search=Search(by_masks=False), max_regions=2, topk=3)
    assert few.region_index.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(few.scores[::3], found.scores[:2])
    assert (few.scores[:3].diff() <= 0).all()
    threshold = float(found.scores[1])
    good = predictor.everything(search=Search(by_masks=False), score_thresh=threshold)
    torch.testing.assert_close(good.scores, found.scores[:1])


def test_the_image_is_encoded_once(predictor, image, monkeypatch):
    calls = []
    for part in (predictor.model.localizer.image_encoder, predictor.model.vision_language.model):
        part.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
    predictor.set_image(image)
    encoded = list(calls)
    for _ in range(2):
        predictor.everything(search=LOOSE)
        predictor.everything(search=LOOSE, vocabulary=["cup", "bread"], panoptic=True)
    assert calls == encoded


def test_regions_without_a_localizer(predictor, monkeypatch):
    monkeypatch.setattr(type(predictor.model.localizer), "masks_are_fine", False)
    found = predictor.everything()
    assert len(found) > 1 and (found.scores.diff() <= 0).all()
    boxes = found.pred_boxes.tensor
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([120, 90])).all()
    # Masks are what the localizer makes of the boxes.
    expected = predictor.predict(boxes=boxes).pred_masks
    assert torch.equal(found.pred_masks, expected)


def test_masks_are_found_for_the_regions_that_are_kept(predictor, monkeypatch):
    """Of many candidates a few are left: the localizer sees only these."""
    model, search = predictor.model, Search(by_masks=False)
    model.region_head = PooledRegionHead(vision_language=model.vision_language)
    assert len(predictor.everything(search=search)) > 3
    seen, decode = [], model.localizer.decode

    def count(embedding, size, prompts, **how):
        seen.append(len(prompts))
        return decode(embedding, size, prompts, **how)

    monkeypatch.setattr(model.localizer, "decode", count)
    found = predictor.everything(search=search, max_regions=3)
    assert found.pred_masks.shape[0] == 3
    assert seen and sum(seen) <= 4


def test_cells_that_look_alike_become_boxes():
    cells = torch.zeros(8, 10, 3)
    cells[1:4, 2:6] = torch.tensor([5.0, 0, 0])
    cells[5:8, 7:9] = torch.tensor([0, 5.0, 0])
    cells += 0.01 * torch.rand(cells.shape, generator=torch.Generator().manual_seed(0))
    boxes = grouped_boxes(cells.flatten(0, 1).numpy(), (8, 10)).tolist()
    assert [2, 1, 6, 4] in boxes and [7, 5, 9, 8] in boxes and boxes[-1] == [0, 0, 10, 8]


@pytest.mark.parametrize("size", [(480, 640), (640, 427), (90, 2000), (30, 40)])
def test_regions_are_named_in_the_views_they_were_found_in(size):
    views = pyramid_views(size, 10)
    assert views[0] == (0, 0, size[1], size[0]) and len(views) <= 10
    corners = torch.rand(500, 2, 2, generator=torch.Generator().manual_seed(0)).sort(1).values
    boxes = Boxes((corners * torch.tensor([size[1], size[0]])).view(-1, 4))
    found = ViewFinder(Zoom(1.5, 10), size, len(boxes))(boxes)
    assert set(found.views) <= set(views)


# Panoptic segments


def masks_of(*boxes: tuple[int, int, int, int], size=(40, 50)) -> torch.Tensor:
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = True
    return masks


def instances(masks: torch.Tensor, scores: list[float], classes: list[int]) -> Instances:
    return Instances(
        masks.shape[1:],
        pred_masks=masks,
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes),
    )


def test_overlaps_go_to_the_better_score_and_stuff_is_merged():
    masks = masks_of(
        (0, 0, 50, 20),  # sky
        (10, 10, 30, 30),  # dog: a quarter of it lies under the better cat
        (20, 20, 40, 40),  # cat
        (0, 30, 10, 40),  # sky again
        (21, 21, 32, 32),  # dog, most of it under the cat
        (45, 35, 48, 38),  # dog, too small
    )
    found = instances(masks, [0.5, 0.8, 0.9, 0.4, 0.7, 0.95], [2, 1, 0, 2, 1, 1])
    seg, segments = panoptic_segments(found, {2}, min_area=10, stuff_area_limit=100)
    assert seg.dtype == torch.int32 and seg.shape == (40, 50)
    assert [(s["id"], s["category_id"], s["isthing"]) for s in segments] == [
        (1, 0, True),
        (2, 1, True),
        (3, 2, False),
    ]
    assert [s["area"] for s in segments] == [400, 300, 50 * 20 - 200 + 100]
    assert [s["score"] for s in segments] == pytest.approx([0.9, 0.8, 0.5])
    assert seg[25, 25] == 1 and seg[15, 15] == 2 and seg[35, 5] == seg[5, 5] == 3
    assert seg[36, 46] == 0 and seg[39, 45] == 0
    assert [int((seg == s["id"]).sum()) for s in segments] == [s["area"] for s in segments]
    assert set(seg.unique().tolist()) == {0, 1, 2, 3}


def test_small_stuff_is_dropped():
    found = instances(masks_of((0, 0, 9, 9), (20, 20, 40, 40)), [0.9, 0.5], [1, 0])
    seg, [segment] = panoptic_segments(found, {1}, min_area=10, stuff_area_limit=100)
    assert (
        segment["id"] == 1
        and segment["category_id"] == 0
        and set(seg.flatten().tolist())
        == {
            0,
            1,
        }
    )


@pytest.mark.parametrize("stuff", [[], ["cat", "bus"], WORDS])
def test_panoptic_output_is_consistent_and_can_be_drawn(predictor, image, stuff):
    seg, segments = predictor.everything(search=LOOSE, panoptic=True, stuff=stuff)
    assert seg.shape == (90, 120) and seg.dtype == torch.int32
    ids = [s["id"] for s in segments]
    assert ids == list(range(1, len(ids) + 1)) and set(seg.unique().tolist()) - {0} == set(ids)
    assert all((WORDS[s["category_id"]] in stuff) != s["isthing"] for s in segments)
    names = [s["category_id"] for s in segments if not s["isthing"]]
    assert len(set(names)) == len(names)
    metadata = Metadata(name="words", thing_classes=WORDS, stuff_classes=WORDS)
    drawn = Visualizer(image, metadata).draw_panoptic_seg_predictions(seg, segments)
    assert drawn.get_image().shape == (90, 120, 3)


@pytest.mark.parametrize(
    "question, message",
    [
        ({"stuff": ["sky"]}, "stuff: 'sky' is not in the vocabulary"),
        ({"stuff": "cat"}, "stuff is 'cat'; a list of class names"),
        ({"stuff": None}, "stuff is None; a list"),
        ({"stuff": [["cat"]]}, "is not in the vocabulary"),
        ({"stuff": ["cat"], "panoptic": False}, "panoptic is False"),
        ({"search": {}}, "search is of the type dict; a Search"),
        ({"search": True}, "search is of the type bool; a Search"),
        ({"score_thresh": np.nan}, "score_thresh is nan; a number of at most 1"),
        ({"score_thresh": True}, "score_thresh is True; a number"),
    ],
)
def test_searches_that_cannot_be_meant(predictor, question, message):
    with pytest.raises(ValueError, match=message):
        predictor.everything(**{"panoptic": True, **question})


@pytest.mark.parametrize("name", ["points_per_side", "box_nms_thresh", "name_nms_thresh"])
@pytest.mark.parametrize("value", ["much", 2.5, np.nan, [], -np.inf, 10**9, -4, True])
def test_numbers_that_no_search_has(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        Search(**{name: value})
    for threshold in ["pred_iou_thresh", "stability_thresh"] if value not in (-np.inf, -4) else []:
        with pytest.raises(ValueError, match=f"^{threshold} is "):
            Search(**{threshold: value})
