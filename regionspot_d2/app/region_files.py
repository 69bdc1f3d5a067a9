"""Files of regions, for --proposals: our json, COCO's json, csv, and folders of YOLO's labels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..safe_loading import read_json
from .inputs import IMAGE_SUFFIXES
from .region_formats import (
    Listed,
    is_coco,
    read_coco,
    read_csv,
    read_ours,
    read_results,
    read_yolo,
)


class RegionFile:
    """The regions that a file or a folder has of images, by their paths or by their names.

    What it calls an image is the end of the image's path: "x.jpg", "train/x.jpg", or all of it. A
    full path that does not exist here is of another machine; then the name is enough.

    Attributes:
        entries: the regions of each image, by what the file calls it.
    """

    def __init__(self, file: str) -> None:
        """
        Args:
            file: a json, csv or tsv file, or a folder of .txt files.

        Raises:
            ValueError: it has something else; the message names the entry.
            OSError: it cannot be read.
        """
        self._file = file
        self._names_of = _as_it_is
        self._empty_if_missing = os.path.isdir(file)  # YOLO writes no file for no object
        if os.path.isdir(file):
            self.entries, self._names_of = read_yolo(file), _without_ending
        elif file.lower().endswith((".csv", ".tsv")):
            self.entries = read_csv(file)
        elif file.lower().endswith(".txt"):
            raise ValueError("for YOLO's text files, their folder is expected.")
        else:
            content = read_json(file)
            if isinstance(content, list):
                self.entries, self._names_of = read_results(content), _as_image_id
            elif isinstance(content, dict) and is_coco(content):
                self.entries = read_coco(content)
            else:
                self.entries = read_ours(content)
        self._keys: dict[str, list[str]] = {}
        for key in self.entries:
            self._keys.setdefault(_parts(key)[-1], []).append(key)

    def of(self, path: str) -> Listed:
        """The regions of an image, by the path that the command line gives.

        Raises:
            ValueError: there are none, or of more than one image that may be meant.
        """
        if path in self.entries:
            return self.entries[path]
        others: list[str] = []
        for name in self._names_of(os.path.abspath(path)):
            wanted = _parts(name)
            keys = self._keys.get(wanted[-1], [])
            fitting = [key for key in keys if _ends_with(wanted, _parts(key))]
            moved = [key for key in keys if _is_of_another_machine(key)]
            if found := fitting or moved:
                # Of x.jpg and a/x.jpg, the second is meant for photos/a/x.jpg.
                found = sorted(found, key=lambda key: len(_parts(key)), reverse=True)
                if not fitting and len(found) > 1:
                    break
                return self.entries[found[0]]
            others += keys
        if self._empty_if_missing and not others:
            return Listed()
        close = f"; it has '{others[0]}'" if others else ""
        raise ValueError(f"{self._file} has no boxes for '{Path(path).name}'{close}.")


def _as_it_is(path: str) -> Iterator[str]:
    yield path


def _without_ending(path: str) -> Iterator[str]:
    stem, ending = os.path.splitext(path)
    yield stem if ending.lower() in IMAGE_SUFFIXES else path


def _as_image_id(path: str) -> Iterator[str]:
    """Results name an image by its id, which in COCO is the number in the image's name."""
    yield path
    [stem] = _without_ending(path)
    yield stem
    if number := re.search(r"(\d+)$", stem):
        yield str(int(number[1]))


def _is_of_another_machine(key: str) -> bool:
    return bool(re.match(r"[/\\]|[A-Za-z]:", key)) and not os.path.exists(key)


def _parts(name: str) -> list[str]:
    # Files that were written on Windows have "\", which names elsewhere hardly have.
    return [part for part in re.split(r"[/\\]", name) if part not in ("", ".")] or [""]


def _ends_with(parts: list[str], end: list[str]) -> bool:
    return parts[-len(end) :] == end
