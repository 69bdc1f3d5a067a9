"""Class names of four well-known datasets, and which classes a model saw in training.

``vocabularies.json`` has Objects365's names as its versions 1 and 2 spell them, corrections of
version 2's misspellings, and OpenImages' names: the 601 of V6 and the 500 of its challenge.

Training vocabularies share names with LVIS: 704 of its 1203 classes, among them 145 of the 337 rare
ones, have boxes in Objects365, OpenImages or V3Det. "Zero-shot" AP mixes seen and unseen classes.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from detectron2.utils.logger import log_first_n

from .annotations import categories_of, class_names, contiguous_ids

VOCABULARIES = ("lvis", "coco", "objects365", "openimages")

# The lists of registered training sets, by the beginning of their names.
_TRAINING_SETS = {
    "objects365_v1": "objects365_v1",
    "objects365_v2": "objects365_v2",
    "openimages": "openimages_v6",
}
_QUALIFIER = re.compile(r"\([^)]*\)")


@functools.cache
def _lists() -> dict[str, Any]:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def known_vocabulary(name: str) -> list[str]:
    """The class names of one of :data:`VOCABULARIES`, spelled and ordered as in the dataset.

    Objects365 comes without its misspellings, OpenImages with the 500 classes of its challenge.
    Each name appears once: two classes of OpenImages are called "Bench" and two "Mouse".
    Raises a ValueError for other vocabularies.
    """
    return list(dict.fromkeys(names[0] for names in class_synonyms(name)))


def class_synonyms(name: str) -> list[list[str]]:
    """Each class of a vocabulary, like :func:`known_vocabulary`: its name, then its other names."""
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
    """The class names of a training set as shipped in this package; None if they are not."""
    found = (key for prefix, key in _TRAINING_SETS.items() if dataset.startswith(prefix))
    key = next(found, None)
    return list(_lists()[key]) if key else None


class TrainingNames(NamedTuple):
    """The :func:`spellings` of the class names in training data, and the datasets they come from.

    Classes that only the ``unknown`` datasets name count as unseen.
    """

    names: frozenset[str]
    known: tuple[str, ...]
    unknown: tuple[str, ...]

    def contain(self, names: Iterable[str]) -> bool:
        """Whether the training data has any of these names, in any spelling."""
        return any(not self.names.isdisjoint(spellings(name)) for name in names)


def spellings(name: str) -> set[str]:
    """The forms in which class names are compared: lower case, no qualifier in parentheses.

    ``"Cabinet/shelf"`` gives ``"cabinet"`` and ``"shelf"``, ``"bat_(animal)"`` gives ``"bat"``.
    """
    plain = _QUALIFIER.sub(" ", name.lower().replace("_", " ").replace("-", " "))
    return {words for part in plain.split("/") if (words := " ".join(part.split()))}


def head_training_names(cfg: CfgNode) -> TrainingNames | None:
    """The names of ``DATASETS.HEAD_TRAINED_ON``, or of ``DATASETS.TRAIN`` if that is empty."""
    datasets = list(cfg.DATASETS.HEAD_TRAINED_ON)
    if not all(isinstance(dataset, str) for dataset in datasets):
        raise ValueError(f"DATASETS.HEAD_TRAINED_ON is {datasets}; names of datasets are expected.")
    return find_training_names(datasets or cfg.DATASETS.TRAIN)


def find_training_names(datasets: Sequence[str]) -> TrainingNames | None:
    """Collects the class names of datasets; None if there are none.

    Names come from metadata or annotation files, else from the lists in this package.
    """
    if not datasets:
        return None
    known: dict[str, set[str]] = {}
    for dataset in datasets:
        try:
            names: list[str] | None = class_names(dataset)
        except (FileNotFoundError, KeyError):
            names = shipped_names(dataset)
        if names is not None:
            known[dataset] = {spelling for name in names for spelling in spellings(name)}
    unknown = tuple(dataset for dataset in datasets if dataset not in known)
    if unknown:
        message = (
            f"The class names of {', '.join(unknown)} are unknown (no annotation file): classes "
            "that only these datasets name count as unseen."
        )
        # Once, not for each of many test sets.
        log_first_n(logging.WARNING, message, key="message", name=__name__)
    return TrainingNames(frozenset().union(*known.values()), tuple(known), unknown)


def class_groups(
    dataset: str, training_names: TrainingNames | None = None
) -> dict[str, frozenset[int]]:
    """Contiguous class ids by group of classes that is evaluated separately.

    The groups are ``r``, ``c`` and ``f`` (rare, common, frequent) if the annotation file has
    frequencies, as LVIS does; ``seen`` and ``unseen`` if there are ``training_names``.
    """
    contiguous = contiguous_ids(dataset)
    groups = defaultdict(set)
    for category in categories_of(dataset):
        # Annotation files may name more classes than the dataset has.
        if category["id"] not in contiguous:
            continue
        keys = [category["frequency"]] if "frequency" in category else []
        if training_names is not None:
            names = [category["name"], *category.get("synonyms", ())]
            keys.append("seen" if training_names.contain(names) else "unseen")
        for key in keys:
            groups[key].add(contiguous[category["id"]])
    return {key: frozenset(ids) for key, ids in groups.items()}
