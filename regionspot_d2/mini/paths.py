"""``embedded://name``: weights that ship inside this folder, for ``MODEL.WEIGHTS``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

_PREFIX = "embedded://"


class EmbeddedPathHandler(PathHandler):
    """Opens ``embedded://name`` wherever the package is installed, read-only."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return str(Path(__file__).with_name(path[len(_PREFIX) :]))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return Path(self._get_local_path(path)).is_file()

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode, buffering, **kwargs)


PathManager.register_handler(EmbeddedPathHandler(), allow_override=True)
