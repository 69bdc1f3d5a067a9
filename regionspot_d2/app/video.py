"""Reads videos by OpenCV, and writes them by PyAV, frame by frame."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from .inputs import tell

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}


class VideoReadError(OSError):
    """A video cannot be read, or only in part."""


class Video:
    """A video file whose frames are read one by one.

    Attributes:
        fps: chosen frames per second of the video.
    """

    def __init__(self, path: Path, every: int = 1) -> None:
        """
        Args:
            path: a file of a format that OpenCV reads.
            every: choose every ``every``-th frame, starting with the first.

        Raises:
            VideoReadError: OpenCV cannot open it.
        """
        self._path = path
        self._every = every
        if not path.is_file():
            raise VideoReadError("there is no such file, or it is not a regular file.")
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise VideoReadError("there is no such file, or OpenCV cannot open it as a video.")
        self._count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self._read = 0
        # If one frame stands for the whole video, it is shown for exactly its length.
        apart = min(every, self._count) if self._count > 0 else every
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        # Damaged headers have rates of 0, NaN, or a million.
        self.fps = (rate if 1e-3 <= rate <= 1000 else 25.0) / apart

    @staticmethod
    def names(path: Path) -> bool:
        """Whether a file's name is that of a video."""
        return path.suffix.lower() in VIDEO_SUFFIXES

    @property
    def expected_frames(self) -> int | None:
        """How many frames will be chosen, if the file says so."""
        return -(-self._count // self._every) if self._count > 0 else None

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the chosen frames: the place in the video, from 0, and (H, W, 3) uint8 RGB."""
        while self._capture.grab():
            if self._read % self._every == 0:
                whole, frame = self._capture.retrieve()
                if not whole:
                    break
                yield self._read, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            self._read += 1
        self._capture.release()
        if self._read == 0:
            raise VideoReadError("OpenCV can read no frame of it.")

    def check_whole(self) -> None:
        """Checks, after the last frame, that the video was not cut off.

        Raises:
            VideoReadError: the file has clearly fewer frames than it says.
        """
        # Some formats only give a length in seconds, from which OpenCV estimates the frames.
        if self._read < 0.95 * self._count - 2:
            raise VideoReadError(f"only {self._read} of its {self._count} frames can be read.")


@contextmanager
def video_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes pictures of one size as H.264, which browsers play; without PyAV as MPEG-4.

    The file appears under its name when it is complete. Odd sides, which the codec cannot have,
    get another row or column.

    Args:
        path: the file; it ends in .mp4.
        fps: pictures per second; below 1, each is written several times, which looks the same.

    Yields:
        A function that appends a picture (H, W, 3), uint8, RGB.
    """
    # Both libraries open files themselves, by a name whose ending tells the format. In a folder of
    # its own, the unfinished video takes nobody's name.
    with tempfile.TemporaryDirectory(prefix=".video.", dir=path.parent) as folder:
        partial = Path(folder) / "partial.mp4"
        repeats = max(1, math.ceil(1 / fps))
        # MPEG-4 stores times as fractions with small denominators; OpenCV rounds to thousandths.
        writer = _writer(partial, float(f"{fps * repeats:.4g}"))
        try:
            yield lambda picture: writer.append(_even(picture), repeats)
            writer.close()
            partial.replace(path)
        finally:
            writer.close()


def _even(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    return cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)


class _Writer(Protocol):
    """Writes pictures with even sides to a video that the first picture opens."""

    def append(self, picture: np.ndarray, times: int) -> None: ...

    def close(self) -> None: ...


def _writer(path: Path, rate: float) -> _Writer:
    try:
        import av

        av.codec.Codec("h264", "w")
    except ModuleNotFoundError:
        _tell_once("the package av is missing (pip install regionspot_d2[video])")
    except av.codec.codec.UnknownCodecError:
        _tell_once("this build of the package av has no encoder for H.264 (its wheels have one)")
    else:
        return _H264(path, rate)
    return _Mpeg4(path, rate)


@cache
def _tell_once(reason: str) -> None:
    tell(f"Videos are written as MPEG-4, which players show and browsers do not: {reason}.")


class _H264:
    def __init__(self, path: Path, rate: float) -> None:
        import av

        self._path, self._rate = path, Fraction(rate).limit_denominator(10**6)
        self._frame = av.VideoFrame.from_ndarray
        # The index in front: a browser starts to play before it has all of the file.
        self._file = av.open(str(path), "w", options={"movflags": "+faststart"})
        self._stream: Any = None

    def append(self, picture: np.ndarray, times: int) -> None:
        try:
            if self._stream is None:
                self._stream = self._open(*picture.shape[:2])
            for _ in range(times):
                self._file.mux(self._stream.encode(self._frame(picture, format="rgb24")))
        except OSError as error:  # as PyAV's errors are
            height, width = picture.shape[:2]
            raise OSError(
                f"PyAV cannot write the video {self._path}, {width} x {height}: {error}"
            ) from error

    def _open(self, height: int, width: int) -> Any:
        stream = self._file.add_stream("h264", rate=self._rate)
        # What browsers decode is 4:2:0; 18 of 51 loses nothing that the eye sees.
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        return stream

    def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            self._file.mux(stream.encode(None))
        self._file.close()


class _Mpeg4:
    def __init__(self, path: Path, rate: float) -> None:
        self._writer, self._path, self._rate = cv2.VideoWriter(), path, rate

    def append(self, picture: np.ndarray, times: int) -> None:
        if not self._writer.isOpened():
            height, width = picture.shape[:2]
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            if not self._writer.open(str(self._path), codec, self._rate, (width, height)):
                raise OSError(
                    f"OpenCV cannot write the video {self._path}, {width} x {height}, "
                    f"{self._rate:g} pictures per second."
                )
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        for _ in range(times):
            self._writer.write(bgr)

    def close(self) -> None:
        self._writer.release()
