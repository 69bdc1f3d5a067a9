"""Image files that are no image files, are damaged, or would fill the memory: one line, no more."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from regionspot_d2.data.images import ImageReadError, read_image, to_rgb_array


def picture(height: int = 64, width: int = 96, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 255, (height // 8, width // 8, 3), np.uint8))
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    noisy = large + random.integers(-12, 13, large.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encoded(kind: str, image: Image.Image | None = None, **settings: object) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, kind, **settings)
    return file.getvalue()


def refused(path: Path, said: str = "") -> None:
    with pytest.raises(ImageReadError, match=said) as caught:
        read_image(path)
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and len(text) < 600
    assert repr(str(path))[1:-1] in text


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    fifo, unix, folder = (tmp_path / name for name in ("fifo.jpg", "socket.png", "folder.png"))
    os.mkfifo(fifo)  # opening it would wait for a writer that does not come
    folder.mkdir()
    refused(folder, "is a folder")
    refused(fifo, "is a device, pipe or socket; a regular file is expected")
    (tmp_path / "link.jpg").symlink_to(fifo)
    refused(tmp_path / "link.jpg", "pipe")
    refused(Path("/dev/zero"), "is a device")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(unix))
        refused(unix, "socket")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    refused(tmp_path / "loop.jpg")
    refused(tmp_path / ("a" * 300))


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
        b"\xd7\xcd\xc6\x9a" + bytes(60),
        b"GRIB" + bytes(60),
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"#define w_width 9\n#define w_height 9\nstatic char w_bits[] = {0};",
        b"\0" * 100,
        b"%PDF-1.4",
    ],
)
def test_other_formats_are_not_tried(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    refused(tmp_path / "a.jpg", "is not an image, or not of a format that is read: JPEG")


def test_the_content_decides_not_the_extension(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(encoded("png"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.txt"), np.asarray(picture()))


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(13300, 13300), (1, 2**31 - 1), (2**20, 2**20), (11000, 11000)])
def test_pixels_are_limited_by_the_header(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(bomb(*size))
    refused(tmp_path / "a.png", "too large")


@pytest.mark.parametrize("kind", ["gif", "tiff", "bmp", "webp", "jpeg", "ppm", "png"])
def test_the_limit_holds_for_every_format(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_bytes(encoded(kind))
    assert read_image(tmp_path / "a", max_pixels=64 * 96).shape == (64, 96, 3)
    with pytest.raises(ImageReadError, match=r"96 x 64 pixels .* 6,143\. .*INPUT\.MAX_PIXELS"):
        read_image(tmp_path / "a", max_pixels=64 * 96 - 1)


def test_no_pixels(tmp_path: Path) -> None:
    for content in (bomb(0, 9), bomb(9, 0), b"P6 0 5 255\n"):
        (tmp_path / "a").write_bytes(content)
        refused(tmp_path / "a")


def test_the_first_frame_is_read_whatever_follows(tmp_path: Path) -> None:
    first = picture()
    frames = [picture(seed=1), Image.new("RGB", (96, 64))]
    for kind in ("tiff", "webp", "png"):
        settings = {"lossless": True} if kind == "webp" else {}
        content = encoded(kind, first, save_all=True, append_images=frames, **settings)
        (tmp_path / "a").write_bytes(content)
        np.testing.assert_array_equal(read_image(tmp_path / "a"), np.asarray(first))
    large = Image.new("L", (3000, 3000))
    (tmp_path / "a.tiff").write_bytes(
        encoded("tiff", first, save_all=True, append_images=[large], compression="tiff_deflate")
    )
    assert read_image(tmp_path / "a.tiff", max_pixels=10_000).shape == (64, 96, 3)


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "webp", "ppm"])
@pytest.mark.parametrize("lenient", [False, True])
def test_cut_anywhere(
    tmp_path: Path, kind: str, lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lenient and kind not in ("jpeg", "png"):
        pytest.skip("PIL is told to accept them")
    # Other libraries set this for all.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    content = encoded(kind, picture(24, 32))
    for end in {*range(1, len(content) - 1, max(1, len(content) // 60)), len(content) - 1}:
        (tmp_path / "a").write_bytes(content[:end])
        refused(tmp_path / "a")


def test_a_wrong_checksum_is_damage(tmp_path: Path) -> None:
    content = bytearray(encoded("png", compress_level=0))  # zlib itself notices nothing
    for place in (20, 60, len(content) // 2, len(content) - 20):
        damaged = bytearray(content)
        damaged[place] ^= 4
        (tmp_path / "a.png").write_bytes(damaged)
        refused(tmp_path / "a.png", "the checksum|cannot be read|truncated|not an image")


JPEGS: list[dict[str, object]] = [
    {"quality": 30},
    {"quality": 95, "subsampling": 0},
    {"optimize": True},
    {"progressive": True},
    {"restart_marker_blocks": 3},
    {"restart_marker_rows": 1},
]


@pytest.mark.parametrize("settings", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_sound_jpegs_are_read(tmp_path: Path, settings: dict, mode: str) -> None:
    plain = [Image.new("RGB", (300, 270), (v, v, v)) for v in (0, 128)]
    for image in (picture(), picture(270, 260), picture(17, 9), *plain):
        content = encoded("jpeg", image.convert(mode), **settings)
        (tmp_path / "a.jpg").write_bytes(content)
        expected = Image.open(io.BytesIO(content)).convert("RGB")
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.asarray(expected))
    # A film after a photo, and what cameras leave before the end mark.
    (tmp_path / "a.jpg").write_bytes(content + bytes(5000))
    read_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(content[:-2] + bytes(8) + content[-2:])
    read_image(tmp_path / "a.jpg")


def test_what_is_odd_in_a_jpeg_but_changes_no_pixel_is_read(tmp_path: Path) -> None:
    content = encoded("jpeg", icc_profile=bytes(200_000))
    profile = content.index(b"ICC_PROFILE")
    odd = {
        "a number of the color profile": content[: profile + 12] + b"\7" + content[profile + 13 :],
        "a future version": content.replace(b"JFIF\0\1\1", b"JFIF\0\7\1"),
        "start marks in a comment": encoded("jpeg", comment=b"\xff\xda" * 500),
        "padding between its parts": content[:20] + bytes(7) + content[20:],
    }
    for what, changed in odd.items():
        assert changed != content
        (tmp_path / "a.jpg").write_bytes(changed)
        np.testing.assert_array_equal(
            read_image(tmp_path / "a.jpg"), np.asarray(Image.open(io.BytesIO(changed))), what
        )


@pytest.mark.parametrize("how", ["zeros", "ones", "inverted", "random", "gone", "twice"])
@pytest.mark.parametrize(
    "settings", [{"quality": 85}, {"restart_marker_rows": 1}, {"progressive": True}]
)
def test_damage_in_the_middle_of_a_jpeg(tmp_path: Path, how: str, settings: dict) -> None:
    content = encoded("jpeg", picture(300, 400), **settings)
    start, size = len(content) // 2, 2000
    middle = content[start : start + size]
    changed = {
        "zeros": bytes(size),
        "ones": b"\xff" * size,
        "inverted": bytes(255 - byte for byte in middle),
        "random": np.random.default_rng(0).bytes(size),
        "gone": b"",
        "twice": middle * 2,
    }[how]
    (tmp_path / "a.jpg").write_bytes(content[:start] + changed + content[start + size :])
    refused(tmp_path / "a.jpg", "damaged|truncated|cannot be read")


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "tiff", "webp", "bmp", "ppm"])
def test_flipped_bytes_end_in_a_picture_or_a_line(tmp_path: Path, kind: str) -> None:
    content, random = encoded(kind, picture(24, 32)), np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 3):
            damaged[place] = random.integers(256)
        (tmp_path / "a").write_bytes(damaged)
        try:
            image = read_image(tmp_path / "a", max_pixels=1_000_000)
            assert image.ndim == 3 and image.dtype == np.uint8
        except ImageReadError as error:
            assert "\n" not in str(error)


def test_many_scans_are_refused(tmp_path: Path) -> None:
    content = encoded("jpeg", picture(24, 32), progressive=True)
    last = content.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(content[:last] + content[last:-2] * 200 + b"\xff\xd9")
    refused(tmp_path / "a.jpg", "more than 100 scans")


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_a_damaged_orientation_is_none(tmp_path: Path, exif: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("jpeg", exif=exif))
    assert read_image(tmp_path / "a.jpg").shape == (64, 96, 3)
    strange = Image.Exif()
    strange[0x0112] = 77
    (tmp_path / "a.jpg").write_bytes(encoded("jpeg", exif=strange))
    assert read_image(tmp_path / "a.jpg").shape == (64, 96, 3)


def test_names_are_printed_escaped(tmp_path: Path) -> None:
    for name in ("a\nb.jpg", "a\x1b[31m.jpg", "a\u202eb.jpg", os.fsdecode(b"a\xff.jpg")):
        (tmp_path / name).write_bytes(b"no image")
        refused(tmp_path / name, re.escape("is not an image"))
    with pytest.raises(ImageReadError, match=r"'a\\x00b' cannot be read"):
        read_image("a\0b")


def test_strips_change_nothing() -> None:
    # Higher than a strip, in every mode that is converted.
    tall = picture(600, 16)
    for mode in ("L", "P", "CMYK", "YCbCr", "1", "HSV", "LAB"):
        image = tall.convert("RGB").convert(mode) if mode != "LAB" else tall.convert("L")
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(to_rgb_array(image), expected)
    alpha = tall.convert("RGBA")
    alpha.putalpha(tall.convert("L"))
    white = Image.new("RGBA", alpha.size, "white")
    expected = np.asarray(Image.alpha_composite(white, alpha).convert("RGB"))
    np.testing.assert_array_equal(to_rgb_array(alpha), expected)
    # One bright pixel decides for all strips.
    deep = np.full((600, 4), 200, np.uint16)
    assert (to_rgb_array(Image.fromarray(deep)) == 200).all()
    deep[599, 3] = 65535
    assert (to_rgb_array(Image.fromarray(deep))[:599] == 1).all()
