"""Class names to text embeddings, once per vocabulary."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

# Texts encoded at a time: 81 templates of one name fill about a third of it.
_BATCH_SIZE = 256


def clean_name(name: str) -> str:
    """Writes a class name as words: ``"aerosol_can"`` becomes ``"aerosol can"``."""
    return " ".join(name.replace("_", " ").split())


class TextEmbedder:
    """Embeds vocabularies: every template of a name is encoded, averaged, then scaled to unit length.

    Embeddings are kept in memory, and on disk in one file per vocabulary, which is valid for one text tower, one set of
    templates and one list of names.
    """

    def __init__(self, vision_language: Any, cache_folder: Path | None = None) -> None:
        """
        Args:
            vision_language: a ``VisionLanguageModel``; its text side, templates and fingerprint are used.
            cache_folder: where embeddings are kept; None keeps them in memory only.
        """
        self._model = vision_language
        self._folder = cache_folder
        self._known: dict[tuple[torch.device, tuple[str, ...]], Tensor] = {}

    def __call__(self, names: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Embeds a vocabulary.

        Args:
            names: C class names. A data set may name two classes alike; see :func:`check_names`.
            device: where the result is wanted; it is kept there for the next call.

        Returns:
            (C, D) float32, rows of unit length.

        Raises:
            ValueError: if ``names`` is empty, holds an empty name, or one that the model cannot encode.
        """
        key = (torch.device(device), tuple(names))
        if key not in self._known:
            check_names(names, repeats=True)
            self._known[key] = self._load(tuple(map(clean_name, names))).to(device)
        return self._known[key]

    def _load(self, names: tuple[str, ...]) -> Tensor:
        path = self._path(names)
        if path is not None and path.is_file():
            try:
                embeddings = torch.from_numpy(np.load(path, allow_pickle=False))
                if embeddings.shape == (len(names), self._model.text_dim):
                    return embeddings
                logger.warning("%s has the shape %s; encoding again.", path, embeddings.shape)
            except (OSError, ValueError, EOFError) as error:
                logger.warning("%s cannot be read (%s); encoding again.", path, error)
        embeddings = self._encode(names)
        if path is not None:
            _save(path, embeddings.numpy())
        return embeddings

    def _path(self, names: tuple[str, ...]) -> Path | None:
        if self._folder is None:
            return None
        parts = [self._model.fingerprint, *self._model.templates, "", *names]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.npy"

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


def check_names(names: Sequence[str], *, repeats: bool = False) -> None:
    """Refuses a vocabulary that cannot be meant.

    Args:
        names: the class names.
        repeats: whether a name may occur twice. Class lists of data sets have such names; in words that a person
            typed they are a slip.

    Raises:
        ValueError: if it is empty, or holds an empty name or, unless allowed, the same name twice.
    """
    if isinstance(names, str):
        raise ValueError(f"A vocabulary is a list of names, not one string ('{names}').")
    if len(names) == 0:
        raise ValueError("The vocabulary is empty; give at least one name.")
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        words = clean_name(name) if isinstance(name, str) else ""
        if not words:
            raise ValueError(
                f"Name {place} of the vocabulary is {name!r}; names are non-empty text."
            )
        first = places.setdefault(words.lower(), place)
        if first != place and not repeats:
            raise ValueError(
                f"The vocabulary has '{name}' twice (places {first} and {place}); "
                "two equal names would share every score. Remove one."
            )


def _save(path: Path, array: np.ndarray) -> None:
    # Written beside and renamed: another process finds the whole file or none.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        np.save(file, array)
    os.replace(file.name, path)
