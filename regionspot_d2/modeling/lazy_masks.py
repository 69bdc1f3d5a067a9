"""Masks of many results: held where they are few, made when they are read where they are many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# From places of regions (K,) and a size (H, W) to their masks, (K, H, W) bool.
MaskReader: TypeAlias = Callable[[Tensor, tuple[int, int]], Tensor]

# What an image's masks may take before they are made one by one: 870 of 640 x 480 pixels.
MAX_MASK_BYTES = 2**28
# Masks made together when they are read one after another, and their pixels.
_CHUNK, _CHUNK_PIXELS = 16, 2**26


def shared_masks(read: MaskReader, regions: Tensor, size: tuple[int, int]) -> Tensor:
    """The masks of N results, some of them of the same region.

    Args:
        read: finds the masks of regions, by their places.
        regions: (N,), the region of each result.
        size: (H, W) of the masks.

    Returns:
        (N, H, W), bool: an ordinary tensor, or :class:`LazyMasks` where it would take more than
        ``MAX_MASK_BYTES``.
    """
    rows, places = regions.unique(return_inverse=True)
    pixels = size[0] * size[1]
    if len(regions) * pixels <= MAX_MASK_BYTES:
        held = read(rows, size)
        # Most often each region has one name, in the order of the regions: nothing to copy.
        return held if torch.equal(rows, regions) else held[places]
    if len(rows) * pixels > MAX_MASK_BYTES:
        return LazyMasks(lambda some: read(some, size), regions, size, regions.device)
    held = read(rows, size)
    return LazyMasks(held.__getitem__, places, size, regions.device)


def nearest_masks(read: MaskReader, made: tuple[int, int]) -> MaskReader:
    """Reads masks in the published way: made at one size, scaled to another by the nearest pixel.

    Args:
        read: finds the masks of regions at any size.
        made: (H, W) at which it is asked for them.

    Returns:
        A reader that gives each pixel that of ``made`` in which its upper left corner lies.
    """

    def nearest(regions: Tensor, size: tuple[int, int]) -> Tensor:
        # In whole numbers: as floats, y * h / H may fall below the row that it is.
        rows, columns = (torch.arange(n) * m // n for n, m in zip(size, made))
        parts = [read(part, made)[:, rows[:, None], columns] for part in regions.split(_CHUNK)]
        return torch.cat(parts)

    return nearest


class LazyMasks(Tensor):
    """Masks (N, H, W), bool, which are made when they are read.

    Iterating makes a few at a time. ``[...]`` along the first dimension and ``to`` another device
    make none or one. Everything else that a tensor can do makes all of them, and gives an ordinary
    tensor. They cannot be changed in place.
    """

    _read: Callable[[Tensor], Tensor]
    _places: Tensor

    # As PyTorch's own wrappers: results are what __torch_dispatch__ gives, not of this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[LazyMasks],
        read: Callable[[Tensor], Tensor],
        places: Tensor,
        size: Sequence[int],
        device: torch.device,
    ) -> LazyMasks:
        """
        Args:
            read: from places (K,) to masks (K, H, W).
            places: (N,), what ``read`` is asked for.
            size: (H, W).
            device: where the masks are wanted.
        """
        self = Tensor._make_wrapper_subclass(
            cls, (len(places), *size), dtype=torch.bool, device=device
        )
        self._read, self._places = read, places
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            raise TypeError("These masks are made when they are read; change a clone() of them.")
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs or {}))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("These masks are made when they are read; change a clone() of them.")

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, int | np.integer):
            return self._read(self._places[index][None])[0].to(self.device)
        one_dimensional = isinstance(index, Tensor | np.ndarray) and index.ndim == 1
        if isinstance(index, slice | list) or one_dimensional:
            if isinstance(index, Tensor):
                index = index.to(self._places.device)
            return LazyMasks(self._read, self._places[index], self.shape[1:], self.device)
        return _whole(self)[index]

    def __iter__(self) -> Iterator[Tensor]:
        height, width = self.shape[1:]
        chunk = max(1, min(_CHUNK, _CHUNK_PIXELS // (height * width)))
        for places in self._places.split(chunk):
            yield from self._read(places).to(self.device)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        like = torch.empty(0, dtype=torch.bool, device=self.device).to(*args, **kwargs)
        if like.dtype != torch.bool:
            return _whole(self).to(*args, **kwargs)
        return LazyMasks(self._read, self._places, self.shape[1:], like.device)

    def cpu(self, *args: Any) -> Tensor:
        return self.to("cpu")

    def numpy(self, **kwargs: Any) -> np.ndarray:
        return _whole(self).numpy(**kwargs)

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return _whole(self).__array__(dtype)

    def tolist(self) -> Any:
        return _whole(self).tolist()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"LazyMasks(shape={tuple(self.shape)}, device={self.device})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return _whole(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _whole(self).__reduce_ex__(protocol)


def _whole(value: Any) -> Any:
    """An ordinary tensor of lazy masks; anything else as it is."""
    if not isinstance(value, LazyMasks):
        return value
    masks = torch.empty(value.shape, dtype=torch.bool, device=value.device)
    for held, mask in zip(masks, value):
        held.copy_(mask)
    return masks
