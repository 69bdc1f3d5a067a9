"""The shipped head: it loads, gives the same answers every time, and knows a cat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager
from safetensors.torch import load_file

from regionspot_d2 import RegionSpotPredictor, add_regionspot_config
from regionspot_d2.engine.linear_fit import RegionTargets, fit_linear_head
from regionspot_d2.modeling import LinearRegionHead, PooledRegionHead
from regionspot_d2.modeling.embedded import known_vocabulary
from regionspot_d2.modeling.weights import WeightsNotFoundError

ROOT = Path(__file__).parent.parent
SHIPPED = "embedded://mini_head.safetensors"


class Grid:
    """What the heads ask of a vision-language model."""

    grid_size, num_prefix_tokens, image_dim, text_dim = (4, 4), 0, 12, 8

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[..., :8]


def boxes(count: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(count)).sort(1).values
    return corners.flatten(1)


def linear_head() -> LinearRegionHead:
    return LinearRegionHead(vision_language=Grid())


def test_untrained_it_is_the_baseline():
    image = torch.randn(2, 16, 12)
    regions = [boxes(3), boxes(5)]
    expected = PooledRegionHead(vision_language=Grid())([], image, regions)
    for found, wanted in zip(linear_head()([], image, regions), expected):
        torch.testing.assert_close(found, wanted)


def test_regions_do_not_see_each_other():
    head = linear_head()
    torch.nn.init.normal_(head.correction.weight)
    image, regions = torch.randn(1, 16, 12), boxes(6)
    [together] = head([], image, [regions])
    [alone] = head([], image, [regions[2:3]])
    torch.testing.assert_close(alone, together[2:3])
    assert head([], image, [regions[:0]])[0].shape == (0, 8)


@pytest.mark.parametrize("count", [10, 60])  # fewer and more than there are features
def test_fit_learns_what_is_linear_and_is_exact(count):
    torch.manual_seed(0)
    head = linear_head()
    [(baseline, features)] = head.describe(torch.randn(1, 16, 12), [boxes(count)])
    targets = torch.nn.functional.normalize(torch.randn(count, 8), dim=1)
    data = RegionTargets(baseline, features, targets, torch.ones(count))

    def distance(ridge: float) -> float:
        fit_linear_head(head, data, share=0.5, prior=0.4, ridge=ridge, blocks=[8, 4, 10])
        return (head.embed(baseline, features) - targets).norm().item()

    far, near = distance(1e6), distance(1e-6)
    assert near < 0.8 * far
    first = head.correction.weight.clone()
    distance(1e-6)
    assert torch.equal(head.correction.weight, first)


def test_regions_of_no_weight_do_not_matter():
    head = linear_head()
    [(baseline, features)] = head.describe(torch.randn(1, 16, 12), [boxes(30)])
    data = RegionTargets(baseline, features, torch.randn(30, 8), torch.arange(30).lt(20).float())
    fit_linear_head(head, data, share=0.5, prior=0.4, ridge=1.0, blocks=[8, 4, 10])
    weight = head.correction.weight.clone()
    fit_linear_head(
        head,
        RegionTargets(*(p[:20] for p in data)),
        share=0.5,
        prior=0.4,
        ridge=1.0,
        blocks=[8, 4, 10],
    )
    torch.testing.assert_close(head.correction.weight, weight)


def test_blocks_must_fit():
    data = RegionTargets(torch.ones(3, 8), torch.ones(3, 22), torch.ones(3, 8), torch.ones(3))
    with pytest.raises(ValueError, match="add up to 12; there are 22"):
        fit_linear_head(linear_head(), data, share=0.5, prior=0.4, ridge=1.0, blocks=[8, 4])


def test_shipped_file():
    path = Path(PathManager.get_local_path(SHIPPED))
    assert path.stat().st_size <= 15_000_000
    head = load_file(path)
    assert set(head) == {"share", "correction.weight", "correction.bias"}
    assert all(part.dtype == torch.float16 and part.isfinite().all() for part in head.values())


@pytest.fixture(scope="module")
def predictor() -> RegionSpotPredictor:
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/mini/regionspot_mini.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    try:
        return RegionSpotPredictor(cfg, vocabulary=known_vocabulary("coco"))
    except WeightsNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def chelsea():
    data = pytest.importorskip("skimage.data")
    return data.chelsea()


@pytest.fixture
def demo_photos(monkeypatch) -> dict[str, Path]:
    for package in ("skimage", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    from photos import photo_paths

    return {path.name: path for path in photo_paths()}


CAT_BOX = [[30.0, 10.0, 440.0, 295.0]]


def test_cat(predictor, chelsea):
    # No training photo.
    predictor.set_image(chelsea)
    found = predictor.predict(boxes=CAT_BOX)
    assert predictor.vocabulary[int(found.pred_classes[0])] == "cat"


def test_same_answer_every_time_and_with_any_number_of_threads(predictor, chelsea):
    def embed(threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            predictor.set_image(chelsea)
            return predictor.region_embeddings(boxes=CAT_BOX)
        finally:
            torch.set_num_threads(before)

    first = embed(1)
    assert torch.equal(embed(1), first)
    torch.testing.assert_close(embed(2), first, atol=1e-4, rtol=0)


def test_localizer_rests_until_a_mask_is_needed(predictor, chelsea, monkeypatch):
    calls = []
    encode = predictor.model.localizer.encode_image
    monkeypatch.setattr(
        predictor.model.localizer, "encode_image", lambda images: calls.append(1) or encode(images)
    )
    predictor.set_image(chelsea)
    predictor.predict(boxes=CAT_BOX)
    assert not calls
    predictor.predict(points=[[230.0, 130.0]])
    assert calls == [1]


def ellipse(box: list[float], size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) of the ellipse that fits the box."""
    x0, y0, x1, y1 = box
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    return (2 * x - x0 - x1) ** 2 / (x1 - x0) ** 2 + (2 * y - y0 - y1) ** 2 / (y1 - y0) ** 2 <= 1


def cross(box: list[float]) -> list[list[float]]:
    """The middle of the box, and the four points halfway from there to its sides."""
    x0, y0, x1, y1 = box
    shares = ((0.5, 0.5), (0.25, 0.5), (0.75, 0.5), (0.5, 0.25), (0.5, 0.75))
    return [[x0 + u * (x1 - x0), y0 + v * (y1 - y0)] for u, v in shares]


def test_box_mask_and_points_of_a_large_object_give_the_same_name(predictor, demo_photos):
    compared = 0
    for name, regions in json.loads((ROOT / "demo/boxes.json").read_text()).items():
        predictor.set_image(demo_photos[name])
        size = predictor.image_size
        for box in regions["boxes"]:
            if (box[2] - box[0]) * (box[3] - box[1]) <= size[0] * size[1] / 10:
                continue
            compared += 1
            found = predictor.predict(
                boxes=[box],
                points=[cross(box), cross(box)[:1]],
                masks=[ellipse(box, size)],
                vocabulary=known_vocabulary("lvis"),
            )
            names = [predictor.vocabulary[i] for i in found.pred_classes]
            assert len(set(names)) == 1, f"{name}, {box}: {names}"
    assert compared == 9
