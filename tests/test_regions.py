"""Regions as people write them: the right prompt, or one message that names the region."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes

from regionspot_d2.modeling.prompts import BoxPrompts, MaskPrompts, PointPrompts
from regionspot_d2.modeling.questions import as_boxes, as_masks, as_points, as_prompts

SIZE = (60, 90)  # height, width


@pytest.mark.parametrize(
    "boxes",
    [
        [[1, 2, 3, 4]],
        [1, 2, 3, 4],
        np.array([[1, 2, 3, 4]], dtype=np.int64),
        torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64),
        [torch.tensor([1, 2, 3, 4])],
        [np.array([1, 2, 3, 4])],
        Boxes(torch.tensor([[1.0, 2, 3, 4]])),
    ],
)
def test_boxes_in_any_container(boxes):
    assert as_boxes(boxes, SIZE).tensor.tolist() == [[1, 2, 3, 4]]


def test_boxes_are_clipped_and_the_input_is_not_changed():
    given = Boxes(torch.tensor([[-10.0, 5, 200, 300]]))
    assert as_boxes(given, SIZE).tensor.tolist() == [[0, 5, 90, 60]]
    assert given.tensor.tolist() == [[-10, 5, 200, 300]]


def test_no_boxes():
    assert as_boxes([], SIZE).tensor.shape == (0, 4)
    assert as_boxes(np.zeros((0, 4)), SIZE).tensor.shape == (0, 4)


@pytest.mark.parametrize(
    "box, message",
    [
        ([30, 2, 10, 4], "Box 1 is .* swapped"),
        ([1, 2, 1, 4], "Box 1 is .* no area"),
        ([1, 2, float("nan"), 4], "Box 1 is .* finite"),
        ([1, 2, float("inf"), 4], "Box 1 is .* finite"),
        ([95, 2, 99, 4], "Box 1 is .* outside the image of 90 x 60"),
        ([1, -9, 5, -2], "Box 1 is .* outside"),
    ],
)
def test_impossible_boxes_are_refused(box, message):
    with pytest.raises(ValueError, match=message):
        as_boxes([[1, 2, 3, 4], box], SIZE)


@pytest.mark.parametrize("boxes", [[[1, 2, 3]], [[[1, 2, 3, 4]]], "1,2,3,4", [[1, 2, 3, "x"]]])
def test_boxes_of_another_shape(boxes):
    with pytest.raises(ValueError, match="shape|numbers"):
        as_boxes(boxes, SIZE)


def test_points_of_different_lengths_are_padded():
    prompts = as_points([[[1, 2]], [[3, 4], [5, 6]]], [[1], [1, 0]], SIZE)
    assert prompts.points.tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    assert prompts.labels.tolist() == [[1, -1], [1, 0]]


def test_one_point_a_region():
    prompts = as_points(np.array([[1, 2], [3, 4]]), None, SIZE)
    assert prompts.points.shape == (2, 1, 2) and prompts.labels.tolist() == [[1], [1]]


@pytest.mark.parametrize(
    "points, labels, message",
    [
        ([[[1, 2]], [[100, 2]]], None, "Region 3 has the point .100, 2., outside"),
        ([[[1, 2]], []], None, "Region 3 has 0 points"),
        ([[[1, 2]], [[1, 2]]], [[1], [1, 0]], "Region 3 has 1 points and 2 labels"),
        ([[[1, 2]], [[1, 2]]], [[1], [2]], "Region 3 has the labels .2."),
        ([[[1, 2]], [[1, 2], [3, 4]]], [[1], [0, 0]], "Region 3 has only points beside it"),
        ([[[1, 2]]], [[1], [1]], "labels of 2"),
        ([[[1, float("nan")]]], None, "Region 2 .* outside"),
        ([[[1, 2]]], [[0.5]], "Region 2 has the labels .0.5."),
        ([[1, 2, 3]], None, "points of region 2 have the shape .3,."),
        ([[1, 2, 3, 4]], None, "points of region 2 have the shape .4,."),
        ([[[1, 2]]], 1, "labels are 1; a list"),
        (5, None, "points are 5; a list"),
    ],
)
def test_impossible_points_are_refused(points, labels, message):
    with pytest.raises(ValueError, match=message):
        as_points(points, labels, SIZE, first_region=2)


def test_masks():
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[3:9, 4:20] = 255
    for given in (
        mask,
        mask[None],
        [mask],
        torch.from_numpy(mask),
        BitMasks(torch.from_numpy(mask)[None]),
    ):
        assert as_masks(given, SIZE).boxes(SIZE).tensor.tolist() == [[4, 3, 20, 9]]
    with pytest.raises(ValueError, match="region 5 is empty"):
        as_masks(np.stack([mask, mask * 0]), SIZE, first_region=4)
    with pytest.raises(ValueError, match=r"\(R, 60, 90\) is expected"):
        as_masks(mask.T, SIZE)


def test_no_masks():
    assert len(as_masks([], SIZE)) == 0


def test_regions_of_all_kinds_are_numbered_together():
    mask = np.ones(SIZE, dtype=bool)
    prompts = as_prompts(
        SIZE, boxes=[1, 2, 3, 4], points=[[[1, 2], [3, 4]], [[5, 6]]], masks=[mask] * 3
    )
    assert len(prompts) == 6
    assert [type(part) for part in prompts.parts] == [BoxPrompts, PointPrompts, MaskPrompts]
    assert [len(part) for part in prompts.parts] == [1, 2, 3]
    found = torch.zeros(6, 30, 45, dtype=torch.bool)
    found[1, 10:20, 10:20] = True
    expected = [[1, 2, 3, 4], [1, 2, 40, 40], [5, 6, 6, 7], *[[0, 0, 90, 60]] * 3]
    assert prompts.boxes(SIZE, found).tensor.tolist() == expected
    with pytest.raises(ValueError, match="region 2 is empty"):
        as_prompts(SIZE, boxes=[1, 2, 3, 4], points=[[1, 2]], masks=mask & False)
    with pytest.raises(ValueError, match="Region 1 has the point"):
        as_prompts(SIZE, boxes=[1, 2, 3, 4], points=[[-1, 2]])
    with pytest.raises(ValueError, match="boxes=, points= or masks="):
        as_prompts(SIZE)
    with pytest.raises(ValueError, match="no points="):
        as_prompts(SIZE, boxes=[1, 2, 3, 4], point_labels=[[1]])


def test_the_number_of_prompts_is_that_of_the_regions():
    assert len(PointPrompts(torch.zeros(5, 2, 2), torch.ones(5, 2))) == 5
    assert len(as_points([[[1, 2], [3, 4]]], None, SIZE)) == 1


def test_the_box_of_points_holds_them_and_their_mask():
    size = (80, 120)
    points = torch.tensor([[[50.5, 20.2], [10.0, 70.0]], [[50.5, 20.2], [10.0, 70.0]]])
    prompts = PointPrompts(points, torch.tensor([[1, 1], [1, 0]]))
    nothing = torch.zeros(2, 40, 60, dtype=torch.bool)
    # An empty mask: only the pixels of the points on the region are known.
    boxes = prompts.boxes(size, nothing)
    assert boxes.tensor.tolist() == [[10, 20, 51, 71], [50, 20, 51, 21]]
    corner = PointPrompts(torch.tensor([[[120.0, 80.0]]]), torch.ones(1, 1, dtype=torch.long))
    assert corner.boxes(size, nothing[:1]).tensor.tolist() == [[119, 79, 120, 80]]
    # All of the image is found.
    assert prompts.boxes(size, ~nothing).tensor.tolist() == [[0, 0, 120, 80]] * 2


def test_without_masks_points_stand_for_what_is_around_them():
    points = torch.tensor([[[100.0, 50.0]], [[2.0, 199.0]]])
    prompts = PointPrompts(points, torch.ones(2, 1, dtype=torch.long))
    # A square of a fifth of the longer side, cut at the edges of the image.
    boxes = prompts.boxes((200, 300)).tensor
    assert boxes.tolist() == [[70, 20, 130, 80], [0, 169, 32, 200]]
    # Points that are further apart than that span the box; those beside the region do not count.
    points = torch.tensor([[[20.0, 30.0], [120.0, 40.0], [290.0, 190.0]]])
    prompts = PointPrompts(points, torch.tensor([[1, 1, 0]]))
    assert prompts.boxes((200, 300)).tensor.tolist() == [[20, 5, 120, 65]]
