"""The shipped head: it loads, gives the same answers every time, and knows a cat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager
from safetensors.torch import load_file, save_file
from torch import nn

from regionspot_d2 import RegionSpotPredictor, add_regionspot_config
from regionspot_d2.checkpoint import RegionSpotCheckpointer
from regionspot_d2.data.datasets.vocabularies import known_vocabulary
from regionspot_d2.engine.config import ConfigError, load_config
from regionspot_d2.files import WeightsNotFoundError
from regionspot_d2.mini import KernelRegionHead
from regionspot_d2.mini.fit import RegionTargets, fit_kernel_head
from regionspot_d2.modeling import PooledRegionHead

ROOT = Path(__file__).parents[2]
SHIPPED = "embedded://mini_head.safetensors"


class Grid:
    """What the heads ask of a vision-language model."""

    grid_size, num_prefix_tokens, image_dim, text_dim = (4, 4), 0, 12, 8

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[..., :8]


def boxes(count: int) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(count)).sort(1).values
    return corners.flatten(1)


def untrained(centers: int = 0) -> KernelRegionHead:
    return KernelRegionHead(vision_language=Grid(), num_centers=centers)


def fit(head: KernelRegionHead, data: RegionTargets, **changes: float) -> KernelRegionHead:
    settings = {"share": 0.5, "ridge": 1.0, "width": 0.2, "radial_share": 0.5, "reserve": 0.0}
    settings |= changes
    fit_kernel_head(head, data, blocks=[8, 4, 10], **settings)
    return head


def some_regions(head: KernelRegionHead, count: int) -> RegionTargets:
    generator = torch.Generator().manual_seed(count)
    image = torch.randn(1, 16, 12, generator=generator)
    [(baseline, descriptions)] = head.describe(image, [boxes(count)])
    targets = torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)
    return RegionTargets(baseline, descriptions, targets, torch.ones(count))


@pytest.mark.parametrize("centers", [0, 7])
def test_untrained_it_is_the_baseline(centers):
    image = torch.randn(2, 16, 12)
    regions = [boxes(3), boxes(5)]
    expected = PooledRegionHead(vision_language=Grid())([], image, regions)
    for found, wanted in zip(untrained(centers)([], image, regions), expected):
        torch.testing.assert_close(found, wanted)


def test_regions_do_not_see_each_other():
    head = untrained()
    fit(head, some_regions(head, 20))
    image, regions = torch.randn(1, 16, 12), boxes(6)
    [together] = head([], image, [regions])
    [alone] = head([], image, [regions[2:3]])
    torch.testing.assert_close(alone, together[2:3])
    assert head([], image, [regions[:0]])[0].shape == (0, 8)


def distance(head: KernelRegionHead, data: RegionTargets) -> float:
    return (head.embed(data.baseline, data.descriptions) - data.targets).norm().item()


def test_fit_goes_from_the_baseline_to_the_targets_and_is_exact():
    head = untrained()
    data = some_regions(head, 60)
    far = distance(fit(head, data, ridge=1e9), data)
    first = head.embed(data.baseline, data.descriptions)
    torch.testing.assert_close(first, data.baseline, atol=1e-5, rtol=0)
    linear = distance(fit(head, data, ridge=1e-6, radial_share=0.0), data)
    # No linear function of 22 numbers gives 60 random targets, but they can be remembered.
    assert 1.0 < linear < 0.9 * far
    assert distance(fit(head, data, ridge=1e-6), data) < 0.05
    weights = [part.clone() for part in head.state_dict().values()]
    fit(head, data, ridge=1e-6)
    assert all(map(torch.equal, weights, head.state_dict().values()))


def test_what_is_far_from_all_training_regions_gets_only_the_linear_part():
    head = untrained()
    data = some_regions(head, 30)
    fit(head, data, width=50.0)
    far = data.descriptions + 1e3
    with torch.no_grad():
        linear = head.share * data.baseline + head.correction((far - head.mean) / head.scale)
    expected = torch.nn.functional.normalize(linear, dim=1)
    torch.testing.assert_close(head.embed(data.baseline, far), expected)


def test_names_of_training_are_held_back_where_nothing_is_known():
    head = untrained()
    data = some_regions(head, 30)
    name = data.targets[:1]
    data = data._replace(targets=name.expand(30, -1))
    fit(head, data, reserve=2.0, ridge=1e-6)
    assert distance(head, data) < 0.05
    lacking = (name - 0.5 * data.baseline).mean(0)
    torch.testing.assert_close(head.correction.bias, -2 * lacking)
    fit(head, data, reserve=2.0, ridge=1e9)
    away = (head.embed(data.baseline, data.descriptions) * name).sum(1)
    assert (away < (data.baseline * name).sum(1)).all()


def test_regions_of_no_weight_do_not_matter():
    head = untrained()
    data = some_regions(head, 30)
    weights = torch.arange(30).lt(20).float()
    fit(head, data._replace(weights=weights))
    found = head.embed(data.baseline, data.descriptions)
    fit(head, RegionTargets(*(part[:20] for part in data)))
    torch.testing.assert_close(head.embed(data.baseline, data.descriptions), found)
    with pytest.raises(ValueError, match="no region of positive weight"):
        fit(head, data._replace(weights=torch.zeros(30)))


def test_a_single_region_can_be_fitted_to():
    head = untrained()
    data = some_regions(head, 1)
    fit(head, data, ridge=1e-6)
    assert distance(head, data) < 0.05


def test_blocks_must_fit():
    head = untrained()
    with pytest.raises(ValueError, match="add up to 12; the descriptions have 22"):
        fit_kernel_head(
            head,
            some_regions(head, 3),
            share=0.5,
            ridge=1,
            width=1,
            radial_share=0,
            reserve=0,
            blocks=[8, 4],
        )


def test_shipped_file():
    path = Path(PathManager.get_local_path(SHIPPED))
    assert path.stat().st_size <= 15_000_000
    head = load_file(path)
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/mini/regionspot_mini.yaml"))
    assert len(head["centers"]) == cfg.MODEL.REGION_HEAD.NUM_CENTERS
    assert set(head) == set(untrained().state_dict())
    assert all(part.dtype == torch.float16 and part.isfinite().all() for part in head.values())


@pytest.mark.parametrize(
    "centers, message", [(7, "NUM_CENTERS of a Kernel"), (-1, "is -1; it must")]
)
def test_another_number_of_centers_than_the_file_has_is_an_error(centers, message):
    with pytest.raises(ValueError, match=message):
        model = nn.ModuleDict({"region_head": untrained(centers)})
        RegionSpotCheckpointer(model).load(SHIPPED)


def test_a_file_with_the_former_buffer_name_loads(tmp_path):
    head = load_file(PathManager.get_local_path(SHIPPED))
    count = len(head["centers"])
    former = {name.replace("centers", "centres"): part for name, part in head.items()}
    path = tmp_path / "former.safetensors"
    save_file(former, path)

    def empty() -> KernelRegionHead:
        real = Grid()
        real.image_dim, real.text_dim = head["mean"].numel() - 10, head["memory"].shape[0]
        return KernelRegionHead(vision_language=real, num_centers=count)

    for load in (
        lambda model: RegionSpotCheckpointer(model).load(str(path)),
        lambda model: model["region_head"].load_state_dict(dict(former)),
    ):
        model = nn.ModuleDict({"region_head": empty()})
        load(model)
        found = model["region_head"].state_dict()
        assert all(torch.equal(found[name], part.float()) for name, part in head.items())


def test_the_former_config_key_is_an_error_that_names_the_new_one(tmp_path):
    former = "MODEL.REGION_HEAD.NUM_CENTRES"
    message = f"Key {former} was renamed to MODEL.REGION_HEAD.NUM_CENTERS; please update"
    with pytest.raises(ConfigError, match=message) as error:
        load_config("", [former, "7"], training=False)
    assert len(str(error.value).splitlines()) == 1
    path = tmp_path / "old.yaml"
    path.write_text("MODEL:\n  REGION_HEAD:\n    NUM_CENTRES: 7\n")
    with pytest.raises(ConfigError, match=f"old.yaml: .*{message}"):
        load_config(str(path), training=False)


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
    encode = predictor.model.localizer.encode_images
    monkeypatch.setattr(
        predictor.model.localizer, "encode_images", lambda images: calls.append(1) or encode(images)
    )
    predictor.set_image(chelsea)
    # Its masks of points are poor, so it is not asked for them either.
    predictor.predict(boxes=CAT_BOX, points=[[230.0, 130.0]])
    assert not calls
    monkeypatch.setattr(predictor.model, "with_masks", True)
    predictor.predict(boxes=CAT_BOX)
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
    same_points = []
    for name, regions in json.loads((ROOT / "demo/boxes.json").read_text()).items():
        predictor.set_image(demo_photos[name])
        size = predictor.image_size
        for box in regions["boxes"]:
            if (box[2] - box[0]) * (box[3] - box[1]) <= size[0] * size[1] / 10:
                continue
            found = predictor.predict(
                boxes=[box],
                points=[cross(box), cross(box)[:1]],
                masks=[ellipse(box, size)],
                vocabulary=known_vocabulary("lvis"),
            )
            by_box, five, one, by_mask = (predictor.vocabulary[i] for i in found.pred_classes)
            assert by_box == by_mask, f"{name}, {box}: {by_box}, by its mask {by_mask}"
            same_points.append((five == by_box, one == by_box))
    # One point stands for a fifth of the photo, which is only a part of the largest objects.
    assert len(same_points) == 9
    from_five, from_one = map(sum, zip(*same_points))
    assert from_five >= 8 and from_one >= 6
