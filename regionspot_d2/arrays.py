"""Numbers in any array that people have, checked at the door and made a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Types that PyTorch computes with, and what holds the numbers of those that it can only store.
_STORED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.float64}
_STORED |= {torch.float8_e4m3fn: torch.float32, torch.float8_e5m2: torch.float32}
_COMPUTED = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_COMPUTED |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def as_numbers(values: Any, what: str) -> Tensor:
    """Reads what looks like an array of numbers.

    Args:
        values: a tensor, an array, nested lists, or a list of tensors; of any type of real numbers,
            byte order, strides and device.
        what: what they are, for the message.

    Returns:
        A tensor of a type that PyTorch computes with, on the device of the values, without
        gradient. It may share their memory.

    Raises:
        ValueError: they cannot be read as numbers.
    """
    try:
        first = values[0] if isinstance(values, Sequence) and len(values) else None
        if isinstance(first, Tensor):
            values = torch.stack(list(values))
        elif not isinstance(values, Tensor):
            values = _from_array(values)
        if values.is_nested or values.is_meta or values.layout != torch.strided:
            raise TypeError("a tensor that is sparse, nested or without data was given")
        if values.dtype not in {*_COMPUTED, *_STORED}:
            raise TypeError(f"they have the type {values.dtype}")
        return values.detach().to(_STORED.get(values.dtype, values.dtype))
    except (TypeError, ValueError, RuntimeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")  # in one line
        raise ValueError(f"The {what} cannot be read as numbers: {reason}.") from error


def _from_array(values: Any) -> Tensor:
    if np.ma.is_masked(values):
        raise TypeError("some are masked; fill them first, as in array.filled(0)")
    if _has_range(values):
        raise TypeError("they have the type range; give a list")
    values = np.asarray(values)
    if values.dtype.kind not in "bfiu":
        raise TypeError(f"they have the type {values.dtype}")
    dtype = values.dtype.newbyteorder("=") if values.dtype.itemsize <= 8 else np.float64
    # PyTorch reads no views with negative strides, such as points[:, ::-1].
    return torch.from_numpy(np.require(values, dtype, ["C", "W"]))


def _has_range(values: Any, depth: int = 4) -> bool:
    """Whether lists hold a range: NumPy would write it out, and a few characters mean billions."""
    if isinstance(values, list | tuple) and depth:
        return any(_has_range(value, depth - 1) for value in values)
    return isinstance(values, range)


def check_number(value: Any, name: str, low: float, high: float) -> None:
    """Checks that an argument is a number in ``low``..``high``, not NaN and not True."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and low <= value <= high):
        least = "" if low == -math.inf else f"at least {low:g} and "
        raise ValueError(
            f"{name} is {value!r:.60}; a number of {least}at most {high:g} is expected."
        )


def check_channels(channels: Any, name: str) -> None:
    """Checks an order of color channels; ``name`` is that of the argument, for the message."""
    if not isinstance(channels, str) or channels not in ("RGB", "BGR"):
        raise ValueError(f"{name} is {channels!r:.60}; it must be 'RGB' or 'BGR'.")


def check_limit(limit: int, name: str) -> int:
    """Returns a limit of the config if it is at least 1; ``name`` is its key, for the message."""
    if limit < 1:
        raise ValueError(f"{name} is {limit}; it must be at least 1.")
    return limit
