"""Where pretrained weights come from: a file, or an official URL that is downloaded once."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

logger = logging.getLogger(__name__)

_DOWNLOADED = ("http", "https", "ftp")
_TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 20


class WeightsNotFoundError(FileNotFoundError):
    """Pretrained weights are neither on disk nor reachable; the message says what to do."""


def cache_dir() -> Path:
    """The folder for everything the project downloads or computes once.

    Returns:
        The environment variable ``REGIONSPOT_CACHE``, by default ``~/.cache/regionspot_d2``. It
        need not exist yet.
    """
    return Path(os.environ.get("REGIONSPOT_CACHE") or "~/.cache/regionspot_d2").expanduser()


def local_weights(value: str, config_key: str) -> Path | None:
    """Makes sure that a pretrained model's weights are on this machine.

    In a distributed run every process must call it. One process of each machine downloads while
    the others wait, and if one fails, all raise. A download appears under its final name only when
    it is complete, so that processes that know nothing of each other may share a cache.

    Args:
        value: the config value: a file, an ``http(s)``/``ftp`` URL, a path of a scheme that
            Detectron2's ``PathManager`` knows, or "" for random weights.
        config_key: the key that holds ``value``, for the messages.

    Returns:
        The local file, or None if ``value`` is "".

    Raises:
        WeightsNotFoundError: the file does not exist, or the URL cannot be downloaded, or its
            content does not have the sha256 that the URL names.
    """
    if not value:
        logger.warning("%s is empty: this model has random weights and knows nothing.", config_key)
        return None
    failure = None
    if comm.get_local_rank() == 0:
        try:
            _fetch(value, config_key)
        except WeightsNotFoundError as error:
            failure = str(error)
    failures = [each for each in comm.all_gather(failure) if each]
    if failures:
        raise WeightsNotFoundError(failures[0])
    return _local_path(value)


def _scheme(value: str) -> str:
    return value.partition("://")[0].lower() if "://" in value else ""


def _local_path(value: str) -> Path:
    """Where the weights are, or will be after a download."""
    if not _scheme(value):
        return Path(value).expanduser()
    if _scheme(value) not in _DOWNLOADED:
        return Path(PathManager.get_local_path(value))
    # Host and folders stay in the path: many models are called "open_clip_pytorch_model.bin".
    url = urllib.parse.urlsplit(value)
    path = cache_dir().joinpath("weights", url.netloc, *filter(None, url.path.split("/")))
    if url.query:
        path = path.with_name(f"{hashlib.sha256(url.query.encode()).hexdigest()[:8]}-{path.name}")
    return path


def _fetch(value: str, config_key: str) -> None:
    if _scheme(value) not in _DOWNLOADED:
        try:
            found = _local_path(value).is_file()
        except Exception as error:  # each handler of PathManager has exceptions of its own
            raise WeightsNotFoundError(
                f"{config_key} names weights that cannot be opened: {value} ({_reason(error)}). "
                f"Set {config_key} to an existing file or to an URL."
            ) from error
        if not found:
            raise WeightsNotFoundError(
                f"{config_key} names a weights file that does not exist: {value}. "
                f"Set {config_key} to an existing file, to an URL, or to '' for random weights."
            )
        return
    path = _local_path(value)
    if path.is_file():
        return
    try:
        _download(value, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise WeightsNotFoundError(
            f"{config_key} names weights that are not on this machine and cannot be downloaded.\n"
            f"  URL:    {value}\n"
            f"  file:   {path}\n"
            f"  reason: {_reason(error)}\n"
            f"Download the URL by hand to that file, or set {config_key} to a file that you have."
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _download(url: str, path: Path) -> None:
    """Downloads beside ``path``, checks length and sha256, and moves the file into place.

    ``torch.hub.download_url_to_file`` would do but for one thing: it takes a connection that closes
    early for the end of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logger.info("Downloading %s to %s", url, path)
    # Registries of weights such as OpenAI's put the file's sha256 in a folder of the URL.
    promised = re.search(r"/([0-9a-f]{64})/", url)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
        part = Path(folder, path.name)
        sha256, received = hashlib.sha256(), 0
        request = urllib.request.Request(url, headers={"User-Agent": "regionspot_d2"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            size = int(length) if length else None
            with (
                open(part, "wb") as file,
                tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while chunk := response.read(_CHUNK_BYTES):
                    file.write(chunk)
                    sha256.update(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
        if size is not None and received != size:
            raise ValueError(f"the connection closed after {received} of {size} bytes")
        if promised and sha256.hexdigest() != promised[1]:
            raise ValueError(f"sha256 is {sha256.hexdigest()}, the URL promises {promised[1]}")
        os.replace(part, path)
