"""Images of every kind are read correctly, or refused with the file's name and the reason."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regionspot_d2.data.images import ImageReadError, read_image, to_rgb_array

COLORS = np.array(
    [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [90, 91, 92]], [[7, 8, 9], [1, 2, 3]]], np.uint8
)


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "webp"])
def test_rgb_is_exact_and_writable(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    Image.fromarray(COLORS).save(path, lossless=True)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, COLORS)
    image[0] = 0


@pytest.mark.parametrize("extension", ["jpg", "png", "tiff", "webp"])
def test_exif_rotation_is_applied_once(tmp_path: Path, extension: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn clockwise to show"
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16] = 255
    path = tmp_path / f"a.{extension}"
    Image.fromarray(stored).save(path, exif=exif, quality=100)
    shown = read_image(path)
    assert shown.shape == (32, 16, 3)
    assert shown[:12].min() > 250 and shown[20:].max() < 5


def test_gray_and_one_bit(tmp_path: Path) -> None:
    gray = np.array([[0, 100, 255]], np.uint8)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), gray[..., None].repeat(3, 2))
    Image.fromarray(gray > 50).save(tmp_path / "bit.png")
    assert read_image(tmp_path / "bit.png")[0, :, 1].tolist() == [0, 255, 255]


def test_16_bit_gray_is_scaled(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 25700, 65535]], np.uint16)
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(deep).save(tmp_path / name)
        assert read_image(tmp_path / name)[0, :, 0].tolist() == [0, 1, 100, 255]
    integers = Image.fromarray(deep.astype(np.int32))  # how older PIL opens 16-bit PNG
    assert integers.mode == "I" and to_rgb_array(integers)[0, :, 2].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_8_bit_values_with_more_bits_keep_them(tmp_path: Path, dtype: type) -> None:
    values = np.array([[0, 1, 100, 255]], dtype)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_unknown_range_is_refused(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 70000]], np.float32 if mode == "F" else np.int32)
    Image.fromarray(values).save(tmp_path / "wide.tiff")
    with pytest.raises(ImageReadError, match=r"wide\.tiff.*unknown range"):
        read_image(tmp_path / "wide.tiff")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        paletted = Image.new("P", (2, 1), 0)
        paletted.putpalette([0, 0, 0, 200, 0, 0])
        paletted.putpixel((1, 0), 1)
        paletted.save(tmp_path / "a.png", transparency=1)
    else:
        image.convert(mode).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_half_transparent_black_is_gray(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[127, 127, 127]]]


def test_palette_and_cmyk(tmp_path: Path) -> None:
    paletted = Image.new("P", (1, 1), 0)
    paletted.putpalette([10, 20, 30])
    paletted.save(tmp_path / "a.gif")
    assert read_image(tmp_path / "a.gif").tolist() == [[[10, 20, 30]]]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = read_image(tmp_path / "a.jpg")[4, 4].tolist()
    assert red > 250 and green < 5 and blue < 5


def test_large_images_are_read_up_to_the_hard_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 601)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "large.png").shape == (30, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(ImageReadError, match=r"large\.png.*too large.*MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "large.png")


def test_broken_files_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for extension in ("jpg", "png", "gif"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, extension.replace("jpg", "jpeg"))
        path = tmp_path / f"cut.{extension}"
        path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
        with pytest.raises(
            ImageReadError, match=rf"cut\.{extension}' (cannot be read: \S|is truncated)"
        ):
            read_image(path)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageReadError, match=r"empty\.jpg' is empty"):
        read_image(tmp_path / "empty.jpg")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(ImageReadError, match=r"page\.jpg' is not an image"):
        read_image(tmp_path / "page.jpg")
    with pytest.raises(ImageReadError, match=r"none\.jpg' does not exist"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageReadError, match="is a folder"):
        read_image(tmp_path)


def test_the_error_travels_between_processes() -> None:
    # As from a data loader's worker.
    error = pickle.loads(pickle.dumps(ImageReadError("The image file 'a.jpg' is empty.")))
    assert isinstance(error, ImageReadError) and str(error) == "The image file 'a.jpg' is empty."
