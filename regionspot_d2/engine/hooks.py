"""What happens around the steps of training: seeds, the moving average, the best checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import RegionSpotCheckpointer

logger = logging.getLogger(__name__)

_BEST = "model_best"


class SeedByIteration(HookBase):
    """Makes the random numbers of a step, such as those of dropout, a function of its number.

    A resumed run then draws what an uninterrupted one draws, without saving any random state.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def before_step(self) -> None:
        step = self.trainer.iter * comm.get_world_size() + comm.get_rank()
        torch.manual_seed(self._seed + step)


class Throughput(HookBase):
    """Logs images per second over all processes. It comes after ``IterationTimer``."""

    def __init__(self, images_per_step: int) -> None:
        self._images = images_per_step

    def after_step(self) -> None:
        storage = self.trainer.storage
        # IterationTimer skips the first steps, which warm up.
        if "time" in storage.histories():
            seconds = storage.history("time").latest()
            # Detectron2's console writer prints the scalars marked [metric].
            storage.put_scalar("[metric]images/s", self._images / seconds)


class ModelEMA:
    """An exponential moving average of the parameters that take gradients."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: the model, not wrapped for distributed training.
            decay: the share of the average that each update keeps, in 0..1.
        """
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._names = list(trained)
        # AveragedModel copies the module it gets: it must not get the large frozen encoders.
        self._trained = nn.ParameterList(trained.values())
        self._average = AveragedModel(self._trained, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def start(self) -> None:
        """Copies the parameters, unless the average came from a checkpoint."""
        if self._average.n_averaged == 0:
            self.update()

    def update(self) -> None:
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
        for own, average in zip(self._trained, self._average.parameters()):
            own.data, average.data = average.data, own.data

    def state_dict(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in zip(self._names, self._average.parameters())}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        for name, average in self.state_dict().items():
            average.copy_(state_dict[name])
        self._average.n_averaged.fill_(1)


class BestCheckpoint:
    """Keeps the model with the best evaluation as ``model_best.pth``, across interruptions too.

    Unlike Detectron2's ``BestCheckpointer`` it remembers the best value when a run is resumed, and
    does not make the best checkpoint the one that a run resumes from.
    """

    def __init__(self, checkpointer: RegionSpotCheckpointer, metric: str) -> None:
        """
        Args:
            checkpointer: saves the trained model.
            metric: a name in the results for which more is better: "bbox/AP"; with several test
                datasets "<dataset>/bbox/AP".
        """
        self._checkpointer = checkpointer
        self._metric = metric
        self._best = -math.inf

    def resume(self) -> None:
        """Goes on from the best value of an earlier part of the run."""
        path = os.path.join(self._checkpointer.save_dir, f"{_BEST}.pth")
        if os.path.exists(path):
            self._best = torch.load(path, map_location="cpu").get(self._metric, -math.inf)

    def update(self, results: Mapping[str, Any], iteration: int) -> None:
        """Saves the model if it is the best so far.

        Args:
            results: of the model as it is now, nested as evaluators give them.
            iteration: is saved with the model.
        """
        values = flatten_results_dict(results)
        if self._metric not in values:
            logger.warning(
                f"TEST.BEST_METRIC is '{self._metric}', which the evaluation did not give; it gave "
                f"{', '.join(sorted(values)) or 'nothing'}. No best checkpoint is kept."
            )
        # A NaN compares as not greater, so it is never the best.
        elif values[self._metric] > self._best:
            self._best = values[self._metric]
            self._checkpointer.save_model(_BEST, iteration=iteration, **{self._metric: self._best})
            logger.info(f"{self._metric} {self._best:.2f} is the best so far: saved {_BEST}.pth.")
