"""From scores to results: which names are kept, in which order, with which scores and masks."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import Boxes, Instances

from regionspot_d2.modeling.naming import name_regions

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
