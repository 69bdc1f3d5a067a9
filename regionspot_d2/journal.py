"""What a long run has finished, noted item by item, so that a run that was stopped can continue."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

import portalocker
from detectron2.utils import comm

logger = logging.getLogger(__name__)

# By path. A process may open a journal again: a notebook, for example, keeps alive what failed.
_own_files: WeakValueDictionary[Path, IO[bytes]] = WeakValueDictionary()


class JournalError(ValueError):
    """A journal cannot be continued."""


class JournalFullError(OSError):
    """A journal can no longer be written, as on a full disk; what it has stays."""


class Journal:
    """A file of JSON lines (UTF-8): the settings of the run, then a line for each finished item.

    Each process writes its own file, ``name.jsonl``, ``name.1.jsonl``, and so on by rank, and reads
    those of all, so the number of processes may change. ``entries`` has the last entry of each key.
    A line that was cut off when its process was killed does not count. No other run can open the
    journal until this one ends, however it ends.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Opens the journal, in every process of a distributed run.

        ``settings``, plain values, are all that the entries depend on; JournalError if they differ,
        a file is damaged, or another run has it open. Without ``resume``, an earlier run's entries
        are kept as ``*.old``.
        """
        self.entries: dict[str, Any] = {}
        self._path, self._settings = Path(path), json.loads(json.dumps(settings))
        rank = comm.get_rank()
        own = self._path if rank == 0 else self._path.with_suffix(f".{rank}{self._path.suffix}")
        own.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_alone(own)
        if resume:
            self.reload()
        elif rank == 0:
            for file in self._files():
                _set_aside(file, set(self._settings))
            self._file = _open_alone(own)
        comm.synchronize()  # nobody may write before all have read
        # A new line after one that was cut off would become part of it.
        os.truncate(own, _read(own)[1])
        if self._file.seek(0, os.SEEK_END) == 0:
            self._write(self._settings)

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
        """Notes that an item is finished; JournalFullError if it cannot.

        ``str(key)`` identifies the item, ``entry`` is a JSON value.
        """
        self._write({"key": str(key), "entry": entry})
        self.entries[str(key)] = entry

    def _write(self, line: dict[str, Any]) -> None:
        place = self._file.seek(0, os.SEEK_END)
        try:
            left = json.dumps(line).encode() + b"\n"
            while left:  # the file is unbuffered: a write may take only a part
                left = left[self._file.write(left) :]
        except OSError as error:
            # A full disk may take a part of the line.
            with contextlib.suppress(OSError):
                self._file.truncate(place)
            raise JournalFullError(f"{self._path} cannot be written: {error}.") from error

    def _files(self) -> list[Path]:
        name = re.escape(self._path.stem) + r"(\.\d+)?" + re.escape(self._path.suffix)
        files = sorted(f for f in self._path.parent.iterdir() if re.fullmatch(name, f.name))
        if others := [file for file in files if not file.is_file()]:
            raise OSError(f"{others[0]} is not a regular file.")
        return files


def _open_alone(path: Path) -> IO[bytes]:
    """Opens a file to append to, which no other process has open in this way."""
    while True:
        # Unbuffered: bytes that a full disk did not take are not tried again later.
        file = path.open("ab", buffering=0)
        if (before := _own_files.get(path)) is not None:
            portalocker.unlock(before)
        try:
            portalocker.lock(file, portalocker.LOCK_EX | portalocker.LOCK_NB)
        except portalocker.AlreadyLocked as error:
            raise JournalError(
                f"{path} is in use: another run is writing to this folder. Wait for it, or give "
                "another folder."
            ) from error
        except portalocker.LockException:
            logger.warning("%s: this disk has no locks; let no other run write there.", path)
            return file
        # In between, the run that had it may have set it aside.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                _own_files[path] = file
                return file
        file.close()


def _set_aside(file: Path, keys: set[str]) -> None:
    """Keeps the journal of an earlier run under another name, unless it has only settings."""
    with contextlib.suppress(JournalError):
        lines, size = _read(file)
        if size == file.stat().st_size and [set(line) for line in lines] in ([], [keys]):
            file.unlink()
            return
    kept, number = Path(f"{file}.old"), 2
    while kept.exists():
        kept, number = Path(f"{file}.old{number}"), number + 1
    file.replace(kept)
    logger.info(
        f"{file.name} of an earlier run is kept as {kept.name}. To go on with that run, rename it "
        "back and give --resume."
    )


def _is_entry(line: dict[str, Any]) -> bool:
    return {*line} == {"key", "entry"} and isinstance(line["key"], str)


def _read(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines without a last one that was cut off, and the number of their bytes."""
    lines, content = file.read_bytes().splitlines(keepends=True), list[dict[str, Any]]()
    with contextlib.suppress(RecursionError, ValueError):  # of a line that is not JSON
        for line in lines:
            parsed = json.loads(line)
            is_entry = isinstance(parsed, dict) and (not content or _is_entry(parsed))
            if not is_entry or not line.endswith(b"\n"):
                break
            content.append(parsed)
    # What does not even begin like a journal is somebody else's file.
    is_foreign = not content and lines and not lines[0].startswith((b"{", b"\0"))
    if len(content) < len(lines) - 1 or is_foreign:
        raise JournalError(
            f"{file}, line {len(content) + 1} is not what a run writes there: "
            f"{lines[len(content)][:40]!r}. Repair or delete the line, or delete the file."
        )
    return content, sum(map(len, lines[: len(content)]))
