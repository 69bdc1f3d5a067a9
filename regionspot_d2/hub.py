"""Files of the Hugging Face hub, by the package huggingface_hub, in the project's cache."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from .files import WeightsNotFoundError, cache_dir, once_per_machine, private_folder

# What the hub itself admits: an owner and a name.
_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def is_hub_id(value: str) -> bool:
    """Whether a value looks like the id of a repository on the hub: ``owner/name``."""
    return bool(_ID.fullmatch(value)) and not value.endswith((".yaml", ".yml"))


def hub_folder() -> Path:
    """The folder of the cache, in the hub's own layout, for huggingface_hub's ``cache_dir``.

    Raises:
        OSError: it cannot be made, or others may write to it.
    """
    return private_folder(cache_dir() / "hub")


def hub_file(repository: str, filename: str, config_key: str) -> Path:
    """The local path of a file of a repository, downloaded if need be.

    Raises:
        WeightsNotFoundError: it is not in the cache and cannot be downloaded.
    """

    def download(folder: Path) -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, filename, cache_dir=folder)

    return fetched(download, repository, config_key)


def hub_snapshot(repository: str, patterns: Sequence[str], config_key: str) -> Path:
    """A folder with those files of a repository whose names match one of the patterns.

    Raises:
        WeightsNotFoundError: as :func:`hub_file`.
    """

    def download(folder: Path) -> str:
        from huggingface_hub import snapshot_download

        return snapshot_download(repository, cache_dir=folder, allow_patterns=list(patterns))

    return fetched(download, repository, config_key)


def fetched(download: Callable[[Path], str], repository: str, config_key: str) -> Path:
    """Runs a download of the hub, first in one process of each machine.

    Args:
        download: takes :func:`hub_folder` and returns a path in it.
        repository, config_key: what is downloaded and who asks, for the message.

    Raises:
        WeightsNotFoundError: in all processes, if it fails in one.
    """

    def fetch() -> Path:
        try:
            return Path(download(hub_folder()))
        except ImportError as error:
            raise ImportError(
                f"{config_key} names '{repository}' on the Hugging Face hub, which needs: "
                "pip install huggingface_hub"
            ) from error
        except (OSError, ValueError) as error:  # all of huggingface_hub's are one of the two
            reason = textwrap.shorten(str(error) or type(error).__name__, 200)
            raise WeightsNotFoundError(
                f"{config_key} names '{repository}' on the Hugging Face hub, which is not in "
                f"'{cache_dir() / 'hub'}' and cannot be downloaded: {reason}"
            ) from error

    found: list[Path] = []
    once_per_machine(lambda: found.append(fetch()))
    return found[0] if found else fetch()  # from the cache
