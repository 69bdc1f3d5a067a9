"""What a long run has finished, noted item by item, so that a run that was stopped can continue."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.utils import comm

logger = logging.getLogger(__name__)


class JournalError(ValueError):
    """A journal cannot be continued."""


class Journal:
    """A file of JSON lines (UTF-8): the settings of the run, then a line for each finished item.

    Each process writes its own file, ``name.jsonl``, ``name.1.jsonl``, and so on by rank, and reads
    those of all, so the number of processes may change. ``entries`` has the last entry of each key.
    A line that was cut off when its process was killed does not count.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Opens the journal, in every process of a distributed run.

        ``settings``, plain values, are all that the entries depend on; JournalError if they differ
        or a file is damaged. Without ``resume``, an earlier run's entries are kept as ``*.old``.
        """
        self.entries: dict[str, Any] = {}
        self._path, self._settings = Path(path), json.loads(json.dumps(settings))
        rank = comm.get_rank()
        own = self._path if rank == 0 else self._path.with_suffix(f".{rank}{self._path.suffix}")
        own.parent.mkdir(parents=True, exist_ok=True)
        if resume:
            self.reload()
        elif rank == 0:
            for file in self._files():
                if file.read_bytes().count(b"\n") > 1:  # more than the settings
                    logger.info(f"{file} is from an earlier run and is kept as {file.name}.old.")
                    file.replace(f"{file}.old")
                file.unlink(missing_ok=True)
        comm.synchronize()  # nobody may write before all have read
        if own.exists():  # a new line after one that was cut off would become part of it
            os.truncate(own, _read(own)[1])
        self._file = own.open("a", encoding="utf-8")
        if self._file.tell() == 0:
            print(json.dumps(self._settings), file=self._file, flush=True)

    def reload(self) -> None:
        """Reads again what all processes have written so far."""
        self.entries, now = {}, self._settings
        for file in self._files():
            then, *entries = _read(file)[0] or [now]
            if other := [key for key in {**now, **then} if then.get(key) != now.get(key)]:
                names = [f"{k} ({then.get(k)!r:.60}, now {now.get(k)!r:.60})" for k in other]
                raise JournalError(
                    f"{file} holds a run with another {', another '.join(names)}. Delete the file "
                    "to start over, or continue with the same settings."
                )
            self.entries.update((line["key"], line["entry"]) for line in entries)

    def add(self, key: Any, entry: Any) -> None:
        """Notes that an item is finished; ``str(key)`` identifies it, ``entry`` is a JSON value."""
        self.entries[str(key)] = entry
        print(json.dumps({"key": str(key), "entry": entry}), file=self._file, flush=True)

    def _files(self) -> list[Path]:
        name = re.escape(self._path.stem) + r"(\.\d+)?" + re.escape(self._path.suffix)
        return sorted(f for f in self._path.parent.iterdir() if re.fullmatch(name, f.name))


def _read(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines without a last one that was cut off, and the number of their bytes."""
    lines, content = file.read_bytes().splitlines(keepends=True), list[dict[str, Any]]()
    with contextlib.suppress(ValueError):  # of a line that is not JSON
        for line in lines:
            parsed = json.loads(line)
            is_entry = isinstance(parsed, dict) and (not content or {*parsed} == {"key", "entry"})
            if not is_entry or not line.endswith(b"\n"):
                break
            content.append(parsed)
    if len(content) < len(lines) - 1:
        raise JournalError(
            f"{file}, line {len(content) + 1} is not what a run writes there: "
            f"{lines[len(content)][:40]!r}. Repair or delete the line, or delete the file."
        )
    return content, sum(map(len, lines[: len(content)]))
