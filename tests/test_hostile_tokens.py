"""Token caches and published tokens that are damaged, exchanged or hostile: one error, no crash."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from regionspot_d2.data.images import ImageReadError
from regionspot_d2.data.published_tokens import PublishedTokens
from regionspot_d2.data.token_cache import (
    CacheManifest,
    TokenCache,
    TokenCacheError,
    TokenCacheWriter,
)

MANIFEST = CacheManifest("mine", "a1", ("cat", "dog"), "SamLocalizer", "vit_b", "mask", "b2")
IDS = [3, 5, 7, 9, 11]
ROWS = [torch.full((count, 8), 1.0 + count) for count in (2, 0, 3, 1, 4)]
REMEDY = "Delete this file and run tools/extract_tokens.py again"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = TokenCacheWriter(tmp_path / "mine", MANIFEST, IDS, token_dim=8, images_per_shard=2)
    for shard in range(writer.num_shards):
        writer.write_shard(shard, [ROWS[place] for place in writer.shard_images(shard)])
    writer.finish()
    return tmp_path / "mine"


def shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def read_all(folder: Path) -> None:
    cache = TokenCache(folder, MANIFEST)
    for image_id, rows in zip(IDS, ROWS):
        assert torch.equal(cache.read(image_id), rows.half())


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    path = shard(folder, 1)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            read_all(folder)  # a space of the header, or the order of its entries, may change
        except TokenCacheError as error:
            assert "shard-" in str(error) or "token cache" in str(error)
    path.write_bytes(whole)
    read_all(folder)


def test_every_cut_is_noticed(folder: Path) -> None:
    path = shard(folder, 0)
    whole = path.read_bytes()
    for end in range(0, len(whole), 11):
        path.write_bytes(whole[:end])
        with pytest.raises(TokenCacheError, match=f"shard-00000.*{REMEDY}"):
            TokenCache(folder)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], sign: bool = True) -> None:
    """Changes the header, with a checksum that is right if it is to be trusted."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    outer = json.loads(content[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["token_cache"])
    changed = change(header)
    header = header if changed is None else changed
    if sign and isinstance(header, dict):
        header.pop("header_sha256", None)
        header["header_sha256"] = hashlib.sha256(json.dumps(header).encode()).hexdigest()
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(load_file(path), path, {"token_cache": text})


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(image_ids=[7]),
        lambda h: h.update(image_ids=[7, [9]]),
        lambda h: h.update(image_ids=[7, 10**400]),
        lambda h: h.update(image_ids=[7, None]),
        lambda h: h.update(image_ids={"a": 1}),
        lambda h: h.update(image_ids="79"),
        lambda h: h.update(shard="1"),
        lambda h: h.update(shard=-1),
        lambda h: h.update(shard=True),
        lambda h: h.update(format=9),
        lambda h: h.update(manifest=None),
        lambda h: h.update(manifest=[1]),
        lambda h: h["manifest"].update(images_per_shard=0),
        lambda h: h["manifest"].update(num_images=10**30),
        lambda h: h["manifest"].update(num_images=10**11, images_per_shard=1),
        lambda h: h["manifest"].update(num_images=-5),
        lambda h: h["manifest"].update(token_dim=9),
        lambda h: h["manifest"].update(class_names=5),
        lambda h: h["manifest"].update(class_names=[["cat"]]),
        lambda h: h["manifest"].update(more=1),
        lambda h: [],
        lambda h: "null",
        lambda h: "[" * 200_000,
        lambda h: '{"format": ' + "9" * 10_000 + "}",
        lambda h: "{",
    ],
)
def test_hostile_headers(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    rewrite(shard(folder, 1), change)
    with pytest.raises(TokenCacheError, match="shard-00001|another cache"):
        TokenCache(folder)


def test_the_header_has_a_checksum(folder: Path) -> None:
    # Two images of a shard change places: the arrays are as they were.
    rewrite(shard(folder, 1), lambda h: h.update(image_ids=[9, 7]), sign=False)
    with pytest.raises(TokenCacheError, match="sha256 of its header is wrong"):
        TokenCache(folder)


def test_caches_of_the_format_before_are_read(folder: Path) -> None:
    for number in range(3):
        rewrite(shard(folder, number), lambda h: {**h, "format": 2})
    read_all(folder)


@pytest.mark.parametrize("ids", [[3, 7], [9, 9]])
def test_an_image_that_is_there_twice(folder: Path, ids: list[int]) -> None:
    rewrite(shard(folder, 1), lambda h: h.update(image_ids=ids))
    with pytest.raises(TokenCacheError, match="has the image [39] more than once"):
        TokenCache(folder)


@pytest.mark.parametrize(
    "arrays",
    [
        {"counts": np.array([3, -2], "i4")},
        {"counts": np.array([2, 1], "i4")},
        {"counts": np.array([3, 2**31 - 1], "i4")},
        {"counts": np.array([3, 1], "i8")},
        {"counts": np.array([[3, 1]], "i4")},
        {"tokens": np.ones((4, 8), "f4")},
        {"tokens": np.ones((4, 2, 4), "f2")},
        {"tokens": np.ones(32, "f2")},
        {"tokens": np.ones((9, 8), "f2")},
    ],
)
def test_hostile_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    path = shard(folder, 1)
    made = {**load_file(path), **arrays}
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = json.loads(content[8 : 8 + length])["__metadata__"]["token_cache"]
    save_file(made, path, {"token_cache": text})
    digest = hashlib.sha256(made["tokens"].tobytes() + made["counts"].tobytes()).hexdigest()
    rewrite(path, lambda h: h.update(sha256=digest))
    with pytest.raises(TokenCacheError, match=f"shard-00001.*{REMEDY}"):
        TokenCache(folder).read(7)


def test_what_is_no_safetensors_file(folder: Path) -> None:
    path = shard(folder, 1)
    huge = struct.pack("<Q", 2**63) + b"{}"
    nested = b'{"a":' * 50_000
    for content in (huge, struct.pack("<Q", len(nested)) + nested, b"\x80\x04.", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(TokenCacheError, match="shard-00001.* not a shard"):
            TokenCache(folder)
    path.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(TokenCacheError, match="shard-00001.* not a file"):
            TokenCache(folder)
        path.unlink() if path.is_fifo() else path.rmdir()


def test_files_that_change_while_they_are_mapped(folder: Path) -> None:
    cache, path = TokenCache(folder), shard(folder, 1)
    first, whole = cache.read(7), path.read_bytes()
    # Replaced under its name: the mapping stays what it was.
    other = path.with_name("other")
    other.write_bytes(whole[:100])
    other.replace(path)
    assert torch.equal(cache.read(7), first)
    path.write_bytes(whole)
    cache = TokenCache(folder)
    cache.read(7)
    # Written over: checked again.
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(1, 1))
    with pytest.raises(TokenCacheError, match="sha256 is wrong"):
        cache.read(7)
    # Cut: an access of the mapping would end the process.
    os.truncate(path, 10)
    with pytest.raises(TokenCacheError, match=f"was changed while it was in use.*{REMEDY}"):
        cache.read(7)


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content",
    [
        {"mask_tokens": torch.zeros(2, 8), "classes": [1.5, 1]},
        {"mask_tokens": torch.zeros(2, 8), "classes": [float("nan"), 1]},
        {"mask_tokens": torch.full((2, 8), torch.nan), "classes": [1, 1]},
        {"mask_tokens": torch.full((2, 8), torch.inf), "classes": [1, 1]},
        {"mask_tokens": torch.zeros(2, 8, dtype=torch.int64), "classes": [1, 1]},
        {"mask_tokens": torch.zeros(3, 7), "classes": [1, 1]},
        {"mask_tokens": None, "classes": [1, 1]},
        {"mask_tokens": torch.zeros(2, 8), "classes": [10**400, 1]},
        {"mask_tokens": torch.zeros(2, 8), "classes": {"a": 1}},
        {"mask_tokens": Runs(), "classes": [1, 1]},
        {"mask_tokens": torch.zeros(2, 8)},
        [1],
        None,
    ],
)
def test_hostile_published_tokens(
    tmp_path: Path, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(content, tmp_path / "1.pth")
    with pytest.raises(ImageReadError, match=r"1\.pth' does not hold") as caught:
        PublishedTokens(tmp_path, 2).read(1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_published_classes_and_files(tmp_path: Path) -> None:
    for wrong in (-1, 3, 2**40):
        torch.save({"mask_tokens": torch.zeros(1, 8), "classes": [wrong]}, tmp_path / "1.pth")
        with pytest.raises(TokenCacheError, match=rf"class {wrong}; 1 to 2"):
            PublishedTokens(tmp_path, 2).read(1)
    (tmp_path / "2.pth").write_bytes(pickle.dumps(Runs()))
    (tmp_path / "3.pth").write_bytes(b"")
    for image_id in (2, 3):
        with pytest.raises(ImageReadError, match="does not hold"):
            PublishedTokens(tmp_path, 2).read(image_id)
    os.mkfifo(tmp_path / "4.pth")
    with pytest.raises(ImageReadError, match="no file"):
        PublishedTokens(tmp_path, 2).read(4)


_EXTRACTION = """
import sys
from pathlib import Path
from tests import test_token_cache as t
from regionspot_d2.data.token_extraction import ExtractionStoppedError
folder = Path(sys.argv[1])
t.register_noise(folder, "noise", 24)
cfg = t.extraction_cfg()
cfg.DATALOADER.NUM_WORKERS = int(sys.argv[2])
localizer = t.FakeLocalizer(seconds_per_image=0.05)
try:
    t.extract_tokens(cfg, localizer, "noise", folder / "out", images_per_shard=1)
except ExtractionStoppedError as error:
    print(error)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupt_says_how_to_go_on(tmp_path: Path, workers: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _EXTRACTION, str(tmp_path), str(workers)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob("out/noise/shard-*")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, errors = process.communicate(timeout=60)
    assert "Stopped (interrupted). " in said and "of 24 shards of 'noise' are in" in said, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("out/noise/.*.partial"))
