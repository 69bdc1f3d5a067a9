"""Damage in PNG and JPEG files that PIL decodes without a word."""

from __future__ import annotations

import re
import struct
import zlib

import simplejpeg

# More scans than any encoder writes keep a decoder busy for minutes.
_MAX_SCANS = 100
# Bytes that a camera may leave before a marker.
_PADDING = 16
# Of libjpeg's warnings, those of pixels. Others are of versions, color profiles and the like.
_DAMAGE = re.compile(r"Corrupt JPEG data: (?!bad ICC)|Inconsistent progression sequence")
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # none among the codes of a scan


def check_png(content: bytes) -> None:
    """Compares the checksums of what makes up the pixels, up to the file's end mark.

    Raises:
        ValueError: one is wrong.
        struct.error: the file is truncated.
    """
    place, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        (checksum,) = struct.unpack_from(">I", content, end)
        # Upper case marks a critical chunk; a wrong date or comment changes no pixel.
        if kind[:1].isupper() or kind == b"tRNS":
            if zlib.crc32(memoryview(content)[place + 4 : end]) != checksum:
                raise ValueError(f"the checksum of its part {kind!r} at byte {place} is wrong")
        place = end + 4


def check_jpeg(content: bytes, mode: str) -> None:
    """Decodes a JPEG at the smallest size, and takes the decoder's warnings of damage for errors.

    A JPEG has no checksum, and libjpeg goes on after damaged codes: it leaves the rest over or
    makes it up, and PIL does not pass its warnings on. What cannot be decoded at all is left to
    PIL, which may know more kinds of JPEG.

    Args:
        mode: PIL's mode of the image.

    Raises:
        ValueError: something is damaged.
        EOFError, struct.error: the file is truncated.
    """
    if content.count(b"\xff\xda") > _MAX_SCANS and _scans(content) > _MAX_SCANS:
        raise ValueError(f"it has more than {_MAX_SCANS} scans")
    try:
        # Only the codes matter: not the colors, and an eighth of the size is the fastest.
        simplejpeg.decode_jpeg(content, "CMYK" if mode == "CMYK" else "GRAY", min_factor=8)
    except ValueError as error:
        warning = str(error)
    else:
        return
    if warning.startswith("Premature end"):
        raise EOFError
    padding = re.search(r"(\d+) extraneous bytes before marker 0x(?!d[0-7])", warning)
    if not (padding and int(padding[1]) <= _PADDING) and _DAMAGE.match(warning):
        raise ValueError(warning[:1].lower() + warning[1:])


def _scans(content: bytes) -> int:
    """How many scans there are up to the end mark; what follows may be a film."""
    found = place = 0
    while marker := _MARKER.search(content, place):
        if marker[0] == b"\xff\xd9":
            break
        found += marker[0] == b"\xff\xda"
        # The start mark has no length.
        (length,) = (
            (0,) if marker[0] == b"\xff\xd8" else struct.unpack_from(">H", content, marker.end())
        )
        place = marker.end() + length
    return found
