"""Tracks of a video's regions: who is who, and one name for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from regionspot_cli import parse_name
from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.app.sources import Regions
from regionspot_d2.app.tracking import TrackedRegions

from .tiny import tiny_model

pytest.importorskip("trackers")


@pytest.fixture
def predictor(vocabularies) -> RegionSpotPredictor:
    return RegionSpotPredictor(tiny_model(), vocabulary=["cat", "dog", "bird"])


def frames() -> list[tuple[np.ndarray, list[list[float]], list[float]]]:
    """Two boxes that move towards each other, in either order, and one that is seen once.

    The second frame lacks one, the fourth has none.
    """
    generator = np.random.default_rng(0)
    result = []
    for t in range(6):
        image = generator.integers(0, 256, (60, 90, 3), dtype=np.uint8)
        boxes = [[5.0 + 2 * t, 5, 35 + 2 * t, 30], [60.0 - 2 * t, 30, 85 - 2 * t, 55]]
        scores = [0.9, 0.5]
        if t % 2:
            boxes, scores = boxes[::-1], scores[::-1]
        if t == 0:
            boxes, scores = [*boxes, [70.0, 2, 85, 12]], [*scores, 0.9]
        if t == 1:
            boxes, scores = boxes[1:], scores[1:]
        if t == 3:
            boxes, scores = [], []
        result.append((image, boxes, scores))
    return result


def test_a_track_has_the_name_of_the_average_of_its_regions(predictor):
    tracked = TrackedRegions(predictor, fps=10, topk=2)
    embeddings: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    for t, (image, boxes, scores) in enumerate(frames()):
        tracked.add(f"a.mp4#{t}", image, Regions(boxes=boxes, scores=np.array(scores, np.float32)))
        if boxes:
            predictor.set_image(image)
            for box, embedding in zip(boxes, predictor.region_embeddings(boxes=boxes)):
                if box[3] in (30, 55) and (box[3] == 30 or t > 3):
                    embeddings[1 if box[3] == 30 else 2].append(embedding)
    entries = tracked.entries(threshold=0)
    assert [entry["file_name"] for entry in entries] == [f"a.mp4#{t}" for t in range(6)]
    found = [annotation for entry in entries for annotation in entry["annotations"]]
    # What was not yet seen in two frames in a row has no track.
    assert [a.get("track_id") for a in entries[0]["annotations"][::2]] == [1, None, None]
    assert {a["track_id"] for a in found if a["bbox"][3] == 25 and a["bbox"][1] == 5} == {1}
    for track, parts in embeddings.items():
        mean = F.normalize(torch.stack(parts).mean(0), dim=0)
        [expected] = predictor.model.score(mean[None], predictor.vocabulary).softmax(1)
        best, names = expected.topk(2)
        own = [a for a in found if a.get("track_id") == track]
        assert len(own) == 2 * len(parts)
        assert [a["category_id"] - 1 for a in own] == names.tolist() * len(parts)
        scores = torch.tensor([a["score"] for a in own]).view(-1, 2)
        torch.testing.assert_close(scores, best.expand(len(parts), 2) * (0.9, 0.5)[track - 1])


def test_regions_without_scores_and_frames_without_regions(predictor):
    tracked = TrackedRegions(predictor, fps=1, topk=1)
    image, empty = frames()[0][0], Regions(boxes=[])
    assert tracked.entries(threshold=0) == []
    tracked.add("a#0", image, empty)
    for t in (1, 2):
        tracked.add(f"a#{t}", image, Regions(boxes=[[5, 5, 30, 30]]))
    tracked.add("a#3", image, empty)
    tracks = [[a["track_id"] for a in e["annotations"]] for e in tracked.entries(threshold=0)]
    assert tracks == [[], [1], [1], []]
    assert not any(entry["annotations"] for entry in tracked.entries(threshold=1))


@pytest.mark.parametrize("options", [[], ["--boxes", "1,2,3,4"], ["--proposals", "sam"]])
def test_only_boxes_of_each_frame_are_tracked(options, capsys):
    with pytest.raises(SystemExit):
        parse_name(["--input", "a.mp4", "--track", *options])
    assert "--track follows boxes that --proposals FILE or a detector" in capsys.readouterr().err
