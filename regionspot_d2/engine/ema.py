"""An exponential moving average of the trained parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ModelEMA:
    """Follows the parameters of a model that take gradients; frozen ones are not copied.

    Attributes:
        loaded: whether the average came from a checkpoint.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the model, not wrapped for distributed training.
            decay: share of the average that each update keeps, in 0..1.
        """
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._update = get_ema_multi_avg_fn(decay)
        self.loaded = False
        self.restart()

    def restart(self) -> None:
        """Starts again from the parameters as they are."""
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    def update(self) -> None:
        """Moves the average towards the parameters."""
        self._update(list(self._averages.values()), list(self._parameters.values()), None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the average for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(own)

    def state_dict(self) -> dict[str, Tensor]:
        return self._averages

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        for name, average in self._averages.items():
            average.copy_(state_dict[name])
        self.loaded = True


class EMAHook(HookBase):
    """Updates a :class:`ModelEMA` after each step; it starts from a checkpoint's, or from the model's weights."""

    def __init__(self, ema: ModelEMA) -> None:
        """
        Args:
            ema: the average, of the trainer's model.
        """
        self._ema = ema

    def before_train(self) -> None:
        if not self._ema.loaded:
            self._ema.restart()

    def after_step(self) -> None:
        self._ema.update()
