"""The names a model was trained on, to tell seen classes from unseen ones.

RegionSpot's training vocabularies and LVIS share many names: 704 of the 1203 LVIS classes have, by
name or synonym, boxes in Objects365, OpenImages or V3Det, 145 of the 337 rare ones among them.
"Zero-shot" AP mixes both kinds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from detectron2.data import MetadataCatalog
from detectron2.utils.logger import log_first_n

from ..data.datasets import class_names, read_categories
from ..data.datasets.vocabularies import shipped_names

_QUALIFIER = re.compile(r"\([^)]*\)")


class TrainingNames(NamedTuple):
    """The vocabularies of a model's training data.

    Attributes:
        names: all names, as :func:`spellings` gives them.
        known: the datasets whose names are among them.
        unknown: the datasets whose names were not found; classes that only these name count as
            unseen.
    """

    names: frozenset[str]
    known: tuple[str, ...]
    unknown: tuple[str, ...]

    def contain(self, names: Iterable[str]) -> bool:
        """Whether any of the names, in any spelling, was trained on."""
        return any(not self.names.isdisjoint(spellings(name)) for name in names)


def spellings(name: str) -> set[str]:
    """The forms in which a class name is compared: lower case, no qualifier in parentheses.

    ``"Cabinet/shelf"`` gives ``"cabinet"`` and ``"shelf"``, ``"bat_(animal)"`` gives ``"bat"``.
    """
    plain = _QUALIFIER.sub(" ", name.lower().replace("_", " ").replace("-", " "))
    return {words for part in plain.split("/") if (words := " ".join(part.split()))}


def find_training_names(datasets: Sequence[str]) -> TrainingNames | None:
    """Collects the class names of ``cfg.DATASETS.TRAIN``.

    Names come from metadata or annotation files; where Objects365's and OpenImages' files are
    absent, from the lists in this package. None for no datasets.
    """
    if not datasets:
        return None
    names = {dataset: _names_of(dataset) for dataset in datasets}
    known = tuple(dataset for dataset, listed in names.items() if listed is not None)
    unknown = tuple(dataset for dataset, listed in names.items() if listed is None)
    if unknown:
        # Once, not for each of many test sets.
        log_first_n(
            logging.WARNING,
            f"The class names of {', '.join(unknown)} are unknown (no annotation file): classes "
            "that only these datasets name count as unseen.",
            key="message",
            name=__name__,
        )
    found = (spellings(name) for dataset in known for name in names[dataset] or ())
    return TrainingNames(frozenset().union(*found), known, unknown)


def _names_of(dataset: str) -> list[str] | None:
    try:
        return class_names(dataset)
    except (FileNotFoundError, KeyError):
        return shipped_names(dataset)


def class_groups(
    dataset: str, training_names: TrainingNames | None = None
) -> dict[str, frozenset[int]]:
    """Groups of classes that are evaluated separately.

    Returns:
        Contiguous class ids by group: ``r``, ``c`` and ``f`` (rare, common, frequent) if the
        dataset's json has frequencies, as LVIS's does; ``seen`` and ``unseen`` with
        ``training_names``.
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
