"""Reads image files of any kind as RGB arrays, or fails with one clear error."""

from __future__ import annotations

import os
import warnings
from typing import TypeAlias

import numpy as np
import torch
from detectron2.data.detection_utils import _apply_exif_orientation
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError
from torch import Tensor

ImageLike: TypeAlias = str | os.PathLike[str] | np.ndarray | Image.Image | Tensor

# 16-bit gray. "I" has 32 bits, but older PIL opens 16-bit PNG as "I".
_DEEP_GRAY = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class ImageReadError(OSError):
    """An image file is missing or cannot be read; the message names the file and the reason."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file, or the first image of a file with several, with :func:`to_rgb_array`.

    ``path`` may have any scheme that Detectron2's ``PathManager`` knows. PIL's guard against
    decompression bombs stays in place at ``2 * PIL.Image.MAX_IMAGE_PIXELS`` (179 megapixels by
    default); its warning at half of that, which ordinary aerial photos reach, is silenced.

    Returns:
        A writable array (H, W, 3), uint8, RGB.

    Raises:
        ImageReadError: the file is missing, empty, truncated, too large, or not an image.
    """
    name = os.fspath(path)
    try:
        with PathManager.open(name, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if not file.read(1):
                raise ImageReadError(f"The image file '{name}' is empty.")
            file.seek(0)
            image = Image.open(file)
            # Decode first: PIL turns TIFF files upright as it decodes, and drops their orientation.
            image.load()
            return to_rgb_array(image)
    except ImageReadError:
        raise
    except FileNotFoundError as error:
        raise ImageReadError(f"The image file '{name}' does not exist.") from error
    except IsADirectoryError as error:
        raise ImageReadError(f"'{name}' is a folder; an image file is expected.") from error
    except UnidentifiedImageError as error:
        raise ImageReadError(
            f"'{name}' is not an image, or its format is unknown to PIL."
        ) from error
    except Image.DecompressionBombError as error:
        remedy = "If you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS."
        raise ImageReadError(f"The image file '{name}' is too large: {error} {remedy}") from error
    except Exception as error:  # PIL's decoders raise everything from SyntaxError to struct.error
        raise ImageReadError(f"The image file '{name}' cannot be read: {error}.") from error


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
    if image.mode in _DEEP_GRAY:
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are integers of unknown range; save it with 8 or 16 bits")
        # Labeling and medical tools save 8-bit values with 16 bits; scaled, they would be black.
        scaled = (values + 128) // 257 if values.max() > 255 else values
        image = Image.fromarray(scaled.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 or 16 bits")
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def as_image_tensor(image: ImageLike, channels: str) -> Tensor:
    """Checks an image and copies it, so that a caller may draw on it afterwards.

    Args:
        image: a path, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W) or (H, W);
            values in 0..255.
        channels: "RGB" or "BGR", the order in an array or tensor.

    Returns:
        (3, H, W), RGB, 0..255, uint8 or float32.

    Raises:
        ValueError: the image has another type, shape or range.
        ImageReadError: the file cannot be read.
    """
    if channels not in ("RGB", "BGR"):
        raise ValueError(f"channels is '{channels}'; it must be 'RGB' or 'BGR'.")
    if isinstance(image, (str, os.PathLike)):
        image, channels = read_image(image), "RGB"
    elif isinstance(image, Image.Image):
        image, channels = to_rgb_array(image), "RGB"
    if isinstance(image, Tensor):
        pixels = image.detach().clone()
        pixels = pixels.permute(1, 2, 0) if pixels.dim() == 3 else pixels
    elif isinstance(image, np.ndarray):
        pixels = torch.from_numpy(image.copy())
    else:
        kind = type(image).__name__
        raise ValueError(
            f"The image is of the type {kind}, not a path, PIL image, array or tensor."
        )
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
    return (pixels.flip(0) if channels == "BGR" else pixels).contiguous()
