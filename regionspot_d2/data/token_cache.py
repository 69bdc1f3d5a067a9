"""Mask tokens on disk: a frozen localizer's tokens are extracted once and then read.

A cache is a folder with a safetensors file for each shard, a fixed range of the dataset's images::

    header  JSON: the :class:`CacheManifest`, the shard's number, image ids, sha256 of all that
    tokens  (regions of the shard, token_dim), float16
    counts  (images,), int32: regions of each image; -1 if the image could not be read

A shard appears only when complete, with the same bytes whichever process writes it. Headers are
checked when the cache is opened, arrays at the first use by each process, or when written over.
"""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ..files import write_atomically
from .images import ImageReadError, OneLineError

PATIENCE_SECONDS = 60  # how long a network disk may hide what another machine has written
_FORMAT, _HEADER, _UNREADABLE = 3, "token_cache", -1
_WITHOUT_HEADER_SHA256 = 2  # the format of caches that exist, and are read and continued
_MAX_SHARDS = 1_000_000
_REMEDY = "Delete this file and run tools/extract_tokens.py again; it writes only what is missing."
# What a header of any content raises.
_BAD = SafetensorError, LookupError, AttributeError, TypeError, ValueError, OSError, RecursionError
_LABELS = {
    "localizer": "MODEL.LOCALIZER.NAME",
    "arch": "MODEL.LOCALIZER.ARCH",
    "tokens": "MODEL.LOCALIZER.TOKENS",
    "annotations_sha256": "sha256 of the annotations",
    "weights_sha256": "sha256 of the localizer's weights",
}


class TokenCacheError(OneLineError, ValueError):
    """A token cache is missing, unfinished, damaged, or made from something else."""


@dataclass(frozen=True)
class CacheManifest:
    """What the tokens of a cache were made from. In a request, None and 0 accept anything."""

    dataset: str  # for messages: the same data may be registered under another name
    annotations_sha256: str
    class_names: Sequence[str]  # in the order of the contiguous ids
    localizer: str  # this and the next two: MODEL.LOCALIZER.NAME, .ARCH and .TOKENS
    arch: str
    tokens: str
    weights_sha256: str | None = None  # the localizer's files.module_fingerprint
    precision: str | None = None  # "float32", or the dtype of autocast
    token_dim: int = 0  # this and the next two: the layout, set by the cache's writer
    num_images: int = 0
    images_per_shard: int = 0

    def require(self, wanted: CacheManifest, problem: str, remedy: str) -> None:
        """Raises a TokenCacheError with the differences if the cache is not what is wanted."""
        have, want = asdict(self), asdict(wanted)
        for values in (have, want):
            names = values.pop("class_names")
            values |= {"dataset": "", "number of classes": len(names)}
            values |= {f"class {i}": name for i, name in enumerate(names)}
        lines = [
            f"{_LABELS.get(key, key)}: the cache has {have[key]!r}, {value!r} is wanted"
            for key, value in want.items()
            if value and key in have and have[key] != value
        ]
        if lines:  # a few are enough where all classes differ
            raise TokenCacheError("\n  ".join([problem, *lines[:8]]) + f"\n{remedy}")

    def shard_paths(self, folder: Path) -> list[Path]:
        """The files of a complete cache."""
        shards = -(-self.num_images // self.images_per_shard)
        return [folder / f"shard-{shard:05d}.safetensors" for shard in range(shards)]

    def missing_shards(self, folder: Path) -> list[int]:
        return [i for i, path in enumerate(self.shard_paths(folder)) if not path.exists()]


def find_manifest(folder: Path) -> CacheManifest | None:
    """The manifest of a cache, finished or not."""
    if (folder / "manifest.json").exists():
        raise TokenCacheError(
            f"'{folder}' is of an earlier version. Delete it and run tools/extract_tokens.py again."
        )
    return next((_Shard(path).manifest for path in folder.glob("shard-*.safetensors")), None)


class _Shard:
    """A mapped shard. It keeps no file descriptor, of which a process has few."""

    def __init__(self, path: Path) -> None:
        try:
            if not path.is_file():
                raise ValueError("it is not a file")
            self.path, self._status, self._checked = path, _status(path), False
            self._file = safe_open(path, framework="numpy")
            header = json.loads(self._file.metadata()[_HEADER])
            promised = header.pop("header_sha256", None)
            if header["format"] not in (_FORMAT, _WITHOUT_HEADER_SHA256):
                raise ValueError(f"format {header['format']} instead of {_FORMAT}")
            if header["format"] == _FORMAT and _sha256_of_header(header) != promised:
                raise ValueError("the sha256 of its header is wrong")
            self.manifest = CacheManifest(**header["manifest"])
            self.number, self._sha256 = header["shard"], header["sha256"]
            self.image_ids = np.array(header["image_ids"])
            self._counts = self._file.get_tensor("counts")
            self._check_layout()
        except _BAD as error:
            reason = textwrap.shorten(str(error), 200)
            raise TokenCacheError(
                f"'{path}' is not a shard of a token cache, or is damaged ({reason}). {_REMEDY}"
            ) from error
        self._ends = self._counts.clip(min=0).cumsum()

    def _check_layout(self) -> None:
        made = self.manifest
        numbers = (self.number, made.token_dim, made.num_images, made.images_per_shard)
        if not all(type(number) is int and 0 <= number < 1 << 40 for number in numbers):
            raise ValueError(f"its sizes are {numbers}")
        if not made.images_per_shard or made.num_images > made.images_per_shard * _MAX_SHARDS:
            raise ValueError(f"its {made.num_images} images are in too many shards")
        names = made.class_names
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("its class names are not a list of names")
        first = self.number * made.images_per_shard
        images = max(0, min(made.images_per_shard, made.num_images - first))
        counts, tokens = self._counts, self._file.get_slice("tokens")
        kinds = (counts.dtype.str, tokens.get_dtype(), self.image_ids.dtype.kind)
        if kinds[:2] != ("<i4", "F16") or kinds[2] not in "iU":
            raise ValueError(f"its counts, tokens and image ids are of the kinds {kinds}")
        shapes = [list(counts.shape), list(self.image_ids.shape), tokens.get_shape()[1:]]
        wanted = [[images], [images], [made.token_dim]]
        if shapes != wanted:
            raise ValueError(f"counts, image ids and tokens have the shapes {shapes}, not {wanted}")

    def tokens(self, place: int) -> Tensor:
        """The tokens of the image at a place in the shard; ImageReadError if it has none."""
        self._check_content()
        end, count = int(self._ends[place]), int(self._counts[place])
        if count == _UNREADABLE:
            raise ImageReadError(
                f"The image {self.image_ids[place].item()!r} of '{self.manifest.dataset}' could not"
                f" be read when its tokens were extracted. Delete '{self.path}' and extract again."
            )
        if not count:  # safetensors refuses an empty slice at the end
            return torch.zeros(0, self.manifest.token_dim, dtype=torch.float16)
        return torch.from_numpy(self._file.get_slice("tokens")[end - count : end])

    def _check_content(self) -> None:
        status = _status(self.path)
        if status and self._status and status != self._status and status[0] == self._status[0]:
            # Written over. A mapping of more than the file has would end the process.
            if status[1] != self._status[1]:
                raise TokenCacheError(f"'{self.path}' was changed while it was in use. {_REMEDY}")
            self._status, self._checked = status, False
        if self._checked:
            return
        rows, counts = self._file.get_tensor("tokens"), self._file.get_tensor("counts")
        if hashlib.sha256(rows.tobytes() + counts.tobytes()).hexdigest() != self._sha256:
            raise TokenCacheError(f"'{self.path}' is damaged: its sha256 is wrong. {_REMEDY}")
        if counts.min(initial=0) < _UNREADABLE or counts.clip(min=0).sum() != len(rows):
            raise TokenCacheError(f"'{self.path}' does not count its {len(rows)} rows. {_REMEDY}")
        self._checked = True


def _status(path: Path) -> tuple[int, int, int] | None:
    """What tells whether a file is another (first), or changed; None if it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _sha256_of_header(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header).encode()).hexdigest()


class TokenCacheWriter:
    """Writes or continues a cache, from any processes and machines that share a disk.

    TokenCacheError if the folder has another cache, or ids are not unique, all int or all str.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: CacheManifest,
        image_ids: Sequence[int] | Sequence[str],
        *,
        token_dim: int = 256,
        images_per_shard: int = 1024,  # a cache that is continued keeps its own
    ) -> None:
        self._folder, ids = Path(folder), np.array(image_ids)
        if ids.dtype.kind != "i" and not all(isinstance(image_id, str) for image_id in image_ids):
            kinds = " and ".join(sorted({type(image_id).__name__ for image_id in image_ids}))
            raise TokenCacheError(f"Image ids must be all int or all str; these are {kinds}.")
        self._ids = ids.tolist()
        image_id, times = Counter(self._ids).most_common(1)[0]
        if times > 1:
            raise TokenCacheError(f"'{manifest.dataset}' has image id {image_id!r} more than once.")
        manifest = replace(manifest, token_dim=token_dim, num_images=len(ids))
        if existing := find_manifest(self._folder):
            problem = f"'{folder}' holds a token cache that cannot be continued:"
            existing.require(manifest, problem, "Give another folder, or delete this one.")
        self._manifest = existing or replace(manifest, images_per_shard=images_per_shard)
        self._paths = self._manifest.shard_paths(self._folder)
        self.num_shards = len(self._paths)

    def shard_images(self, shard: int) -> range:  # places in the dataset
        size = self._manifest.images_per_shard
        return range(len(self._ids))[shard * size : (shard + 1) * size]

    def missing_shards(self) -> list[int]:
        return self._manifest.missing_shards(self._folder)

    def write_shard(self, shard: int, tokens: Sequence[Tensor | None]) -> None:
        """Writes a complete shard, unless it exists; ValueError if the tokens do not fit.

        There are (R, token_dim), finite in float16, for each image, or None if it is unreadable.
        """
        ids = [self._ids[place] for place in self.shard_images(shard)]
        if len(tokens) != len(ids):
            raise ValueError(f"Shard {shard} has {len(ids)} images; tokens of {len(tokens)} given.")
        if self._paths[shard].exists():  # a process of a killed run may write late
            return
        read = [each.detach().cpu().half().numpy() for each in tokens if each is not None]
        rows = np.concatenate([np.empty((0, self._manifest.token_dim), np.float16), *read])
        if not np.isfinite(rows).all():
            raise ValueError(f"Shard {shard}: tokens are not finite as float16; check the weights.")
        counts = np.array([_UNREADABLE if each is None else len(each) for each in tokens], "i4")
        header = dict(format=_FORMAT, shard=shard, image_ids=ids, manifest=asdict(self._manifest))
        header["sha256"] = hashlib.sha256(rows.tobytes() + counts.tobytes()).hexdigest()
        header["header_sha256"] = _sha256_of_header(header)
        # A single entry: safetensors writes several in random order, and bytes must not differ.
        with write_atomically(self._paths[shard]) as file:
            file.write(save({"tokens": rows, "counts": counts}, {_HEADER: json.dumps(header)}))

    def finish(self) -> None:
        """Checks, once all processes are done, that the cache is whole; else TokenCacheError."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.missing_shards() and time.monotonic() < deadline:
            time.sleep(0.2)
        for leftover in self._folder.glob(".shard-*.partial"):  # of killed processes
            leftover.unlink(missing_ok=True)
        TokenCache(self._folder, self._manifest)


class TokenCache:
    """Reads a finished cache; TokenCacheError if there is none, or not of what is ``wanted``."""

    def __init__(self, folder: str | Path, wanted: CacheManifest | None = None) -> None:
        self._folder = Path(folder)
        if not (manifest := find_manifest(self._folder)):
            raise TokenCacheError(f"No token cache in '{folder}'; run tools/extract_tokens.py.")
        self.manifest = manifest
        remedy = "Extract into another folder (tools/extract_tokens.py), or change the config."
        manifest.require(wanted or manifest, f"The token cache '{folder}' does not match:", remedy)
        paths, missing = manifest.shard_paths(self._folder), manifest.missing_shards(self._folder)
        if missing:
            raise TokenCacheError(
                f"The token cache '{folder}' is not finished: {len(missing)} of {len(paths)} shards"
                f" are missing, the first is {missing[0]}. Restart the extraction to continue."
            )
        self._shards = [_Shard(path) for path in paths]
        for number, shard in enumerate(self._shards):
            if (shard.number, shard.manifest) != (number, manifest):
                raise TokenCacheError(f"'{shard.path}' is of another cache or place. {_REMEDY}")
        if len({shard.image_ids.dtype.kind for shard in self._shards}) > 1:
            raise TokenCacheError(f"'{folder}' has image ids that are text and numbers. {_REMEDY}")
        # Not a dict: forked workers would copy its millions of ids.
        self._ids = np.concatenate([shard.image_ids for shard in self._shards])
        self._order = np.argsort(self._ids)
        ids = self._ids[self._order]
        if len(twice := ids[1:][ids[1:] == ids[:-1]]):
            raise TokenCacheError(
                f"The token cache '{folder}' has the image {twice[0].item()!r} more than once. "
                "Delete it and run tools/extract_tokens.py again."
            )

    def __reduce__(self) -> tuple[type[TokenCache], tuple[Path]]:
        return TokenCache, (self._folder,)  # processes share the pages of the files

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, image_id: int | str, classes: Tensor | None = None) -> Tensor:
        """The tokens of one image: (R, token_dim), float16, a copy, in the order of its regions.

        Raises:
            TokenCacheError: the cache lacks the image, is damaged, or R differs from ``classes``.
            ImageReadError: the image could not be read when the tokens were extracted.
        """
        i = int(self._ids.searchsorted(image_id, sorter=self._order))
        if i == len(self._ids) or self._ids[self._order[i]] != image_id:
            raise TokenCacheError(f"The token cache '{self._folder}' has no image {image_id!r}.")
        number, place = divmod(int(self._order[i]), self.manifest.images_per_shard)
        tokens = self._shards[number].tokens(place)
        if classes is not None and len(classes) != len(tokens):
            raise TokenCacheError(
                f"The token cache '{self._folder}' has tokens of {len(tokens)} regions of the image"
                f" {image_id!r}, which has {len(classes)} annotated regions. Extract them again."
            )
        return tokens
