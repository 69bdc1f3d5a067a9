"""Files: written whole or not at all, identified by content, found or downloaded once."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import tempfile
import textwrap
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

_DATA_ROOT = "DETECTRON2_DATASETS"
_DOWNLOADED = ("http", "https", "ftp")
# A download that brings fewer bytes than this in a second, for 30 seconds, has stalled.
_LEAST_BYTES_PER_SECOND = 100
_CHUNK_BYTES = 1 << 20
# Parts of a URL that can be names of files as they are.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+:-]{0,99}")


class WeightsNotFoundError(FileNotFoundError):
    """Pretrained weights are neither on disk nor reachable; the message says what to do."""


def cache_dir() -> Path:
    """The folder for everything the project downloads or computes once; it need not exist yet.

    It is the environment variable ``REGIONSPOT_CACHE``, by default ``~/.cache/regionspot_d2``.
    """
    return Path(os.environ.get("REGIONSPOT_CACHE") or "~/.cache/regionspot_d2").expanduser()


def private_folder(folder: Path) -> Path:
    """Makes a folder of the cache that nobody else can change, and returns it.

    Raises:
        PermissionError: others own it or may write to it, or a link on the way leads elsewhere.
        OSError: it cannot be made.
    """
    root = cache_dir() if folder.is_relative_to(cache_dir()) else folder
    inside = folder.relative_to(root)
    if (found := folder.resolve()) != root.resolve() / inside:
        raise PermissionError(
            f"'{folder}' leads to '{found}': links in the cache are not followed. Remove it, or "
            "let REGIONSPOT_CACHE name the folder that you mean."
        )
    for level in reversed([folder, *folder.parents[: len(inside.parts)]]):
        level.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = level.stat()
        if level != root and state.st_uid == os.getuid() and state.st_mode & 0o077:
            level.chmod(0o700)
        elif state.st_uid not in (os.getuid(), 0) or state.st_mode & 0o022:
            raise PermissionError(
                f"Others can change '{level}' (owner {state.st_uid}, mode "
                f"{state.st_mode & 0o777:03o}), and files of the cache are trusted. Run chmod 700 "
                "on it if it is yours, or let REGIONSPOT_CACHE name a folder of your own."
            )
    return folder


def data_root() -> str:
    """The folder of all datasets: ``$DETECTRON2_DATASETS``, or "datasets", as in Detectron2."""
    return os.path.expanduser(os.environ.get(_DATA_ROOT, "datasets"))


def expand_data_root(path: str) -> str:
    """Replaces ``$DETECTRON2_DATASETS`` in a path of a config by :func:`data_root`."""
    return path.replace(f"${_DATA_ROOT}", data_root()).replace(f"${{{_DATA_ROOT}}}", data_root())


@contextmanager
def write_atomically(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a local file that appears under its name only when it is complete.

    Another process sees the old file or the new one, never a part; if writing fails, the old one
    stays. Missing folders are made.

    Args:
        mode: "wb", or "w" for UTF-8 text.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    # Every writer has a name of its own: nobody writes into the file of another.
    descriptor, partial = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".partial", dir=path.parent
    )
    try:
        with open(descriptor, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; give them what open() would.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with PathManager.open(os.fspath(path), "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(tensors: Iterable[tuple[str, Tensor]], *extra: str) -> str:
    """A sha256 of named weights, whatever file they came from and whatever device they are on.

    ``extra`` is what else determines the outputs, such as the kind of activation.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    for text in extra:
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()


def module_fingerprint(module: nn.Module) -> str:
    """The :func:`fingerprint` of all parameters and buffers of a module."""
    return fingerprint([*module.named_parameters(), *module.named_buffers()])


@contextmanager
def explained_weights(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turns the many errors of a damaged or unsuitable file of weights into a ValueError of a line.

    Args:
        path: the file that is read within the ``with`` block.
        what: what it should hold: "a checkpoint", "the weights of SAM vit_b".
    """
    try:
        yield
    except Exception as error:  # torch, pickle, zipfile and safetensors each have their own
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        # torch's own message advises to load it all the same, which would run its code.
        if asked := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            reason = f"it asks for {asked[1]}; only tensors and plain containers are admitted"
        raise ValueError(
            f"'{os.fspath(path)}' does not hold {what}, or is damaged: {reason}"
        ) from error


def local_weights(value: str, config_key: str) -> Path | None:
    """Makes sure that a pretrained model's weights are on this machine.

    In a distributed run every process must call it; see :func:`once_per_machine`.

    Args:
        value: a file, an ``http(s)``/``ftp`` URL, a path that Detectron2's ``PathManager`` can
            open, or "" for random weights.
        config_key: the key that holds ``value``, for the messages.

    Returns:
        The local file, or None if ``value`` is "".

    Raises:
        WeightsNotFoundError: the file does not exist, the URL cannot be downloaded, or its content
            does not have the sha256 that the URL names.
    """
    if not value:
        logger.warning("%s is empty: this model has random weights and knows nothing.", config_key)
        return None
    once_per_machine(lambda: _fetch(value, config_key))
    return _local_path(value)


def once_per_machine(fetch: Callable[[], object]) -> None:
    """Lets one process of each machine fetch something while the others wait.

    Raises:
        WeightsNotFoundError: in all processes of all machines, if one ``fetch`` raised it.
    """
    failure = None
    if comm.get_local_rank() == 0:
        try:
            fetch()
        except WeightsNotFoundError as error:
            failure = str(error)
    if failures := [each for each in comm.all_gather(failure) if each]:
        raise WeightsNotFoundError(failures[0])


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
    host, names = url.netloc, [name for name in url.path.split("/") if name]
    plain = names and len(value) < 500 and all(map(_PLAIN_NAME.fullmatch, [host, *names]))
    if not plain or url.query or url.fragment:
        host = re.sub(r"[^A-Za-z0-9-]", ".", url.hostname or "")[:100].strip(".") or "unknown"
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", names[-1] if names else "")[-80:]
        names = [f"{hashlib.sha256(value.encode()).hexdigest()[:16]}-{name}"]
    return cache_dir().joinpath("weights", host, *names)


def _fetch(value: str, config_key: str) -> None:
    if _scheme(value) not in _DOWNLOADED:
        try:
            found = _local_path(value).is_file()
        except Exception as error:  # each handler of PathManager has exceptions of its own
            raise WeightsNotFoundError(
                f"{config_key} names weights that cannot be opened: {value} ({_reason(error)})."
            ) from error
        if not found:
            raise WeightsNotFoundError(
                f"{config_key} names a weights file that does not exist: {value}. "
                f"Set {config_key} to an existing file, to a URL, or to '' for random weights."
            )
        return
    path = None
    try:
        path = _local_path(value)
        # Made first, so that a file that cannot be downloaded can be put there by hand.
        private_folder(path.parent)
        if path.is_symlink():
            raise PermissionError(f"'{path}' is a link, and links in the cache are not followed")
        if not path.is_file():
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
    """Downloads a file, checking its length and, where the URL names one, its sha256.

    ``torch.hub.download_url_to_file`` takes a connection that closes early for the end of the file.
    """
    logger.info("Downloading %s to %s", url, path)
    patience = float(os.environ.get("REGIONSPOT_DOWNLOAD_TIMEOUT") or 30)
    # Registries of weights such as OpenAI's put the file's sha256 in a folder of the URL.
    promised = re.search(r"/([0-9a-f]{64})/", url)
    digest, received = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "regionspot_d2"})
    with (
        # It follows redirections to these schemes only, never to a file of this machine.
        urllib.request.urlopen(request, timeout=patience) as response,
        write_atomically(path) as file,
    ):
        size = int(response.headers.get("Content-Length") or 0) or None
        since, before = time.monotonic(), 0
        with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
            # read() would wait for a whole chunk, however slowly it comes.
            while chunk := response.read1(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
                if time.monotonic() - since > patience:
                    if received - before < _LEAST_BYTES_PER_SECOND * patience:
                        raise TimeoutError(f"it stalled after {received} bytes")
                    since, before = time.monotonic(), received
        if size and received != size:
            raise ValueError(f"the connection closed after {received} of {size} bytes")
        if promised and digest.hexdigest() != promised[1]:
            raise ValueError(f"sha256 is {digest.hexdigest()}, the URL promises {promised[1]}")


class _Downloads(HTTPURLHandler):
    """Lets Detectron2 download as we do; iopath's own waits forever and leaves its folder."""

    def _get_local_path(
        self, path: str, force: bool = False, cache_dir: str | None = None, **kwargs: Any
    ) -> str:
        _fetch(path, "A path")
        return str(_local_path(path))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        try:
            return bool(self._get_local_path(path))
        except WeightsNotFoundError:
            return False

    _exists = _isfile


PathManager.register_handler(_Downloads(), allow_override=True)
