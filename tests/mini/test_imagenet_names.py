"""The table that carries ImageNet classes to names of the detection vocabularies."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[2] / "regionspot_d2" / "mini" / "imagenet_names.json"


@pytest.fixture(scope="module")
def table() -> list[dict]:
    return json.loads(TABLE.read_text())


def test_classes_are_in_the_order_of_the_classifier(table):
    metadata = pytest.importorskip("open_clip.zero_shot_metadata")
    assert [row["class"] for row in table] == list(metadata.IMAGENET_CLASSNAMES)
    assert len(table) == 1000


def test_weights_are_shares_of_one_vote(table):
    for row in table:
        weights = list(row["names"].values())
        assert all(weight > 0 for weight in weights), row
        assert not weights or math.isclose(sum(weights), 1.0), row


def test_scenes_do_not_vote(table):
    names = {row["class"]: row["names"] for row in table}
    assert all(names[scene] == {} for scene in ("cliff", "valley", "coral reef", "lakeshore"))
    assert sum(not row["names"] for row in table) < 40


@pytest.mark.parametrize(
    ("index", "name"),
    [(207, "dog"), (281, "cat"), (340, "zebra"), (671, "bicycle"), (954, "banana")],
)
def test_plain_classes_lead_to_their_coco_name(table, index, name):
    assert table[index]["names"] == {name: 1.0}
