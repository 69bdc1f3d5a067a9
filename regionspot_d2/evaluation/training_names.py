"""The names a model was trained on, to tell seen classes from unseen ones.

RegionSpot's training vocabularies and LVIS share many names: 704 of the 1203 LVIS classes have, by name or synonym,
boxes in Objects365, OpenImages or V3Det, 145 of the 337 rare ones among them. "Zero-shot" AP mixes both kinds.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.data import MetadataCatalog
from detectron2.utils.logger import log_first_n

from regionspot_d2.data.datasets import class_names, read_categories

# Class names of Objects365 v1 and v2 and of OpenImages V6 (601), for machines without their annotation files.
_NAMES_FILE = Path(__file__).parent / "training_names.json"
_QUALIFIER = re.compile(r"\([^)]*\)")


class TrainingNames(NamedTuple):
    """The vocabularies of a model's training data.

    Attributes:
        names: all names, as :func:`spellings` gives them.
        known: the datasets whose names are among them.
        unknown: the datasets whose names could not be found; classes that only they name count as unseen.
    """

    names: frozenset[str]
    known: tuple[str, ...]
    unknown: tuple[str, ...]

    def contain(self, names: Iterable[str]) -> bool:
        """Whether any of the names, or any spelling of them, was trained on."""
        return any(not self.names.isdisjoint(spellings(name)) for name in names)


def spellings(name: str) -> set[str]:
    """A class name as it is compared: lower case, blanks for ``_`` and ``-``, no qualifier in brackets.

    ``"Cabinet/shelf"`` gives both ``"cabinet"`` and ``"shelf"``, ``"bat_(animal)"`` gives ``"bat"``.
    """
    plain = _QUALIFIER.sub(" ", name.lower().replace("_", " ").replace("-", " "))
    return {found for part in plain.split("/") if (found := " ".join(part.split()))}


def find_training_names(datasets: Sequence[str]) -> TrainingNames | None:
    """Collects the class names of training sets.

    Args:
        datasets: names of registered datasets, ``cfg.DATASETS.TRAIN``. Names are taken from their metadata or
            annotation files; for Objects365 and OpenImages, if those are not there, from a list in this package.

    Returns:
        The names; None for no datasets.
    """
    if not datasets:
        return None
    found: set[str] = set()
    known, unknown = [], []
    for dataset in datasets:
        names = _names_of(dataset)
        if names is None:
            unknown.append(dataset)
        else:
            known.append(dataset)
            found.update(spelling for name in names for spelling in spellings(name))
    if unknown:
        # Once, not for each of many test sets.
        log_first_n(
            logging.WARNING,
            f"The class names of {', '.join(unknown)} are not known (no annotation file): classes that only these "
            "datasets name count as unseen.",
            key="message",
            name=__name__,
        )
    return TrainingNames(frozenset(found), tuple(known), tuple(unknown))


def _names_of(dataset: str) -> list[str] | None:
    try:
        return class_names(dataset)
    except (FileNotFoundError, KeyError):
        listed = json.loads(_NAMES_FILE.read_text(encoding="utf-8"))
        return next((names for key, names in listed.items() if dataset.startswith(key)), None)


def class_groups(
    dataset: str, training_names: TrainingNames | None = None
) -> dict[str, frozenset[int]]:
    """Groups of classes whose numbers are told apart.

    Args:
        dataset: a registered dataset with a ``json_file``.
        training_names: what the model was trained on.

    Returns:
        Contiguous class ids by group: ``r``, ``c`` and ``f`` (rare, common, frequent) if the json tells frequencies,
        as LVIS does; ``seen`` and ``unseen`` with ``training_names``.
    """
    metadata = MetadataCatalog.get(dataset)
    categories = sorted(read_categories(metadata.json_file), key=lambda category: category["id"])
    contiguous = metadata.get("thing_dataset_id_to_contiguous_id")
    if contiguous is None:
        contiguous = {category["id"]: index for index, category in enumerate(categories)}
    groups: dict[str, set[int]] = {}
    for category in categories:
        # Annotation files may name more classes than the dataset has.
        if category["id"] not in contiguous:
            continue
        keys = [category["frequency"]] if "frequency" in category else []
        if training_names is not None:
            names = [category["name"], *category.get("synonyms", ())]
            keys.append("seen" if training_names.contain(names) else "unseen")
        for key in keys:
            groups.setdefault(key, set()).add(contiguous[category["id"]])
    return {key: frozenset(ids) for key, ids in groups.items()}
