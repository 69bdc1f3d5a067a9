"""Pretrained models that are used, never trained and never saved."""

from __future__ import annotations

from typing import Any

from torch import nn


class FrozenModule(nn.Module):
    """A pretrained part of a larger model.

    It stays in eval mode under ``train()``, its parameters take no gradient, and it is absent from ``state_dict()``:
    a checkpoint of the parent holds the trained parts alone, and loads with ``strict=True``. A subclass calls
    :meth:`freeze` at the end of its ``__init__``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state_prefix = ""
        self.register_load_state_dict_post_hook(_forgive_missing_keys)

    def freeze(self) -> FrozenModule:
        """Stops gradients and switches to eval mode.

        Returns:
            The module itself, as Detectron2's ``CNNBlockBase.freeze`` does.
        """
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> FrozenModule:
        """Stays in eval mode whatever ``mode`` says."""
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Adds nothing: the weights come from their own file, named by the config."""
        destination = args[0] if args else kwargs.get("destination")
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The hook below is not told where in the parent this module sits.
        self._state_prefix = prefix
        super()._load_from_state_dict(state_dict, prefix, *args)


def _forgive_missing_keys(module: FrozenModule, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if not key.startswith(module._state_prefix)]
