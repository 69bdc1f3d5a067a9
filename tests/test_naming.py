"""From scores to results: which names are kept, in which order, with which scores and masks."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances

from regionspot_d2.modeling import BoxPrompts, naming
from regionspot_d2.modeling.naming import name_regions

from .tiny import tiny_model

SIZE = (60, 90)
BOXES = Boxes(torch.tensor([[0.0, 0, 10, 10], [20, 20, 50, 40], [5, 30, 80, 60]]))
LOGITS = torch.tensor([[0.0, 2, 1, -1], [3, 0, 0, 1], [1, 1.5, 0, 2]])
REGION_SCORES = torch.tensor([0.9, 0.1, 0.5])


def name(**rules: object) -> Instances:
    return name_regions(LOGITS, BOXES, SIZE, **rules)


def pairs(found: Instances) -> list[tuple[int, int]]:
    return list(zip(found.region_index.tolist(), found.pred_classes.tolist()))


def test_each_region_keeps_its_best_names_in_the_order_of_the_regions():
    found = name(topk=2)
    assert pairs(found) == [(0, 1), (0, 2), (1, 0), (1, 3), (2, 3), (2, 1)]
    expected = LOGITS.softmax(1)
    torch.testing.assert_close(found.scores, expected[found.region_index, found.pred_classes])
    torch.testing.assert_close(found.pred_boxes.tensor, BOXES.tensor[found.region_index])
    assert pairs(name(topk=99, region_scores=REGION_SCORES))[:4] == [(0, 1), (0, 2), (0, 0), (0, 3)]


def test_an_image_keeps_its_best_pairs_best_first():
    scores = LOGITS.softmax(1) * REGION_SCORES[:, None]
    order = scores.flatten().argsort(descending=True)
    for count in (0, 1, 5, 12, 100, -1):
        found = name(region_scores=REGION_SCORES, max_pairs=count)
        kept = order[:count] if count >= 0 else order
        assert pairs(found) == [(int(i) // 4, int(i) % 4) for i in kept]
        torch.testing.assert_close(found.scores, scores.flatten()[kept])


@pytest.mark.parametrize("rules", [{"topk": 4}, {"max_pairs": -1}])
def test_a_higher_threshold_keeps_a_part_of_what_a_lower_one_keeps(rules):
    before = None
    for threshold in (0.0, 0.05, 0.2, 0.5, 1.0):
        found = name(region_scores=REGION_SCORES, score_thresh=threshold, **rules)
        assert (found.scores > threshold).all()
        assert before is None or set(pairs(found)) <= before
        before = set(pairs(found))
    assert before == set()


def test_the_published_order_takes_the_best_names_before_the_scores_of_regions():
    found = name(region_scores=REGION_SCORES, keep_before_region_score=2)
    best = LOGITS.softmax(1).flatten().topk(2).indices.tolist()
    assert set(pairs(found)) == {(i // 4, i % 4) for i in best}
    assert (found.scores.diff() <= 0).all()


def test_names_of_a_region_share_one_mask_which_is_read_once():
    asked = []

    def masks(regions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        asked.append((regions.tolist(), size))
        return (torch.arange(3)[regions] == 1)[:, None, None].expand(-1, *size)

    found = name(topk=3, output_size=(120, 180), masks=masks)
    assert asked == [([0, 1, 2], (120, 180))]
    assert found.pred_masks.shape == (9, 120, 180)
    assert found.pred_masks.flatten(1).any(1).tolist() == (found.region_index == 1).tolist()
    torch.testing.assert_close(found.pred_boxes.tensor, BOXES.tensor[found.region_index] * 2)
    name(score_thresh=0.6, masks=masks)
    assert asked[1] == ([0, 1], SIZE)


def test_no_regions():
    for rules in ({"topk": 2}, {"max_pairs": 10, "keep_before_region_score": 3}):
        found = name_regions(torch.zeros(0, 4), Boxes(torch.zeros(0, 4)), SIZE, **rules)
        assert len(found) == 0 and found.image_size == SIZE


@pytest.mark.parametrize(
    "rules",
    [
        {"topk": 1},
        {"topk": 3, "score_thresh": 0.1},
        {"max_pairs": 10},
        {"max_pairs": 10, "score_thresh": 0.2},
        {"max_pairs": -1, "score_thresh": 0.05},
        {"max_pairs": 6, "keep_before_region_score": 14},
        {"max_pairs": -1, "keep_before_region_score": 14, "score_thresh": 0.01},
    ],
)
@pytest.mark.parametrize("rows", [1, 4, 12, 50])
def test_rows_in_parts_have_the_names_of_all(rules, rows):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(13, 7, generator=random)
    rules = {**rules, "region_scores": torch.rand(13, generator=random)}
    boxes = Boxes(torch.rand(13, 4, generator=random))
    whole = name_regions(logits, boxes, SIZE, **rules)
    found = name_regions(iter(logits.split(rows)), boxes, SIZE, **rules)
    assert len(whole) > 0
    for name, values in whole.get_fields().items():
        in_parts = found.get(name)
        if name == "pred_boxes":
            values, in_parts = values.tensor, in_parts.tensor
        assert torch.equal(in_parts, values), name


@pytest.mark.usefixtures("vocabularies")
@pytest.mark.parametrize("rules", [{"topk": 2}, {"max_pairs": 5}])
def test_a_model_scores_many_pairs_in_parts(monkeypatch, rules):
    model, widths = tiny_model(), []
    encoded = model.encode([torch.zeros(3, 60, 90)])
    boxes = Boxes(torch.tensor([[k, k, k + 20.0, k + 30] for k in range(11)]))
    [answer] = model.answer(encoded, [BoxPrompts(boxes)], with_masks=False)
    whole = model.name(answer, ["cat", "dog", "bird"], **rules)
    score = model.score
    monkeypatch.setattr(model, "score", lambda e, names: widths.append(len(e)) or score(e, names))
    monkeypatch.setattr(naming, "MAX_PAIRS_TOGETHER", 14)
    found = model.name(answer, ["cat", "dog", "bird"], **rules)
    assert widths == [4, 4, 3]
    assert torch.equal(found.pred_classes, whole.pred_classes)
    assert torch.equal(found.region_index, whole.region_index)
    torch.testing.assert_close(found.scores, whole.scores)
