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
from detectron2.structures import Boxes

from regionspot_d2.data import token_cache
from regionspot_d2.data.datasets import register_coco_format
from regionspot_d2.data.images import ImageReadError
from regionspot_d2.data.token_cache import (
    CachedRegions,
    CacheManifest,
    PublishedTokens,
    TokenCache,
    TokenCacheError,
    TokenCacheWriter,
    has_tokens,
    module_sha256,
    open_token_cache,
)
from regionspot_d2.data.token_extraction import extract_tokens

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


def regions(count: int, seed: int = 0, dim: int = 256) -> CachedRegions:
    random_ = np.random.RandomState(seed)
    return CachedRegions(
        torch.from_numpy(random_.randn(count, dim).astype("f2")),
        torch.from_numpy(random_.rand(count, 4).astype("f4") * 500),
        torch.from_numpy(random_.randint(0, 2, count)),
    )


def writer(folder: Path, ids: list = IDS, **settings: int) -> TokenCacheWriter:
    return TokenCacheWriter(folder, MANIFEST, ids, **{"images_per_shard": 2, **settings})


def fill(writing: TokenCacheWriter, shards: range | None = None) -> None:
    for shard in shards or range(writing.num_shards):
        found = [regions(COUNTS[i % 5], seed=i) for i in writing.shard_images(shard)]
        writing.write_shard(shard, found)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("ids", [IDS, ["b", "a", "long name", "é", "c"]])
def test_what_is_written_is_read(tmp_path: Path, ids: list) -> None:
    writing = writer(tmp_path, ids)
    fill(writing)
    writing.finish()
    cache = TokenCache(tmp_path, MANIFEST)
    assert len(cache) == 5 and cache.token_dim == 256
    for place in (3, 0, 4, 1, 2):
        read, expected = cache.read(ids[place]), regions(COUNTS[place], seed=place)
        assert read.tokens.dtype == torch.float16 and read.classes.dtype == torch.int64
        assert torch.equal(read.tokens, expected.tokens)
        assert torch.equal(read.boxes, expected.boxes)
        assert torch.equal(read.classes, expected.classes)
    for unknown in (7, "7"):
        with pytest.raises(TokenCacheError, match="has no image '?7"):
            cache.read(unknown)


def test_a_token_of_256_numbers_takes_little_more_than_512_bytes(tmp_path: Path) -> None:
    writing = writer(tmp_path, list(range(100)), images_per_shard=50)
    for shard in range(2):
        writing.write_shard(shard, [regions(12, seed=i) for i in range(50)])
    writing.finish()
    arrays = sum(path.stat().st_size for path in tmp_path.rglob("*.npy"))
    assert arrays < 1200 * 512 * 1.05


def test_readers_travel_as_a_path(tmp_path: Path) -> None:
    writing = writer(tmp_path)
    fill(writing)
    writing.finish()
    cache = TokenCache(tmp_path)
    first = cache.read(30)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).read(30).tokens, first.tokens)
    # What a reader gives is its own: nobody can write into the files.
    first.tokens.zero_()
    assert cache.read(30).tokens.abs().sum() > 0


def test_mapped_shards_are_not_kept_open(tmp_path: Path) -> None:
    writing = writer(tmp_path, images_per_shard=1)
    fill(writing)
    writing.finish()
    cache = TokenCache(tmp_path)
    for place, image_id in enumerate(IDS):
        assert torch.equal(cache.read(image_id).tokens, regions(COUNTS[place], seed=place).tokens)
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("needs Linux's /proc")
    # A shard without any region has its file mapped too.
    assert mapped.read_text().count(str(tmp_path / "shard-")) == 5
    opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
    assert not any(path.startswith(str(tmp_path)) for path in opened)


def test_a_shard_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    writing = writer(tmp_path)
    fill(writing)
    writing.finish()
    path = tmp_path / "shard-00000" / "regions.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="regions.npy"):
        TokenCache(tmp_path).read(30)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"localizer": "LiteMedSam"}, "MODEL.LOCALIZER.NAME: .*'SamLocalizer', 'LiteMedSam' is"),
        ({"arch": "vit_h"}, "MODEL.LOCALIZER.ARCH: .*'vit_b', 'vit_h' is wanted"),
        ({"tokens": "both"}, "MODEL.LOCALIZER.TOKENS: .*'mask', 'both' is wanted"),
        ({"weights_sha256": "c3"}, "localizer's weights: .*'b2', 'c3' is wanted"),
        ({"annotations_sha256": "d4"}, "sha256 of the annotations: .*'a1', 'd4' is wanted"),
        ({"class_names": ("cat", "fox")}, "class 1: the cache has 'dog', 'fox' is wanted"),
        ({"class_names": ("cat",)}, "classes: the cache has 2, 1 are wanted"),
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


def test_missing_and_unfinished_caches_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_PATIENCE_SECONDS", 1)
    with pytest.raises(TokenCacheError, match="no token cache.*extract_tokens.py"):
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
    (tmp_path / "mine" / "manifest.json").write_text("{")
    with pytest.raises(TokenCacheError, match="not the manifest"):
        open_token_cache(tmp_path, MANIFEST)


def test_a_finished_shard_is_never_written_again(tmp_path: Path) -> None:
    writing = writer(tmp_path)
    fill(writing, range(1))
    path = tmp_path / "shard-00000" / "regions.npy"
    before = path.stat()
    # The orphan of a killed run comes late.
    writer(tmp_path).write_shard(0, [regions(1), regions(1)])
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime_ns == before.st_mtime_ns
    # What a killed process left is swept up in the end, and nothing else is.
    (tmp_path / ".partial-shard-00001-x").mkdir()
    (tmp_path / ".partial-image_ids.npy-x").touch()
    (tmp_path / ".mine").touch()
    # Another run may ask for shards of another size; those that are there decide.
    again = writer(tmp_path, images_per_shard=7)
    assert again.missing_shards() == [1, 2]
    fill(again, range(1, 3))
    again.finish()
    assert [path.name for path in tmp_path.glob(".*")] == [".mine"]
    assert torch.equal(TokenCache(tmp_path).read(30).tokens, regions(2, seed=0).tokens)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenCacheError, match="image id 10 more than once"):
        writer(tmp_path / "a", [10, 20, 10])
    with pytest.raises(TokenCacheError, match="these are int and str"):
        writer(tmp_path / "b", [10, "20"])
    writing = writer(tmp_path / "c")
    huge = regions(1)._replace(tokens=torch.full((1, 256), 1e6))
    with pytest.raises(ValueError, match="not finite as float16"):
        writing.write_shard(0, [huge, huge])
    with pytest.raises(ValueError, match="as many tokens as boxes"):
        writing.write_shard(0, [regions(2)._replace(boxes=torch.zeros(1, 4)), regions(1)])
    with pytest.raises(ValueError, match="has 2 images; regions of 1"):
        writing.write_shard(0, [regions(1)])
    assert writing.missing_shards() == [0, 1, 2]


def test_published_layout(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    tokens = torch.randn(3, 256)
    torch.save({"mask_tokens": tokens, "classes": torch.tensor([1, 2, 1])}, folder / "7.pth")
    assert has_tokens(tmp_path, "mine")
    cache = open_token_cache(tmp_path, MANIFEST)
    assert isinstance(cache, PublishedTokens)
    read = cache.read(7)
    assert torch.equal(read.tokens, tokens) and read.boxes is None
    assert read.classes.tolist() == [0, 1, 0]
    torch.save({"mask_tokens": tokens[:, None], "classes": [1, 2, 2]}, folder / "8.pth")
    assert torch.equal(cache.read(8).tokens, tokens)
    with pytest.raises(ImageReadError, match=r"no file '.*9\.pth'"):
        cache.read(9)
    (folder / "9.pth").write_bytes(b"PK")
    with pytest.raises(ImageReadError, match=r"9\.pth' does not hold 'mask_tokens'"):
        cache.read(9)
    for wrong in (0, 3):
        torch.save({"mask_tokens": tokens, "classes": [1, wrong, 1]}, folder / "9.pth")
        with pytest.raises(TokenCacheError, match=rf"9\.pth' has the class {wrong}; 1 to 2"):
            cache.read(9)


def test_published_files_run_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"mask_tokens": Evil(), "classes": [1]}, tmp_path / "1.pth")
    with pytest.raises(ImageReadError, match="1.pth"):
        PublishedTokens(tmp_path, ["cat"]).read(1)
    assert not (tmp_path / "run").exists()


def test_sha256_of_weights() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    before = module_sha256(module)
    assert before == module_sha256(module.eval())
    with torch.no_grad():
        module[0].bias[1] += 1e-6
    after = module_sha256(module)
    module[1].running_mean[0] = 1
    assert len({before, after, module_sha256(module), module_sha256(module.bfloat16())}) == 4


class FakeLocalizer(torch.nn.Module):
    """Tokens tell the box, and what the image looks like under it."""

    token_dim = 8

    def __init__(self, seconds_per_image: float = 0.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.25))
        self.seconds_per_image = seconds_per_image
        self.calls: list[int] = []

    def forward(self, images: list, prompts: list[Boxes], *, with_masks: bool) -> tuple:
        assert not with_masks
        time.sleep(self.seconds_per_image * len(images))
        self.calls.append(len(images))
        tokens = []
        for image, boxes in zip(images, prompts):
            rows = []
            for x0, y0, x1, y1 in boxes.tensor.round().int().tolist():
                crop = image[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].float()
                rows.append(
                    torch.cat([crop.mean((1, 2)) / 255, crop.new_tensor([x0, y0, x1, y1, 1])])
                )
            tokens.append(torch.stack(rows) * self.scale)
        return tokens, None


def register_noise(folder: Path, name: str, count: int) -> None:
    """Images of noise, each with a good box, one over the edge, one without area, and a crowd; every fifth has none."""
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
    read = cache.read(3)
    # The crowd and the box without area are gone, and what hung over the edge (50 x 70 pixels) is cut off.
    assert read.boxes.tolist() == [[4.5, 6, 24.5, 36], [30, 20, 50, 29]]
    assert read.tokens[:, 3:].tolist() == [[1, 1.5, 6, 9, 0.25], [7.5, 5, 12.5, 7.25, 0.25]]
    assert len(cache.read(0).tokens) == 0
    assert cache.manifest.precision == "float32"
    assert cache.manifest.weights_sha256 == module_sha256(localizer)
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
    assert len(cache.read(18).tokens) == len(cache.read(24).tokens) == 2


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
    finished = {path: path.stat().st_ino for path in killed.glob("shard-*/*.npy")}
    assert len(finished) >= 2 * enough
    extract_tokens(extraction_cfg(), FakeLocalizer(), "noise", noise / "killed", **settings)
    assert all(path.stat().st_ino == inode for path, inode in finished.items())
    assert content(killed) == content(noise / "undisturbed" / "noise")
