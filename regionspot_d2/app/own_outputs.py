"""What earlier runs wrote, which lies among the photos if --output does."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

from .names import file_name

# A run notes the names of its images in its folder, as regionspot_d2.journal writes them.
_NOTES = "results.jsonl"
_KEY = re.compile(rb'\{"key": ("(?:[^"\\]|\\.)*"),')
# Beside pictures and notes; app.formats has the names of those that --format asks for.
_RESULTS = {"results.json", "results.csv", "data.yaml", "labels", "annotations"}
# What a run adds to the name of an image.
_ADDED = re.compile(r"(-\d+)?(\.attention)?\.(png|jpg|mp4)$")


class OwnOutputs:
    """Tells what a run wrote from its inputs: by the notes in the folder, or in an outer one.

    A picture is named after an image that was noted. Notes are read once.
    """

    def __init__(self) -> None:
        self._noted: dict[Path, set[str]] = {}

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        place = Path(os.path.abspath(path))
        if (
            (place / _NOTES).is_file()
            or (place.parent / _NOTES).is_file()
            and (place.name in _RESULTS or place.name.startswith(_NOTES))
        ):
            return True
        if not (added := _ADDED.search(place.name)):
            return False
        image = place.name[: added.start()]
        # "-2" may be part of the name of the image.
        names = {image, image + (added[1] or "")}
        return any(names & self._noted_in(folder) for folder in place.parents)

    def _noted_in(self, folder: Path) -> set[str]:
        if folder not in self._noted:
            # A frame of a video is noted as "street.avi#10", and the video is one picture.
            self._noted[folder] = {
                file_name(Path(name).name)
                for notes in _notes_in(folder)
                for key in _keys(notes)
                for name in (key, key.rpartition("#")[0])
            }
        return self._noted[folder]


def _notes_in(folder: Path) -> Iterator[Path]:
    """Those of the last run, and those of earlier ones, which the journal keeps as ``*.old``."""
    for ending in chain(["", ".old"], (f".old{number}" for number in count(2))):
        notes = folder / f"{_NOTES}{ending}"
        if notes.is_file():
            yield notes
        elif ending:
            return


def _keys(notes: Path) -> Iterator[str]:
    with contextlib.suppress(OSError), notes.open("rb") as lines:
        for line in lines:
            if found := _KEY.match(line):
                with contextlib.suppress(ValueError):
                    yield json.loads(found[1])
