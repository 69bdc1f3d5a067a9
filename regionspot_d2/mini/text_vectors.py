"""CLIP's text embeddings of the names of four vocabularies, computed beforehand."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.datasets.vocabularies import VOCABULARIES, class_synonyms
from ..files import fingerprint
from .packages import DETIC

# Detic's files (Apache-2.0): CLIP ViT-B/32's vectors of "a {name}".
_VECTORS = {
    "lvis": "datasets/metadata/lvis_v1_clip_a+cname.npy",
    "coco": "datasets/metadata/coco_clip_a+cname.npy",
    "objects365": "datasets/metadata/o365_clip_a+cnamefix.npy",
    "openimages": "datasets/metadata/oid_clip_a+cname.npy",
}


def package_vectors(vocabulary: str) -> Tensor:
    """CLIP's text vectors of the classes of a vocabulary, in its order: (classes, 512).

    Raises:
        WeightsNotFoundError: their package is unavailable.
    """
    content = io.BytesIO(DETIC.read(_VECTORS[vocabulary]))
    return torch.from_numpy(np.load(content, allow_pickle=False))


class TextVectors:
    """Looks names up among the classes of LVIS, COCO, Objects365 and OpenImages.

    Case, underscores, hyphens, slashes and parentheses do not matter. Class names come first
    ("mouse"); then class names without the part in parentheses ("drum" for
    "drum_(musical_instrument)"); then synonyms, with and without it. Where several classes share a
    name, in one vocabulary or in several, the answer is the mean of their vectors.

    Attributes:
        dim: width of a vector.
        mean: (dim,), the mean of the vectors of all classes.
        fingerprint: changes with the names and the vectors.
    """

    def __init__(self, classes: Sequence[Sequence[str]], vectors: Tensor) -> None:
        """
        Args:
            classes: for each class its name, then its synonyms.
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
                # A name belongs to the first level that knows it.
                self._rows = level | self._rows
        rows = repr(sorted(self._rows.items()))
        self.fingerprint = fingerprint([("vectors", vectors)], rows)[:16]

    @classmethod
    def from_package(cls) -> TextVectors:
        """All four vocabularies.

        Raises:
            WeightsNotFoundError: the package of their vectors is unavailable.
        """
        classes = [names for name in VOCABULARIES for names in class_synonyms(name)]
        return cls(classes, torch.cat([package_vectors(name) for name in VOCABULARIES]))

    def __call__(self, names: Sequence[str]) -> Tensor:
        """Embeds names: (len(names), dim), float32, rows of unit length.

        Raises:
            ValueError: a name is unknown; the message has similar known ones.
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
                f"'{name:.60}': " + (f"close: {', '.join(close)}" if close else "none close")
            )
        if len(unknown) > len(lines):
            lines.append(f"and {len(unknown) - len(lines)} more")
        return (
            "The mini model knows the class names and synonyms of LVIS, COCO, Objects365 and "
            "OpenImages, but not "
            + "; ".join(lines)
            + ". Configs with a CLIP text encoder, e.g. configs/regionspot_L.yaml, take any name."
        )


def _plain(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def _without_brackets(name: str) -> str:
    return _plain(re.sub(r"\([^)]*\)", " ", name))
