"""What happens between the steps of training."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..checkpoint import RegionSpotCheckpointer

logger = logging.getLogger(__name__)

_BEST = "model_best"


class SeedByIteration(HookBase):
    """Makes the random numbers of a step, those of dropout, a function of its number.

    A resumed run then draws the same as one that was never stopped, with nothing to save.
    """

    def __init__(self, seed: int) -> None:
        """
        Args:
            seed: of the run.
        """
        self._seed = seed

    def before_step(self) -> None:
        step = self.trainer.iter * comm.get_world_size() + comm.get_rank()
        torch.manual_seed(self._seed + step)


class Throughput(HookBase):
    """Logs images per second, over all processes. It comes after ``IterationTimer``."""

    def __init__(self, images_per_step: int) -> None:
        """
        Args:
            images_per_step: over all processes.
        """
        self._images = images_per_step

    def after_step(self) -> None:
        storage = self.trainer.storage
        # The first steps are not timed.
        if "time" in storage.histories():
            seconds = storage.history("time").latest()
            # Detectron2 prints what has this mark.
            storage.put_scalar("[metric]images/s", self._images / seconds)


class BestCheckpoint(HookBase):
    """Keeps the model with the best evaluation as ``model_best.pth``, over interruptions too.

    It comes after ``EvalHook``, in the main process. Unlike Detectron2's hook it does not make the best checkpoint the
    last: a resumed run goes on from the last one.
    """

    def __init__(
        self,
        period: int,
        checkpointer: RegionSpotCheckpointer,
        metric: str,
        weights: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """
        Args:
            period: iterations between evaluations.
            checkpointer: of the trained model.
            metric: a name in the results, more is better: "bbox/AP", with several test sets
                "<dataset>/bbox/AP".
            weights: gives the model the weights that are evaluated.
        """
        self._period = period
        self._checkpointer = checkpointer
        self._metric = metric
        self._weights = weights
        self._best = -math.inf

    def before_train(self) -> None:
        path = os.path.join(self._checkpointer.save_dir, f"{_BEST}.pth")
        if self.trainer.start_iter > 0 and os.path.exists(path):
            self._best = torch.load(path, map_location="cpu").get(self._metric, -math.inf)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % self._period == 0 and done != self.trainer.max_iter:
            self._compare()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._compare()

    def _compare(self) -> None:
        latest = self.trainer.storage.latest()
        if self._metric not in latest:
            names = [name for name in latest if "/" in name and not name.startswith("[")]
            logger.warning(
                f"TEST.BEST_METRIC is '{self._metric}', which the evaluation did not give; it gave "
                f"{', '.join(sorted(names)) or 'nothing'}. No best checkpoint is kept."
            )
            return
        value, iteration = latest[self._metric]
        # NaN is not better.
        if not value > self._best:
            return
        self._best = value
        with self._weights():
            self._checkpointer.save_model(_BEST, iteration=iteration, **{self._metric: value})
        logger.info(f"{self._metric} {value:.2f} is the best so far: saved {_BEST}.pth.")
