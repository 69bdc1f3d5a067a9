"""Runs a localizer over a dataset and leaves its mask tokens on disk."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds
from torch import nn
from torch.utils.data import DataLoader

from ..modeling.prompts import BoxPrompts
from .build import load_records
from .images import ImageReadError
from .mapper import RegionMapper, UnreadableImages
from .token_cache import (
    CachedRegions,
    TokenCache,
    TokenCacheWriter,
    cache_manifest,
    module_sha256,
)

logger = logging.getLogger(__name__)

_SHARDS_AT_LEAST = 64


@torch.no_grad()
def extract_tokens(
    cfg: CfgNode,
    localizer: nn.Module,
    dataset_name: str,
    root: str | os.PathLike[str],
    *,
    images_per_batch: int = 1,
    images_per_shard: int | None = None,
    amp: bool = False,
) -> TokenCache:
    """Extracts the mask tokens of a dataset's annotated boxes, and reads those that are there already.

    In a distributed run every process calls it, and writes its part of the shards. A run that was killed goes on
    where it stopped.

    Args:
        cfg: ``MODEL.LOCALIZER`` is written down beside the tokens; ``DATALOADER`` has workers and the share of images
            that may be unreadable.
        localizer: called as ``localizer(images, boxes, with_masks=False)``, see
            :class:`~regionspot_d2.modeling.localizer.Localizer`. It stays on its device.
        dataset_name: a registered dataset with annotations.
        root: folder of caches, for ``INPUT.TOKEN_CACHE``. The dataset gets a folder in it. All machines must see it.
        images_per_batch: images that the localizer takes at a time. Images of a batch share its rounding errors, so
            another number may change the last digit of a token.
        images_per_shard: see :class:`TokenCacheWriter`. By default 1024, or fewer for a small dataset, so that there
            are shards for many processes.
        amp: whether the localizer runs under autocast, in float16 on a GPU.

    Returns:
        The finished cache.

    Raises:
        ValueError: the dataset has no annotations, or one of a class it has not.
        TokenCacheError: the folder holds tokens of something else.
        RuntimeError: too many images cannot be read.
    """
    loaded = load_records(dataset_name, with_annotations=True)
    device = next(localizer.parameters()).device
    autocast = torch.autocast(device.type, enabled=amp)
    manifest = dataclasses.replace(
        cache_manifest(cfg, dataset_name, module_sha256(localizer)),
        precision=str(autocast.fast_dtype if amp else torch.float32).removeprefix("torch."),
    )
    folder = Path(root) / dataset_name
    token_dim: Any = localizer.token_dim
    records = [_boxes_alone(record) for record in loaded]
    writer = TokenCacheWriter(
        folder,
        manifest,
        [record["image_id"] for record in records],
        token_dim=token_dim,
        images_per_shard=images_per_shard or min(1024, -(-len(records) // _SHARDS_AT_LEAST)),
    )
    # All look before anyone writes, or they would not agree on who does what.
    missing = writer.missing_shards()
    comm.synchronize()
    mine = missing[comm.get_rank() :: comm.get_world_size()]
    logger.info(
        f"'{dataset_name}': {len(missing)} of {writer.num_shards} shards are missing, {len(mine)} for this process."
    )
    batches = [
        list(images[first : first + images_per_batch])
        for images in map(writer.shard_images, mine)
        for first in range(0, len(images), images_per_batch)
    ]
    loader = DataLoader(
        MapDataset(DatasetFromList(records, copy=False), _ExtractionMapper()),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )
    unreadable = UnreadableImages(cfg.DATALOADER.MAX_UNREADABLE_SHARE)
    with autocast:
        _write_shards(writer, mine, _run(localizer, token_dim, device, loader, unreadable))
    comm.synchronize()
    if comm.is_main_process():
        writer.finish()
    comm.synchronize()
    return TokenCache(folder, manifest)


def _write_shards(
    writer: TokenCacheWriter, shards: Sequence[int], regions: Iterator[CachedRegions | None]
) -> None:
    start = time.perf_counter()
    images = 0
    for done, shard in enumerate(shards, start=1):
        places = writer.shard_images(shard)
        writer.write_shard(shard, list(_reported(shard, len(places), regions)))
        images += len(places)
        seconds = time.perf_counter() - start
        eta = datetime.timedelta(seconds=int(seconds / done * (len(shards) - done)))
        logger.info(
            f"Wrote shard {shard} ({done} of {len(shards)}), {images / seconds:.1f} images/s, eta {eta}."
        )


def _reported(
    shard: int, images: int, regions: Iterator[CachedRegions | None]
) -> Iterator[CachedRegions | None]:
    for number, found in enumerate(itertools.islice(regions, images), start=1):
        yield found
        log_every_n_seconds(
            logging.INFO, f"Shard {shard}: {number} of {images} images.", 60, name=__name__
        )


def _run(
    localizer: nn.Module,
    token_dim: int,
    device: torch.device,
    loader: DataLoader,
    unreadable: UnreadableImages,
) -> Iterator[CachedRegions | None]:
    for batch in loader:
        # The image encoder is what costs: images without regions do not see it.
        asked = [x for x in batch if "error" not in x and len(x["instances"])]
        tokens = iter(())
        if asked:
            images = [x["image"].to(device) for x in asked]
            boxes = [BoxPrompts(x["instances"].gt_boxes.to(device)) for x in asked]
            tokens = iter(localizer(images, boxes, with_masks=False)[0])
        for x in batch:
            if "error" in x:
                unreadable.add_bad(x["error"])
                yield None
                continue
            unreadable.add_good()
            found = x["instances"]
            token = next(tokens) if len(found) else found.gt_boxes.tensor.new_zeros(0, token_dim)
            yield CachedRegions(token, found.gt_boxes.tensor, found.gt_classes)


class _ExtractionMapper:
    """The mapper of training, without augmentation: tokens are of the very boxes that training would use."""

    def __init__(self) -> None:
        self.mapper = RegionMapper(True, augmentations=[])

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self.mapper(record)
        except (ImageReadError, SizeMismatchError) as error:
            return {"error": error}


def _boxes_alone(record: dict[str, Any]) -> dict[str, Any]:
    """Leaves out polygons and the like: every worker holds the records."""
    keys = ("bbox", "bbox_mode", "category_id", "iscrowd")
    annotations = [{k: a[k] for k in keys if k in a} for a in record["annotations"]]
    return {**record, "annotations": annotations}
