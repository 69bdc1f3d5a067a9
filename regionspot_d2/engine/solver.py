"""The optimizer of the paper: AdamW, with the gradient of the whole model clipped at once."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import GradientClipType, maybe_add_gradient_clipping
from torch import nn

_CLIP_FULL_MODEL = "full_model"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """Builds AdamW over the parameters that take gradients, with the settings in ``cfg.SOLVER``.

    Beside Detectron2's own kinds of clipping ("value" and "norm", one parameter at a time) there is "full_model": the
    norm over all parameters together is brought down to ``CLIP_VALUE``. It happens when the optimizer steps, so it sees
    gradients after a ``GradScaler`` has taken its scale off.

    Args:
        cfg: a config.
        model: the model to train.

    Raises:
        ValueError: if the model has nothing to train, or the kind of clipping is unknown.
    """
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    if not groups:
        raise ValueError(
            f"MODEL.REGION_HEAD.NAME: {cfg.MODEL.REGION_HEAD.NAME} leaves nothing to train; "
            "RegionSpotHead is the trained head. (--eval-only evaluates a model as it is.)"
        )
    optimizer = torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return optimizer
    if clip.CLIP_TYPE != _CLIP_FULL_MODEL:
        kinds = [_CLIP_FULL_MODEL, *(kind.value for kind in GradientClipType)]
        if clip.CLIP_TYPE not in kinds:
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is '{clip.CLIP_TYPE}'; it must be one of {', '.join(kinds)}."
            )
        return maybe_add_gradient_clipping(cfg, optimizer)
    max_norm, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE

    def clip_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)

    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer
