"""Mask tokens on disk: the localizer is frozen, so its tokens are extracted once and read ever after.

A cache is a folder per dataset, of plain NumPy arrays that are memory-mapped, on a disk that all processes see::

    manifest.json                   what the tokens were made from, and how
    shard-00000/regions.npy         a record per region: token (float16), box (float32 XYXY, pixels of the original
                                    image) and class (contiguous id); 532 bytes with SAM's 256 numbers
    shard-00000/counts.npy          regions of each image of the shard; -1 where the image could not be read
    ...
    image_ids.npy, image_rows.npy   the index, written when all shards are there: sorted image ids, and for each its
                                    shard, first row and number of regions

A shard holds a fixed range of the dataset's images, whichever process makes it, and appears under its name only when it
is complete. So extraction may be killed and started again, with any number of processes, and ends with the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import Tensor

from .datasets import class_names
from .images import ImageReadError

logger = logging.getLogger(__name__)

_FORMAT = 1
_UNREADABLE = -1
_PARTIAL = ".partial-"
# What a reader takes for the sign of a finished cache.
_LAST_FILE = "image_rows.npy"
# For how long a network disk may hide what another machine has written.
_PATIENCE_SECONDS = 60


class TokenCacheError(ValueError):
    """A token cache is missing, unfinished, or not made from what it is asked for; the message says which."""


class CachedRegions(NamedTuple):
    """The regions of one image, aligned.

    Attributes:
        tokens: (R, token_dim), float16; float32 from the published layout.
        boxes: (R, 4), float32, XYXY, pixels of the original image; None from the published layout, which has none.
        classes: (R,), int64, contiguous ids.
    """

    tokens: Tensor
    boxes: Tensor | None
    classes: Tensor


@dataclass(frozen=True)
class CacheManifest:
    """What a cache was made from, and how.

    Attributes:
        dataset: name of the dataset.
        annotations_sha256: of its annotations.
        class_names: its words, in the order of the contiguous ids.
        localizer: name in the registry of localizers.
        arch: size of the localizer.
        tokens: kind of token, ``MODEL.LOCALIZER.TOKENS``.
        weights_sha256: of the localizer's parameters, see :func:`module_sha256`. None, when asking, accepts any.
        precision: the localizer ran in, "float32" or the type of autocast. None, when asking, accepts any.
    """

    dataset: str
    annotations_sha256: str
    class_names: tuple[str, ...]
    localizer: str
    arch: str
    tokens: str
    weights_sha256: str | None = None
    precision: str | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CacheManifest:
        """Takes what :func:`dataclasses.asdict` gave, after a trip through json."""
        return cls(**{**values, "class_names": tuple(values["class_names"])})

    def differences(self, wanted: CacheManifest) -> list[str]:
        """Says in words what is not as wanted. The same data may have another name."""
        found = []
        for field, what in (
            ("localizer", "MODEL.LOCALIZER.NAME"),
            ("arch", "MODEL.LOCALIZER.ARCH"),
            ("tokens", "MODEL.LOCALIZER.TOKENS"),
            ("weights_sha256", "sha256 of the localizer's weights"),
            ("precision", "precision"),
            ("annotations_sha256", "sha256 of the annotations"),
        ):
            have, want = getattr(self, field), getattr(wanted, field)
            if want is not None and have != want:
                found.append(f"{what}: the cache has '{have}', '{want}' is wanted")
        if len(self.class_names) != len(wanted.class_names):
            found.append(
                f"classes: the cache has {len(self.class_names)}, {len(wanted.class_names)} are wanted"
            )
        for i, (have, want) in enumerate(zip(self.class_names, wanted.class_names)):
            if have != want:
                found.append(f"class {i}: the cache has '{have}', '{want}' is wanted")
                break
        return found


def cache_manifest(
    cfg: CfgNode, dataset_name: str, weights_sha256: str | None = None
) -> CacheManifest:
    """What the cache of a dataset must be made from.

    Args:
        cfg: ``MODEL.LOCALIZER`` matters.
        dataset_name: a registered dataset.
        weights_sha256: of the localizer, see :func:`module_sha256`; None accepts any.
    """
    return CacheManifest(
        dataset=dataset_name,
        annotations_sha256=_annotations_sha256(dataset_name),
        class_names=tuple(class_names(dataset_name)),
        localizer=cfg.MODEL.LOCALIZER.NAME,
        arch=cfg.MODEL.LOCALIZER.ARCH,
        tokens=cfg.MODEL.LOCALIZER.TOKENS,
        weights_sha256=weights_sha256,
    )


def _annotations_sha256(dataset_name: str) -> str:
    sha256 = hashlib.sha256()
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is None:
        # A dataset made by a function of the user's.
        for record in DatasetCatalog.get(dataset_name):
            regions = [
                (a["category_id"], *map(float, a["bbox"])) for a in record.get("annotations", ())
            ]
            sha256.update(repr((record["image_id"], regions)).encode())
    else:
        with PathManager.open(json_file, "rb") as file:
            while chunk := file.read(1 << 20):
                sha256.update(chunk)
    return sha256.hexdigest()


def module_sha256(module: torch.nn.Module) -> str:
    """Identifies the weights of a model, whatever file they came from and whatever device they are on.

    Returns:
        The sha256 of names and bytes of all parameters and buffers.
    """
    sha256 = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        sha256.update(values.view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _region_dtype(token_dim: int) -> np.dtype:
    return np.dtype([("token", "<f2", (token_dim,)), ("box", "<f4", (4,)), ("class", "<i4")])


class TokenCacheWriter:
    """Writes a cache, shard by shard, from any number of processes and machines that share a disk."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: CacheManifest,
        image_ids: Sequence[int] | Sequence[str],
        *,
        token_dim: int = 256,
        images_per_shard: int = 1024,
    ) -> None:
        """
        Args:
            folder: of this dataset alone; made if missing. What is there already is continued.
            manifest: what the tokens are made from.
            image_ids: of the dataset's images, in its order; all whole numbers or all texts.
            token_dim: width of a token.
            images_per_shard: images of one shard: what is lost at most when a process is killed. A cache that is
                continued keeps its own.

        Raises:
            TokenCacheError: the folder holds a cache of something else; or image ids that are not unique.
        """
        self.folder = Path(folder)
        self.token_dim = token_dim
        self.num_images = len(image_ids)
        self._keys = _as_keys(image_ids)
        self._check_unique(manifest.dataset, image_ids)
        content = {
            "format": _FORMAT,
            "token_dim": token_dim,
            "images_per_shard": images_per_shard,
            "num_images": self.num_images,
            **asdict(manifest),
        }
        path = self.folder / "manifest.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(content, indent=1).encode()
            _write_atomically(path, lambda file: file.write(text))
        there = _read_manifest(self.folder)
        different = CacheManifest.from_json(_manifest_fields(there)).differences(manifest)
        for key in ("token_dim", "num_images"):
            if there[key] != content[key]:
                different.append(f"{key}: the cache has {there[key]}, {content[key]} is wanted")
        if different:
            raise TokenCacheError(
                f"'{self.folder}' holds a token cache that cannot be continued:\n  "
                + "\n  ".join(different)
                + "\nGive another folder, or delete this one."
            )
        self.images_per_shard: int = there["images_per_shard"]

    def _check_unique(self, dataset: str, image_ids: Sequence[Any]) -> None:
        keys, counts = np.unique(self._keys, return_counts=True)
        if len(keys) < self.num_images:
            twice = keys[counts.argmax()]
            first = int((self._keys == twice).argmax())
            raise TokenCacheError(
                f"The dataset '{dataset}' has the image id {image_ids[first]!r} more than once."
            )

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_per_shard)

    def shard_images(self, shard: int) -> range:
        """Places in the dataset of a shard's images."""
        first = shard * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.num_images))

    def missing_shards(self) -> list[int]:
        """Shards that are not complete yet."""
        return [shard for shard in range(self.num_shards) if not self._shard_folder(shard).is_dir()]

    def write_shard(self, shard: int, regions: Sequence[CachedRegions | None]) -> None:
        """Writes a complete shard; does nothing if it is there already.

        Args:
            shard: its number.
            regions: of each of :meth:`shard_images`, with boxes; None for an image that could not be read.

        Raises:
            ValueError: if tokens are not finite as float16, or parts of an image do not have the same length.
        """
        if len(regions) != len(self.shard_images(shard)):
            raise ValueError(
                f"Shard {shard} has {len(self.shard_images(shard))} images; regions of {len(regions)} were given."
            )
        counts = np.array([_UNREADABLE if r is None else len(r.tokens) for r in regions], "<i4")
        rows = np.empty(int(counts.clip(min=0).sum()), _region_dtype(self.token_dim))
        first = 0
        for found in regions:
            if found is None:
                continue
            if found.boxes is None or not len(found.tokens) == len(found.boxes) == len(
                found.classes
            ):
                raise ValueError("An image needs as many tokens as boxes and classes.")
            part = rows[first : first + len(found.tokens)]
            part["token"] = found.tokens.detach().cpu().half().numpy()
            part["box"] = found.boxes.detach().cpu().numpy()
            part["class"] = found.classes.detach().cpu().numpy()
            first += len(part)
        if not np.isfinite(rows["token"]).all():
            raise ValueError(
                f"Shard {shard}: the localizer gave tokens that are not finite as float16; are its weights intact?"
            )
        final = self._shard_folder(shard)
        folder = _partial(final)
        folder.mkdir()
        for name, array in (("regions.npy", rows), ("counts.npy", counts)):
            with open(folder / name, "wb") as file:
                _save(array, file)
                _flush(file)
        try:
            os.rename(folder, final)
        except OSError:
            if not final.is_dir():
                raise
            # Another process was faster, as an orphan of a killed run can be. Its content is the same.
            shutil.rmtree(folder, ignore_errors=True)

    def finish(self) -> None:
        """Writes the index, in one process, after all shards are written.

        Raises:
            TokenCacheError: if shards are missing.
        """
        for _ in range(_PATIENCE_SECONDS):
            missing = self.missing_shards()
            if not missing:
                break
            time.sleep(1)
        else:
            raise TokenCacheError(
                f"'{self.folder}': {len(missing)} of {self.num_shards} shards are missing, the first is {missing[0]}. "
                "Start the extraction again."
            )
        rows = np.empty((self.num_images, 3), "<i4")
        for shard in range(self.num_shards):
            counts = np.load(self._shard_folder(shard) / "counts.npy", allow_pickle=False)
            regions = counts.clip(min=0)
            part = rows[self.shard_images(shard).start :][: len(counts)]
            part[:, 0] = shard
            part[:, 1] = regions.cumsum() - regions
            part[:, 2] = counts
        order = np.argsort(self._keys, kind="stable")
        for name, array in (("image_ids.npy", self._keys[order]), (_LAST_FILE, rows[order])):
            _write_atomically(self.folder / name, functools.partial(_save, array))
        for leftover in self.folder.glob(f"{_PARTIAL}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        unreadable = int((rows[:, 2] == _UNREADABLE).sum())
        logger.info(
            f"'{self.folder}': {self.num_images} images, {int(rows[:, 2].clip(min=0).sum())} regions, "
            f"{unreadable} images could not be read."
        )

    def _shard_folder(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}"


class TokenCache:
    """Reads a cache. It travels between processes as a path; they share the pages of the files."""

    def __init__(self, folder: str | os.PathLike[str], wanted: CacheManifest | None = None) -> None:
        """
        Args:
            folder: of one dataset.
            wanted: what the cache must have been made from.

        Raises:
            TokenCacheError: there is no finished cache, or it was made from something else.
        """
        self.folder = Path(folder)
        content = _read_manifest(self.folder)
        self.manifest = CacheManifest.from_json(_manifest_fields(content))
        self.token_dim: int = content["token_dim"]
        different = [] if wanted is None else self.manifest.differences(wanted)
        if different:
            raise TokenCacheError(
                f"The token cache '{self.folder}' does not match:\n  "
                + "\n  ".join(different)
                + "\nExtract the tokens again into another folder (tools/extract_tokens.py), or change the config."
            )
        if not (self.folder / _LAST_FILE).exists():
            raise TokenCacheError(
                f"The token cache '{self.folder}' is not finished; start its extraction again, it goes on where it "
                "stopped."
            )
        self._open()

    def _open(self) -> None:
        self._keys = _map(self.folder / "image_ids.npy")
        self._rows = _map(self.folder / _LAST_FILE)
        self._shards: dict[int, np.ndarray] = {}

    def _shard(self, shard: int) -> np.ndarray:
        if shard not in self._shards:
            self._shards[shard] = _map(self.folder / f"shard-{shard:05d}" / "regions.npy")
        return self._shards[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_keys", "_rows", "_shards")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, image_id: int | str) -> CachedRegions:
        """The regions of one image.

        Args:
            image_id: as in the dataset.

        Raises:
            TokenCacheError: the cache has no such image.
            ImageReadError: the image could not be read when the tokens were extracted.
        """
        key: Any = image_id.encode() if isinstance(image_id, str) else image_id
        place = 0
        # A number among texts, or the reverse, has no place in the order.
        if (self._keys.dtype.kind == "S") == isinstance(key, bytes):
            place = int(self._keys.searchsorted(key))
        if place == len(self._keys) or self._keys[place] != key:
            raise TokenCacheError(f"The token cache '{self.folder}' has no image {image_id!r}.")
        shard, first, count = self._rows[place].tolist()
        if count == _UNREADABLE:
            raise ImageReadError(
                f"The image {image_id!r} of '{self.manifest.dataset}' could not be read when its tokens were "
                f"extracted. To extract it now, delete 'shard-{shard:05d}' and 'image_rows.npy' in '{self.folder}' "
                "and start the extraction again."
            )
        regions = self._shard(shard)[first : first + count]
        return CachedRegions(
            torch.from_numpy(regions["token"].copy()),
            torch.from_numpy(regions["box"].copy()),
            torch.from_numpy(regions["class"].astype(np.int64)),
        )


class PublishedTokens:
    """Reads the layout of the RegionSpot authors: a file ``<image id>.pth`` per image.

    Each is a dict of ``mask_tokens`` (R tokens) and ``classes`` (R ids, the first class is 1).
    """

    def __init__(self, folder: str | os.PathLike[str], class_names: Sequence[str]) -> None:
        """
        Args:
            folder: of one dataset.
            class_names: its words, in the order of the ids.
        """
        self.folder = Path(folder)
        self.num_classes = len(class_names)

    def read(self, image_id: int | str) -> CachedRegions:
        """The regions of one image, without boxes.

        Raises:
            ImageReadError: there is no file for the image, or it is damaged.
            TokenCacheError: the file has a class that the dataset has not.
        """
        path = self.folder / f"{image_id}.pth"
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            classes = torch.as_tensor(content["classes"], dtype=torch.int64).reshape(-1) - 1
            tokens = torch.as_tensor(content["mask_tokens"]).reshape(len(classes), -1)
        except FileNotFoundError as error:
            raise ImageReadError(
                f"There are no tokens of the image {image_id!r}: no file '{path}'."
            ) from error
        except Exception as error:
            raise ImageReadError(
                f"'{path}' does not hold 'mask_tokens' and 'classes' of as many regions ({error})."
            ) from error
        wrong = (classes < 0) | (classes >= self.num_classes)
        if wrong.any():
            raise TokenCacheError(
                f"'{path}' has the class {int(classes[wrong][0]) + 1}; 1 to {self.num_classes} are expected."
            )
        return CachedRegions(tokens, None, classes)


AnyTokenCache = TokenCache | PublishedTokens


def has_tokens(root: str | os.PathLike[str], dataset_name: str) -> bool:
    """Whether a folder of caches has a finished one of a dataset, of whatever localizer, ours or the authors'."""
    folder = Path(root) / dataset_name
    return (folder / _LAST_FILE).exists() or next(folder.glob("*.pth"), None) is not None


def open_token_cache(root: str | os.PathLike[str], wanted: CacheManifest) -> AnyTokenCache:
    """Opens the cache of a dataset, ours or the authors'.

    Args:
        root: folder of caches, one folder per dataset under its name.
        wanted: the dataset, and what its tokens must have been made from. The authors' files do not say.

    Raises:
        TokenCacheError: there is none, it is not finished, or it does not match.
    """
    folder = Path(root) / wanted.dataset
    if not (folder / "manifest.json").exists() and next(folder.glob("*.pth"), None) is not None:
        logger.warning(
            f"'{folder}' holds tokens in the published layout, which does not say what they were made from."
        )
        return PublishedTokens(folder, wanted.class_names)
    return TokenCache(folder, wanted)


def _as_keys(image_ids: Sequence[Any]) -> np.ndarray:
    if all(isinstance(image_id, str) for image_id in image_ids):
        return np.array([image_id.encode() for image_id in image_ids], dtype="S")
    try:
        return np.array([image_id.__index__() for image_id in image_ids], dtype="<i8")
    except AttributeError:
        kinds = sorted({type(image_id).__name__ for image_id in image_ids})
        raise TokenCacheError(
            f"Image ids must be all whole numbers or all texts; these are {' and '.join(kinds)}."
        ) from None


def _map(path: Path) -> np.ndarray:
    """Maps a file of ``np.save``, as ``np.load(mmap_mode="r")`` does, but without keeping it open.

    A large data set has more shards than a process may have open files.
    """
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    size = start + math.prod(shape) * dtype.itemsize
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return content.numpy()[start:].view(dtype).reshape(shape)


def _manifest_fields(content: dict[str, Any]) -> dict[str, Any]:
    return {name: content[name] for name in CacheManifest.__dataclass_fields__}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
        if content["format"] == _FORMAT:
            return content
    except FileNotFoundError as error:
        raise TokenCacheError(
            f"There is no token cache in '{folder}': no 'manifest.json'. tools/extract_tokens.py makes one."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TokenCacheError(f"'{path}' is not the manifest of a token cache.") from error
    raise TokenCacheError(
        f"'{path}' is of format {content['format']}; this version reads format {_FORMAT}."
    )


def _save(array: np.ndarray, file: IO[bytes]) -> None:
    np.save(file, array, allow_pickle=False)


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    partial = _partial(path)
    with open(partial, "xb") as file:
        write(file)
        _flush(file)
    os.replace(partial, path)


def _partial(path: Path) -> Path:
    # A name of its own for every process: nobody ever writes what another one is writing.
    return path.with_name(f"{_PARTIAL}{path.name}-{uuid.uuid4().hex}")


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
