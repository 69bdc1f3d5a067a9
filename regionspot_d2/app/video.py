"""Reads and writes videos frame by frame, by OpenCV."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

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
    """Writes pictures of one size as MPEG-4; the file appears under its name when it is complete.

    Args:
        path: the file; it ends in .mp4.
        fps: pictures per second; below 1, each is written several times, which looks the same.

    Yields:
        A function that appends a picture (H, W, 3), uint8, RGB.
    """
    # OpenCV opens files itself, by a name whose ending tells the format. In a folder of its own,
    # the unfinished video takes nobody's name.
    with tempfile.TemporaryDirectory(prefix=".video.", dir=path.parent) as folder:
        partial = Path(folder) / "partial.mp4"
        writer = cv2.VideoWriter()
        try:
            yield _Appending(writer, partial, fps)
            writer.release()
            partial.replace(path)
        finally:
            writer.release()


class _Appending:
    """Appends a picture (H, W, 3), uint8, RGB, to a video that the first picture opens."""

    def __init__(self, writer: cv2.VideoWriter, path: Path, fps: float) -> None:
        self._writer, self._path = writer, path
        # OpenCV rounds rates to thousandths: 0.0625 becomes 0.063, and 0.0004 an error.
        self._repeats = max(1, math.ceil(1 / fps))
        # MPEG-4 stores times as fractions with small denominators.
        self._rate = float(f"{fps * self._repeats:.4g}")

    def __call__(self, picture: np.ndarray) -> None:
        if not self._writer.isOpened():
            height, width = picture.shape[:2]
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            if not self._writer.open(str(self._path), codec, self._rate, (width, height)):
                raise OSError(
                    f"OpenCV cannot write the video {self._path}, {width} x {height}, "
                    f"{self._rate:g} pictures per second."
                )
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        for _ in range(self._repeats):
            self._writer.write(bgr)
