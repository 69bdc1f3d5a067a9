"""Proposals from files that others wrote: real logits, wrong shapes, hostile json and pickles."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regionspot_d2.app.results import OtherResults
from regionspot_d2.app.sources import from_file
from regionspot_d2.data.proposal_sources import from_glip_json, from_results_json
from regionspot_d2.data.proposals import attach_proposals, read_proposals
from regionspot_d2.safe_loading import read_json

BOXES = [np.array([[1, 2, 9, 9], [2, 2, 8, 8.0]]), np.array([[1, 1, 5, 5.0]])]
FUZZ = settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def write_pickle(path: Path, **changes: Any) -> str:
    scores = [np.array([0.9, 0.5]), np.array([0.1])]
    content = {"ids": [1, 2], "boxes": BOXES, "objectness_logits": scores, "bbox_mode": 0}
    path.write_bytes(pickle.dumps({**content, **changes}))
    return str(path)


@pytest.mark.parametrize("logits", [[6.0, 0.5, -0.4], [6.0, 0.5, 0.2], [0.9, 0.5, -0.4]])
def test_logits_become_probabilities_in_all_of_a_file(
    tmp_path: Path, logits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    expected = 1 / (1 + np.exp(-np.array(logits)))
    path = write_pickle(
        tmp_path / "a.pkl", objectness_logits=[np.array(logits[:2]), np.array(logits[2:])]
    )
    found, _ = read_proposals(path)
    np.testing.assert_allclose(np.concatenate([found["1"].scores, found["2"].scores]), expected)
    [first] = attach_proposals([{"image_id": 1}], path, "mine")
    np.testing.assert_allclose(first["proposal_objectness_logits"], sorted(expected[:2])[::-1])
    assert caplog.text.count("taken for logits (sigmoid)") == 2

    entries = {"1": (BOXES[0], logits[:2]), "2": (BOXES[1], logits[2:])}
    glip = {k: {"boxes": b.tolist(), "scores": s} for k, (b, s) in entries.items()}
    (tmp_path / "glip.json").write_text(json.dumps(glip))
    scores = from_glip_json(str(tmp_path / "glip.json"))
    np.testing.assert_allclose(
        np.concatenate([scores[k].scores for k in "12"]), expected, rtol=1e-5
    )
    image = np.zeros((20, 20, 3), np.uint8)
    regions = from_file(str(tmp_path / "glip.json"))("1", image)
    np.testing.assert_allclose(regions.scores, expected[:2], rtol=1e-5)


def test_probabilities_stay_as_they_are(tmp_path: Path) -> None:
    scores = [np.array([1.0000001, -1e-9]), np.array([0.25])]
    found, _ = read_proposals(write_pickle(tmp_path / "a.pkl", objectness_logits=scores))
    np.testing.assert_array_equal(found["1"].scores, scores[0].astype(np.float32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ids": [1]}, "1 image ids, boxes of 2 images"),
        ({"ids": [1, 1]}, "the image 1 is there twice"),
        ({"ids": [1, None]}, "the image None is no id"),
        ({"ids": [1, [2]]}, r"the image \[2\] is no id"),
        ({"ids": 3}, "must hold lists"),
        ({"ids": np.array(3)}, "must hold lists"),
        ({"boxes": "no"}, "must hold lists"),
        ({"boxes": [BOXES[0], BOXES[0]]}, "image '2' has boxes of shape"),
        ({"boxes": [BOXES[0], [[1, 2], [3]]]}, "image '2' has boxes or scores that are no arrays"),
        ({"boxes": [BOXES[0], [[None, 1, 2, 3]]]}, "image '2' has boxes that are not finite"),
        ({"boxes": [BOXES[0], [["1", "1", "5", "5"]]]}, "image '2' has boxes that are not finite"),
        ({"boxes": [BOXES[0], [[10**400, 1, 2, 3]]]}, "image '2' has boxes"),
        ({"objectness_logits": [[0.5, np.nan], [0.5]]}, "image '1' has scores that are not finite"),
        ({"bbox_mode": 4}, "bbox_mode is 4"),
        ({"bbox_mode": [0]}, r"bbox_mode is \[0\]"),
    ],
)
def test_pickles_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"a.pkl.*{message}"):
        read_proposals(write_pickle(tmp_path / "a.pkl", **changes))


def refused(read: Callable[[str], Any], path: Path) -> str:
    """The one line with which a reader refuses a file; "" if it takes it."""
    try:
        read(str(path))
    except (OSError, ValueError, SystemExit) as error:
        message = str(error)
        assert message and message.isprintable() and path.name in message and len(message) < 500
        return message
    return ""


READERS = [from_glip_json, from_results_json, from_file, OtherResults]
GOOD = {
    "annotations": [],
    "images": [{"id": 1, "file_name": "a"}],
    "categories": [{"id": 1, "name": "cat"}],
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 5000,
        b'{"a": {"boxes": [[1, 2, 9, ' + b"9" * 400 + b']], "scores": [0.5]}}',
        b'{"a": {"boxes": [[1, 2, 9, Infinity]], "scores": [0.5]}}',
        b'{"a": {"boxes": [[1, 2, 9, null]], "scores": [0.5]}}',
        b'{"a": {"boxes": [[1, 2, 9, [9]]], "scores": [0.5]}}',
        b'{"a": {"boxes": [[1, 2, 9, 9]], "scores": [-1e999]}}',
        b'{"a": {"boxes": []}, "a": {"boxes": [], "scores": []}}',
        b'[{"image_id": [1], "bbox": [1, 2, 3, 4], "score": 0.5}]',
        b'[{"image_id": null, "bbox": [1, 2, 3, 4], "score": 0.5}]',
        b'[{"image_id": 1, "bbox": [1, 2, 3, 1e999], "score": 0.5}]',
        b'[{"image_id": 1, "bbox": [1, 2, 3], "score": 0.5}]',
        b"\xff\xfe\x00",
        b"\x80\x04K\x01.",
        '{"ä": 1}'.encode("latin-1"),
        json.dumps({**GOOD, "images": [{"id": [], "file_name": "a"}]}).encode(),
        json.dumps({**GOOD, "images": [{"id": 1, "file_name": None}]}).encode(),
        json.dumps({**GOOD, "annotations": [{"image_id": {}}]}).encode(),
        json.dumps({**GOOD, "images": 5}).encode(),
    ],
    ids=range(21),
)
def test_hostile_json(tmp_path: Path, read: Callable[[str], Any], content: bytes) -> None:
    path = tmp_path / "hostile.json"
    path.write_bytes(content)
    assert refused(read, path)


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file(tmp_path: Path, read: Callable[[str], Any]) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json", "missing.json"):
        # A folder may be one of YOLO's labels.
        is_folder = read is from_file and name == "folder.json"
        said = "the folder has no .txt file" if is_folder else "there is no such file"
        assert said in refused(read, tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_encodings_that_json_may_have(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"ä": 1}', encoding=encoding)
    assert read_json(str(path)) == {"ä": 1}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from("boxes scores image_id bbox score images id annotations".split()), inner
    ),
    max_leaves=5,
)
ENTRIES = st.one_of(
    VALUES,
    st.dictionaries(
        st.text(max_size=2), st.fixed_dictionaries({"boxes": VALUES, "scores": VALUES})
    ),
    st.lists(st.fixed_dictionaries({"image_id": VALUES, "bbox": VALUES, "score": VALUES})),
    st.fixed_dictionaries(
        {
            "images": st.lists(st.fixed_dictionaries({"id": VALUES, "file_name": VALUES})),
            "categories": st.lists(st.fixed_dictionaries({"id": VALUES, "name": VALUES})),
            "annotations": st.lists(st.dictionaries(st.sampled_from(["bbox", "score"]), VALUES)),
        }
    ),
)


@pytest.mark.parametrize("read", READERS)
@FUZZ
@given(content=ENTRIES)
def test_any_json(tmp_path: Path, read: Callable[[str], Any], content: Any) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps(content))
    refused(read, path)


ARRAYS = st.sampled_from(
    [
        *BOXES,
        np.zeros((0, 4)),
        np.zeros(0),
        np.array([0.5]),
        np.array(["a"]),
        np.array([None]),
        np.array(1),
        np.array([b""]),
        np.array([np.nan]),
        np.array([True]),
    ]
)


@FUZZ
@given(
    content=st.dictionaries(
        st.sampled_from("ids indexes boxes scores objectness_logits bbox_mode info".split()),
        st.lists(st.one_of(ARRAYS, VALUES), max_size=3) | VALUES | ARRAYS,
    )
)
def test_any_pickle(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "any.pkl"
    path.write_bytes(pickle.dumps(content))
    refused(read_proposals, path)


@FUZZ
@given(content=st.binary(max_size=60), ending=st.sampled_from(["json", "pkl"]))
def test_any_bytes(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"any.{ending}"
    path.write_bytes(content)
    refused(read_proposals if ending == "pkl" else from_glip_json, path)
