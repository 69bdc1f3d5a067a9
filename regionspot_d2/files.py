"""Files: written whole or not at all, identified by content, found or downloaded once."""

from __future__ import annotations

import hashlib
import http.client
import io
import logging
import os
import pickle
import re
import tempfile
import textwrap
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

_DATA_ROOT = "DETECTRON2_DATASETS"
_DOWNLOADED = ("http", "https", "ftp")
_TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 20


class WeightsNotFoundError(FileNotFoundError):
    """Pretrained weights are neither on disk nor reachable; the message says what to do."""


class UnsafePickleError(ValueError):
    """A pickle asks for more than arrays and plain containers; nothing of it was run."""


def cache_dir() -> Path:
    """The folder for everything the project downloads or computes once.

    Returns:
        The environment variable ``REGIONSPOT_CACHE``, by default ``~/.cache/regionspot_d2``. It need not exist yet.
    """
    return Path(os.environ.get("REGIONSPOT_CACHE") or "~/.cache/regionspot_d2").expanduser()


def data_root() -> str:
    """The folder of all datasets: ``DETECTRON2_DATASETS``, by default ``datasets``, as in Detectron2."""
    return os.path.expanduser(os.environ.get(_DATA_ROOT, "datasets"))


def expand_data_root(path: str) -> str:
    """Replaces ``$DETECTRON2_DATASETS`` in a path of a config by :func:`data_root`."""
    return path.replace(f"${_DATA_ROOT}", data_root()).replace(f"${{{_DATA_ROOT}}}", data_root())


@contextmanager
def write_atomically(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a local file that appears under its name only when it is complete.

    Another process sees the old file or the new one, never a part. If writing fails, what was there before stays.

    Args:
        path: the file; missing folders are made.
        mode: "wb", or "w" for UTF-8 text.

    Yields:
        The file to write to.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    # A name of its own for every writer: nobody writes what another one is writing.
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
    """Identifies weights by content, whatever file they came from and whatever device they are on.

    Args:
        tensors: names and values.
        extra: what else decides over the outputs, such as the kind of activation.

    Returns:
        A sha256 in hexadecimal digits.
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


class _PlainUnpickler(pickle.Unpickler):
    """Admits what NumPy needs to rebuild an array, and nothing else. Containers and numbers need no class."""

    _ADMITTED = {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *(
            (f"numpy.{core}.multiarray", name)
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
        ("_codecs", "encode"),  # how Python 3 pickles bytes for Python 2,
        ("__builtin__", "bytes"),  # and how it pickles them if there are none
        ("collections", "OrderedDict"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ADMITTED:
            raise UnsafePickleError(
                f"it asks for {module}.{name}; only NumPy arrays and plain containers are admitted"
            )
        return super().find_class(module, name)


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Reads a pickle of NumPy arrays and plain containers, such as Detectron2's weights and proposals.

    Args:
        path: a file, or a path of a scheme that Detectron2's ``PathManager`` knows.

    Returns:
        The content.

    Raises:
        UnsafePickleError: it asks for anything else; nothing was run.
        ValueError: it is not a pickle, or damaged.
    """
    with PathManager.open(os.fspath(path), "rb") as file:
        content = io.BytesIO(file.read())
    try:
        # latin1: Python 2 wrote the oldest of these files.
        return _PlainUnpickler(content, encoding="latin1").load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"'{os.fspath(path)}' is not safe to open: {error}.") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"'{os.fspath(path)}' is not a pickle, or damaged: {error}") from error


@contextmanager
def explained_weights(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turns the many errors of a damaged or unsuitable file of weights into one kind, one line.

    Args:
        path: the file that is read within the ``with`` block.
        what: what it should hold: "a checkpoint", "the weights of SAM vit_b".

    Raises:
        ValueError: in place of any other error.
    """
    try:
        yield
    except Exception as error:  # torch, pickle, zipfile and safetensors each have their own
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        raise ValueError(
            f"'{os.fspath(path)}' does not hold {what}, or is damaged: {reason}"
        ) from error


def local_weights(value: str, config_key: str) -> Path | None:
    """Makes sure that a pretrained model's weights are on this machine.

    In a distributed run every process must call it. One process of each machine downloads while the others wait, and
    if one fails, all raise.

    Args:
        value: the config value: a file, an ``http(s)``/``ftp`` URL, a path of a scheme that Detectron2's
            ``PathManager`` knows, or "" for random weights.
        config_key: the key that holds ``value``, for the messages.

    Returns:
        The local file, or None if ``value`` is "".

    Raises:
        WeightsNotFoundError: the file does not exist, or the URL cannot be downloaded, or its content does not have
            the sha256 that the URL names.
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
                f"Set {config_key} to an existing file or to a URL."
            ) from error
        if not found:
            raise WeightsNotFoundError(
                f"{config_key} names a weights file that does not exist: {value}. "
                f"Set {config_key} to an existing file, to a URL, or to '' for random weights."
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
    """Downloads a file, checking its length and, where the URL names one, its sha256.

    ``torch.hub.download_url_to_file`` takes a connection that closes early for the end of the file.
    """
    logger.info("Downloading %s to %s", url, path)
    # Made first, so that a file that cannot be downloaded can be put there by hand.
    path.parent.mkdir(parents=True, exist_ok=True)
    # Registries of weights such as OpenAI's put the file's sha256 in a folder of the URL.
    promised = re.search(r"/([0-9a-f]{64})/", url)
    digest, received = hashlib.sha256(), 0
    request = urllib.request.Request(url, headers={"User-Agent": "regionspot_d2"})
    with (
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response,
        write_atomically(path) as file,
    ):
        length = response.headers.get("Content-Length")
        size = int(length) if length else None
        with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
        if size is not None and received != size:
            raise ValueError(f"the connection closed after {received} of {size} bytes")
        if promised and digest.hexdigest() != promised[1]:
            raise ValueError(f"sha256 is {digest.hexdigest()}, the URL promises {promised[1]}")
