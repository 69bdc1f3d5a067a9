"""What a training run keeps beside its model: the moving average and the best checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.evaluation.testing import flatten_results_dict
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import RegionSpotCheckpointer
from ..files import explained_weights

logger = logging.getLogger(__name__)


class ModelEMA:
    """An exponential moving average of the parameters that take gradients.

    Each update keeps the share ``decay`` of the average. It can follow a model as two callbacks.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._names = list(trained)
        # AveragedModel copies the module it gets, so it must not get the large frozen encoders.
        self._trained = nn.ParameterList(trained.values())
        self._average = AveragedModel(self._trained, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def start(self, *_: object) -> None:
        """Copies the parameters, unless the average came from a checkpoint."""
        if self._average.n_averaged == 0:
            self.update()

    def update(self, *_: object) -> None:
        """Moves the average towards the parameters."""
        self._average.update_parameters(self._trained)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the averaged parameters within a ``with`` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        # Swapping the tensors inside the parameters needs no third copy of the weights.
        for own, average in zip(self._trained, self._average.parameters()):
            own.data, average.data = average.data, own.data

    def state_dict(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in zip(self._names, self._average.parameters())}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        for name, average in self.state_dict().items():
            average.copy_(state_dict[name])
        self._average.n_averaged.fill_(1)


class BestCheckpoint:
    """Keeps the model with the best evaluation as ``model_best.pth``.

    Unlike Detectron2's ``BestCheckpointer`` it remembers the best value when a run is resumed, and
    a run never resumes from the best checkpoint. ``metric`` is a name in the results for which more
    is better: "bbox/AP", or with several test datasets "<dataset>/bbox/AP".
    """

    def __init__(self, checkpointer: RegionSpotCheckpointer, metric: str) -> None:
        self._checkpointer = checkpointer
        self._path = os.path.join(checkpointer.save_dir, "model_best.pth")
        self._metric = metric
        self._best = -math.inf

    def resume(self) -> None:
        """Continues from the best value of an earlier part of the run."""
        if os.path.exists(self._path):
            with explained_weights(self._path, "the best checkpoint"):
                content = torch.load(self._path, map_location="cpu", weights_only=True)
                self._best = content.get(self._metric, -math.inf)

    def update(self, results: Mapping[str, Any], iteration: int) -> None:
        """Saves the model, with the iteration, if the results of it are the best so far."""
        values = flatten_results_dict(results)
        if self._metric not in values:
            logger.warning(
                f"TEST.BEST_METRIC is '{self._metric}', but the evaluation gave "
                f"{', '.join(sorted(values)) or 'nothing'}. No best checkpoint is kept."
            )
        # A NaN compares as not greater, so it is never the best.
        elif values[self._metric] > self._best:
            best = self._best = values[self._metric]
            self._checkpointer.save_model("model_best", iteration=iteration, **{self._metric: best})
            logger.info(f"{self._metric} {best:.2f} is the best so far: saved {self._path}.")
