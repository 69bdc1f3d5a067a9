"""Class names to text embeddings, once per vocabulary."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from torch import Tensor
from tqdm import tqdm

from ..files import write_atomically
from .interfaces import VisionLanguageModel

logger = logging.getLogger(__name__)

# Texts encoded at a time: 81 templates of one name fill about a third of it.
_BATCH_SIZE = 256
# Vocabularies kept in memory, and bytes kept on disk. LVIS with ViT-L/14 takes 3.7 MB.
_MAX_VOCABULARIES = 32
_MAX_DISK_BYTES = 1_000_000_000


def dataset_class_names(name: str | None) -> list[str]:
    """The vocabulary of a dataset: its ``thing_classes`` in the ``MetadataCatalog``.

    Raises:
        ValueError: there is no dataset, or it has none.
    """
    if name is None:
        raise ValueError(
            "There is no vocabulary: give the input a 'dataset_name' of the MetadataCatalog that has "
            "'thing_classes', or name a dataset in DATASETS.TEST."
        )
    names = MetadataCatalog.get(name).get("thing_classes")
    if not names:
        raise ValueError(
            f"The dataset '{name}' has no 'thing_classes' in the MetadataCatalog; "
            f'MetadataCatalog.get("{name}").thing_classes = [...] sets the vocabulary.'
        )
    return names


def clean_name(name: str) -> str:
    """Writes a class name as words: ``"aerosol_can"`` becomes ``"aerosol can"``."""
    return " ".join(name.replace("_", " ").split())


class TextEmbedder:
    """Embeds vocabularies: a name's templates are encoded, averaged, then scaled to unit length.

    The last vocabularies stay in memory. On disk there is a file per vocabulary, valid for one text
    tower, one set of templates and one list of names; the ones that were not used for longest make
    room for new ones.
    """

    def __init__(
        self,
        vision_language: VisionLanguageModel,
        cache_folder: Path | None = None,
        *,
        max_disk_bytes: int = _MAX_DISK_BYTES,
    ) -> None:
        """
        Args:
            vision_language: encodes the texts.
            cache_folder: where embeddings are kept; None keeps them only in memory.
            max_disk_bytes: of all embeddings in ``cache_folder``.
        """
        self._model = vision_language
        self._folder = cache_folder
        self._max_disk_bytes = max_disk_bytes
        self._recent: OrderedDict[tuple[torch.device, tuple[str, ...]], Tensor] = OrderedDict()

    def __call__(self, names: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Embeds a vocabulary.

        Args:
            names: C class names. A dataset may name two classes alike; see :func:`check_names`.
            device: where the result is wanted.

        Returns:
            (C, D) float32, rows of unit length.

        Raises:
            ValueError: ``names`` is empty, holds an empty name, or one that the model cannot encode.
        """
        key = (torch.device(device), tuple(names))
        if key not in self._recent:
            check_names(names, repeats=True)
            self._recent[key] = self._load(tuple(map(clean_name, names))).to(device)
            while len(self._recent) > _MAX_VOCABULARIES:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        return self._recent[key]

    def _load(self, names: tuple[str, ...]) -> Tensor:
        if self._folder is None:
            return self._encode(names)
        parts = [self._model.fingerprint, *self._model.templates, "", *names]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        path = self._folder / f"{digest[:32]}.npy"
        if path.is_file():
            try:
                embeddings = torch.from_numpy(np.load(path, allow_pickle=False))
                if embeddings.shape == (len(names), self._model.text_dim):
                    os.utime(path)
                    return embeddings
                logger.warning("%s has the shape %s; encoding again.", path, embeddings.shape)
            except (OSError, ValueError, EOFError) as error:
                logger.warning("%s cannot be read (%s); encoding again.", path, error)
        embeddings = self._encode(names)
        with write_atomically(path) as file:
            np.save(file, embeddings.numpy())
        _drop_oldest(self._folder, self._max_disk_bytes)
        return embeddings

    @torch.no_grad()
    def _encode(self, names: tuple[str, ...]) -> Tensor:
        templates = self._model.templates
        step = max(1, _BATCH_SIZE // len(templates))
        chunks = range(0, len(names), step)
        rows = []
        for start in tqdm(chunks, desc="Encoding the vocabulary", disable=len(chunks) < 16):
            chunk = names[start : start + step]
            texts = [template.format(name) for name in chunk for template in templates]
            encoded = self._model.encode_text(texts).float().cpu()
            rows.append(encoded.view(len(chunk), len(templates), -1).mean(1))
        return F.normalize(torch.cat(rows), dim=-1)


def _drop_oldest(folder: Path, max_bytes: int) -> None:
    """Removes the files of a folder that were used last, until the others fit."""
    states = []
    for path in folder.glob("*.npy"):
        try:
            state = path.stat()
        except FileNotFoundError:  # another process was faster
            continue
        states.append((state.st_mtime_ns, state.st_size, path))
    total = 0
    for _, size, path in sorted(states, reverse=True):
        total += size
        if total > max_bytes:
            path.unlink(missing_ok=True)


def check_names(names: Sequence[str], *, repeats: bool = False) -> None:
    """Checks that a vocabulary is a list of class names.

    Args:
        names: the class names.
        repeats: whether a name may occur twice. Class lists of datasets have such names; in a
            vocabulary that a person typed they are a slip.

    Raises:
        ValueError: it is one string, empty, or holds an empty name, something that is no text or,
            unless allowed, the same name twice.
    """
    if isinstance(names, str):
        raise ValueError(f"A vocabulary is a list of names, not one string ('{names}').")
    if len(names) == 0:
        raise ValueError("The vocabulary is empty; give at least one name.")
    for place, name in enumerate(names):
        if not isinstance(name, str) or not clean_name(name):
            raise ValueError(
                f"Name {place} of the vocabulary is {name!r}; names are non-empty text."
            )
    if not repeats:
        _check_repeats(tuple(names))


# Reading a thousand names takes longer than naming a box; a vocabulary that comes back was read.
@lru_cache(maxsize=_MAX_VOCABULARIES)
def _check_repeats(names: tuple[str, ...]) -> None:
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        first = places.setdefault(clean_name(name).lower(), place)
        if first != place:
            raise ValueError(
                f"The vocabulary has '{name}' twice (places {first} and {place}); "
                "two equal names would share every score. Remove one."
            )
