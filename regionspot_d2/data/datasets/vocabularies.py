"""The class names of four well-known datasets, from this package and Detectron2's metadata.

``vocabularies.json`` has Objects365's names as its versions 1 and 2 spell them, corrections of
version 2's misspellings, and OpenImages' names: the 601 of V6 and the 500 of its challenge.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

VOCABULARIES = ("lvis", "coco", "objects365", "openimages")

_FILE = Path(__file__).with_suffix(".json")
# Names of registered training sets begin like this.
_TRAINING_SETS = {
    "objects365_v1": "objects365_v1",
    "objects365_v2": "objects365_v2",
    "openimages": "openimages_v6",
}


def known_vocabulary(name: str) -> list[str]:
    """The class names of a well-known dataset, spelled and ordered as the dataset has them.

    Args:
        name: one of :data:`VOCABULARIES`. Objects365 comes without its misspellings, OpenImages
            with the 500 classes of its challenge.

    Returns:
        Each name once: two of OpenImages' classes are called "Bench" and two "Mouse".

    Raises:
        ValueError: there is no such vocabulary.
    """
    return list(dict.fromkeys(names[0] for names in class_synonyms(name)))


def class_synonyms(name: str) -> list[list[str]]:
    """Each class of a vocabulary, in the dataset's order: its name, then other names for it.

    Args:
        name: one of :data:`VOCABULARIES`.

    Raises:
        ValueError: there is no such vocabulary.
    """
    if name == "lvis":
        return [[c["name"], *c["synonyms"]] for c in LVIS_CATEGORIES]
    if name == "coco":
        return [[c["name"]] for c in COCO_CATEGORIES if c["isthing"]]
    if name == "objects365":
        corrections = _lists()["objects365_corrections"]
        pairs = [(corrections.get(own, own), own) for own in _lists()["objects365_v2"]]
        # "Monitor/TV" goes by either word, and by the dataset's own "Moniter/TV".
        return [[corrected, own, *corrected.split("/")] for corrected, own in pairs]
    if name == "openimages":
        return [[listed] for listed in _lists()["openimages_challenge"]]
    raise ValueError(f"There is no vocabulary '{name}'; there are {', '.join(VOCABULARIES)}.")


def shipped_names(dataset: str) -> list[str] | None:
    """The class names of a registered training set, for machines without its annotation file.

    Returns:
        The names; None for a dataset other than Objects365 and OpenImages.
    """
    keys = (key for prefix, key in _TRAINING_SETS.items() if dataset.startswith(prefix))
    key = next(keys, None)
    return list(_lists()[key]) if key else None


@functools.cache
def _lists() -> dict[str, Any]:
    return json.loads(_FILE.read_text(encoding="utf-8"))
