"""Videos, one frame after another, by OpenCV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}


class VideoReadError(OSError):
    """A video cannot be read; the message names it."""


class Video:
    """A video file whose frames are read one by one.

    Attributes:
        fps: chosen frames per second.
    """

    def __init__(self, path: Path, every: int = 1) -> None:
        """
        Args:
            path: of a format that OpenCV reads.
            every: choose each ``every``-th frame, from the first on.

        Raises:
            VideoReadError: if OpenCV cannot open it.
        """
        self._path = path
        self._every = every
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise VideoReadError("there is no such file, or OpenCV cannot open it as a video.")
        self.fps = (self._capture.get(cv2.CAP_PROP_FPS) or 25.0) / every

    @property
    def expected_frames(self) -> int | None:
        """How many frames will be chosen, if the file says so."""
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return -(-count // self._every) if count > 0 else None

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the number of each chosen frame, from 0 in the whole video, and its pixels (H, W, 3), uint8, RGB."""
        number = 0
        while self._capture.grab():
            if number % self._every == 0:
                whole, frame = self._capture.retrieve()
                if not whole:
                    break
                yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            number += 1
        self._capture.release()
        if number == 0:
            raise VideoReadError("it has no frame that OpenCV can read.")


@contextmanager
def video_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes pictures of one size as MPEG-4; the file appears under its name when it is whole.

    Args:
        path: ends in .mp4.
        fps: pictures per second.

    Yields:
        A function that appends a picture (H, W, 3), uint8, RGB.
    """
    partial = path.with_suffix(".partial.mp4")
    writer = cv2.VideoWriter()

    def append(picture: np.ndarray) -> None:
        if not writer.isOpened():
            height, width = picture.shape[:2]
            # MPEG-4 counts time in fractions with small denominators.
            opened = writer.open(
                str(partial), cv2.VideoWriter_fourcc(*"mp4v"), round(fps, 2), (width, height)
            )
            if not opened:
                raise OSError(f"OpenCV cannot write the video {partial}.")
        writer.write(np.ascontiguousarray(picture[:, :, ::-1]))

    try:
        yield append
        writer.release()
        partial.replace(path)
    finally:
        writer.release()
        partial.unlink(missing_ok=True)
