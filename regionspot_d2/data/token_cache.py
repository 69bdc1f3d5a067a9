"""Mask tokens on disk: the localizer is frozen, so its tokens are extracted once and then read.

A cache is a folder with one safetensors file per shard, a fixed range of the dataset's images::

    shard-00000.safetensors
        header  JSON: the :class:`CacheManifest`, the shard's number and image ids, the sha256
        tokens  (regions of the shard, token_dim), float16
        counts  (images,), int32: regions of each image; -1 if the image could not be read

Boxes and classes are in the annotations, whose sha256 is in the manifest. Whichever process writes
a shard, it has the same bytes, and appears only when complete. So an extraction can be killed and
started again with any number of processes, and loses only open shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ..files import write_atomically
from .cache_manifest import CacheManifest, TokenCacheError
from .images import ImageReadError

_FORMAT, _HEADER = 2, "token_cache"
_UNREADABLE = -1
# How long a network disk may hide what another machine has written.
PATIENCE_SECONDS = 60
_REMEDY = "Delete this file and run tools/extract_tokens.py again; it writes only what is missing."


class _Shard:
    """An open shard: mapped, but without a file descriptor, of which a process has few."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="numpy")
            header = json.loads(self._file.metadata()[_HEADER])
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']} instead of {_FORMAT}")
            names = tuple(header["manifest"].pop("class_names"))
            self.manifest = CacheManifest(class_names=names, **header["manifest"])
            self.number, self._sha256 = header["shard"], header["sha256"]
            self.image_ids = _as_array(header["image_ids"])
            self._counts = self._file.get_tensor("counts")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TokenCacheError(
                f"'{path}' is not a shard of a token cache, or is damaged ({error}). {_REMEDY}"
            ) from error
        self._ends = self._counts.clip(min=0).cumsum()

    def tokens(self, place: int) -> Tensor | None:
        """Of the image at a place in the shard; None if it was unreadable."""
        if self._sha256:  # to be checked once
            if _sha256(self._file.get_tensor("tokens"), self._counts) != self._sha256:
                raise TokenCacheError(f"'{self.path}' is damaged: its sha256 is wrong. {_REMEDY}")
            self._sha256 = ""
        end, count = int(self._ends[place]), int(self._counts[place])
        if not count:  # safetensors refuses an empty slice at the end
            return torch.zeros(0, self.manifest.token_dim, dtype=torch.float16)
        rows = self._file.get_slice("tokens")
        return None if count == _UNREADABLE else torch.from_numpy(rows[end - count : end])


class TokenCacheWriter:
    """Writes a cache, shard by shard, from any processes and machines that share a disk.

    Args:
        folder: for this dataset only. Shards that are in it already are kept.
        image_ids: unique, in the order of the dataset; all int or all str.
        images_per_shard: what a killed process loses. A cache that is continued keeps its own.

    Raises:
        TokenCacheError: the folder holds another cache, or the image ids cannot be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: CacheManifest,
        image_ids: Sequence[int] | Sequence[str],
        *,
        token_dim: int = 256,
        images_per_shard: int = 1024,
    ) -> None:
        self.folder = Path(folder)
        self._ids = _as_array(image_ids).tolist()
        image_id, times = Counter(self._ids).most_common(1)[0]
        if times > 1:
            raise TokenCacheError(f"'{manifest.dataset}' has image id {image_id!r} more than once.")
        manifest = replace(manifest, token_dim=token_dim, num_images=len(image_ids))
        existing = find_manifest(self.folder)
        if existing is not None:
            problem = f"'{folder}' holds a token cache that cannot be continued:"
            existing.require(manifest, problem, "Give another folder, or delete this one.")
        self._manifest = existing or replace(manifest, images_per_shard=images_per_shard)
        self._paths = self._manifest.shard_paths(self.folder)
        self.num_shards = len(self._paths)

    def shard_images(self, shard: int) -> range:
        """Places of a shard's images in the dataset."""
        size = self._manifest.images_per_shard
        return range(len(self._ids))[shard * size : (shard + 1) * size]

    def missing_shards(self) -> list[int]:
        return self._manifest.missing_shards(self.folder)

    def write_shard(self, shard: int, tokens: Sequence[Tensor | None]) -> None:
        """Writes a complete shard, unless it exists.

        Args:
            tokens: (R, token_dim) for each of :meth:`shard_images`; None if it could not be read.

        Raises:
            ValueError: wrong number of images or width, or a token is not finite as float16.
        """
        ids = [self._ids[place] for place in self.shard_images(shard)]
        if len(tokens) != len(ids):
            raise ValueError(f"Shard {shard} has {len(ids)} images; tokens of {len(tokens)} given.")
        if self._paths[shard].exists():  # the orphan of a killed run can be late
            return
        read = [each.detach().cpu().half().numpy() for each in tokens if each is not None]
        rows = np.concatenate([np.empty((0, self._manifest.token_dim), np.float16), *read])
        if not np.isfinite(rows).all():
            raise ValueError(
                f"Shard {shard} has tokens that are not finite as float16; are the weights intact?"
            )
        counts = np.array([_UNREADABLE if each is None else len(each) for each in tokens], "i4")
        header: dict[str, Any] = {"format": _FORMAT, "shard": shard, "image_ids": ids}
        header |= {"manifest": asdict(self._manifest), "sha256": _sha256(rows, counts)}
        # A single entry: safetensors writes several in random order, and bytes must not differ.
        with write_atomically(self._paths[shard]) as file:
            file.write(save({"tokens": rows, "counts": counts}, {_HEADER: json.dumps(header)}))

    def finish(self) -> None:
        """Checks, once all processes are done, that the cache is whole; else TokenCacheError."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.missing_shards() and time.monotonic() < deadline:
            time.sleep(0.2)
        for leftover in self.folder.glob(".shard-*.partial"):  # of killed processes
            leftover.unlink(missing_ok=True)
        TokenCache(self.folder, self._manifest)


class TokenCache:
    """Reads a finished cache. It is pickled as a path; processes share the pages of the files.

    Raises:
        TokenCacheError: there is none, or it was not made from what is wanted.
    """

    def __init__(self, folder: str | os.PathLike[str], wanted: CacheManifest | None = None) -> None:
        self.folder = Path(folder)
        manifest = find_manifest(self.folder)
        if manifest is None:
            raise TokenCacheError(
                f"No token cache in '{folder}'. tools/extract_tokens.py makes one."
            )
        self.manifest = manifest
        remedy = "Extract into another folder (tools/extract_tokens.py), or change the config."
        manifest.require(wanted or manifest, f"The token cache '{folder}' does not match:", remedy)
        paths = manifest.shard_paths(self.folder)
        if missing := manifest.missing_shards(self.folder):
            raise TokenCacheError(
                f"The token cache '{folder}' is not finished: {len(missing)} of {len(paths)} shards"
                f" are missing, the first is {missing[0]}. Start the extraction again to continue."
            )
        self._shards = [_Shard(path) for path in paths]
        for number, shard in enumerate(self._shards):
            if (shard.number, shard.manifest) != (number, manifest):
                raise TokenCacheError(f"'{shard.path}' is of another cache or place. {_REMEDY}")
        # Sorted arrays, because forked workers would copy a dict of millions of ids.
        ids = np.concatenate([shard.image_ids for shard in self._shards])
        self._places = np.argsort(ids)
        self._ids = ids[self._places]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCache, (self.folder,)

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, image_id: int | str, classes: Tensor | None = None) -> Tensor:
        """The tokens of one image, in the order of its annotated regions.

        Args:
            classes: (R,) of the annotated regions, if R is to be checked.

        Returns:
            (R, token_dim), float16, a copy.

        Raises:
            TokenCacheError: the cache does not have the image, or another R, or is damaged.
            ImageReadError: the image could not be read when the tokens were extracted.
        """
        # An integer among strings, or the reverse, has no place in the order.
        same_kind = isinstance(image_id, str) == (self._ids.dtype.kind == "U")
        i = int(self._ids.searchsorted(image_id)) if same_kind else len(self._ids)
        if i == len(self._ids) or self._ids[i] != image_id:
            raise TokenCacheError(f"The token cache '{self.folder}' has no image {image_id!r}.")
        number, place = divmod(int(self._places[i]), self.manifest.images_per_shard)
        tokens = self._shards[number].tokens(place)
        if tokens is None:
            raise ImageReadError(
                f"The image {image_id!r} of '{self.manifest.dataset}' could not be read when its "
                f"tokens were extracted. To extract it now, delete '{self._shards[number].path}' "
                "and start the extraction again."
            )
        if classes is not None and len(classes) != len(tokens):
            raise TokenCacheError(
                f"The token cache '{self.folder}' has tokens of {len(tokens)} regions of the image "
                f"{image_id!r}, which has {len(classes)} annotated regions. Delete the cache and "
                "extract the tokens again (tools/extract_tokens.py)."
            )
        return tokens


def find_manifest(folder: Path) -> CacheManifest | None:
    """The manifest of a cache, finished or not."""
    if (folder / "manifest.json").exists():
        raise TokenCacheError(
            f"'{folder}' is of an earlier version. Delete it and run tools/extract_tokens.py again."
        )
    path = next(folder.glob("shard-*.safetensors"), None)
    return None if path is None else _Shard(path).manifest


def _as_array(image_ids: Sequence[Any]) -> np.ndarray:
    array = np.array(image_ids)
    if array.dtype.kind == "i" or all(isinstance(image_id, str) for image_id in image_ids):
        return array
    kinds = " and ".join(sorted({type(image_id).__name__ for image_id in image_ids}))
    raise TokenCacheError(f"Image ids must be all int or all str; these are {kinds}.")


def _sha256(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
