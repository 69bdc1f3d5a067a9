"""Class names as text: how they are written as words, and which are refused."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

_MAX_LETTERS = 1000  # of a name; CLIP reads about 300
# Lists of names that are remembered as checked.
_MAX_LISTS = 32
# What the published code takes off a name, such as COCO's "wall-other-merged".
_ENDINGS = re.compile("(?<=.)(-other|-merged|-stuff)+$")


def clean_name(name: str) -> str:
    """Writes a class name as words: ``"aerosol_can"`` becomes ``"aerosol can"``.

    COCO's names of stuff lose what only tells them from others: ``"sky-other-merged"`` becomes
    ``"sky"``.
    """
    return " ".join(_ENDINGS.sub("", name).replace("_", " ").split())


def raw_name(name: str) -> str:
    """A class name as the published code encodes it: ``"aerosol_can"`` stays as it is.

    Only the endings ``-other``, ``-merged`` and ``-stuff`` are taken off.
    """
    return _ENDINGS.sub("", name)


def check_names(names: Any, *, repeats: bool = False) -> None:
    """Checks that a vocabulary is a list of class names, none of them empty; ValueError if not.

    With ``repeats`` a name may occur twice, as in the class lists of some datasets. In a vocabulary
    that a person typed it is a slip.
    """
    if isinstance(names, str):
        raise ValueError(f"A vocabulary is a list of names, not one string ('{names:.60}').")
    if not isinstance(names, Sequence | np.ndarray):
        kind = type(names).__name__
        raise ValueError(f"A vocabulary is a list of names, not a {kind}: pass list(...) of it.")
    if isinstance(names, np.ndarray) and names.ndim != 1:
        raise ValueError(f"A vocabulary is a list of names, not an array of shape {names.shape}.")
    if len(names) == 0:
        raise ValueError("The vocabulary is empty; give at least one name.")
    for place, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"Name {place} of the vocabulary is {name!r}: give non-empty text.")
    if (repeated := repeated_name(tuple(names))) and not repeats:
        raise ValueError(repeated)


# Reading a thousand names takes longer than naming a box, so each list is read once.
@lru_cache(maxsize=_MAX_LISTS)
def repeated_name(names: tuple[str, ...]) -> str:
    """Checks names one by one; returns what is wrong if one occurs twice, or ""."""
    repeated = ""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        if len(name) > _MAX_LETTERS:
            found = f"Name {place} of the vocabulary, '{name:.30}...', has {len(name)} characters"
            raise ValueError(f"{found}; a class name of at most {_MAX_LETTERS} is expected.")
        words = clean_name("".join(c for c in name if unicodedata.category(c) != "Cf"))  # unseen
        if not words:
            raise ValueError(f"Name {place} of the vocabulary is {name!r}: give non-empty text.")
        first = places.setdefault(words.lower(), place)
        if first != place and not repeated:
            repeated = (
                f"The vocabulary has '{name}' twice (places {first} and {place}); "
                "two equal names would share every score. Remove one."
            )
    return repeated
