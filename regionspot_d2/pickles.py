"""Pickles of arrays, read without running what they ask for."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

from detectron2.utils.file_io import PathManager


class UnsafePickleError(ValueError):
    """A pickle asks for more than arrays and plain containers; nothing of it was run."""


class _PlainUnpickler(pickle.Unpickler):
    """Admits only what NumPy needs to rebuild an array; containers and numbers need no class."""

    _ADMITTED = {
        "numpy": ("dtype", "ndarray"),
        "numpy.core.multiarray": ("_reconstruct", "scalar"),
        "numpy.core.numeric": ("_frombuffer",),
        "numpy._core.multiarray": ("_reconstruct", "scalar"),  # of NumPy 2
        "numpy._core.numeric": ("_frombuffer",),
        "_codecs": ("encode",),  # how Python 3 pickles bytes for Python 2,
        "__builtin__": ("bytes",),  # and how it pickles them if there are none
        "collections": ("OrderedDict",),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._ADMITTED.get(module, ()):
            raise UnsafePickleError(
                f"it asks for {module}.{name}; only NumPy arrays and plain containers are admitted"
            )
        return super().find_class(module, name)


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Reads a pickle of NumPy arrays and plain containers, such as Detectron2's proposals.

    Args:
        path: a file, or a path that Detectron2's ``PathManager`` can open.

    Raises:
        UnsafePickleError: it asks for anything else; nothing was run.
        ValueError: it is not a file, not a pickle, or damaged.
    """
    local = PathManager.get_local_path(os.fspath(path))
    if os.path.exists(local) and not os.path.isfile(local):  # reading a pipe may never end
        raise ValueError(f"'{os.fspath(path)}' is not a file.")
    with open(local, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        # latin1: Python 2 wrote the oldest of these files.
        return _PlainUnpickler(content, encoding="latin1").load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"'{os.fspath(path)}' is not safe to open: {error}.") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"'{os.fspath(path)}' is not a pickle, or damaged: {error}") from error
