"""Mask tokens on disk: what goes in comes out, whatever happens to the processes that write it."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot_d2.data import token_cache
from regionspot_d2.data.build import load_records
from regionspot_d2.data.datasets import register_coco_format
from regionspot_d2.data.images import ImageReadError
from regionspot_d2.data.mapper import RegionMapper
from regionspot_d2.data.published_tokens import has_tokens, open_token_cache
from regionspot_d2.data.token_cache import (
    CacheManifest,
    TokenCache,
    TokenCacheError,
    TokenCacheWriter,
)
from regionspot_d2.data.token_extraction import extract_tokens
from regionspot_d2.files import module_fingerprint
from regionspot_d2.modeling.prompts import BoxPrompts

from .datasets_on_disk import SIZES, annotation, write_images
from .tiny import tiny_cfg

MANIFEST = CacheManifest(
    dataset="mine",
    annotations_sha256="a1",
    class_names=("cat", "dog"),
    localizer="SamLocalizer",
    arch="vit_b",
    tokens="mask",
    weights_sha256="b2",
)
IDS = [30, 10, 20, 50, 40]
COUNTS = (2, 0, 3, 1, 4)


def tokens(count: int, seed: int = 0, dim: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(count, dim).astype("f2"))


def writer(folder: Path, ids: list = IDS, **settings: int) -> TokenCacheWriter:
    return TokenCacheWriter(folder, MANIFEST, ids, **{"images_per_shard": 2, **settings})


def fill(writing: TokenCacheWriter, shards: range | None = None) -> None:
    for shard in shards or range(writing.num_shards):
        writing.write_shard(
            shard, [tokens(COUNTS[i % 5], seed=i) for i in writing.shard_images(shard)]
        )


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("ids", [IDS, ["b", "a", "long name", "é", "c"]])
def test_what_is_written_is_read(tmp_path: Path, ids: list) -> None:
    writing = writer(tmp_path, ids)
    fill(writing)
    writing.finish()
    cache = TokenCache(tmp_path, MANIFEST)
    assert len(cache) == 5 and cache.manifest.token_dim == 256
    for place in (3, 0, 4, 1, 2):
        read, expected = cache.read(ids[place]), tokens(COUNTS[place], seed=place)
        assert read.dtype == torch.float16 and torch.equal(read, expected)
        assert torch.equal(cache.read(ids[place], torch.zeros(COUNTS[place])), expected)
    for unknown in (7, "7"):
        with pytest.raises(TokenCacheError, match="has no image '?7"):
            cache.read(unknown)
    with pytest.raises(TokenCacheError, match="tokens of 1 regions .* has 2 annotated regions"):
        cache.read(ids[3], torch.zeros(2))


def test_a_token_of_256_numbers_takes_little_more_than_512_bytes(tmp_path: Path) -> None:
    writing = writer(tmp_path, list(range(100)), images_per_shard=50)
    for shard in range(2):
        writing.write_shard(shard, [tokens(12, seed=i) for i in range(50)])
    writing.finish()
    assert sum(map(len, content(tmp_path).values())) < 1200 * 512 * 1.05


def test_readers_travel_as_a_path(tmp_path: Path) -> None:
    writing = writer(tmp_path)
    fill(writing)
    writing.finish()
    cache = TokenCache(tmp_path)
    first = cache.read(30)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).read(30), first)
    # A reader returns copies: nobody can write into the files.
    first.zero_()
    assert cache.read(30).abs().sum() > 0


def test_mapped_shards_are_not_kept_open(tmp_path: Path) -> None:
    writing = writer(tmp_path, images_per_shard=1)
    fill(writing)
    writing.finish()
    cache = TokenCache(tmp_path)
    for place, image_id in enumerate(IDS):
        assert torch.equal(cache.read(image_id), tokens(COUNTS[place], seed=place))
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("needs Linux's /proc")
    # A shard without any region has its file mapped too.
    assert mapped.read_text().count(str(tmp_path / "shard-")) == 5
    opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert not any(path.startswith(str(tmp_path)) for path in opened)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def test_damaged_shards_are_noticed(tmp_path: Path) -> None:
    writing = writer(tmp_path)
    fill(writing)
    writing.finish()
    path = shard_path(tmp_path, 1)
    whole = path.read_bytes()
    remedy = "Delete this file and run tools/extract_tokens.py again"
    for damaged in (whole[:-1], b"{", b""):
        path.write_bytes(damaged)
        with pytest.raises(TokenCacheError, match=rf"shard-00001\..* is damaged \(.*\). {remedy}"):
            TokenCache(tmp_path)
    # A token, and the number of regions of an image.
    for position in (-1, -8 - 4 * 512):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        cache = TokenCache(tmp_path)
        assert torch.equal(cache.read(10), tokens(0)) and len(cache.read(30)) == 2
        with pytest.raises(TokenCacheError, match=rf"shard-00001\..* sha256 is wrong. {remedy}"):
            cache.read(20)
    path.unlink()
    again = writer(tmp_path)
    assert again.missing_shards() == [1]
    fill(again, range(1, 2))
    assert path.read_bytes() == whole


def test_shards_in_the_wrong_place_are_noticed(tmp_path: Path) -> None:
    for name, change in (("mine", {}), ("other", {"weights_sha256": "c3"})):
        manifest = dataclasses.replace(MANIFEST, **change)
        writing = TokenCacheWriter(tmp_path / name, manifest, IDS, images_per_shard=2)
        fill(writing)
    whole = shard_path(tmp_path / "mine", 1).read_bytes()
    for wrong in (shard_path(tmp_path / "mine", 0), shard_path(tmp_path / "other", 1)):
        shard_path(tmp_path / "mine", 1).write_bytes(wrong.read_bytes())
        with pytest.raises(TokenCacheError, match=r"shard-0000\d.* is of another cache or place"):
            TokenCache(tmp_path / "mine")
    shard_path(tmp_path / "mine", 1).write_bytes(whole)
    TokenCache(tmp_path / "mine")


def test_a_cache_of_the_earlier_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "shard-00000").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"format": 1}')
    for use in (
        lambda: writer(folder),
        lambda: open_token_cache(tmp_path, MANIFEST),
        lambda: has_tokens(tmp_path, "mine"),
    ):
        with pytest.raises(TokenCacheError, match="mine' .* earlier version.*extract_tokens.py"):
            use()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"localizer": "LiteMedSam"}, "MODEL.LOCALIZER.NAME: .*'SamLocalizer', 'LiteMedSam' is"),
        ({"arch": "vit_h"}, "MODEL.LOCALIZER.ARCH: .*'vit_b', 'vit_h' is wanted"),
        ({"tokens": "both"}, "MODEL.LOCALIZER.TOKENS: .*'mask', 'both' is wanted"),
        ({"weights_sha256": "c3"}, "localizer's weights: .*'b2', 'c3' is wanted"),
        ({"annotations_sha256": "d4"}, "sha256 of the annotations: .*'a1', 'd4' is wanted"),
        ({"class_names": ("cat", "fox")}, "class 1: the cache has 'dog', 'fox' is wanted"),
        ({"class_names": ("cat",)}, "number of classes: the cache has 2, 1 is wanted"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, change: dict, said: str) -> None:
    writing = writer(tmp_path)
    fill(writing)
    writing.finish()
    wanted = dataclasses.replace(MANIFEST, **change)
    with pytest.raises(TokenCacheError, match=f"(?s)does not match.*{said}"):
        TokenCache(tmp_path, wanted)
    with pytest.raises(TokenCacheError, match=f"(?s)cannot be continued.*{said}"):
        TokenCacheWriter(tmp_path, wanted, IDS)


def test_weights_and_name_may_be_left_open(tmp_path: Path) -> None:
    writing = writer(tmp_path)
    fill(writing)
    writing.finish()
    TokenCache(tmp_path, dataclasses.replace(MANIFEST, weights_sha256=None, dataset="renamed"))


def test_a_renamed_dataset_continues_its_cache(tmp_path: Path) -> None:
    for folder in (tmp_path / "undisturbed", tmp_path / "renamed"):
        writing = writer(folder)
        fill(writing, range(1))
        if folder.name == "renamed":
            renamed = dataclasses.replace(MANIFEST, dataset="renamed")
            writing = TokenCacheWriter(folder, renamed, IDS, images_per_shard=3)
        fill(writing)
        writing.finish()
    assert content(tmp_path / "undisturbed") == content(tmp_path / "renamed")


def test_missing_and_unfinished_caches_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "PATIENCE_SECONDS", 1)
    with pytest.raises(TokenCacheError, match="No token cache.*extract_tokens.py"):
        open_token_cache(tmp_path, MANIFEST)
    writing = writer(tmp_path / "mine")
    fill(writing, range(2))
    assert writing.missing_shards() == [2] and not has_tokens(tmp_path, "mine")
    with pytest.raises(TokenCacheError, match="not finished"):
        open_token_cache(tmp_path, MANIFEST)
    with pytest.raises(TokenCacheError, match="1 of 3 shards are missing, the first is 2"):
        writing.finish()
    fill(writing, range(2, 3))
    writing.finish()
    assert isinstance(open_token_cache(tmp_path, MANIFEST), TokenCache)
    assert has_tokens(tmp_path, "mine")
    for path in (tmp_path / "mine").iterdir():
        path.write_text("{")
    with pytest.raises(TokenCacheError, match="not a shard of a token cache"):
        open_token_cache(tmp_path, MANIFEST)


def test_a_finished_shard_is_never_written_again(tmp_path: Path) -> None:
    writing = writer(tmp_path)
    fill(writing, range(1))
    path = shard_path(tmp_path, 0)
    before = path.stat()
    # The orphan of a killed run comes late.
    writer(tmp_path).write_shard(0, [tokens(1), tokens(1)])
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime_ns == before.st_mtime_ns
    # What a killed process left is removed in the end, and nothing else is.
    for name in (".shard-00001.safetensors.x.partial", ".shard-00002.safetensors.y.partial"):
        (tmp_path / name).touch()
    (tmp_path / ".mine").touch()
    # Another run may ask for shards of another size; those that are there decide.
    again = writer(tmp_path, images_per_shard=7)
    assert again.missing_shards() == [1, 2]
    fill(again, range(1, 3))
    again.finish()
    assert [path.name for path in tmp_path.glob(".*")] == [".mine"]
    assert torch.equal(TokenCache(tmp_path).read(30), tokens(2, seed=0))


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenCacheError, match="image id 10 more than once"):
        writer(tmp_path / "a", [10, 20, 10])
    with pytest.raises(TokenCacheError, match="these are int and str"):
        writer(tmp_path / "b", [10, "20"])
    writing = writer(tmp_path / "c")
    huge = torch.full((1, 256), 1e6)
    with pytest.raises(ValueError, match="not finite as float16"):
        writing.write_shard(0, [huge, huge])
    with pytest.raises(ValueError, match="dimension"):
        writing.write_shard(0, [tokens(1, dim=255), tokens(1)])
    with pytest.raises(ValueError, match="has 2 images; tokens of 1"):
        writing.write_shard(0, [tokens(1)])
    assert writing.missing_shards() == [0, 1, 2]


def test_sha256_of_weights() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    before = module_fingerprint(module)
    assert before == module_fingerprint(module.eval())
    with torch.no_grad():
        module[0].bias[1] += 1e-6
    after = module_fingerprint(module)
    module[1].running_mean[0] = 1
    assert (
        len({before, after, module_fingerprint(module), module_fingerprint(module.bfloat16())}) == 4
    )


class FakeLocalizer(torch.nn.Module):
    """Tokens depend on the box and on the image under it."""

    token_dim = 8

    def __init__(self, seconds_per_image: float = 0.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.25))
        self.seconds_per_image = seconds_per_image
        self.calls: list[int] = []

    def forward(self, images: list, prompts: list[BoxPrompts], *, with_masks: bool) -> tuple:
        assert not with_masks
        time.sleep(self.seconds_per_image * len(images))
        self.calls.append(len(images))
        tokens = []
        for image, regions in zip(images, prompts):
            rows = []
            for x0, y0, x1, y1 in regions.values.tensor.round().int().tolist():
                crop = image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].float()
                rows.append(
                    torch.cat([crop.mean((1, 2)) / 255, crop.new_tensor([x0, y0, x1, y1, 1])])
                )
            tokens.append(torch.stack(rows) * self.scale)
        return tokens, None


def register_noise(folder: Path, name: str, count: int) -> None:
    """Images of noise, each with a crowd, and boxes that are good, over the edge, without area.

    Every fifth image has only the crowd.
    """
    images: list[Any] = []
    annotations: list[Any] = []
    if not (folder / "ann.json").exists():
        for first in range(0, count, len(SIZES)):
            names = [f"{first + i}.png" for i in range(len(SIZES))]
            entries = write_images(folder / "images", names)
            images += [{**entry, "id": 3 * (first + i)} for i, entry in enumerate(entries)]
        for image in images:
            for box in [[4.5, 6.0, 20, 30], [30.0, 20, 500, 9], [3.0, 3, 0, 5]] * (
                image["id"] % 5 > 0
            ):
                number = len(annotations) + 1
                annotations.append(annotation(number, image["id"], box, category=1 + number % 2))
            annotations.append(
                annotation(len(annotations) + 1, image["id"], [1, 1, 9, 9], iscrowd=1)
            )
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        text = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "ann.json").write_text(json.dumps(text))
    register_coco_format([[name, str(folder / "ann.json"), str(folder / "images")]])


@pytest.fixture
def noise(tmp_path: Path, empty_cache: Path):
    register_noise(tmp_path, "noise", 24)
    yield tmp_path
    DatasetCatalog.remove("noise")
    MetadataCatalog.remove("noise")


def extraction_cfg():
    cfg = tiny_cfg()
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def test_extraction(noise: Path) -> None:
    localizer = FakeLocalizer()
    cache = extract_tokens(
        extraction_cfg(), localizer, "noise", noise / "out", images_per_batch=3, images_per_shard=5
    )
    assert len(cache) == 24
    # Batches do not cross the end of a shard; images without regions cost nothing.
    assert sum(localizer.calls) == 24 - 5 and max(localizer.calls) <= 3
    # Training sees the same regions: the crowd and the box without area are gone, and what hung
    # over the edge (50 x 70 pixels) is cut off.
    record = load_records("noise")[1]
    x = RegionMapper(True, augmentations=[], token_caches={"noise": cache})(record)
    assert x["image_id"] == 3 and torch.equal(x["mask_tokens"], cache.read(3))
    assert x["instances"].gt_boxes.tensor.tolist() == [[4.5, 6, 24.5, 36], [30, 20, 50, 29]]
    assert cache.read(3)[:, 3:].tolist() == [[1, 1.5, 6, 9, 0.25], [7.5, 5, 12.5, 7.25, 0.25]]
    assert len(cache.read(0)) == 0
    assert cache.manifest.precision == "float32"
    assert cache.manifest.weights_sha256 == module_fingerprint(localizer)
    # A second run finds everything done.
    again = FakeLocalizer()
    extract_tokens(extraction_cfg(), again, "noise", noise / "out")
    assert again.calls == []
    with pytest.raises(TokenCacheError, match="precision: the cache has 'float32', 'bfloat16' is"):
        extract_tokens(extraction_cfg(), again, "noise", noise / "out", amp=True)
    with torch.no_grad():
        again.scale += 1
    with pytest.raises(TokenCacheError, match="localizer's weights"):
        extract_tokens(extraction_cfg(), again, "noise", noise / "out")


def test_unreadable_images_are_marked(noise: Path) -> None:
    (noise / "images" / "7.png").write_bytes(b"")
    cfg = extraction_cfg()
    cfg.DATALOADER.MAX_UNREADABLE_SHARE = 0.0
    with pytest.raises(RuntimeError, match=r"MAX_UNREADABLE_SHARE = 0 .*7\.png' is empty"):
        extract_tokens(cfg, FakeLocalizer(), "noise", noise / "out")
    cfg.DATALOADER.MAX_UNREADABLE_SHARE = 0.01
    cache = extract_tokens(cfg, FakeLocalizer(), "noise", noise / "out", images_per_batch=4)
    with pytest.raises(ImageReadError, match="image 21 of 'noise' could not be read when"):
        cache.read(21)
    assert len(cache.read(18)) == len(cache.read(24)) == 2


_KILLED = """
import sys
from pathlib import Path
from typing import Any
from tests import test_token_cache as t
folder = Path(sys.argv[1])
t.register_noise(folder, "noise", 24)
localizer = t.FakeLocalizer(seconds_per_image=0.02)
t.extract_tokens(t.extraction_cfg(), localizer, "noise", folder / "killed", images_per_shard=1)
"""


def test_killed_and_started_again(noise: Path) -> None:
    settings = {"images_per_shard": 1}
    extract_tokens(extraction_cfg(), FakeLocalizer(), "noise", noise / "undisturbed", **settings)
    enough = random.randint(1, 20)
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(noise)], cwd=root)
    killed = noise / "killed" / "noise"
    while len(list(killed.glob("shard-*"))) < enough and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the extraction was over before it could be killed"
    assert not has_tokens(noise / "killed", "noise")
    finished = {path: path.stat().st_ino for path in killed.glob("shard-*")}
    assert len(finished) >= enough
    extract_tokens(extraction_cfg(), FakeLocalizer(), "noise", noise / "killed", **settings)
    assert all(path.stat().st_ino == inode for path, inode in finished.items())
    assert content(killed) == content(noise / "undisturbed" / "noise")
