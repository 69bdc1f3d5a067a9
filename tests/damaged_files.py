"""Writes a folder of photos and videos of which most are damaged, each in another way.

    python -m tests.damaged_files FOLDER 1000
    python demo/demo.py --input FOLDER --output OUTPUT --boxes 2,2,20,20 --vocabulary cat,dog

The demo then ends with a count of each outcome and exit status 1.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".gif": "GIF", ".bmp": "BMP", ".webp": "WEBP"}
_NAMES = [
    "plain",
    "two words",
    "$5 and $10",
    "猫",
    "e\u0301te\u0301",
    "a\x1b[31mred",
    "-5,5",
    "#0 %d",
]


def write_damaged(folder: Path, count: int) -> None:
    """Writes ``count`` files to a new folder; the same ones each time."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    damages = [_whole, _cut, _zeros_inside, _flipped, _empty, _text, _other_ending, _bomb, _nested]
    endings = list(_FORMATS)
    for number in range(count):
        ending = endings[number // len(damages) % len(endings)]
        content = damages[number % len(damages)](_image(rng, _FORMATS[ending]), rng)
        name = f"{number:04d} {_NAMES[number % len(_NAMES)]}{ending}"
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("left out")
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.png").symlink_to("missing.png")


def _image(rng: np.random.Generator, kind: str) -> bytes:
    stream = io.BytesIO()
    pixels = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def _whole(content: bytes, rng: np.random.Generator) -> bytes:
    return content


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(1, len(content)))]


def _zeros_inside(content: bytes, rng: np.random.Generator) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes(100) + content[place + 100 :]


def _flipped(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(0, len(content), 20):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _empty(content: bytes, rng: np.random.Generator) -> bytes:
    return b""


def _text(content: bytes, rng: np.random.Generator) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n{} loop\n"


def _other_ending(content: bytes, rng: np.random.Generator) -> bytes:
    return _image(rng, "TIFF")


def _bomb(content: bytes, rng: np.random.Generator) -> bytes:
    """A PNG whose header promises a hundred thousand pixels a side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def _nested(content: bytes, rng: np.random.Generator) -> bytes:
    return b"[" * 200_000


if __name__ == "__main__":
    write_damaged(Path(sys.argv[1]), int(sys.argv[2]))
