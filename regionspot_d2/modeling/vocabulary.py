"""Class names to text embeddings, once per vocabulary."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ..files import cache_dir, fingerprint, private_folder, write_atomically
from .interfaces import VisionLanguageModel
from .members import Member
from .names import clean_name, raw_name
from .words import MAX_VOCABULARIES, Words, as_vocabulary

logger = logging.getLogger(__name__)

# Texts encoded at a time: 81 templates of one name fill about a third of it.
_BATCH_SIZE = 256
# Bytes kept on disk. LVIS with ViT-L/14 takes 3.7 MB.
_MAX_DISK_BYTES = 1_000_000_000
# Between numbers of two rows that are the same: the order of texts changes the last digits.
_ROUNDING = 1e-5
_TEMPLATE = re.compile(r"[^{}]*\{\}[^{}]*", re.DOTALL)


def dataset_class_names(name: str | None) -> list[str]:
    """The ``thing_classes`` of a dataset in the ``MetadataCatalog``; ValueError if it has none."""
    names = MetadataCatalog.get(name).get("thing_classes") if name else None
    if not names:
        raise ValueError(
            f"There is no vocabulary: dataset {name!r} has no MetadataCatalog 'thing_classes'. "
            "Set them, or name a dataset in the input's 'dataset_name' or in DATASETS.TEST."
        )
    return names


def dataset_stuff_classes(name: str | None) -> set[int]:
    """The places of stuff in a panoptic dataset's ``thing_classes``, which hold all its names.

    Raises:
        ValueError: its metadata has no list of both, as Detectron2's "standard" datasets have.
    """
    metadata = MetadataCatalog.get(name) if name else None
    names = metadata and metadata.get("thing_classes")
    if metadata is None or not names or names != metadata.get("stuff_classes"):
        raise ValueError(
            f"The dataset {name!r} does not tell things from stuff: its thing_classes and "
            "stuff_classes must both list all names, as those of coco_2017_val_panoptic do."
        )
    return set(metadata.stuff_dataset_id_to_contiguous_id.values())


class TextEmbedder:
    """Embeds vocabularies: a name's templates are encoded, averaged, then scaled to unit length.

    The last vocabularies stay in memory. In ``cache_folder``, if any, each has a file, valid for
    one text tower, one set of templates and one list of names. Files unused for longest go when
    all take more than ``max_disk_bytes``.
    """

    def __init__(
        self,
        vision_language: VisionLanguageModel,
        cache_folder: Path | None = None,
        *,
        max_disk_bytes: int = _MAX_DISK_BYTES,
        raw_names: bool = False,
        templates: Sequence[str] = (),
    ) -> None:
        """
        Args:
            raw_names: whether names are encoded by :func:`raw_name`, not :func:`clean_name`.
            templates: with one ``{}`` each; by default those of the model.
        """
        for template in templates:
            if not isinstance(template, str) or not _TEMPLATE.fullmatch(template):
                raise ValueError(
                    f"MODEL.VISION_LANGUAGE.TEMPLATES holds {template!r:.60}; text with one {{}} "
                    "for the class name is expected, such as 'a photo of a {}.'."
                )
        self._model = vision_language
        self._words = raw_name if raw_names else clean_name
        self._templates = tuple(templates) or vision_language.templates
        self._folder = cache_folder
        self._max_disk_bytes = max_disk_bytes
        self._recent: OrderedDict[tuple[torch.device, str], Tensor] = OrderedDict()
        self._lock = Lock()
        self._stood_in: OrderedDict[str, dict[str, str]] = OrderedDict()
        self._apart: OrderedDict[str, bool] = OrderedDict()

    @classmethod
    def from_config(cls, cfg: CfgNode, vision_language: VisionLanguageModel) -> TextEmbedder:
        """Builds it as ``MODEL.VISION_LANGUAGE`` says, with a folder in the project's cache."""
        return cls(
            vision_language,
            cache_dir() / "vocabularies",
            raw_names=cfg.MODEL.VISION_LANGUAGE.RAW_NAMES,
            templates=cfg.MODEL.VISION_LANGUAGE.TEMPLATES,
        )

    def __call__(self, words: Words, device: torch.device | str = "cpu") -> Tensor:
        """Embeds class names, or the texts of a vocabulary, with the vectors that it has besides.

        Returns:
            (T, D) float32 on ``device``, rows of unit length: one for each of C class names; for a
            vocabulary of another kind see :meth:`Vocabulary.vectors`.

        Raises:
            ValueError: there are none, or one is empty or too long for the model. A name may occur
                twice, as in the class lists of some datasets.
        """
        vocabulary = as_vocabulary(words, repeats=True)
        key = (torch.device(device), vocabulary.key)
        vectors = self._recall(self._recent, key)
        if vectors is None:  # not locked: threads with other vocabularies need not wait
            texts = tuple(map(self._words, vocabulary.texts))
            embeddings = self._load(texts) if texts else torch.zeros(0, self._model.text_dim)
            vectors = vocabulary.vectors(embeddings).to(device)
            self._remember(self._recent, key, vectors)
        return vectors

    def _recall(self, recent: OrderedDict[Any, Any], key: Any) -> Any:
        with self._lock:
            if key in recent:
                recent.move_to_end(key)  # the last to go
            return recent.get(key)

    def _remember(self, recent: OrderedDict[Any, Any], key: Any, value: Any) -> None:
        with self._lock:
            recent[key] = value
            if len(recent) > MAX_VOCABULARIES:
                recent.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def stood_in(self, words: Words) -> dict[str, str]:
        """The texts that the model does not know, each with the known one that stands in for it.

        Raises:
            ValueError: the model cannot encode one.
        """
        vocabulary = as_vocabulary(words, repeats=True)
        found = self._recall(self._stood_in, vocabulary.key)
        if found is None:
            texts = vocabulary.texts
            cleaned = list(map(self._words, texts))
            pairs = zip(texts, cleaned, self._model.known_names(cleaned))
            found = {text: known for text, word, known in pairs if known != word}
            self._remember(self._stood_in, vocabulary.key, found)
        return dict(found)

    def check_apart(self, words: Words) -> None:
        """Checks that no text has the embedding of another: two spellings of one name, as the text
        side reads them, or a known name that stands in for both.

        Two texts of one class may have the same: the nearest decides, whichever it is.

        Raises:
            ValueError: two classes would share every score, or the model cannot encode a text.
        """
        vocabulary = as_vocabulary(words, repeats=True)
        if self._recall(self._apart, vocabulary.key):
            return
        for group in vocabulary.groups:
            compared = (*group.members, *vocabulary.background)
            self._check_group([vocabulary.members[place] for place in compared])
        self._remember(self._apart, vocabulary.key, True)

    def _check_group(self, members: Sequence[Member]) -> None:
        owners = {text: place for place, member in enumerate(members) for text in member.texts}
        if len(texts := list(owners)) < 2:
            return
        stood_in = self.stood_in(texts)
        for first, second in _equal_rows(self(texts)):
            one, other = texts[first], texts[second]
            if owners[one] != owners[other]:
                known = stood_in.get(one, stood_in.get(other))
                reason = f"go by '{known}'" if known else "are one name to the text side"
                raise ValueError(
                    f"The vocabulary has {one!r:.60} and {other!r:.60}, which both {reason} and "
                    "would share every score. Remove one."
                )

    def _load(self, names: tuple[str, ...]) -> Tensor:
        if self._folder is None:
            return self._encode(names)
        # As JSON, since a name may hold any character, a line break included.
        key = json.dumps([self._model.fingerprint, self._templates, names])
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        with self._tolerated(path):
            private_folder(self._folder)
            if path.is_file():
                embeddings = _read(path, key, (len(names), self._model.text_dim))
                with suppress(OSError):  # a cache that may only be read
                    os.utime(path)
                return embeddings
        embeddings = self._encode(names)
        with self._tolerated(path):
            content = {"key": key, "sha256": _checksum(embeddings)}
            with write_atomically(private_folder(self._folder) / path.name) as file:
                file.write(save({"embeddings": embeddings}, content))
            _drop_oldest(self._folder, self._max_disk_bytes)
        return embeddings

    @contextmanager
    def _tolerated(self, path: Path) -> Iterator[None]:
        """A cache that cannot be used costs time and nothing else."""
        try:
            yield
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("The vocabulary cache %s cannot be used (%s).", path, error)

    @torch.no_grad()
    def _encode(self, names: tuple[str, ...]) -> Tensor:
        templates = self._templates
        step = max(1, _BATCH_SIZE // len(templates))
        chunks = range(0, len(names), step)
        rows = []
        for start in tqdm(chunks, desc="Encoding the vocabulary", disable=len(chunks) < 16):
            chunk = names[start : start + step]
            texts = [template.format(name) for name in chunk for template in templates]
            encoded = self._model.encode_text(texts).float().cpu()
            rows.append(encoded.view(len(chunk), len(templates), -1).mean(1))
        embeddings = F.normalize(torch.cat(rows), dim=-1)
        if not embeddings.isfinite().all():
            raise ValueError(
                "MODEL.VISION_LANGUAGE.WEIGHTS are damaged: the text side gives what is not a "
                "number."
            )
        return embeddings


def _equal_rows(embeddings: Tensor) -> Iterator[tuple[int, int]]:
    """Places of rows that differ by nothing but rounding.

    Along any direction they are neighbors, and hardly ever with another between them; so that
    100,000 rows need not all be compared.
    """
    direction = torch.randn(embeddings.shape[1], generator=torch.Generator().manual_seed(0))
    order = (embeddings.double() @ direction.double()).argsort()
    rows = embeddings[order]
    equal = (rows[1:] - rows[:-1]).abs().amax(1) < _ROUNDING
    for place in equal.nonzero().flatten().tolist():
        first, second = sorted(order[place : place + 2].tolist())
        yield first, second


def _checksum(embeddings: Tensor) -> str:
    return fingerprint([("embeddings", embeddings)])


def _read(path: Path, key: str, shape: tuple[int, int]) -> Tensor:
    """The embeddings in a file; ValueError if it is damaged, or of another vocabulary."""
    with safe_open(path, "pt") as file:
        content, embeddings = file.metadata() or {}, file.get_tensor("embeddings")
    if content.get("key") != key:
        raise ValueError("it is of another vocabulary or model")
    if content.get("sha256") != _checksum(embeddings):
        raise ValueError("its sha256 is not that of its content")
    # Rows that were already wrong when they were written.
    if embeddings.dtype != torch.float32 or embeddings.shape != shape:
        raise ValueError(f"it holds {embeddings.dtype} of shape {(*embeddings.shape,)}")
    if not torch.allclose(embeddings.norm(dim=1), torch.ones(len(embeddings)), atol=1e-3):
        raise ValueError("its rows are not of unit length")
    return embeddings


def _drop_oldest(folder: Path, max_bytes: int) -> None:
    """Removes the files of a folder that were not used for longest, until the others fit."""
    states = []
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.npy")]:  # .npy: of version 0.1
        with suppress(FileNotFoundError):  # another process may have removed it
            states.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(states, reverse=True):
        total += size
        if total > max_bytes:
            path.unlink(missing_ok=True)
