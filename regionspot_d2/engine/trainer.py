"""The trainer: Detectron2's, with RegionSpot's loaders, optimizer, step and hooks."""

from __future__ import annotations

import contextlib
import itertools
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
from detectron2.engine import AMPTrainer, DefaultTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import GradientClipType, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from ..checkpoint import RegionSpotCheckpointer, region_heads
from ..data.build import build_test_loader, build_train_loader, open_token_caches, start_at
from ..data.datasets.trained_on import trained_on, warn_of_known_photos
from ..data.published_tokens import has_tokens
from ..data.token_extraction import extract_tokens
from ..evaluation import build_evaluator, check_evaluation, write_report
from ..files import write_atomically
from ..modeling import RegionSpot
from .config import ConfigError
from .hooks import BestCheckpoint, ModelEMA

logger = logging.getLogger(__name__)

# Extracting tokens of more images is a job of its own, too long for the other processes to wait.
MAX_IMAGES_EXTRACTED = 10_000
_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> AdamW:
    """AdamW over the parameters that take gradients, with the settings in ``cfg.SOLVER``.

    ``CLIP_GRADIENTS.CLIP_TYPE`` is one of Detectron2's ("value" and "norm", of each parameter), or
    the paper's "full_model", which limits the norm over all parameters together.

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
    optimizer = AdamW(groups, lr=solver.BASE_LR)
    kinds = ["full_model", *(kind.value for kind in GradientClipType)]
    if clip.ENABLED and clip.CLIP_TYPE not in kinds:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is '{clip.CLIP_TYPE}', not one of {', '.join(kinds)}."
        )
    if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, optimizer)

    def clip_gradients(optimizer: Optimizer, *_: object) -> None:
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
        # Not DefaultTrainer's constructor: it passes device_ids to DistributedDataParallel, which
        # refuses them on the CPU, and picks a step that requires CUDA for half precision.
        TrainerBase.__init__(self)
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        for name in cfg.DATASETS.TEST:
            check_evaluation(cfg, name)  # not first after hours of training
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        if cfg.INPUT.TOKEN_CACHE:
            _prepare_token_caches(cfg, model)
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
        self._trainer = TrainStep(cfg, wrapped, self.build_train_loader(cfg), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.ema = ModelEMA(model, cfg.MODEL.EMA.DECAY) if cfg.MODEL.EMA.ENABLED else None
        states = {"trainer": weakref.proxy(self), **({"ema": self.ema} if self.ema else {})}
        self.checkpointer = RegionSpotCheckpointer(model, cfg.OUTPUT_DIR, **states)
        self._best = BestCheckpoint(self.checkpointer, cfg.TEST.BEST_METRIC)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes from the last checkpoint in ``OUTPUT_DIR``, or starts from ``MODEL.WEIGHTS``."""
        super().resume_or_load(resume=resume)
        start_at(self.data_loader, self.start_iter)
        for head in region_heads(self.model):
            head.trained_on = trained_on(self.cfg.DATASETS.TRAIN, head.trained_on)
        if self.start_iter > 0 and comm.is_main_process():
            self._best.resume()

    def build_hooks(self) -> list[hooks.HookBase]:
        """Detectron2's hooks, with the moving average and with our evaluation in place of its."""
        evaluation = hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        built = [evaluation if isinstance(h, hooks.EvalHook) else h for h in super().build_hooks()]
        if self.ema is not None:
            # Before the checkpoint, which holds the average of the same step.
            follow = hooks.CallbackHook(before_train=self.ema.start, after_step=self.ema.update)
            built.insert(1, follow)
        return built

    def _evaluate(self) -> Mapping[str, Any]:
        with contextlib.nullcontext() if self.ema is None else self.ema.applied():
            results = self._last_eval_results = self.test(self.cfg, self.model)
            # Only the main process has results.
            if results and self.cfg.TEST.EVAL_PERIOD > 0 and self.cfg.TEST.BEST_METRIC:
                self._best.update(results, self.iter)
        return results

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Mapping[str, Any]:
        """Evaluates a model on ``DATASETS.TEST`` and writes the table of results to ``OUTPUT_DIR``.

        Returns:
            Results by dataset, or those of the only dataset; empty except in the main process.
        """
        if comm.is_main_process():
            for head, name in itertools.product(region_heads(model), cfg.DATASETS.TEST):
                warn_of_known_photos(head.trained_on, name)
        results = super().test(cfg, model, evaluators)
        if results and comm.is_main_process():
            write_report(cfg, results)
        return results

    @classmethod
    def evaluate_checkpoint(cls, cfg: CfgNode, *, resume: bool = False) -> Mapping[str, Any]:
        """Builds the model, loads its weights and tests it, as :meth:`test` does.

        ``resume`` prefers the last checkpoint in ``OUTPUT_DIR`` to ``MODEL.WEIGHTS``; with
        ``MODEL.EMA.ENABLED``, the average in the checkpoint is used if there is one.
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

    With a ``SEED``, the random numbers of a step are a function of its number, so a resumed run
    draws the same ones. A loss that is NaN or infinite stops every process before the weights
    change, and leaves the file names of the batch in ``OUTPUT_DIR/nonfinite_batch.json``.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, data: DataLoader, optimizer: AdamW) -> None:
        amp = cfg.SOLVER.AMP
        if amp.ENABLED and amp.DTYPE not in _PRECISIONS:
            kinds = ", ".join(_PRECISIONS)
            raise ValueError(f"SOLVER.AMP.DTYPE is '{amp.DTYPE}'; it must be one of {kinds}.")
        precision = _PRECISIONS[amp.DTYPE] if amp.ENABLED else torch.float32
        device = torch.device(cfg.MODEL.DEVICE).type
        # Only float16 has so few exponents that small gradients need scaling.
        scaled = precision == torch.float16 and amp.GRAD_SCALER
        scaler = torch.amp.GradScaler(device, enabled=scaled)
        super().__init__(model, data, optimizer, grad_scaler=scaler, precision=precision)
        self._autocast = torch.autocast(device, precision, enabled=amp.ENABLED)
        self._cfg = cfg

    def run_step(self) -> None:
        """``AMPTrainer``'s step, which itself insists on CUDA."""
        if self._cfg.SEED >= 0:
            # No two processes and no two steps share a seed.
            step = self.iter * comm.get_world_size() + comm.get_rank()
            torch.manual_seed(self._cfg.SEED + step)
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

    def _record(self, losses: dict[str, Tensor], data_time: float, batch: list[dict]) -> None:
        values = {name: loss.item() for name, loss in losses.items()}
        own: dict[str, Any] = {"losses": values, "data_time": data_time}
        if not all(map(math.isfinite, values.values())):
            keys = ("dataset_name", "image_id", "file_name")
            own["images"] = [{key: x.get(key) for key in keys} for x in batch]
        # Every process learns of a bad loss in any of them, so all stop and none waits forever.
        everyone = comm.all_gather(own)
        if broken := [{"process": i, **x} for i, x in enumerate(everyone) if "images" in x]:
            self._stop(broken)
        storage = get_event_storage()
        # IterationTimer writes the time after each step, without the first ones, which warm up. The
        # console prints what is marked [metric].
        if "time" in storage.histories():
            images = self._cfg.SOLVER.IMS_PER_BATCH
            storage.put_scalar("[metric]images/s", images / storage.history("time").latest())
        # A step waits for the slowest loader.
        storage.put_scalar("data_time", max(x["data_time"] for x in everyone))
        means = {k: sum(x["losses"][k] for x in everyone) / len(everyone) for k in values}
        means = {"total_loss": sum(means.values()), **(means if len(means) > 1 else {})}
        # Unsmoothed in the files, so that a resumed run writes the same numbers.
        storage.put_scalars(**means, smoothing_hint=False)

    def _stop(self, broken: list[dict[str, Any]]) -> None:
        path = os.path.join(self._cfg.OUTPUT_DIR, "nonfinite_batch.json")
        if comm.is_main_process():
            with write_atomically(path, "w") as file:
                json.dump({"iteration": self.iter, "batches": broken}, file, indent=1)
        raise FloatingPointError(
            f"The loss is not a finite number at iteration {self.iter}: {broken[0]['losses']}. The "
            f"weights are those before it. '{path}' lists the images of the batch; the first is "
            f"'{broken[0]['images'][0]['file_name']}'."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The scaler of a run in another precision is empty, which torch refuses to load.
        scaler = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": scaler})


def _prepare_token_caches(cfg: CfgNode, model: RegionSpot) -> None:
    """Extracts the tokens that small datasets lack, and checks that all fit the model."""
    side, (height, width) = cfg.INPUT.CACHED_IMAGE_SIZE, model.vision_language.image_size
    # An image resized twice is not the image that the model sees at test time.
    if side and (height, width) != (side, side):
        raise ConfigError(
            f"INPUT.CACHED_IMAGE_SIZE is {side}, but {cfg.MODEL.VISION_LANGUAGE.ARCH} takes images "
            f"of {height} x {width}: set it to {max(height, width)}, or to 0 for no resizing."
        )
    if side and not model.vision_language.resizes_plainly:
        raise ConfigError(
            f"INPUT.CACHED_IMAGE_SIZE is {side}, but {cfg.MODEL.VISION_LANGUAGE.ARCH} resizes "
            "images with antialiasing, as it was trained: set it to 0."
        )
    if side and cfg.INPUT.ZOOM_TRAIN and cfg.MODEL.ZOOM:
        raise ConfigError(
            f"INPUT.CACHED_IMAGE_SIZE is {side}, which leaves no details for INPUT.ZOOM_TRAIN: set "
            "it to 0."
        )
    for name in (n for n in cfg.DATASETS.TRAIN if not has_tokens(cfg.INPUT.TOKEN_CACHE, n)):
        if (images := len(DatasetCatalog.get(name))) > MAX_IMAGES_EXTRACTED:
            raise ConfigError(
                f"INPUT.TOKEN_CACHE, '{cfg.INPUT.TOKEN_CACHE}', lacks the tokens of the {images} "
                f"images of '{name}'. Extract them by tools/extract_tokens.py with this config, or "
                "set INPUT.TOKEN_CACHE to '' to run the localizer in each step."
            )
        logger.info(f"INPUT.TOKEN_CACHE has no tokens of '{name}' yet: extracting them.")
        extract_tokens(cfg, model.localizer, name, cfg.INPUT.TOKEN_CACHE)
    open_token_caches(cfg, model.localizer)
