"""Zoom: regions seen in views of the image, whatever their order, number and company."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor

from regionspot_d2 import RegionSpotPredictor, wrap
from regionspot_d2.modeling import BoxPrompts, RegionSpot
from regionspot_d2.modeling.prompts import MaskPrompts
from regionspot_d2.modeling.region_head import PooledRegionHead
from regionspot_d2.modeling.views import ViewFinder, Zoom

from . import tiny

pytestmark = pytest.mark.usefixtures("vocabularies")

PETS = tiny.WORDS["regionspot_pets"]


def random_image(seed: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def random_boxes(seed: int, count: int, height: int, width: int, largest: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, 4, generator=generator)
    size = u[:, :2] * largest
    start = u[:, 2:] * (1 - size)
    return torch.cat([start, start + size], dim=1) * torch.tensor([width, height] * 2)


def embed(model: RegionSpot, image: Tensor, boxes: Tensor, zoom: float) -> Tensor:
    encoded = model.encode([image])
    with torch.no_grad():
        [answer] = model.answer(encoded, [BoxPrompts(Boxes(boxes))], with_masks=False, zoom=zoom)
    return answer.embeddings


def pooled_model(**attributes: object) -> RegionSpot:
    """A model whose regions do not see each other."""
    model = tiny.tiny_model(**attributes)
    model.region_head = PooledRegionHead(vision_language=model.vision_language)
    return model


def count_views(model: RegionSpot) -> list[int]:
    """Counts the images of each later call of the image tower."""
    counts: list[int] = []
    model.vision_language.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    return counts


@pytest.mark.parametrize(
    ("box", "zoom", "view"),
    [
        ((100, 100, 160, 130), 2, (70, 55, 190, 175)),
        ((100, 100, 160, 130), 1, (100, 85, 160, 145)),
        # At least 48 pixels, also around a box without area.
        ((100, 100, 110, 104), 2, (81, 78, 129, 126)),
        ((100, 100, 100, 100), 2, (76, 76, 124, 124)),
        # Moved inside the image, not cut.
        ((0, 0, 60, 30), 2, (0, 0, 120, 120)),
        ((270, 150, 300, 200), 2, (200, 100, 300, 200)),
        # Cut where it is larger than the image.
        ((20, 20, 220, 60), 2, (0, 0, 300, 200)),
        ((40, 20, 160, 60), 2, (0, 0, 240, 200)),
        # Outside the image: what counts is the part inside, or the nearest edge.
        ((-500, 50, 40, 80), 1, (0, 41, 48, 89)),
        ((900, 900, 950, 950), 2, (252, 152, 300, 200)),
    ],
)
def test_the_view_of_a_region_is_a_square_around_it(box, zoom, view):
    find = ViewFinder(Zoom(zoom, 64), (200, 300), 1)
    views, places = find(Boxes(torch.tensor([box], dtype=torch.float)))
    assert views == [view] and places.tolist() == [0]


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (47, 300), (300, 47), (48, 48)])
def test_the_views_of_tiny_images_lie_inside(size):
    boxes = Boxes(random_boxes(0, 200, *size))
    for count in (1, 200):
        views, _ = ViewFinder(Zoom(2, 64), size, count)(boxes)
        for x0, y0, x1, y1 in views:
            assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]


@pytest.mark.parametrize("max_views", [1, 7, 42, 64, 300])
@pytest.mark.parametrize("size", [(480, 640), (1000, 200), (333, 333)])
def test_many_regions_share_a_bounded_number_of_views_that_hold_them(size, max_views):
    find = ViewFinder(Zoom(2, max_views), size, 5000)
    boxes = random_boxes(1, 5000, *size, largest=0.3)
    views, places = find(Boxes(boxes))
    assert len(views) <= max_views
    seen = torch.tensor(views)[places]
    assert (seen[:, :2] <= boxes[:, :2] + 1).all() and (boxes[:, 2:] <= seen[:, 2:] + 1).all()


def test_small_regions_are_seen_in_small_views():
    find = ViewFinder(Zoom(2, 64), (480, 640), 5000)
    boxes = random_boxes(1, 5000, 480, 640, largest=60 / 640)
    views, places = find(Boxes(boxes))
    sides = torch.tensor([max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in views])[places]
    # A square of at most 120 pixels lies wholly in one of the views of 160 in most places.
    assert (sides <= 161).float().mean() > 0.7 and (sides <= 321).all()
    assert [v for v in find(Boxes(torch.tensor([[0.0, 0, 640, 480]])))[0]] == [(0, 0, 640, 480)]


@pytest.mark.parametrize("zoom", [1, 1.5, 3])
def test_a_region_is_named_as_it_would_be_in_a_crop(zoom):
    model, image = pooled_model(), random_image(0, 150, 210)
    boxes = random_boxes(2, 6, 150, 210, largest=0.4)
    views, places = ViewFinder(Zoom(zoom, 64), (150, 210), 6)(Boxes(boxes))
    expected = []
    for box, place in zip(boxes, places.tolist()):
        x0, y0, x1, y1 = views[place]
        crop = image[:, y0:y1, x0:x1].contiguous()
        expected.append(embed(model, crop, (box - torch.tensor([x0, y0, x0, y0]))[None], zoom=0))
    torch.testing.assert_close(embed(model, image, boxes, zoom), torch.cat(expected))
    assert not torch.allclose(embed(model, image, boxes, 0), torch.cat(expected), atol=1e-3)


@pytest.mark.parametrize("count", [20, 1000])
def test_order_company_and_groups_change_no_answer(count):
    image, other = random_image(0, 180, 240), random_image(1, 90, 60)
    boxes = random_boxes(3, count, 180, 240)
    model = pooled_model(zoom_max_views=30)
    together = embed(model, image, boxes, 2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        embed(model, image, boxes[order], 2), together[order], atol=1e-5, rtol=0
    )
    prompts = [BoxPrompts(Boxes(random_boxes(4, 3, 90, 60))), BoxPrompts(Boxes(boxes))]
    _, answer = model.answer(model.encode([other, image]), prompts, with_masks=False, zoom=2)
    torch.testing.assert_close(answer.embeddings, together, atol=1e-5, rtol=0)
    model.max_regions = 7
    torch.testing.assert_close(embed(model, image, boxes, 2), together, atol=1e-5, rtol=0)
    # Fewer regions of the same kind: each in a square of its own, or all in the pyramid.
    some = torch.arange(1, count, 2)
    if count <= model.zoom_max_views:
        rows = [embed(model, image, box[None], 2) for box in boxes]
        torch.testing.assert_close(torch.cat(rows), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        embed(model, image, boxes[some], 2), together[some], atol=1e-5, rtol=0
    )


def test_the_cost_is_bounded_by_the_number_of_views_and_paid_once():
    model, image = pooled_model(zoom_max_views=30), random_image(0, 240, 320)
    counts = count_views(model)
    predictor = RegionSpotPredictor(model)
    model.zoom = 2.0
    predictor.set_image(image)
    assert counts == []
    boxes = random_boxes(5, 12, 240, 320, largest=0.3)
    predictor.predict(boxes=boxes, vocabulary=PETS)
    assert sum(counts) == 12 and max(counts) <= 8
    predictor.predict(boxes=boxes, vocabulary=tiny.WORDS["regionspot_food"])
    predictor.predict(boxes=boxes[3:5], vocabulary=PETS)
    assert sum(counts) == 12
    counts.clear()
    predictor.predict(boxes=random_boxes(6, 1000, 240, 320))
    assert 5 < sum(counts) <= 30
    counts.clear()
    predictor.predict(boxes=boxes, zoom=0)
    predictor.predict(boxes=boxes[:2], zoom=0)
    assert counts == [1]


def test_regions_of_one_view_see_each_other_and_no_others():
    model, image = tiny.tiny_model(), random_image(0, 300, 300)
    # Two boxes in one corner share a view, as long as both are smaller than the smallest view.
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 10, 24], [200, 200, 290, 260]])
    together = embed(model, image, boxes, 2)
    torch.testing.assert_close(embed(model, image, boxes[:2], 2), together[:2])
    torch.testing.assert_close(embed(model, image, boxes[2:], 2), together[2:])
    assert not torch.allclose(embed(model, image, boxes[:1], 2), together[:1], atol=1e-4)


def test_points_and_masks_are_seen_closely_too():
    predictor = RegionSpotPredictor(tiny.tiny_model(), vocabulary=PETS)
    predictor.set_image(random_image(0, 150, 210))
    masks = np.zeros((2, 150, 210), dtype=bool)
    masks[0, 20:50, 30:70] = masks[1, 100:140, 100:130] = True
    found = predictor.predict(masks=masks, zoom=2)
    assert len(found) == 2
    whole = predictor.predict(masks=masks)
    assert not torch.allclose(found.scores, whole.scores, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes.tensor, whole.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, whole.pred_masks)
    mixed = predictor.predict(boxes=[[5, 5, 60, 40]], points=[[100, 90]], masks=masks, zoom=2)
    alone = predictor.predict(points=[[100, 90]], zoom=2)
    assert len(mixed) == 4
    torch.testing.assert_close(mixed.pred_boxes.tensor[1], alone.pred_boxes.tensor[0])
    model, encoded = predictor.model, predictor.model.encode([random_image(0, 150, 210)])
    prompts = MaskPrompts(torch.from_numpy(masks))
    [answer] = model.answer(encoded, [prompts], with_masks=False, zoom=2)
    assert answer.embeddings.shape == (2, model.vision_language.text_dim)


def test_no_regions():
    model = tiny.tiny_model()
    assert embed(model, random_image(0, 60, 80), torch.zeros(0, 4), 2).shape == (0, 40)
    predictor = RegionSpotPredictor(model, vocabulary=PETS)
    results = predictor.predict_batch(
        [random_image(0, 60, 80), random_image(1, 90, 60)], [[], [[3, 4, 40, 50]]], zoom=2
    )
    assert [len(found) for found in results] == [0, 1]


@pytest.mark.parametrize("in_training", [False, True])
def test_a_head_can_be_trained_with_zoom(in_training):
    model = tiny.tiny_model(zoom=2.0, zoom_in_training=in_training).train()
    # Without dropout, so that losses can be compared.
    for module in model.region_head.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    targets = Instances((120, 160))
    targets.gt_boxes = Boxes(random_boxes(0, 6, 120, 160, largest=0.3))
    targets.gt_classes = torch.tensor([0, 1, 2, 0, 1, 2])
    x = {"image": random_image(0, 120, 160), "instances": targets, "dataset_name": None}
    x["dataset_name"] = "regionspot_pets"
    counts = count_views(model)
    optimizer = torch.optim.Adam(model.region_head.parameters(), lr=1e-4)
    losses = []
    for _ in range(8):
        loss = model([x])["loss_cls"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None for p in model.region_head.parameters())
    assert sum(counts) == (8 * 6 if in_training else 8)
    # An image without regions still gives every parameter a gradient.
    optimizer.zero_grad(set_to_none=True)
    model([{**x, "instances": targets[:0]}])["loss_cls"].backward()
    assert all(p.grad is not None for p in model.region_head.parameters())


def test_every_door_uses_the_zoom_of_the_config(tiny_models):
    cfg = tiny.tiny_cfg()
    cfg.DATASETS.TEST = ("regionspot_pets",)
    cfg.merge_from_list(["MODEL.ZOOM", 2.0, "MODEL.ZOOM_MAX_VIEWS", 5])
    model = build_model(cfg).eval()
    image, boxes = random_image(0, 120, 160), random_boxes(0, 4, 120, 160, largest=0.3)
    detected = Instances((120, 160), pred_boxes=Boxes(boxes), scores=torch.ones(4))
    expected = model.score(embed(model, image, boxes, 2), PETS).softmax(1).amax(1)

    [found] = model.inference([{"image": image}], [detected])
    best = found["instances"]
    kept = [float(best.scores[best.region_index == i].max()) for i in range(4)]
    torch.testing.assert_close(torch.tensor(kept), expected)

    predictor = RegionSpotPredictor(model, vocabulary=PETS)
    predictor.set_image(image)
    torch.testing.assert_close(predictor.predict(boxes=boxes).scores, expected)
    [batch] = predictor.predict_batch([image], [boxes])
    torch.testing.assert_close(batch.scores, expected)

    class Detector(torch.nn.Module):
        def forward(self, batched_inputs):
            return [{"instances": detected}]

    [wrapped] = wrap(Detector(), model, vocabulary=PETS, input_format="RGB")([{"image": image}])
    scores = wrapped["instances"].scores
    torch.testing.assert_close(scores, expected.sort(descending=True).values)


@pytest.mark.parametrize("zoom", [0.5, -1, math.nan, math.inf, True, "2", [2]])
def test_a_zoom_that_is_no_zoom(zoom):
    predictor = RegionSpotPredictor(tiny.tiny_model(), vocabulary=PETS)
    predictor.set_image(random_image(0, 60, 80))
    with pytest.raises(ValueError, match="zoom is .*; it must be 0 .* or at least 1"):
        predictor.predict(boxes=[[3, 4, 40, 50]], zoom=zoom)


@pytest.mark.parametrize("zoom", [2, np.float32(2), np.int64(2)])
def test_a_zoom_of_any_type_of_numbers(zoom):
    predictor = RegionSpotPredictor(tiny.tiny_model(), vocabulary=PETS)
    predictor.set_image(random_image(0, 60, 80))
    found = predictor.predict(boxes=[[3, 4, 40, 50]], zoom=zoom)
    assert torch.equal(found.scores, predictor.predict(boxes=[[3, 4, 40, 50]], zoom=2.0).scores)


@pytest.mark.parametrize(("key", "value"), [("MODEL.ZOOM", 0.3), ("MODEL.ZOOM_MAX_VIEWS", 0)])
def test_a_config_of_impossible_views(tiny_models, key, value):
    cfg = tiny.tiny_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=f"{key} is {value}; it must be"):
        build_model(cfg)
