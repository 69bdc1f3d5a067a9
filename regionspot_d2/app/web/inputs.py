"""What the browser sends to the web page: words, boxes and file names, checked at the door."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.datasets.vocabularies import VOCABULARIES, known_vocabulary
from ...modeling.vocabulary import clean_name
from ..names import printable
from ..results import is_number

# What one question may ask for; a page is open to anyone who finds it.
MAX_REGIONS, MAX_WORDS = 300, 5000

# Of a box, with their values where they are missing.
_KEYS: dict[str, Any] = {"xmin": None, "ymin": None, "xmax": None, "ymax": None, "scaleFactor": 1}

Box = list[float]


def class_names(words: str, lists: Sequence[str] = ()) -> list[str]:
    """The vocabulary that a visitor asks for, each name once.

    Args:
        words: names, separated by commas or lines; one of ``VOCABULARIES`` stands for its names.
            Unlike ``--vocabulary`` of the command line, no text names a file.
        lists: chosen from ``VOCABULARIES``.

    Raises:
        ValueError: there is none, or too many are typed.
    """
    typed = [word for part in re.split(r"[,;\n]", words) if (word := part.strip())]
    if len(typed) > MAX_WORDS:
        raise ValueError(f"There are {len(typed)} words; at most {MAX_WORDS} are expected.")
    names: dict[str, str] = {}
    for word in [*typed, *lists]:
        known = word.lower() in VOCABULARIES
        for name in known_vocabulary(word.lower()) if known else [word]:
            names.setdefault(clean_name(name).lower(), name)
    if not names:
        raise ValueError("There are no words: type some, such as cat, dog, sofa, or choose a list.")
    return list(names.values())


def drawn_boxes(photo: Mapping[str, Any] | None) -> list[Box]:
    """The boxes on a photo, XYXY, pixels of it, the first drawn first.

    Args:
        photo: what ``image_annotator`` sends: its ``boxes``, the newest first, have ``xmin`` ...
            ``ymax`` in units of 1 / ``scaleFactor`` pixels. None if there is none.

    Raises:
        ValueError: they are too many, or no boxes.
    """
    annotated = [] if photo is None else photo.get("boxes") or []
    if len(annotated) > MAX_REGIONS:
        raise ValueError(f"There are {len(annotated)} boxes; at most {MAX_REGIONS} are expected.")
    boxes = []
    for box in reversed(annotated):
        *corners, scale = (box.get(key, default) for key, default in _KEYS.items())
        if not all(map(is_number, [*corners, scale])) or scale <= 0:
            raise ValueError("A box needs four numbers: xmin, ymin, xmax and ymax.")
        boxes.append([corner / scale for corner in corners])
    return boxes


def display_name(path: str, given: str | None) -> str:
    """What the visitor calls an uploaded file."""
    return printable(Path(given or path).name)
