"""The trainer: Detectron2's, with RegionSpot's loaders, optimizer, step and hooks."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint import RegionSpotCheckpointer
from ..data.build import build_test_loader, build_train_loader, open_token_caches, start_at
from ..data.published_tokens import has_tokens
from ..data.token_extraction import extract_tokens
from ..evaluation import build_evaluator, write_report
from .ema import EMAHook, ModelEMA
from .hooks import BestCheckpoint, SeedByIteration, Throughput
from .setup import ConfigError
from .solver import build_optimizer
from .train_step import TrainStep

logger = logging.getLogger(__name__)

# More images are a job of their own, for which the other processes would not wait.
_EXTRACTED_ON_THE_WAY = 10_000

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class RegionSpotTrainer(DefaultTrainer):
    """Trains the region head, on GPUs or the CPU, in one process or many.

    A run that is stopped at any moment and resumed goes on as if it had not been: the order of the images and the
    random numbers of a step depend on ``SEED`` and the iteration alone.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a config.

        Raises:
            ValueError: if a key does not fit, or the model has nothing to train.
        """
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        if cfg.INPUT.TOKEN_CACHE:
            _check_cached_image_size(cfg, model.vision_language)
            _complete_token_caches(cfg, model.localizer)
        self.ema = ModelEMA(model, cfg.MODEL.EMA.DECAY) if cfg.MODEL.EMA.ENABLED else None
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        devices = {"device_ids": None} if on_cpu else {}
        self._trainer = TrainStep(
            create_ddp_model(model, broadcast_buffers=False, **devices),
            self.build_train_loader(cfg),
            optimizer,
            precision=_precision(cfg),
            output_dir=cfg.OUTPUT_DIR,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RegionSpotCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **_checkpointables(self.ema)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Goes on from the last checkpoint in ``OUTPUT_DIR``, or starts from ``MODEL.WEIGHTS``.

        Args:
            resume: whether to look for a checkpoint.
        """
        super().resume_or_load(resume=resume)
        start_at(self.data_loader, self.start_iter)

    def build_hooks(self) -> list[HookBase | None]:
        """As Detectron2's, with ours between them."""
        cfg = self.cfg
        is_main = comm.is_main_process()
        keeps_best = is_main and cfg.TEST.EVAL_PERIOD > 0 and cfg.TEST.BEST_METRIC
        return [
            hooks.IterationTimer(),
            Throughput(cfg.SOLVER.IMS_PER_BATCH),
            SeedByIteration(cfg.SEED) if cfg.SEED >= 0 else None,
            hooks.LRScheduler(),
            EMAHook(self.ema) if self.ema is not None else None,
            (
                hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
                if is_main
                else None
            ),
            # After the checkpoint: if the evaluation fails, the checkpoint tells why.
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate),
            (
                BestCheckpoint(
                    cfg.TEST.EVAL_PERIOD,
                    self.checkpointer,
                    cfg.TEST.BEST_METRIC,
                    self._evaluated_weights,
                )
                if keeps_best and cfg.DATASETS.TEST
                else None
            ),
            hooks.PeriodicWriter(self.build_writers(), period=20) if is_main else None,
        ]

    def _evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def _evaluate(self) -> Mapping[str, Any]:
        with self._evaluated_weights():
            self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> Mapping[str, Any]:
        """Evaluates a model on ``DATASETS.TEST``, and writes the table of the results to ``OUTPUT_DIR``.

        Args:
            cfg: a config.
            model: with its weights.
            evaluators: one for each data set; by default those of :meth:`build_evaluator`.

        Returns:
            Results by data set, or of the only one; empty without data sets, and in all but the main process.
        """
        results = super().test(cfg, model, evaluators)
        if results and comm.is_main_process():
            write_report(cfg, results)
        return results

    @classmethod
    def evaluate_checkpoint(cls, cfg: CfgNode, *, resume: bool = False) -> Mapping[str, Any]:
        """Builds the model, loads its weights and tests it.

        Args:
            cfg: a config. With ``MODEL.EMA.ENABLED`` the average is taken from a checkpoint that has one.
            resume: whether the last checkpoint in ``OUTPUT_DIR`` is preferred to ``MODEL.WEIGHTS``.

        Returns:
            As :meth:`test`.
        """
        model = cls.build_model(cfg)
        ema = ModelEMA(model, cfg.MODEL.EMA.DECAY) if cfg.MODEL.EMA.ENABLED else None
        checkpointer = RegionSpotCheckpointer(model, cfg.OUTPUT_DIR)
        content = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        if ema is None or "ema" not in content:
            return cls.test(cfg, model)
        ema.load_state_dict(content["ema"])
        with ema.applied():
            return cls.test(cfg, model)


def _checkpointables(ema: ModelEMA | None) -> dict[str, ModelEMA]:
    return {} if ema is None else {"ema": ema}


def _check_cached_image_size(cfg: CfgNode, vision_language: nn.Module) -> None:
    """Images squashed twice are not the images that the model is tested with."""
    side = cfg.INPUT.CACHED_IMAGE_SIZE
    if side and tuple(vision_language.image_size) != (side, side):
        height, width = vision_language.image_size
        raise ConfigError(
            f"INPUT.CACHED_IMAGE_SIZE is {side}, but {cfg.MODEL.VISION_LANGUAGE.NAME} {cfg.MODEL.VISION_LANGUAGE.ARCH} takes "
            f"images of {height} x {width}: set it to {max(height, width)}, or to 0 to leave images as they are."
        )


def _complete_token_caches(cfg: CfgNode, localizer: nn.Module) -> None:
    """Extracts tokens of small data sets that have none yet, and checks that all are of this localizer."""
    for name in cfg.DATASETS.TRAIN:
        if has_tokens(cfg.INPUT.TOKEN_CACHE, name):
            continue
        images = len(DatasetCatalog.get(name))
        if images > _EXTRACTED_ON_THE_WAY:
            raise ConfigError(
                f"INPUT.TOKEN_CACHE, '{cfg.INPUT.TOKEN_CACHE}', has no tokens of the {images} images of '{name}'. "
                "tools/extract_tokens.py with the same config file extracts them first; an empty INPUT.TOKEN_CACHE "
                "runs the localizer in each step."
            )
        logger.info(f"INPUT.TOKEN_CACHE has no tokens of '{name}' yet: extracting them.")
        extract_tokens(cfg, localizer, name, cfg.INPUT.TOKEN_CACHE)
    open_token_caches(cfg, localizer)


def _precision(cfg: CfgNode) -> torch.dtype:
    if not cfg.SOLVER.AMP.ENABLED:
        return torch.float32
    if cfg.SOLVER.AMP.DTYPE not in _PRECISIONS:
        raise ValueError(
            f"SOLVER.AMP.DTYPE is '{cfg.SOLVER.AMP.DTYPE}'; it must be one of {', '.join(_PRECISIONS)}."
        )
    return _PRECISIONS[cfg.SOLVER.AMP.DTYPE]
