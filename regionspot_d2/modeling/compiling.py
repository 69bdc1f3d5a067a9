"""``torch.compile`` of a model's repeated layers (MODEL.COMPILE)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


class Compilable:
    """A part of a model that says which of its layers ``torch.compile`` may take."""

    def layers_to_compile(self) -> list[nn.Module]:
        """Layers that run often and are alike, which then share what is compiled; by default none.

        Each must be called as a module, and take and give tensors.
        """
        return []


def compile_layers(parts: Iterable[Compilable], backend: str | Callable[..., Any] = "") -> None:
    """Lets ``torch.compile`` take the layers that some parts name, in place.

    Layers rather than whole encoders: layers of one class and of one shape share a graph, so that
    the first image takes a minute and not ten. Names and weights stay as they are, and a copy of
    the model is not compiled. A size that changes, such as the number of regions, becomes a symbol
    when its second value is seen; numbers of regions that come later need no new graph.

    Args:
        parts: of the model.
        backend: of ``torch.compile``, by default its own.

    Raises:
        ValueError: torch's own backend has no C++ compiler to work with.
    """
    layers = [layer for part in parts for layer in part.layers_to_compile()]
    if not layers:
        logger.warning("MODEL.COMPILE is True, but no part of this model names layers to compile.")
        return
    if not backend:
        _check_compiler()
    for layer in layers:
        layer.compile(backend=backend or "inductor")
    logger.info(f"MODEL.COMPILE: {len(layers)} layers; the first image takes a minute or two.")


def _check_compiler() -> None:
    """Tells at once what would else be a long traceback at the first image."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise ValueError(
            "MODEL.COMPILE is True, but torch.compile finds no C++ compiler: install g++, name "
            "yours in the environment variable CXX, or set MODEL.COMPILE to False."
        ) from error
