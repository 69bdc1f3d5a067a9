"""Frozen parts: never trained, never saved, never in the way of a strict load."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from regionspot_d2.modeling import FrozenModule


class Frozen(FrozenModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.freeze()


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = Frozen()
        self.nested = nn.ModuleDict({"frozen": Frozen()})
        self.trained = nn.Linear(4, 2)


def test_stays_in_eval_mode_without_gradients():
    parent = Parent().train()
    assert parent.training and parent.trained.training
    assert not any(module.training for module in parent.frozen.modules())
    trained = [name for name, p in parent.named_parameters() if p.requires_grad]
    assert trained == ["trained.weight", "trained.bias"]


def test_absent_from_state_dict_and_strict_load_passes():
    parent, other = Parent(), Parent()
    state = parent.state_dict()
    assert sorted(state) == ["trained.bias", "trained.weight"]
    before = copy.deepcopy(other.frozen.layers[0].weight)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.trained.weight, parent.trained.weight)
    assert torch.equal(other.frozen.layers[0].weight, before)


def test_strict_load_still_finds_real_mistakes():
    parent = Parent()
    state = parent.state_dict()
    del state["trained.bias"]
    with pytest.raises(RuntimeError, match="trained.bias"):
        parent.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="stranger"):
        parent.load_state_dict({**parent.state_dict(), "stranger": torch.zeros(1)}, strict=True)


def test_survives_a_deep_copy():
    twin = copy.deepcopy(Parent())
    twin.load_state_dict(twin.state_dict(), strict=True)
    assert sorted(twin.state_dict()) == ["trained.bias", "trained.weight"]
