"""Names: how those of others are shown, and which ones our own files get."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

# File systems allow 255 bytes; endings, numbers and the names of unfinished files need some.
_MAX_BYTES = 200


def printable(text: object) -> str:
    """Escapes control characters, undecodable bytes and the like: they could steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(message: object) -> str:
    """A message of any library as one printable line."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", str(message).strip()))


def file_name(name: str) -> str:
    """A name for a file in one folder, made of an image's name or id, whatever is in it."""
    safe = re.sub(r'[/\\:*?"<>|]', "_", printable(name)).lstrip(".") or "_"
    encoded = safe.encode()
    if len(encoded) <= _MAX_BYTES:
        return safe
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[:_MAX_BYTES - 13].decode(errors='ignore')}-{digest}"


class OutputFolder:
    """Gives each output a path of its own in a folder, never that of an input.

    Attributes:
        path: the folder.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Iterable[str | os.PathLike[str]],
        roots: Sequence[Path] = (),
    ) -> None:
        """
        Args:
            folder: it need not exist yet.
            inputs: files that no output may replace.
            roots: folders of inputs; :meth:`claim_for` keeps the folders inside them.
        """
        self.path = folder
        self._roots = roots
        self._inside: dict[str, OutputFolder] = {}
        self._claimed: set[str] = set()
        self._inputs: set[object] = set()
        for path in inputs:
            # The name that was given and the file that it links to; neither may be replaced.
            self._inputs |= {_entry(path), _entry(os.path.realpath(path)), _identity(path)}
        self._inputs.discard(None)

    def inside(self, name: str) -> OutputFolder:
        """A folder in it, with the same inputs."""
        key = _folded(name)
        if key not in self._inside:
            inner = OutputFolder(self.path / name, [], self._roots)
            inner._inputs = self._inputs
            self._inside[key] = inner
        return self._inside[key]

    def is_input(self, path: Path) -> bool:
        """Whether a path is that of an input, by a link or in another spelling too."""
        return bool({_entry(path), _identity(path)} & self._inputs)

    def claim_for(self, image: Path, name: str, *endings: str) -> list[Path]:
        """As :meth:`claim`, in the folder that the image has below the folder that was named."""
        folder = self
        around = [root for root in self._roots if image.is_relative_to(root)]
        root = max(around, key=lambda root: len(root.parts), default=image.parent)
        for part in image.relative_to(root).parent.parts:
            folder = folder.inside(file_name(part))
        return folder.claim(name, *endings)

    def claim(self, name: str, *endings: str) -> list[Path]:
        """Paths named after ``name``, one for each ending; a name in use gets a number."""
        base, number = file_name(name), 1
        while True:
            numbered = f"{base}-{number}" if number > 1 else base
            paths = [self.path / f"{numbered}{ending}" for ending in endings]
            keys = {_folded(path.name) for path in paths}
            if not keys & self._claimed and not any(map(self.is_input, paths)):
                self._claimed |= keys
                return paths
            number += 1


def _folded(name: str) -> str:
    # Some disks take x.JPG for x.jpg, and store the accents of names in another way.
    return unicodedata.normalize("NFC", name).casefold()


def _entry(path: str | os.PathLike[str]) -> str:
    """The place of a file in its folder, which may be reached by links."""
    folder, name = os.path.split(os.path.abspath(path))
    return _folded(os.path.join(os.path.realpath(folder), name))


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_dev, state.st_ino
