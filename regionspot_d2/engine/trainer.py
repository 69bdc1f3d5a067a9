"""The trainer: Detectron2's, with RegionSpot's loaders, optimizer, step and hooks."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import GradientClipType, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoint import RegionSpotCheckpointer
from ..data.build import build_test_loader, build_train_loader, open_token_caches, start_at
from ..data.published_tokens import has_tokens
from ..data.token_extraction import extract_tokens
from ..evaluation import build_evaluator, write_report
from ..files import write_atomically
from .config import ConfigError
from .hooks import BestCheckpoint, ModelEMA, SeedByIteration, Throughput

logger = logging.getLogger(__name__)

# Extracting tokens of more images is a job of its own, too long for the other processes to wait.
MAX_IMAGES_EXTRACTED = 10_000
_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_CLIP_FULL_MODEL = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """Builds AdamW over the parameters that take gradients, with the settings in ``cfg.SOLVER``.

    Beside Detectron2's kinds of clipping, "value" and "norm" of one parameter at a time, there is
    the paper's "full_model": the norm over all parameters together is limited to ``CLIP_VALUE``.

    Raises:
        ValueError: the model has nothing to train, or the kind of clipping is unknown.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if not groups:
        raise ValueError(
            f"MODEL.REGION_HEAD.NAME: {cfg.MODEL.REGION_HEAD.NAME} leaves nothing to train; "
            "RegionSpotHead is the trained head. (--eval-only evaluates a model as it is.)"
        )
    optimizer = torch.optim.AdamW(groups, lr=solver.BASE_LR)
    kinds = [_CLIP_FULL_MODEL, *(kind.value for kind in GradientClipType)]
    if clip.ENABLED and clip.CLIP_TYPE not in kinds:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is '{clip.CLIP_TYPE}'; "
            f"it must be one of {', '.join(kinds)}."
        )
    if not clip.ENABLED or clip.CLIP_TYPE != _CLIP_FULL_MODEL:
        return maybe_add_gradient_clipping(cfg, optimizer)

    def clip_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)

    # Before each step, so it sees gradients from which a GradScaler has taken its scale.
    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer


class RegionSpotTrainer(DefaultTrainer):
    """Trains the region head, on GPUs or the CPU, in one process or many.

    A run that is stopped at any moment and resumed continues as if it had never stopped: the order
    of the images and the random numbers of a step depend only on ``SEED`` and the iteration.
    """

    build_optimizer = staticmethod(build_optimizer)
    build_train_loader = staticmethod(build_train_loader)
    build_test_loader = staticmethod(build_test_loader)
    build_evaluator = staticmethod(build_evaluator)

    def __init__(self, cfg: CfgNode) -> None:
        """
        Raises:
            ValueError: a value of ``cfg`` does not fit, or the model has nothing to train.
        """
        # Not DefaultTrainer's constructor: between building the loader and the checkpointer, with
        # no method to override, it wraps the model for GPUs (DistributedDataParallel refuses its
        # device_ids on the CPU) and picks a step that requires CUDA for half precision.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        if cfg.INPUT.TOKEN_CACHE:
            _check_cached_image_size(cfg, model.vision_language.image_size)
            _complete_token_caches(cfg, model.localizer)
        self.ema = ModelEMA(model, cfg.MODEL.EMA.DECAY) if cfg.MODEL.EMA.ENABLED else None
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        device = {"device_ids": None} if on_cpu else {}
        wrapped = create_ddp_model(model, broadcast_buffers=False, **device)
        self._trainer = TrainStep(cfg, wrapped, self.build_train_loader(cfg), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        averages = {} if self.ema is None else {"ema": self.ema}
        self.checkpointer = RegionSpotCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **averages
        )
        test = cfg.TEST
        # Only the main process has the results of an evaluation.
        keeps_best = test.EVAL_PERIOD > 0 and test.BEST_METRIC and comm.is_main_process()
        self._best = BestCheckpoint(self.checkpointer, test.BEST_METRIC) if keeps_best else None
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes from the last checkpoint in ``OUTPUT_DIR``, or starts from ``MODEL.WEIGHTS``."""
        super().resume_or_load(resume=resume)
        start_at(self.data_loader, self.start_iter)
        if self._best is not None and self.start_iter > 0:
            self._best.resume()

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, with ours between them."""
        cfg, ema = self.cfg, self.ema
        built = [hooks.IterationTimer(), Throughput(cfg.SOLVER.IMS_PER_BATCH), hooks.LRScheduler()]
        if cfg.SEED >= 0:
            built.append(SeedByIteration(cfg.SEED))
        if ema is not None:
            follow = {"before_train": lambda _: ema.start(), "after_step": lambda _: ema.update()}
            built.append(hooks.CallbackHook(**follow))
        if comm.is_main_process():
            period = cfg.SOLVER.CHECKPOINT_PERIOD
            built.append(hooks.PeriodicCheckpointer(self.checkpointer, period))
        # After the checkpoint: if the evaluation fails, the weights are there to find out why.
        built.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate))
        if comm.is_main_process():
            built.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return built

    def _evaluate(self) -> Mapping[str, Any]:
        with contextlib.nullcontext() if self.ema is None else self.ema.applied():
            self._last_eval_results = self.test(self.cfg, self.model)
            if self._last_eval_results and self._best is not None:
                self._best.update(self._last_eval_results, self.iter)
        return self._last_eval_results

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> Mapping[str, Any]:
        """Evaluates a model on ``DATASETS.TEST`` and writes the table of results to ``OUTPUT_DIR``.

        Args:
            evaluators: one for each dataset; by default those of :meth:`build_evaluator`.

        Returns:
            Results by dataset, or those of the only dataset. Empty without datasets, and in all
            processes but the main one.
        """
        results = super().test(cfg, model, evaluators)
        if results and comm.is_main_process():
            write_report(cfg, results)
        return results

    @classmethod
    def evaluate_checkpoint(cls, cfg: CfgNode, *, resume: bool = False) -> Mapping[str, Any]:
        """Builds the model, loads its weights and tests it, as :meth:`test` does.

        Args:
            cfg: with ``MODEL.EMA.ENABLED`` the average is taken from a checkpoint that has one.
            resume: prefers the last checkpoint in ``OUTPUT_DIR`` to ``MODEL.WEIGHTS``.
        """
        model = cls.build_model(cfg)
        checkpointer = RegionSpotCheckpointer(model, cfg.OUTPUT_DIR)
        content = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        if not cfg.MODEL.EMA.ENABLED or "ema" not in content:
            return cls.test(cfg, model)
        ema = ModelEMA(model, cfg.MODEL.EMA.DECAY)
        ema.load_state_dict(content["ema"])
        with ema.applied():
            return cls.test(cfg, model)


class TrainStep(AMPTrainer):
    """Detectron2's ``AMPTrainer`` for any device and precision, float32 and the CPU included.

    A loss that is NaN or infinite stops every process before the weights change, and leaves the
    file names of the batch in ``nonfinite_batch.json`` in ``OUTPUT_DIR``.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, loader: DataLoader, optimizer: torch.optim.Optimizer
    ) -> None:
        amp = cfg.SOLVER.AMP
        if amp.ENABLED and amp.DTYPE not in _PRECISIONS:
            raise ValueError(
                f"SOLVER.AMP.DTYPE is '{amp.DTYPE}'; it must be one of {', '.join(_PRECISIONS)}."
            )
        precision = _PRECISIONS[amp.DTYPE] if amp.ENABLED else torch.float32
        device = torch.device(cfg.MODEL.DEVICE).type
        # Only float16 has so few exponents that small gradients need scaling.
        scaler = torch.amp.GradScaler(device, enabled=precision == torch.float16)
        super().__init__(model, loader, optimizer, grad_scaler=scaler, precision=precision)
        self._autocast = torch.autocast(device, precision, enabled=amp.ENABLED)
        self._output_dir = cfg.OUTPUT_DIR

    def run_step(self) -> None:
        """``AMPTrainer``'s step, which itself insists on CUDA."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with self._autocast:
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
        own: dict[str, Any] = {"losses": values, "data_time": data_time}
        if not all(map(math.isfinite, values.values())):
            keys = ("dataset_name", "image_id", "file_name")
            own["images"] = [{key: x.get(key) for key in keys} for x in batch]
        # Every process learns of a bad loss in any of them, so all stop and none waits forever.
        everyone = comm.all_gather(own)
        broken = [{"process": i, **each} for i, each in enumerate(everyone) if "images" in each]
        if broken:
            self._stop(broken)
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        # A step waits for the slowest loader.
        storage.put_scalar("data_time", max(each["data_time"] for each in everyone))
        means = {k: sum(each["losses"][k] for each in everyone) / len(everyone) for k in values}
        means = {"total_loss": sum(means.values()), **(means if len(means) > 1 else {})}
        # Unsmoothed in the files, so that a resumed run writes the same numbers.
        storage.put_scalars(**means, smoothing_hint=False)

    def _stop(self, broken: list[dict[str, Any]]) -> None:
        path = os.path.join(self._output_dir, "nonfinite_batch.json")
        if comm.is_main_process():
            with write_atomically(path, "w") as file:
                json.dump({"iteration": self.iter, "batches": broken}, file, indent=1)
        raise FloatingPointError(
            f"The loss is not a finite number at iteration {self.iter}: {broken[0]['losses']}. "
            "The weights are those of the iteration before. The images of the batch are listed in "
            f"'{path}'; the first is '{broken[0]['images'][0]['file_name']}'."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The scaler of a run in another precision is empty, which torch refuses to load.
        scaler = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": scaler})


def _check_cached_image_size(cfg: CfgNode, image_size: tuple[int, int]) -> None:
    """An image resized twice is not the image that the model sees at test time."""
    side, model = cfg.INPUT.CACHED_IMAGE_SIZE, cfg.MODEL.VISION_LANGUAGE
    if side and tuple(image_size) != (side, side):
        height, width = image_size
        raise ConfigError(
            f"INPUT.CACHED_IMAGE_SIZE is {side}, but {model.NAME} {model.ARCH} takes images of "
            f"{height} x {width}: set it to {max(height, width)}, or to 0 to keep the image size."
        )


def _complete_token_caches(cfg: CfgNode, localizer: nn.Module) -> None:
    """Extracts the tokens that small datasets lack, and checks that all are of this localizer."""
    for name in cfg.DATASETS.TRAIN:
        if has_tokens(cfg.INPUT.TOKEN_CACHE, name):
            continue
        images = len(DatasetCatalog.get(name))
        if images > MAX_IMAGES_EXTRACTED:
            raise ConfigError(
                f"INPUT.TOKEN_CACHE, '{cfg.INPUT.TOKEN_CACHE}', has no tokens of the {images} "
                f"images of '{name}'. tools/extract_tokens.py with the same config file extracts "
                "them; an empty INPUT.TOKEN_CACHE runs the localizer in each step instead."
            )
        logger.info(f"INPUT.TOKEN_CACHE has no tokens of '{name}' yet: extracting them.")
        extract_tokens(cfg, localizer, name, cfg.INPUT.TOKEN_CACHE)
    open_token_caches(cfg, localizer)
