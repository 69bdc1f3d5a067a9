"""Reads image files of any kind as RGB arrays, or fails with one clear error."""

from __future__ import annotations

import os
import stat
import struct
import textwrap
import warnings
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from detectron2.data.detection_utils import _apply_exif_orientation
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ..arrays import as_numbers, check_channels
from .image_files import check_jpeg, check_png

ImageLike: TypeAlias = str | os.PathLike[str] | np.ndarray | Image.Image | Tensor

# What is read: formats that PIL decodes itself. EPS and the like, it hands to other programs.
FORMATS = tuple(
    "JPEG MPO PNG BMP DIB GIF TIFF WEBP AVIF JPEG2000 PPM HEIF ICO PCX QOI SGI TGA".split()
)
# INPUT.MAX_PIXELS by default: the photos of 108-megapixel cameras are read.
MAX_PIXELS = 120_000_000

_STRIP_ROWS = 256
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
# 16-bit gray. "I" has 32 bits, but older PIL opens 16-bit PNG as "I".
_DEEP_GRAY = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class OneLineError(Exception):
    """An error that stays one line on its way out of a loader's worker.

    torch makes an error of the same type there, whose message is the worker's whole traceback.
    """

    def __init__(self, message: str) -> None:
        if "Original Traceback (most recent call last)" in message:
            message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(message)


class ImageReadError(OneLineError, OSError):
    """An image file is missing or cannot be read; the message names the file and the reason."""


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Reads an image file, or the first image of a file with several, with :func:`to_rgb_array`.

    Args:
        path: a regular file, or a URL that Detectron2's ``PathManager`` knows. Its content decides
            on the format, which is one of ``FORMATS``.
        max_pixels: width times height, by the file's header; nothing larger is decoded. Above 179
            megapixels, ``PIL.Image.MAX_IMAGE_PIXELS`` must be raised too.

    Returns:
        A writable array (H, W, 3), uint8, RGB.

    Raises:
        ImageReadError: the file is missing, no regular file, empty, truncated, damaged as far as
            its format can show it, too large, or not an image.
    """
    # A repr: control characters and what cannot be encoded are escaped.
    name = repr(os.fspath(path))
    try:
        with _open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata, and at half of PIL's limit
            Image.init()
            # PIL may be built without AVIF; HEIF is of the package pillow-heif.
            image = Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])
            _check_size(image, max_pixels)
            _check_content(file, image)
            # Decode first: PIL turns TIFF files upright as it decodes, and drops their orientation.
            image.load()
            return to_rgb_array(image)
    except ImageReadError as error:
        raise ImageReadError(f"The image file {name} {error}") from None
    except FileNotFoundError as error:
        raise ImageReadError(f"The image file {name} does not exist.") from error
    except UnidentifiedImageError as error:
        raise ImageReadError(
            f"{name} is not an image, or not of a format that is read: {', '.join(FORMATS)}."
        ) from error
    except Image.DecompressionBombError as error:
        remedy = "If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS."
        raise ImageReadError(f"The image file {name} is too large: {error} {remedy}") from error
    except Exception as error:  # PIL's decoders raise everything from SyntaxError to struct.error
        reason = textwrap.shorten(str(error).rstrip("."), 200) or type(error).__name__
        raise ImageReadError(f"The image file {name} cannot be read: {reason}.") from error


def _open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file that is one; a FIFO or a device might never end, and is not even opened."""
    local = PathManager.get_local_path(os.fspath(path))
    status = os.stat(local)
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise ImageReadError(f"is {what}; a regular file is expected.")
    if not status.st_size:
        raise ImageReadError("is empty.")
    return open(local, "rb")


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    sizes = [(width, height)]
    if isinstance(image, TiffImageFile):  # tiles of any size are allocated for a small picture
        tags = image.tag_v2
        sizes.append((int(tags.get(_TILE_WIDTH, 1)), int(tags.get(_TILE_LENGTH, 1))))
    if min(width, height) < 1:
        raise ImageReadError(f"has the size {width} x {height}.")
    if any(width * height > max_pixels for width, height in sizes):
        width, height = max(sizes)
        raise ImageReadError(
            f"is too large: {width} x {height} pixels are more than {max_pixels:,}. Make it "
            "smaller, or raise INPUT.MAX_PIXELS."
        )


def _check_content(file: BinaryIO, image: Image.Image) -> None:
    """Notices damage that PIL passes over. It leaves other formats to their decoders.

    What no check can notice: pixels of formats without checksums, which are all but PNG, that still
    decode. For example, a JPEG whose codes are in step again before their end shows other pixels.
    """
    if image.format not in ("JPEG", "MPO", "PNG"):
        return
    # Enough for any metadata and pixels, but not for a film that is appended to a photo.
    file.seek(0)
    content = file.read((1 << 26) + 16 * image.width * image.height)
    file.seek(0)
    try:
        if image.format == "PNG":
            check_png(content)
        else:
            check_jpeg(content, image.mode)
    except (EOFError, struct.error) as error:
        raise ImageReadError("is truncated.") from error
    except ValueError as error:
        raise ImageReadError(f"is damaged: {error}.") from error


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """Converts an image of any mode to 8-bit RGB, and applies its EXIF orientation.

    Transparent pixels become white: unlike Detectron2's ``read_image``, this does not reveal the
    black or noise that is often below them. 16-bit gray is scaled to 8 bits, not clipped, unless
    all values are at most 255: those are 8 bits already.

    Returns:
        A writable array (H, W, 3), uint8, RGB.

    Raises:
        ValueError: pixels are floats or 32-bit integers of unknown range.
    """
    image = _apply_exif_orientation(image)
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 or 16 bits")
    extremes: Any = image.getextrema() if image.mode in _DEEP_GRAY else (0, 0)
    low, high = extremes
    if low < 0 or high > 65535:
        raise ValueError("its pixels are integers of unknown range; save it with 8 or 16 bits")
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    # In strips, or a large image would be in memory five times.
    for top in range(0, height, _STRIP_ROWS):
        strip = image.crop((0, top, width, min(top + _STRIP_ROWS, height)))
        pixels[top : top + _STRIP_ROWS] = _rgb_strip(strip, deep=high > 255)
    return pixels


def _rgb_strip(image: Image.Image, deep: bool) -> np.ndarray:
    if image.mode in _DEEP_GRAY:
        values = np.asarray(image).astype(np.int32)
        # Labeling and medical tools save 8-bit values with 16 bits; scaled, they would be black.
        scaled = (values + 128) // 257 if deep else values
        return scaled.astype(np.uint8)[..., None]
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def as_image_tensor(image: ImageLike, channels: str, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Checks an image and copies it, so that a caller may draw on it afterwards.

    Args:
        image: a path, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W) or (H, W);
            values in 0..255.
        channels: "RGB" or "BGR", the order in an array or tensor.
        max_pixels: see :func:`read_image`; what is in memory already is not limited.

    Returns:
        (3, H, W), RGB, 0..255, uint8 or float32.

    Raises:
        ValueError: the image has another type, shape or range.
        ImageReadError: the file cannot be read.
    """
    check_channels(channels, "channels")
    if isinstance(image, (str, os.PathLike)):
        image, channels = read_image(image, max_pixels=max_pixels), "RGB"
    elif isinstance(image, Image.Image):
        image, channels = _pil_pixels(image), "RGB"
    if not isinstance(image, np.ndarray | Tensor):
        kind = type(image).__name__
        raise ValueError(
            f"The image is of the type {kind}, not a path, PIL image, array or tensor."
        )
    pixels = as_numbers(image, "pixels of the image")
    if isinstance(image, Tensor) and pixels.dim() == 3:
        pixels = pixels.permute(1, 2, 0)
    if pixels.dim() == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    if pixels.dim() != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"The image has the shape {tuple(image.shape)}; an array must have (H, W, 3), a tensor "
            "(3, H, W), a gray image (H, W)."
        )
    if pixels.dtype != torch.uint8:
        values = pixels.float()
        low, high = float(values.min()), float(values.max())
        # Numbers up to 1 are a common mistake; integers up to 1 are a very dark image.
        shares = 0 < high <= 1 and (pixels.is_floating_point() or pixels.dtype == torch.bool)
        if not (low >= 0 and high <= 255) or shares:
            remedy = " Multiply by 255 if 1 is white." if shares else ""
            raise ValueError(
                f"The image has values from {low:g} to {high:g}; 0..255 is expected.{remedy}"
            )
        pixels = values if pixels.is_floating_point() else pixels.to(torch.uint8)
    pixels = pixels.permute(2, 0, 1)
    pixels = pixels.flip(0) if channels == "BGR" else pixels
    return pixels.clone(memory_format=torch.contiguous_format)


def _pil_pixels(image: Image.Image) -> np.ndarray:
    try:
        return to_rgb_array(image)
    # A file that PIL opened is decoded only now, or was closed before.
    except Exception as error:
        reason = textwrap.shorten(str(error).rstrip("."), 200) or type(error).__name__
        raise ValueError(f"The PIL image cannot be read: {reason}.") from error
