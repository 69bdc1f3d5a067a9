"""Numbers that turn scores into probabilities: fitted once, in a file beside the region head."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor

from .files import local_weights, sha256_of_file, write_atomically
from .modeling.scoring import Scoring, scores_of_names
from .safe_loading import read_json

# Keys of MODEL.NAMING.
_KEYS = ("TEMPERATURE", "SIGMOID_TEMPERATURE", "SIGMOID_BIAS")
# Temperatures that are tried.
_LEAST, _MOST = 0.02, 50.0


def fit_temperature(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    """The temperature of the softmax whose best score is nearest to how often its name is right.

    It is the least squared difference of the two (Brier score) rather than the likelihood of the
    true name: that depends on the scores of names that nobody is shown, and one box with a
    doubtful label can count as much as a hundred others.

    Args:
        logits: (R, C) of each question; C may differ.
        labels: (R,), the true places.

    Raises:
        ValueError: there are no regions.
    """
    _check(logits, labels)
    right = torch.cat([(part.argmax(1) == label) for part, label in zip(logits, labels)]).float()

    def loss(temperature: float) -> float:
        scoring = Scoring(temperature=temperature)
        best = torch.cat([scores_of_names(part, None, scoring).amax(1) for part in logits])
        return float((best - right).square().mean())

    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(3):  # each time more finely, around the best
        step = (high - low) / 40
        tried = [low + i * step for i in range(41)]
        best = min(tried, key=lambda value: loss(math.exp(value)))
        low, high = best - step, best + step
    return math.exp(best)


def fit_sigmoid(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[float, float]:
    """The temperature and bias of a sigmoid under which the true names are likeliest (Platt).

    Args:
        logits, labels: as for :func:`fit_temperature`.

    Raises:
        ValueError: there are no regions.
    """
    _check(logits, labels)
    targets = [F.one_hot(label, part.shape[1]).float() for part, label in zip(logits, labels)]
    factor = torch.tensor([1.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([factor], max_iter=200, line_search_fn="strong_wolfe")
    regions = sum(map(len, labels))

    def loss() -> Tensor:
        optimizer.zero_grad()
        parts = [
            F.binary_cross_entropy_with_logits(
                part * factor[0] + factor[1], target, reduction="sum"
            )
            for part, target in zip(logits, targets)
        ]
        total = torch.stack(parts).sum() / regions
        total.backward()
        return total

    optimizer.step(loss)
    scale, bias = factor.detach().tolist()
    return 1 / max(scale, 1 / _MOST), bias


def _check(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> None:
    if not sum(map(len, labels)) or len(logits) != len(labels):
        raise ValueError("There are no labeled regions to fit a calibration to.")


def calibration_file(head: str | os.PathLike[str]) -> Path:
    """Where the calibration of a head is: ``head.safetensors`` has ``head.calibration.json``."""
    return Path(head).with_suffix(".calibration.json")


def write_calibration(
    head: str | os.PathLike[str], naming: Mapping[str, float], about: Mapping[str, Any]
) -> Path:
    """Writes the calibration of a head beside it.

    Args:
        head: its file, whose sha256 is kept: the numbers fit no other.
        naming: ``TEMPERATURE``, ``SIGMOID_TEMPERATURE`` and ``SIGMOID_BIAS`` of ``MODEL.NAMING``.
        about: what they were fitted to, for people to read.

    Raises:
        OSError: the head cannot be read or the file not be written.
    """
    content = {
        "head_sha256": sha256_of_file(head),
        "naming": {key: float(naming[key]) for key in _KEYS},
        "about": dict(about),
    }
    path = calibration_file(head)
    with write_atomically(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    return path


def calibrated(cfg: CfgNode) -> CfgNode:
    """A config with the calibration that lies beside its head, if there is one.

    It stays as it is if ``MODEL.NAMING.CALIBRATED`` is False or it has numbers of its own.

    Raises:
        ValueError: the file beside the head is damaged, or of another head.
        WeightsNotFoundError: there is no head.
    """
    model = cfg.get("MODEL")
    if not isinstance(model, CfgNode) or "NAMING" not in model:
        return cfg  # of another model; whoever builds it says so
    naming = model.NAMING
    given = naming.TEMPERATURE, naming.SIGMOID_TEMPERATURE, naming.SIGMOID_BIAS
    if not naming.CALIBRATED or not cfg.MODEL.WEIGHTS or given != (1, 1, 0):
        return cfg
    head = local_weights(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    path = None if head is None else calibration_file(head)
    if head is None or path is None or not path.is_file():
        return cfg
    content = read_json(str(path))
    found = content.get("naming") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(
        type(found.get(key)) in (int, float) for key in _KEYS
    ):
        raise ValueError(f"'{path}': a file of tools/calibrate.py is expected; remove this one.")
    if content.get("head_sha256") != sha256_of_file(head):
        raise ValueError(
            f"'{path}' is the calibration of another head than '{head}': run tools/calibrate.py "
            "again, or remove it."
        )
    cfg = cfg.clone()
    cfg.defrost()
    for key in _KEYS:
        cfg.MODEL.NAMING[key] = float(found[key])
    return cfg
