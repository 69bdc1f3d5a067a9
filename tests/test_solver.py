"""The optimizer: what it trains, and the clipping of the whole gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regionspot_d2.engine import build_optimizer
from regionspot_d2.modeling.frozen import FrozenModule

from .tiny import tiny_cfg


class Frozen(FrozenModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.freeze()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2), Frozen())


def clipping_cfg(value: float = 1.0, kind: str = "full_model"):
    cfg = tiny_cfg()
    cfg.SOLVER.BASE_LR = 2.5e-5
    cfg.SOLVER.WEIGHT_DECAY = 1e-4
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = value
    return cfg


def set_gradients(model: nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def test_trains_what_takes_gradients_with_the_published_settings():
    model = small_model()
    optimizer = build_optimizer(clipping_cfg(), model)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for p in model.parameters() if p.requires_grad}
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert group["lr"] == 2.5e-5
        norms = {model[1].weight, model[1].bias}
        assert group["weight_decay"] == (0.0 if set(group["params"]) <= norms else 1e-4)


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_clips_the_norm_over_all_parameters(scale):
    model = small_model()
    optimizer = build_optimizer(clipping_cfg(0.5), model)
    set_gradients(model, scale)
    before = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    norm = torch.cat([g.flatten() for g in before]).norm().item()
    optimizer.step()
    for gradient, p in zip(before, model.parameters()):
        torch.testing.assert_close(p.grad, gradient * min(1.0, 0.5 / norm))


def test_step_is_adamw_on_clipped_gradients():
    model = small_model()
    reference = copy.deepcopy(model)
    cfg = clipping_cfg(0.5)
    cfg.SOLVER.WEIGHT_DECAY_NORM = cfg.SOLVER.WEIGHT_DECAY
    optimizer = build_optimizer(cfg, model)
    trained = [p for p in reference.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(trained, lr=2.5e-5, weight_decay=1e-4)
    for scale in (3.0, 0.01, 8.0):
        set_gradients(model, scale)
        set_gradients(reference, scale)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        plain.step()
    for one, other in zip(model.parameters(), reference.parameters()):
        assert torch.equal(one, other)


def test_clips_after_the_scale_of_half_precision_is_off():
    model = small_model()
    optimizer = build_optimizer(clipping_cfg(0.5), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # a scaler starts with the first loss
    set_gradients(model, 1e-3 * 1024)
    scaler.step(optimizer)
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    set_gradients(model, 1e-3)
    expected = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(torch.cat(gradients), torch.cat(expected))


def test_other_kinds_are_those_of_detectron2():
    model = small_model()
    optimizer = build_optimizer(clipping_cfg(0.01, "value"), model)
    set_gradients(model, 1.0)
    optimizer.step()
    assert max(p.grad.abs().max() for p in model.parameters() if p.requires_grad) == pytest.approx(
        0.01
    )


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="CLIP_TYPE is 'all'.*full_model, value, norm"):
        build_optimizer(clipping_cfg(kind="all"), small_model())


def test_nothing_to_train_is_refused():
    cfg = clipping_cfg()
    cfg.MODEL.REGION_HEAD.NAME = "PooledRegionHead"
    with pytest.raises(ValueError, match="PooledRegionHead leaves nothing to train"):
        build_optimizer(cfg, Frozen())
