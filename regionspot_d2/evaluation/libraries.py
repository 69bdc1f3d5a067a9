"""Which code computes AP: hotcoco, or the reference libraries pycocotools and lvis.

hotcoco gives the same digits many times faster. Detectron2's evaluators import ``pycocotools`` and ``lvis`` by name;
the contexts below decide what those names mean, for as long as they are open and no longer.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import hotcoco
import numpy as np
from detectron2.evaluation import coco_evaluation

BACKENDS = ("hotcoco", "reference")

# The modules named "lvis" of each backend: importing them again would make classes that do not know each other.
_LVIS_MODULES: dict[str, dict[str, ModuleType]] = {backend: {} for backend in BACKENDS}


def check_backend(backend: str) -> str:
    """Returns ``backend``.

    Raises:
        ValueError: if there is no backend of this name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"TEST.EVALUATION_BACKEND is '{backend}'; it must be one of {BACKENDS}.")
    return backend


@contextlib.contextmanager
def lvis_library(backend: str) -> Iterator[None]:
    """While open, ``import lvis`` gives hotcoco, or the package ``lvis``.

    Args:
        backend: one of :data:`BACKENDS`.

    Raises:
        ImportError: if the reference library is asked for and is not installed.
    """
    check_backend(backend)
    before = _take_lvis_modules()
    sys.modules.update(_LVIS_MODULES[backend])
    try:
        if backend == "hotcoco":
            hotcoco.init_as_lvis()
            yield
        else:
            _import_reference()
            with _numpy_float():
                yield
    finally:
        _LVIS_MODULES[backend] = _take_lvis_modules()
        sys.modules.update(before)


@contextlib.contextmanager
def coco_library(backend: str) -> Iterator[None]:
    """While open, Detectron2's ``COCOEvaluator`` computes with hotcoco, or with pycocotools.

    Args:
        backend: one of :data:`BACKENDS`.
    """
    if check_backend(backend) == "reference":
        yield
        return
    # COCOEvaluator imported these names when it was imported itself.
    replaced = {"COCO": hotcoco.COCO, "COCOeval": hotcoco.COCOeval}
    before = {name: getattr(coco_evaluation, name) for name in replaced}
    try:
        for name, replacement in replaced.items():
            setattr(coco_evaluation, name, replacement)
        yield
    finally:
        for name, original in before.items():
            setattr(coco_evaluation, name, original)


def _take_lvis_modules() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == "lvis" or name.startswith("lvis.")]
    return {name: sys.modules.pop(name) for name in names}


def _import_reference() -> None:
    try:
        importlib.import_module("lvis")
    except ImportError as error:
        raise ImportError(
            "TEST.EVALUATION_BACKEND: reference computes LVIS AP with the package lvis, which is not installed: "
            "pip install --no-deps lvis==0.5.3. The default, hotcoco, gives the same numbers."
        ) from error


@contextlib.contextmanager
def _numpy_float() -> Iterator[None]:
    """lvis 0.5.3, the last release, still uses a name that NumPy 1.24 removed."""
    if "float" in vars(np):
        yield
        return
    np.float = float  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.float  # type: ignore[attr-defined]
