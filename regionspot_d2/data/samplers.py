"""Which images are drawn in training, how often, and in which order."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch import Tensor
from torch.utils.data import Sampler

Record = dict[str, Any]

_BY_CLASS = "RepeatFactorTrainingSampler"


def repeat_factors(cfg: CfgNode, datasets: Sequence[Sequence[Record]]) -> Tensor | None:
    """How often each image is seen, relative to the rarest.

    ``DATALOADER.SAMPLER_TRAIN: RepeatFactorTrainingSampler`` repeats images of rare classes within
    a dataset; ``DATASETS.TRAIN_RATIOS`` then sets how often each dataset is seen.

    Returns:
        (records of all ``datasets``,), float64, at least 1; None if all are seen equally often.
    """
    names, ratios = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TRAIN_RATIOS)
    sampler, samplers = cfg.DATALOADER.SAMPLER_TRAIN, ("TrainingSampler", _BY_CLASS)
    if sampler not in samplers:
        raise ValueError(f"DATALOADER.SAMPLER_TRAIN is '{sampler}'; it must be one of {samplers}.")
    if ratios and (len(ratios) != len(names) or min(ratios) <= 0):
        raise ValueError(
            f"DATASETS.TRAIN_RATIOS is {ratios}; it must be empty or have a positive number for "
            f"each of the {len(names)} datasets in DATASETS.TRAIN."
        )
    repeated = list(cfg.DATALOADER.REPEAT_DATASETS) or names
    if not set(repeated) <= set(names):
        raise ValueError(f"DATALOADER.REPEAT_DATASETS is {repeated}; DATASETS.TRAIN is {names}.")
    by_class = sampler == _BY_CLASS
    if not ratios and not by_class:
        return None
    factors = []
    for name, records in zip(names, datasets):
        factors.append(torch.ones(len(records), dtype=torch.float64))
        if by_class and name in repeated:
            factors[-1] *= RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
                records, cfg.DATALOADER.REPEAT_THRESHOLD
            )
    if ratios:
        factors = [factor * (ratio / factor.sum()) for factor, ratio in zip(factors, ratios)]
    return torch.cat(factors) / min(factor.min() for factor in factors)


class ResumableSampler(Sampler[int]):
    """An endless, repeatable sampler that can begin later: ``skip`` of its indices are left out."""

    def __init__(self, sampler: Sampler[int]) -> None:
        self.sampler, self.skip = sampler, 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(iter(self.sampler), self.skip, None)


def batch_groups(datasets: Sequence[Sequence[Record]], *, by_orientation: bool) -> list[int]:
    """A number for each record of all datasets; a batch of one number is of one dataset.

    With ``by_orientation`` it is also of images that are wider than high, or of none of them.
    """
    return [
        2 * place + (by_orientation and record.get("width", 0) > record.get("height", 0))
        for place, records in enumerate(datasets)
        for record in records
    ]


class GroupedSampler(Sampler[int]):
    """Reorders an endless sampler, so that each ``size`` indices in a row are of one group.

    Detectron2's ``AspectRatioGroupedDataset`` groups images that are loaded already, which cannot
    be started at a later iteration.
    """

    def __init__(self, sampler: Sampler[int], groups: Sequence[int], size: int) -> None:
        """
        Args:
            sampler: endless, over the places in ``groups``.
            groups: the group of each image, any number.
            size: images of a batch of this process.
        """
        self.sampler, self.groups, self.size = sampler, groups, size

    def __iter__(self) -> Iterator[int]:
        waiting = defaultdict[int, list[int]](list)
        for index in self.sampler:
            group = self.groups[index]
            waiting[group].append(index)
            if len(waiting[group]) == self.size:
                yield from waiting.pop(group)


class FastRepeatFactorSampler(RepeatFactorTrainingSampler):
    """Detectron2's sampler without its loop, which takes many seconds for millions of images."""

    def _get_epoch_indices(self, generator: torch.Generator) -> Tensor:
        chance = torch.rand(len(self._frac_part), generator=generator)
        repeats = self._int_part + (chance < self._frac_part)
        return torch.arange(len(repeats)).repeat_interleave(repeats.long())
