"""Text embeddings of the names that the mini model knows."""

from __future__ import annotations

import copy
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
from .words import KnownWords, plain

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
    """Looks names up among the classes of LVIS, COCO, Objects365, OpenImages and ImageNet.

    Case, underscores, hyphens, slashes and parentheses do not matter. Class names come first
    ("mouse"); then class names without the part in parentheses ("drum" for
    "drum_(musical_instrument)"); then synonyms, with and without it. Where several classes share a
    name, in one vocabulary or in several, the answer is the mean of their vectors. For a name that
    is none of these, :class:`~regionspot_d2.mini.words.KnownWords` finds one that stands in.

    Attributes:
        dim: width of a vector.
        mean: (dim,), the mean of the vectors of all classes but those of :meth:`extended`.
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
        self._vectors = vectors[:0]
        self._rows: dict[str, list[int]] = {}
        self._ambiguous: set[str] = set()
        self._add(classes, vectors)

    @classmethod
    def from_package(cls) -> TextVectors:
        """The four vocabularies.

        Raises:
            WeightsNotFoundError: the package of their vectors is unavailable.
        """
        classes = [names for name in VOCABULARIES for names in class_synonyms(name)]
        return cls(classes, torch.cat([package_vectors(name) for name in VOCABULARIES]))

    def extended(self, classes: Sequence[Sequence[str]], vectors: Tensor) -> TextVectors:
        """A copy that knows more classes; whatever had a vector before keeps it.

        Args:
            classes, vectors: as for the constructor.
        """
        more = copy.copy(self)
        more._add(classes, F.normalize(vectors.float(), dim=1))
        return more

    def _add(self, classes: Sequence[Sequence[str]], vectors: Tensor) -> None:
        rows, ambiguous = dict(self._rows), set(self._ambiguous)
        for synonyms in (False, True):
            for spelled in (plain, _without_brackets):
                level: dict[str, list[int]] = {}
                for row, names in enumerate(classes, start=len(self._vectors)):
                    for name in dict.fromkeys(map(spelled, names[1:] if synonyms else names[:1])):
                        level.setdefault(name, []).append(row)
                if spelled is _without_brackets:
                    ambiguous |= level.keys() - rows.keys()
                # A name belongs to the first level that knows it.
                rows = level | rows
        self._vectors = torch.cat([self._vectors, vectors])
        self._rows, self._ambiguous = rows, ambiguous
        self._words = KnownWords(rows, ambiguous)
        # The rules by which names stand in are part of what a name means.
        meanings = repr([sorted(rows.items()), sorted(ambiguous), self._words.fingerprint])
        self.fingerprint = fingerprint([("vectors", self._vectors)], meanings)[:16]

    def known_names(self, names: Sequence[str]) -> list[str]:
        """For each name the one whose vector it gets: itself if it is known, else its stand-in.

        Raises:
            ValueError: nothing stands in for a name; the message has similar known ones.
        """
        found = [n if plain(n) in self._rows else self._words.stand_in(n) for n in names]
        unknown = [name for name, known in zip(names, found) if known is None]
        if unknown:
            raise ValueError(self._advice(unknown))
        return [name for name in found if name is not None]

    def __call__(self, names: Sequence[str]) -> Tensor:
        """Embeds names: (len(names), dim), float32, rows of unit length.

        Raises:
            ValueError: as :meth:`known_names`.
        """
        rows = [self._rows[plain(name)] for name in self.known_names(names)]
        found = [self._vectors[row].mean(0) for row in rows]
        return F.normalize(torch.stack(found), dim=1) if found else self._vectors[:0]

    def _advice(self, unknown: Sequence[str]) -> str:
        lines = []
        for name in unknown[:5]:
            # "cricket bat" is not close to "bat" by its letters, nor "red bag" to "paper bag".
            words = plain(name).split()
            close = [word for word in words if word in self._rows]
            close += difflib.get_close_matches(plain(name), self._rows, n=4)
            close += [known for known in self._rows if words and known.split()[-1:] == words[-1:]]
            close = list(dict.fromkeys(close))[:6]
            lines.append(
                f"'{name:.60}': " + (f"close: {', '.join(close)}" if close else "none close")
            )
        if len(unknown) > len(lines):
            lines.append(f"and {len(unknown) - len(lines)} more")
        return (
            "The mini model knows the class names and synonyms of LVIS, COCO, Objects365, "
            "OpenImages and ImageNet, but not "
            + "; ".join(lines)
            + ". Configs with a CLIP text encoder, e.g. configs/regionspot_L.yaml, take any name."
        )


def _without_brackets(name: str) -> str:
    return plain(re.sub(r"\([^)]*\)", " ", name))
