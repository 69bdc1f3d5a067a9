"""Compares the token cache with one ``torch.save`` file per image, the published layout.

It is the command ``token-cache`` of training.py.

Both sides hold the same synthetic tokens, in half precision, and are read in the same random order in one run, first
once to warm the disk's cache. The published layout has no boxes; its side is spared writing and reading them.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from regionspot_d2.data.token_cache import (
    CachedRegions,
    CacheManifest,
    PublishedTokens,
    TokenCache,
    TokenCacheWriter,
)

_CLASSES = tuple(f"class {i}" for i in range(365))


def synthetic_regions(count: int, generator: torch.Generator) -> CachedRegions:
    """As many random regions, with SAM's 256 numbers each."""
    return CachedRegions(
        torch.randn(count, 256, generator=generator).half(),
        torch.rand(count, 4, generator=generator) * 640,
        torch.randint(len(_CLASSES), (count,), generator=generator),
    )


def write_both(folder: Path, images: int, boxes: int, images_per_shard: int) -> int:
    """Writes ``folder/cache`` and ``folder/files``; returns the number of boxes, 1 to ``2 * boxes - 1`` an image."""
    manifest = CacheManifest("synthetic", "", _CLASSES, "SamLocalizer", "vit_b", "mask")
    writer = TokenCacheWriter(
        folder / "cache", manifest, range(images), images_per_shard=images_per_shard
    )
    (folder / "files").mkdir()
    generator = torch.Generator().manual_seed(0)
    total = 0
    for shard in range(writer.num_shards):
        places = writer.shard_images(shard)
        counts = torch.randint(1, 2 * boxes, (len(places),), generator=generator).tolist()
        found = [synthetic_regions(count, generator) for count in counts]
        writer.write_shard(shard, found)
        for place, regions in zip(places, found):
            content = {"mask_tokens": regions.tokens, "classes": regions.classes + 1}
            torch.save(content, folder / "files" / f"{place}.pth")
        total += sum(counts)
    writer.finish()
    return total


def microseconds_per_image(read: Callable[[int], object], order: Sequence[int]) -> float:
    """Reads all images twice; the second time counts."""
    for image_id in order:
        read(image_id)
    start = time.perf_counter()
    for image_id in order:
        read(image_id)
    return (time.perf_counter() - start) / len(order) * 1e6


def opening_milliseconds(folder: Path) -> float:
    """The median of several openings."""
    times = []
    for _ in range(11):
        start = time.perf_counter()
        TokenCache(folder)
        times.append(time.perf_counter() - start)
    return sorted(times)[5] * 1e3


def bytes_on_disk(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def run(args: argparse.Namespace) -> None:
    """Prints how fast the token cache is against one file per image, and its size."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        boxes = write_both(folder, args.images, args.boxes, args.images_per_shard)
        opening = opening_milliseconds(folder / "cache")
        cache = TokenCache(folder / "cache")
        files = PublishedTokens(folder / "files", _CLASSES)
        order = list(range(args.images))
        random.Random(0).shuffle(order)
        fast = microseconds_per_image(cache.read, order)
        slow = microseconds_per_image(files.read, order)
        assert torch.equal(cache.read(order[0]).tokens, files.read(order[0]).tokens)
        sizes = [bytes_on_disk(folder / "cache", "*"), bytes_on_disk(folder / "files", "*.pth")]
    print(f"{args.images} images, {boxes} boxes, {torch.get_num_threads()} thread(s)")
    print(f"open the cache          {opening:10.2f} ms")
    print(f"read an image, cache    {fast:10.1f} us   {sizes[0] / boxes:7.1f} bytes per box")
    print(f"read an image, files    {slow:10.1f} us   {sizes[1] / boxes:7.1f} bytes per box")
    print(
        f"the cache is {slow / fast:.1f} times faster; {sizes[0] / boxes / 512:.3f} x 512 bytes per box"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--boxes", type=int, default=12, help="per image, on average")
    parser.add_argument("--images-per-shard", type=int, default=1024)
    parser.add_argument("--folder", help="disk to measure on; by default that of temporary files")
