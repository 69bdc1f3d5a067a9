"""tools/evaluate_robustness.py: what its conditions do to regions, and what it writes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from PIL import Image
from torch import Tensor

from regionspot_d2.engine import RegionSpotTrainer, load_config
from regionspot_d2.modeling import BoxPrompts, RegionSpot

from .shapes import COLORS, shapes_cfg
from .synthetic_lvis import forget
from .tiny import WORDS, golden, tiny_model
from .tools import ROOT, load_tool

with pytest.MonkeyPatch.context() as path:  # of ``python tools/evaluate_robustness.py``
    path.syspath_prepend(ROOT / "tools")
    tool = load_tool("evaluate_robustness")
    from robustness import attack as attacks
    from robustness.conditions import Regions, corrupted, disturbed, loose_boxes, moved_boxes
    from robustness.kinds import ATTACK, BOX_NOISE, CORRUPTIONS, LOOSE_BOXES, STRENGTHS
    from robustness.report import Result, table

PETS = WORDS["regionspot_pets"]


@pytest.fixture
def model(vocabularies: None) -> RegionSpot:
    return tiny_model(with_masks=False)


@pytest.fixture
def regions(model: RegionSpot) -> Regions:
    """Regions whose labels are what the model calls them, so that a change can only do harm."""
    image = torch.from_numpy(golden()["image"].astype(np.uint8)).permute(2, 0, 1)
    boxes = torch.from_numpy(golden()["boxes"])
    unlabeled = Regions("1", image, boxes, torch.zeros(len(boxes), dtype=torch.int64))
    return unlabeled._replace(labels=plain_answer(model, unlabeled)[1])


def plain_answer(model: RegionSpot, regions: Regions) -> tuple[Tensor, Tensor]:
    """Scores and classes of the best names, as a predictor gets them."""
    with torch.no_grad():
        prompts = [BoxPrompts(Boxes(regions.boxes))]
        [answer] = model.answer(model.encode([regions.image]), prompts, with_masks=False)
        found = model.name(answer, PETS, topk=1)
    return found.scores, found.pred_classes


# Boxes --------------------------------------------------------------------------------------------


def test_loose_boxes_are_scaled_about_their_centers_and_cut_at_the_image() -> None:
    boxes = torch.tensor([[10.0, 20, 30, 60], [0, 0, 20, 20], [90, 70, 100, 80]])
    loose = loose_boxes(boxes, (80, 100), 1.5)  # H, W
    assert loose.tolist() == [[5, 10, 35, 70], [0, 0, 25, 25], [87.5, 67.5, 100, 80]]
    assert torch.equal(loose_boxes(boxes, (80, 100), 1), boxes)


def test_noise_moves_and_resizes_boxes_by_no_more_than_its_strength() -> None:
    boxes = torch.tensor([[400.0, 300, 500, 340]]).expand(2000, -1)
    moved = moved_boxes(boxes, (1000, 1000), 0.2, seed=0)
    sides, centers = moved[:, 2:] - moved[:, :2], (moved[:, 2:] + moved[:, :2]) / 2
    changes = torch.cat([sides - torch.tensor([100, 40]), centers - torch.tensor([450, 320])], 1)
    changes /= torch.tensor([100, 40, 100, 40])
    assert changes.abs().max() <= 0.2 + 1e-5
    # All of what is allowed is used, in both directions, and sides do not follow the centers.
    assert (changes.amin(0) < -0.19).all() and (changes.amax(0) > 0.19).all()
    assert (torch.corrcoef(changes.T) - torch.eye(4)).abs().max() < 0.1
    cut = moved_boxes(torch.tensor([[0.0, 0, 50, 50]]).expand(99, -1), (50, 50), 0.4, seed=0)
    assert cut.min() == 0 and cut.max() == 50


def test_without_noise_the_answer_is_the_plain_one(model: RegionSpot, regions: Regions) -> None:
    found = attacks.name_regions(model, disturbed(regions, BOX_NOISE, 0), PETS)
    scores, classes = plain_answer(model, regions)
    assert torch.equal(found.scores, scores) and found.right.all()
    others = regions._replace(labels=(classes + torch.arange(len(classes)) % 2) % len(PETS))
    found = attacks.name_regions(model, others, PETS)
    assert found.right.tolist() == [place % 2 == 0 for place in range(len(classes))]
    far = attacks.name_regions(model, disturbed(regions, BOX_NOISE, 0.4), PETS)
    assert not torch.equal(far.scores, scores)


# Images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_grow_with_their_severity_and_leave_random_numbers_alone(kind: str) -> None:
    pytest.importorskip("imagecorruptions")
    place = torch.linspace(0, 3, 90)[:, None] + torch.linspace(0, 4, 120)
    image = (128 + 90 * torch.stack([place.sin(), place.cos(), (2 * place).sin()])).byte()
    before = image.clone()
    np.random.seed(7)
    following = np.random.RandomState(7).rand()
    found = [corrupted(image, CORRUPTIONS[kind], severity, 0) for severity in STRENGTHS[kind]]
    assert np.random.rand() == following and torch.equal(image, before)
    assert all(each.dtype == torch.uint8 and each.shape == image.shape for each in found)
    damage = [float((each.float() - image.float()).abs().mean()) for each in found]
    assert damage == sorted(damage) and 0.5 < damage[0] < damage[-1] / 1.2


def test_small_images_are_told_before_they_are_corrupted(regions: Regions) -> None:
    small = regions._replace(image=regions.image[:, :31])
    with pytest.raises(ValueError, match="^The image 1 is 120 x 31; .* at least 32 pixels"):
        disturbed(small, "blur", 1)


@pytest.mark.parametrize("kind", [BOX_NOISE, "noise"])
def test_a_condition_is_the_same_in_each_run_with_one_seed(kind: str, regions: Regions) -> None:
    if kind in CORRUPTIONS:
        pytest.importorskip("imagecorruptions")

    def under(seed: int, key: str = "1") -> Tensor:
        found = disturbed(regions._replace(key=key), kind, STRENGTHS[kind][-1], seed)
        assert torch.equal(found.labels, regions.labels)
        return found.boxes if kind == BOX_NOISE else found.image

    once = under(0)
    assert torch.equal(under(0), once)
    assert not torch.equal(under(1), once) and not torch.equal(under(0, key="2"), once)


def test_stronger_noise_is_not_the_same_noise_made_larger() -> None:
    box = torch.tensor([[500.0, 500, 510, 510]])  # far from the edges
    regions = Regions("1", torch.zeros(3, 1000, 1000, dtype=torch.uint8), box, torch.tensor([0]))
    weak, strong = (disturbed(regions, BOX_NOISE, s).boxes - box for s in (0.2, 0.4))
    assert not torch.allclose(2 * weak, strong, atol=0.1)


# The attack ---------------------------------------------------------------------------------------


class Tried(NamedTuple):
    """Attributes: the image (3, H, W), None for the clean one, and what the model said of it."""

    image: Tensor | None
    found: attacks.Named


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Tried]:
    """What attacks try, in order."""
    notes: list[Tried] = []
    name_regions = attacks.name_regions

    def noted(*args: Any) -> attacks.Named:
        found = name_regions(*args)
        notes.append(Tried(args[3].detach().clone() if len(args) > 3 else None, found))
        return found

    monkeypatch.setattr(attacks, "name_regions", noted)
    return notes


def test_the_attack_does_more_harm_with_more_budget_and_stays_within_it(
    model: RegionSpot, regions: Regions, tried: list[Tried]
) -> None:
    # Values at both ends of the range, which no change may leave.
    image = torch.where(regions.image < 100, 0, torch.where(regions.image > 160, 255, 130))
    regions = regions._replace(image=image.byte())
    scores, labels = plain_answer(model, regions)
    regions = regions._replace(labels=labels)
    budgets, steps = (0, 1, 2, 8), 3
    clean, *worse = attacks.attack(model, regions, PETS, budgets, steps=steps)
    assert torch.equal(clean.scores, scores) and clean.right.all()
    assert worse[-1].right.sum() < clean.right.sum() and worse[0].rank < clean.rank
    assert tried[0].image is None and len(tried) == 1 + 3 * (steps + 1)
    for place, budget in enumerate(budgets[1:]):
        # The worst of all that was tried, with this budget or less.
        until = 1 + (place + 1) * (steps + 1)
        assert worse[place].rank == min(each.found.rank for each in tried[:until])
        values = torch.stack([each.image for each in tried[until - steps - 1 : until]])
        assert (values - image).abs().max() == budget
        assert values.min() == 0 and values.max() == 255 and torch.equal(values, values.round())


def test_an_attack_is_the_same_in_each_run_with_one_seed(
    model: RegionSpot, regions: Regions, tried: list[Tried]
) -> None:
    def images(seed: int, key: str = "1") -> Tensor:
        tried.clear()
        list(attacks.attack(model, regions._replace(key=key), PETS, (4,), steps=1, seed=seed))
        return torch.stack([each.image for each in tried[1:]])

    once = images(0)
    assert torch.equal(images(0), once)
    assert not torch.equal(images(1), once) and not torch.equal(images(0, "2"), once)


# The tool -----------------------------------------------------------------------------------------


@pytest.fixture
def shapes(tmp_path: Path, tiny_models: None, empty_cache: Path) -> Iterator[CfgNode]:
    """A config of tiny towers and of a small dataset, "shapes"; "others" is the same again."""
    cfg = shapes_cfg(tmp_path)
    cfg.DATASETS.COCO_FORMAT += [["others", *cfg.DATASETS.COCO_FORMAT[0][1:]]]
    cfg.MODEL.REGION_HEAD.NAME = "PooledRegionHead"
    (tmp_path / "shapes.yaml").write_text(cfg.dump())
    yield load_config(str(tmp_path / "shapes.yaml"), [], training=False, testing=True)
    forget("shapes", "others")


def test_strength_0_is_the_evaluation(model: RegionSpot, shapes: CfgNode) -> None:
    dataset = tool.load_regions(shapes)
    kinds = [BOX_NOISE, ATTACK]
    results = tool.measure("tiny", model, dataset, list(COLORS), kinds, steps=0, seed=0)
    found = {result[1:3]: result for result in results}
    cfg = shapes.clone()
    cfg.merge_from_list(["TEST.REGION_CLASSIFICATION", True])
    expected = RegionSpotTrainer.test(cfg, model)["region_classification"]
    count = sum(len(regions.labels) for regions in dataset)
    assert count == expected["regions"] and count & (count - 1)  # not a power of two: no rounding
    assert 0 < expected["top1"] < 100
    for kind in kinds:
        assert found[kind, 0].top1 == expected["top1"]
        assert found[kind, 0].ece == pytest.approx(expected["ece"])
    assert found[BOX_NOISE, 0.4].ece != pytest.approx(expected["ece"])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate_robustness.py", *map(str, arguments)])
    tool.main()


def test_the_tool_compares_models_under_every_condition(
    shapes: CfgNode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("imagecorruptions")
    config, output = tmp_path / "shapes.yaml", tmp_path / "out"
    models: dict[str, list[str]] = {
        "pooled": [],
        "decoder": ["MODEL.REGION_HEAD.NAME", "RegionSpotHead"],
    }
    arguments: list[object] = ["--output", output, "--images", 2, "--steps", 1]
    for name, options in models.items():
        arguments += ["--model", name, config, *options]
    run(monkeypatch, *arguments)
    conditions = [(kind, s) for kind, strengths in STRENGTHS.items() for s in strengths]
    assert len(conditions) == 4 + 2 + 6 * 5 + 4
    content = json.loads((output / "robustness.json").read_text())
    results = [Result(**each) for each in content["results"]]
    assert [result[:3] for result in results] == [(name, *c) for name in models for c in conditions]
    assert all(0 <= result.top1 <= 100 and 0 <= result.ece <= 100 for result in results)
    title, _, written = (output / "robustness.md").read_text().partition("\n\n")
    assert title == f"shapes: {content['regions']} regions in 2 images, top-1 / ECE"
    head, _, *rows = written.strip().splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["condition", "strength", *models]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    of_model = [results[: len(conditions)], results[len(conditions) :]]
    for row, condition, *both in zip(cells, conditions, *of_model):
        said = [f"{result.top1:.1f} / {result.ece:.1f}" for result in both]
        assert row == [*map(str, condition), *said]
    assert len(cells) == len(conditions) and written in capsys.readouterr().out
    picture = np.array(Image.open(output / "robustness.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_a_condition_that_one_model_lacks_is_a_dash() -> None:
    rows = table([Result("a", "blur", 1, 50, 2.25), Result("b", "fog", 1, 7, 1)]).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[2:] == [["blur", "1", "50.0 / 2.2", "–"], ["fog", "1", "–", "7.0 / 1.0"]]


ONE, BOTH = "('others',)", "('shapes','others')"
BOXES_OF_BOTH = "('ground_truth://shapes','ground_truth://others')"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "a"], "--model a: a name of its own and a config expected"),
        (["--model", "a", "CONFIG"] * 2, "--model a .*: a name of its own and a config expected"),
        (["--model", "a", "no.yaml"], "no.yaml"),
        (["--model", "a", "CONFIG", "NO.KEY", "1"], "no config key NO.KEY"),
        (
            ["--model", "a", "CONFIG", "--model", "b", "CONFIG", "DATASETS.TEST", ONE],
            "The models have different DATASETS.TEST",
        ),
        (
            ["--model", "a", "CONFIG", "DATASETS.TEST", BOTH]
            + ["DATASETS.PROPOSAL_FILES_TEST", BOXES_OF_BOTH],
            "one dataset is expected",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], said: str, shapes: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(tmp_path / "shapes.yaml")
    words = [config if word == "CONFIG" else word for word in words]
    with pytest.raises(SystemExit, match=f"^evaluate_robustness.py: .*{said}") as error:
        run(monkeypatch, "--output", tmp_path / "out", "--kinds", BOX_NOISE, *words)
    assert "\n" not in str(error.value)


def test_without_imagecorruptions_the_other_conditions_are_measured(
    shapes: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    arguments: list[object] = ["--model", "a", tmp_path / "shapes.yaml", "--images", 1]
    arguments += ["--output", tmp_path / "out", "--kinds", LOOSE_BOXES]
    with pytest.raises(SystemExit, match="^error: .*pip install --no-deps imagecorruptions, or"):
        run(monkeypatch, *arguments, "fog")
    assert not (tmp_path / "out").exists()
    run(monkeypatch, *arguments)
    results = json.loads((tmp_path / "out" / "robustness.json").read_text())["results"]
    assert [result["strength"] for result in results] == list(STRENGTHS[LOOSE_BOXES])
