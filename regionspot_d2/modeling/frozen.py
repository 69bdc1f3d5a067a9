"""Pretrained models that stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn


class FrozenModule(nn.Module):
    """A pretrained part of a larger model: never trained, never saved.

    It stays in eval mode under ``train()``, takes no gradient, and is absent from ``state_dict()``,
    so that a checkpoint of the parent holds only trained parts and loads with ``strict=True``. A
    subclass calls :meth:`freeze` at the end of its ``__init__``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state_prefix = ""
        self.register_load_state_dict_post_hook(_forgive_missing_keys)

    def freeze(self) -> FrozenModule:
        """Stops gradients and switches to eval mode; returns the module itself."""
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrozenModule:
        """Stays in eval mode whatever ``mode`` says."""
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Adds nothing: the weights come from a file of their own."""
        destination = args[0] if args else kwargs.get("destination")
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The hook below is not told where in the parent this module sits.
        self._state_prefix = prefix
        super()._load_from_state_dict(state_dict, prefix, *args)


def _forgive_missing_keys(module: Any, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.startswith(module._state_prefix)]
