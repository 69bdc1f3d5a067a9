"""The journal of a run: what counts as finished, with one process or several, after a kill."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.utils import comm

from regionspot_d2.journal import Journal, JournalError

SETTINGS = {"option": (1, 2), "text": "ä"}

OpenJournal = Callable[..., Journal]


@pytest.fixture
def open_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenJournal:
    """Opens the journal as a process of a given rank would."""

    def open_as(rank: int = 0, *, resume: bool = True, **changes: object) -> Journal:
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        return Journal(tmp_path / "run" / "log.jsonl", {**SETTINGS, **changes}, resume=resume)

    return open_as


def test_entries_survive_numbers_and_text(open_as: OpenJournal, tmp_path: Path) -> None:
    journal = open_as()
    assert journal.entries == {}
    journal.add(17, {"boxes": [[1 / 3, 0.1]], "name": "grün\n"})
    journal.add("a/b", [])
    journal.add(17, 1 / 7)

    assert open_as().entries == journal.entries == {"17": 1 / 7, "a/b": []}
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines][0] == {"option": [1, 2], "text": "ä"}
    assert len(lines) == 4


def test_processes_write_their_own_files_and_may_change_in_number(open_as: OpenJournal) -> None:
    for rank in (0, 1, 2):
        open_as(rank).add(f"by {rank}", rank)
    expected = {"by 0": 0, "by 1": 1, "by 2": 2}
    journal = open_as(0)
    assert journal.entries == expected
    open_as(3).add("late", 3)
    journal.reload()
    assert journal.entries == {**expected, "late": 3}


@pytest.mark.parametrize("torn", [b'{"key": "b", "en', b'{"key": "b"\n', bytes(9), b"\xc3"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_line_that_was_cut_off_is_an_entry_to_do_again(
    open_as: OpenJournal, tmp_path: Path, torn: bytes, rank: int
) -> None:
    open_as(rank).add("a", 1)
    file = tmp_path / "run" / ("log.jsonl" if rank == 0 else "log.1.jsonl")
    with file.open("ab") as stream:
        stream.write(torn)
    assert open_as(1 - rank).entries == {"a": 1}  # of another process

    open_as(rank).add("b", 2)
    assert open_as(rank).entries == {"a": 1, "b": 2}


def test_a_first_line_that_was_cut_off_is_a_run_to_begin(
    open_as: OpenJournal, tmp_path: Path
) -> None:
    open_as()
    file = tmp_path / "run" / "log.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:9])
    assert open_as(text="another").entries == {}
    assert json.loads(file.read_text(encoding="utf-8"))["text"] == "another"


@pytest.mark.parametrize("damage", [b"{}\n", b"3\n", b"\n", b'{"key": "b"\n', b"\xff\n"])
def test_damage_names_its_line(open_as: OpenJournal, tmp_path: Path, damage: bytes) -> None:
    journal = open_as()
    for key in "abc":
        journal.add(key, key)
    file = tmp_path / "run" / "log.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], damage, *lines[3:]]))
    damaged = file.read_bytes()
    with pytest.raises(JournalError, match="log.jsonl, line 3 is not what a run writes there"):
        open_as()
    assert file.read_bytes() == damaged


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_with_other_settings_is_refused(open_as: OpenJournal, rank: int) -> None:
    open_as(rank).add("a", 1)
    message = r"log.*jsonl holds a run with another option \(\[1, 2\], now 5\), another new \(None"
    with pytest.raises(JournalError, match=message):
        open_as(option=5, new="x")
    assert open_as().entries == {"a": 1}


def test_a_run_that_starts_over_keeps_what_was_there(
    open_as: OpenJournal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rank in (0, 1):
        open_as(rank).add(f"by {rank}", rank)
    with caplog.at_level(logging.INFO):
        journal = open_as(resume=False, option=5)
    assert journal.entries == {} and "kept as log.1.jsonl.old" in caplog.text
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "log.1.jsonl.old",
        "log.jsonl",
        "log.jsonl.old",
    ]
    assert '"by 1"' in (tmp_path / "run" / "log.1.jsonl.old").read_text()
    # A run that finished nothing does not replace it.
    open_as(resume=False)
    assert '"by 0"' in (tmp_path / "run" / "log.jsonl.old").read_text()
    assert open_as().entries == {}
