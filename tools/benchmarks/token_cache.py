"""Compares the token cache with one ``torch.save`` file per image, the published layout.

It is the command ``token-cache`` of training.py.

Both hold the same synthetic tokens in half precision, and are read in the same random order: once
to fill the disk's cache and check the sha256 of the shards, then three times, which is what counts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measuring import Ratio

from regionspot_d2.data.published_tokens import PublishedTokens
from regionspot_d2.data.token_cache import CacheManifest, TokenCache, TokenCacheWriter

_CLASS_NAMES = tuple(f"class {i}" for i in range(365))


def write_both(folder: Path, images: int, regions: int, images_per_shard: int) -> int:
    """Writes ``folder/cache`` and ``folder/files``: ``regions`` per image on average.

    Returns:
        The number of regions.
    """
    manifest = CacheManifest("synthetic", "", _CLASS_NAMES, "SamLocalizer", "vit_b", "mask")
    writer = TokenCacheWriter(
        folder / "cache", manifest, range(images), images_per_shard=images_per_shard
    )
    (folder / "files").mkdir()
    generator = torch.Generator().manual_seed(0)
    total = 0
    for shard in range(writer.num_shards):
        places = writer.shard_images(shard)
        counts = torch.randint(1, 2 * regions, (len(places),), generator=generator).tolist()
        tokens = [torch.randn(count, 256, generator=generator).half() for count in counts]
        writer.write_shard(shard, tokens)
        for place, each in zip(places, tokens):
            classes = torch.randint(1, len(_CLASS_NAMES) + 1, (len(each),), generator=generator)
            path = folder / "files" / f"{place}.pth"
            torch.save({"mask_tokens": each, "classes": classes}, path)
        total += sum(counts)
    writer.finish()
    return total


def microseconds_per_image(
    read: Callable[[int], object], order: Sequence[int]
) -> tuple[float, list[float]]:
    """Reads all images several times; returns the times of the first pass and of the others."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for image_id in order:
            read(image_id)
        times.append((time.perf_counter() - start) / len(order) * 1e6)
    return times[0], times[1:]


def opening_milliseconds(folder: Path) -> float:
    """The median of several openings."""
    times = []
    for _ in range(11):
        start = time.perf_counter()
        TokenCache(folder)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def compare(folder: Path, images: int, regions: int, images_per_shard: int) -> None:
    """Prints sizes, times and their ratio."""
    total = write_both(folder, images, regions, images_per_shard)
    cache = TokenCache(folder / "cache")
    files = PublishedTokens(folder / "files", len(_CLASS_NAMES))
    order = list(range(images))
    random.Random(0).shuffle(order)
    print(f"{images} images, {total} regions, {torch.get_num_threads()} thread(s)")
    print(f"open the cache          {opening_milliseconds(folder / 'cache'):10.2f} ms")
    times = []
    for name, source in (("cache", cache), ("files", files)):
        first, others = microseconds_per_image(source.read, order)
        size = bytes_on_disk(folder / name) / total
        print(
            f"read an image, {name}    {statistics.median(others):10.1f} us   "
            f"(first time {first:.1f} us)   {size:7.1f} bytes per region"
        )
        times.append(others)
    assert torch.equal(cache.read(order[0]), files.read(order[0]))
    print(f"the cache, times as fast: {Ratio(times[1], times[0])}")


def run(args: argparse.Namespace) -> None:
    """Compares both in a temporary folder."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        compare(Path(name), args.images, args.boxes, args.images_per_shard)
