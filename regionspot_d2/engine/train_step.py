"""One step of training, on any device and in any precision, that stops at a loss which is no number."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class TrainStep(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, for the CPU too.

    A loss that is NaN or infinite stops every process before the weights change, and leaves the files of the batch in
    ``nonfinite_batch.json``.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        precision: torch.dtype = torch.float32,
        output_dir: str,
    ) -> None:
        """
        Args:
            model: gives a dict of losses in training.
            data_loader: gives batches of Detectron2's dicts.
            optimizer: of the model.
            precision: of autocast: float32 (off), float16 (with a ``GradScaler``) or bfloat16.
            output_dir: folder of ``nonfinite_batch.json``.
        """
        super().__init__(model, data_loader, optimizer)
        self._device = next(model.parameters()).device.type
        self._precision = precision
        self._output_dir = output_dir
        self.grad_scaler = torch.amp.GradScaler(self._device, enabled=precision == torch.float16)

    def run_step(self) -> None:
        """Forward, backward, update."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        autocast = self._precision != torch.float32
        with torch.autocast(self._device, dtype=self._precision, enabled=autocast):
            losses = self.model(batch)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self._record(losses, data_time, batch)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _record(
        self, losses: dict[str, Tensor], data_time: float, batch: list[dict[str, Any]]
    ) -> None:
        values = {name: loss.item() for name, loss in losses.items()}
        storage = get_event_storage()
        own: dict[str, Any] = {"losses": values, "data_time": data_time}
        if not all(map(math.isfinite, values.values())):
            own["images"] = [
                {key: x.get(key) for key in ("dataset_name", "image_id", "file_name")}
                for x in batch
            ]
        everyone = comm.all_gather(own)
        broken = [{"process": i, **each} for i, each in enumerate(everyone) if "images" in each]
        if broken:
            self._stop(broken)
        if not comm.is_main_process():
            return
        # A step waits for the slowest loader.
        storage.put_scalar("data_time", max(each["data_time"] for each in everyone))
        means = {k: sum(each["losses"][k] for each in everyone) / len(everyone) for k in values}
        means = {"total_loss": sum(means.values()), **(means if len(means) > 1 else {})}
        # As they are in the files, so that a resumed run writes the same; the log still shows medians.
        storage.put_scalars(**means, smoothing_hint=False)

    def _stop(self, broken: list[dict[str, Any]]) -> None:
        path = os.path.join(self._output_dir, "nonfinite_batch.json")
        if comm.is_main_process():
            with PathManager.open(path, "w") as file:
                json.dump({"iteration": self.iter, "batches": broken}, file, indent=1)
        raise FloatingPointError(
            f"The loss is not a finite number at iteration {self.iter}: {broken[0]['losses']}. The weights are those "
            f"of the iteration before. The images of the batch are in '{path}', the first is "
            f"'{broken[0]['images'][0]['file_name']}'."
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # Empty from a run in another precision.
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
