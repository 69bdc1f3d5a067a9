"""Region embeddings on disk: arrays and JSON in a safetensors file, of one model, with a checksum.

Such a file holds numbers and text, and opening it runs nothing.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import fingerprint, write_atomically

if TYPE_CHECKING:
    from .modeling.regionspot import RegionSpot

_HEADER, _FORMAT = "regionspot_d2", 1


class VectorFileError(ValueError):
    """A file of vectors is damaged, of another kind, or of another model."""


def model_fingerprint(model: RegionSpot) -> str:
    """Changes with all that region embeddings depend on: both towers, texts, and the head.

    Not with ``MODEL.ZOOM``, since embeddings of different zooms lie in one space.
    """
    parts = [model.localizer, model.vision_language, model.region_head]
    weights = (
        (f"{place}.{name}", values)
        for place, part in enumerate(parts)
        for name, values in [*part.named_parameters(), *part.named_buffers()]
    )
    kinds = [type(part).__name__ for part in parts]
    return fingerprint(weights, *kinds, model.vision_language.fingerprint)


def write_vectors(
    path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Writes a file for :func:`read_vectors`, whole or not at all.

    Args:
        path: of the file.
        kind: what it is, such as "index"; another kind is refused when it is read.
        arrays: by name.
        about: JSON values.
    """
    header = json.dumps({**about, "kind": kind, "format": _FORMAT})
    checksum = fingerprint(sorted(arrays.items()), header)
    with write_atomically(path) as file:
        file.write(save(dict(arrays), {_HEADER: header, "sha256": checksum}))


def read_vectors(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`write_vectors` wrote.

    Returns:
        The arrays, mapped from the file rather than read, and what is known about them.

    Raises:
        VectorFileError: the file is damaged, or of another kind.
        OSError: there is no such file.
    """
    path = Path(path).expanduser()
    if not path.is_file():  # reading a pipe may never end
        raise FileNotFoundError(f"{path}: there is no such file.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        header = metadata[_HEADER]
        about = json.loads(header)
        found, version = about["kind"], about["format"]
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 200)
        raise VectorFileError(f"{path} is no {kind}, or is damaged: {reason}.") from error
    if (found, version) != (kind, _FORMAT):
        raise VectorFileError(
            f"{path} holds {str(found)[:40]!r} of format {str(version)[:10]}; {kind!r} of format "
            f"{_FORMAT} is expected."
        )
    if fingerprint(sorted(arrays.items()), header) != metadata.get("sha256"):
        raise VectorFileError(f"{path} is damaged: its sha256 is wrong. Make it again.")
    return arrays, about


def check_model(path: str | os.PathLike[str], made_by: Any, model: str, made_with: Any) -> None:
    """Raises a VectorFileError if the vectors of a file are those of another model.

    Args:
        path: the file.
        made_by: the :func:`model_fingerprint` in the file.
        model: that of the model at hand.
        made_with: what the file says of its model, for the message.
    """
    if made_by != model:
        with_what = f" ({made_with[:100]})" if made_with and isinstance(made_with, str) else ""
        raise VectorFileError(
            f"{os.fspath(path)} was made with another model{with_what}: its towers or its head "
            "differ. Use that model (--config-file, --opts), or make the file again."
        )
