"""Runs a localizer over a dataset and leaves its mask tokens on disk."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import logging
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..files import module_fingerprint
from ..modeling.interfaces import Localizer
from ..modeling.precision import precision_on, running_in
from ..modeling.prompts import BoxPrompts
from ..stopping import leave_interrupts
from .build import cache_manifest, load_records
from .images import ImageReadError
from .mapper import RegionMapper, UnreadableImages
from .token_cache import TokenCache, TokenCacheWriter

logger = logging.getLogger(__name__)

_SHARDS_AT_LEAST = 64


class ExtractionStoppedError(RuntimeError):
    """An extraction was interrupted, or cannot write; the message says how to go on."""


@torch.no_grad()
def extract_tokens(
    cfg: CfgNode,
    localizer: Localizer,
    dataset_name: str,
    root: str | os.PathLike[str],
    *,
    images_per_batch: int = 1,
    images_per_shard: int | None = None,
    amp: bool = False,
) -> TokenCache:
    """Extracts the mask tokens of a dataset's annotated regions, or continues a killed extraction.

    In a distributed run every process calls it, and writes its part of the shards.

    Args:
        root: for ``INPUT.TOKEN_CACHE``, on a disk that all machines share; the cache is its folder
            with the name of the dataset.
        images_per_batch: for the localizer; another number may change the last digit of a token.
        images_per_shard: by default 1024, or fewer where there are few images to share out.
        amp: whether the localizer runs in half precision (float16 on a GPU, else bfloat16) where
            ``MODEL.PRECISION`` is float32.

    Raises:
        ValueError: see :func:`~regionspot_d2.data.build.load_records`.
        TokenCacheError: the folder holds tokens of something else.
        TooManyUnreadableError: more images than ``DATALOADER.MAX_UNREADABLE_SHARE`` allows.
        ExtractionStoppedError: Ctrl-C, a full disk, or no right to write.
    """
    records = load_records(dataset_name, with_annotations=True)
    device = next(localizer.parameters()).device
    precision = _precision(cfg, device, amp)
    manifest = dataclasses.replace(
        cache_manifest(cfg, dataset_name, module_fingerprint(localizer)),
        precision=str(precision).removeprefix("torch."),
    )
    folder, ids = Path(root) / dataset_name, [record["image_id"] for record in records]
    size, dim = images_per_shard or min(1024, -(-len(ids) // _SHARDS_AT_LEAST)), localizer.token_dim
    writer = TokenCacheWriter(folder, manifest, ids, token_dim=dim, images_per_shard=size)
    # All look before any writes, or they would not agree on who writes what.
    missing = writer.missing_shards()
    comm.synchronize()
    mine = missing[comm.get_rank() :: comm.get_world_size()]
    logger.info(
        f"'{dataset_name}': {len(missing)} of {writer.num_shards} shards are missing; "
        f"this process writes {len(mine)}."
    )
    batches = [
        list(images[first : first + images_per_batch])
        for images in map(writer.shard_images, mine)
        for first in range(0, len(images), images_per_batch)
    ]
    loader = _build_loader(cfg, records, batches, pin_memory=device.type == "cuda")
    unreadable = UnreadableImages(cfg.DATALOADER.MAX_UNREADABLE_SHARE)
    try:
        if mine:  # a finished cache may be read-only
            _require_writable(folder)
        with running_in(precision, device):
            _write_shards(writer, mine, _run(localizer, loader, unreadable))
    except (KeyboardInterrupt, OSError) as error:
        done = writer.num_shards - len(writer.missing_shards())
        raise ExtractionStoppedError(
            f"Stopped ({textwrap.shorten(str(error), 200) or 'interrupted'}). {done} of "
            f"{writer.num_shards} shards of '{dataset_name}' are in '{folder}'. The same command "
            "goes on from there."
        ) from error
    comm.synchronize()
    if comm.is_main_process():
        writer.finish()
    comm.synchronize()
    return TokenCache(folder, manifest)


def _build_loader(
    cfg: CfgNode, records: list[dict[str, Any]], batches: list[list[int]], *, pin_memory: bool
) -> DataLoader:
    # Training's mapper without augmentation: the regions are those that training will see.
    mapper = RegionMapper(True, augmentations=[], max_pixels=cfg.INPUT.MAX_PIXELS)
    return DataLoader(
        MapDataset(DatasetFromList(records, copy=False), partial(_map, mapper)),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        worker_init_fn=leave_interrupts,
        pin_memory=pin_memory,
    )


def _precision(cfg: CfgNode, device: torch.device, amp: bool) -> torch.dtype:
    precision = precision_on(cfg.MODEL.PRECISION, device)
    plain = amp and precision == torch.float32
    return torch.get_autocast_dtype(device.type) if plain else precision


def _require_writable(folder: Path) -> None:
    """Raises an OSError before the first shard, which may take an hour."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"there is no right to write to '{folder}'")


def _write_shards(
    writer: TokenCacheWriter, shards: Sequence[int], tokens: Iterator[Tensor | None]
) -> None:
    start, images = time.perf_counter(), 0
    for done, shard in enumerate(shards, start=1):
        size = len(writer.shard_images(shard))
        writer.write_shard(shard, list(itertools.islice(tokens, size)))
        images += size
        seconds = time.perf_counter() - start
        eta = datetime.timedelta(seconds=int(seconds / done * (len(shards) - done)))
        logger.info(
            f"Wrote shard {shard} ({done} of {len(shards)}), {images / seconds:.1f} images/s, "
            f"eta {eta}."
        )


def _run(
    localizer: Localizer, loader: DataLoader, unreadable: UnreadableImages
) -> Iterator[Tensor | None]:
    device = next(localizer.parameters()).device
    # None: a bar on a terminal only; a log has a line for each shard, and one every minute.
    hidden = None if comm.is_main_process() else True
    for batch in tqdm(loader, desc="Extracting tokens", unit="batch", disable=hidden):
        # Encoding images is what takes time: those without regions are left out.
        asked = [x for x in batch if "error" not in x and len(x["instances"])]
        found: Iterator[Tensor] = iter(())
        if asked:
            images = [x["image"].to(device, non_blocking=True) for x in asked]
            boxes = [BoxPrompts(x["instances"].gt_boxes.to(device)) for x in asked]
            found = iter(localizer(images, boxes, with_masks=False)[0])
        for x in batch:
            if "error" in x:
                unreadable.add_bad(x["error"])
                yield None
                continue
            unreadable.add_good()
            yield next(found) if len(x["instances"]) else torch.zeros(0, localizer.token_dim)
        text = f"{len(unreadable)} images done."
        log_every_n_seconds(logging.INFO, text, 60, name=__name__)


def _map(mapper: RegionMapper, record: dict[str, Any]) -> dict[str, Any] | None:
    try:
        return mapper(record)
    except (ImageReadError, SizeMismatchError) as error:
        return {"error": error}
