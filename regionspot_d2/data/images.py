"""Image files of every kind become RGB arrays, or one clear error."""

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

# 16-bit grey, as PIL's versions and formats name it. "I" holds 32 bits, but is also how older PIL opens 16-bit PNG.
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")


class ImageReadError(OSError):
    """An image file is missing, or cannot be read; the message names the file and what is wrong."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image file, upright as its EXIF data says, as :func:`to_rgb_array` describes.

    Files of several pictures give the first. PIL's guard against decompression bombs stays in place at its hard limit,
    ``2 * PIL.Image.MAX_IMAGE_PIXELS`` (179 megapixels by default); its warning below that is silenced, since 100
    megapixels are an ordinary aerial photo.

    Args:
        path: a file, or a path of a scheme that Detectron2's ``PathManager`` knows.

    Returns:
        A writable array (H, W, 3), uint8, RGB.

    Raises:
        ImageReadError: the file is missing, empty, truncated, too large, or no image.
    """
    name = os.fspath(path)
    try:
        with PathManager.open(name, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
            # Decode first: PIL turns TIFF files upright while it decodes, and forgets their orientation then.
            image.load()
            return to_rgb_array(image)
    except FileNotFoundError as error:
        raise ImageReadError(f"The image file '{name}' does not exist.") from error
    except IsADirectoryError as error:
        raise ImageReadError(f"'{name}' is a folder; an image file is expected.") from error
    except Image.DecompressionBombError as error:
        raise ImageReadError(
            f"The image file '{name}' is too large: {error} If the file can be trusted, raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageReadError(_unidentified(name)) from error
    except Exception as error:  # PIL's decoders raise everything from SyntaxError to struct.error
        raise ImageReadError(f"The image file '{name}' cannot be read: {error}.") from error


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """Turns an opened image upright and into 8-bit RGB.

    Transparent pixels are laid over white: what they hide is often black or noise that no viewer shows. (Detectron2's
    ``read_image`` shows what they hide.) 16-bit grey is scaled to 8 bits, not clipped, unless no value
    is above 255: those are 8 bits already.

    Args:
        image: of any mode; its EXIF orientation is applied.

    Returns:
        A writable array (H, W, 3), uint8, RGB.

    Raises:
        ValueError: the range of the pixel values is unknown (floats, 32-bit integers), or PIL has no way to RGB.
    """
    image = _apply_exif_orientation(image)
    if image.mode in _DEEP_GREY:
        image = _shallow_grey(image)
    elif image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 or 16 bits")
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _shallow_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            "its pixels are 32-bit integers of unknown range; save it with 8 or 16 bits"
        )
    # Tools of labels and of medical images save 8-bit values with more bits; scaled, they would all be black. The same
    # for each mode: which of them a 16-bit PNG opens with depends on PIL's version.
    if values.max() > 255:
        values = (values + 128) // 257
    return Image.fromarray(values.astype(np.uint8))


def _unidentified(name: str) -> str:
    with PathManager.open(name, "rb") as file:
        if not file.read(1):
            return f"The image file '{name}' is empty."
    return f"The file '{name}' is not an image, or of a format that PIL cannot read."


def as_image_tensor(image: ImageLike, channels: str) -> Tensor:
    """Checks an image and copies it, so that a caller may draw on it afterwards.

    Args:
        image: a path, a PIL image, an array (H, W, 3) or (H, W), or a tensor (3, H, W) or (H, W);
            values in 0..255.
        channels: "RGB" or "BGR", the order in an array or tensor.

    Returns:
        (3, H, W), RGB, 0..255, uint8 or float32.

    Raises:
        ValueError: it is none of these.
        ImageReadError: a file cannot be read.
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
        raise ValueError(
            f"The image is of the type {type(image).__name__}; a path, a PIL image, an array or a "
            "tensor is expected."
        )
    if pixels.dim() == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    if pixels.dim() != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"The image has the shape {tuple(image.shape)}; (H, W, 3) is expected of an array, "
            "(3, H, W) of a tensor, (H, W) of a gray one."
        )
    if pixels.dtype != torch.uint8:
        pixels = _checked_range(pixels)
    pixels = pixels.permute(2, 0, 1)
    return (pixels.flip(0) if channels == "BGR" else pixels).contiguous()


def _checked_range(pixels: Tensor) -> Tensor:
    values = pixels.float()
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(f"The image has values from {low:g} to {high:g}; 0..255 is expected.")
    if 0 < high <= 1 and (pixels.is_floating_point() or pixels.dtype == torch.bool):
        raise ValueError(
            f"The image has values from {low:g} to {high:g}; 0..255 is expected. Multiply by 255 if "
            "1 is white."
        )
    return values if pixels.is_floating_point() else pixels.to(torch.uint8)
