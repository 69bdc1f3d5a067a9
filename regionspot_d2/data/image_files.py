"""Damage in PNG and JPEG files that PIL decodes without a word, found in their structure."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile

# More scans than any encoder writes keep a decoder busy for minutes.
_MAX_SCANS = 100
# Bytes that a camera may leave after the codes of a picture.
_SLACK = 16
_FILLER = b"\x5a\xa7\x3c\x99" * 16
_SOF0, _SOF1, _SOF2, _SOI, _EOI, _SOS, _DRI = 0xC0, 0xC1, 0xC2, 0xD8, 0xD9, 0xDA, 0xDD
_RESTARTS = range(0xD0, 0xD8)
# Tables, comments and what applications add; no other marker follows a scan.
_AFTER_SCAN = {0xC4, 0xCC, 0xDB, 0xDC, _DRI, _SOS, _EOI, 0xFE, *range(0xE0, 0xF0)}


def check_png(content: bytes) -> None:
    """Compares the checksums of what makes up the pixels, up to the file's end mark.

    Raises:
        ValueError: one is wrong.
        IndexError, struct.error: the file is truncated.
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


class _Scan(NamedTuple):
    start: int  # of the codes
    end: int  # the marker that follows
    restarts: list[int]  # where its restart markers are
    components: int


def check_jpeg(content: bytes) -> None:
    """Checks the order of a JPEG's markers, and that its codes end where the pixels do.

    A JPEG has no checksum, and libjpeg goes on after damaged codes: it leaves the rest over or
    makes it up, and PIL does not pass its warnings on.

    Raises:
        ValueError: something is damaged.
        IndexError, struct.error: the file is truncated.
    """
    frame, components, scans = _parse(content)
    if not scans:
        raise ValueError("it has no pixels")
    sequential = frame in (_SOF0, _SOF1)
    if sequential and len(scans) == 1 and scans[0].components == components:
        _check_end(content, scans[0])
    elif not sequential and frame != _SOF2:
        return  # arithmetic codes do not show where they end
    late, ends = False, [place for scan in scans for place in (*scan.restarts, scan.end)]
    if len(ends) > 1 or len(scans) > 1:
        # A sound decoder skips what follows the last code; one that is late takes it for codes.
        pieces = [content[a:b] for a, b in zip([0, *ends], ends)]
        filled = _FILLER.join([*pieces, content[ends[-1] :]])
        with contextlib.suppress(OSError):  # the decoder itself says what is wrong
            late = _decode(content, sequential) != _decode(filled, sequential)
        if late:
            raise ValueError("its codes end before its pixels do")


def _parse(content: bytes) -> tuple[int, int, list[_Scan]]:  # noqa: C901 (a marker after the other)
    """The kind of frame, the number of components, and the scans up to the end mark."""
    values = np.frombuffer(content, np.uint8)
    at = np.flatnonzero(values[:-1] == 0xFF)
    at = at[(values[at + 1] != 0) & (values[at + 1] != 0xFF)]
    place, frame, components, interval, scans = 2, 0, 0, 0, list[_Scan]()
    while True:
        place = int(at[np.searchsorted(at, place)])
        code = content[place + 1]
        if code == _EOI:
            return frame, components, scans
        (length,) = struct.unpack_from(">H", content, place + 2)
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            frame, components = code, content[place + 9]
        elif code == _DRI:
            (interval,) = struct.unpack_from(">H", content, place + 4)
        elif code == _SOS:
            start = place + 2 + length
            restarts = list[int]()
            for marker in at[np.searchsorted(at, start) :].tolist():
                if content[marker + 1] not in _RESTARTS:
                    break
                restarts.append(marker)
            else:
                raise IndexError
            if content[marker + 1] not in _AFTER_SCAN:
                raise ValueError(f"byte {marker} among its pixels belongs to no code")
            numbers = [content[restart + 1] - 0xD0 for restart in restarts]
            if numbers != [i % 8 for i in range(len(numbers))] or (numbers and not interval):
                raise ValueError("the restart marks among its pixels are not in order")
            scans.append(_Scan(start, marker, restarts, content[place + 4]))
            if len(scans) > _MAX_SCANS:
                raise ValueError(f"it has more than {_MAX_SCANS} scans")
            length = marker - place - 2
        place += 2 + length


def _check_end(content: bytes, scan: _Scan) -> None:
    """Checks that the codes of the only scan are neither too many nor too few.

    libjpeg waits for more where the codes end that it was given, and is done after the last pixel:
    the piece with the last codes must be what it needs. At an eighth of the size this takes half
    the time of decoding.
    """
    image, cut = _small(content), max(scan.start, scan.end - _SLACK)
    # libjpeg looks 8 bytes ahead. An empty piece ends the file.
    pieces = [content[:cut], content[cut : scan.end] + _FILLER[:8], b""]
    asked = iter(pieces)
    image.load_read = lambda read_bytes: next(asked)  # type: ignore[method-assign]
    late = False
    try:
        image.load()
    except OSError:
        late = not list(asked)
        if not late:
            return  # the decoder itself says what is wrong
    left = len(list(asked))
    if left == 2:
        raise ValueError("its pixels end before its codes do")
    if late or left == 0:
        raise ValueError("its codes end before its pixels do")


def _small(content: bytes) -> JpegImageFile:
    image = JpegImageFile(io.BytesIO(content))
    # A few pixels could be right by chance.
    scale = 8 if min(image.size) >= 256 else 1
    image.draft("L", (image.width // scale, image.height // scale))
    return image


def _decode(content: bytes, sequential: bool) -> bytes:
    """The luminance; of a progressive file at full size, whose later scans add only detail."""
    image = JpegImageFile(io.BytesIO(content))
    image.draft("L", None)
    if sequential:
        image = _small(content)
    return image.tobytes()
