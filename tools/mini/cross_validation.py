"""Cross-validation of the mini model's head: no head sees photos that it was fitted to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from head_settings import Settings
from torch import Tensor
from train_mini_head import Photo, Prepared, fit

from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.names import clean_name


@dataclass
class Measured:
    """A labeled photo.

    Attributes:
        dataset: index of its dataset on the command line.
        labels: (R,), indices of its boxes' names in the vocabulary of the dataset; -1 for a name
            outside the vocabulary, whose box is only trained on.
    """

    photo: Photo
    prepared: Prepared
    dataset: int
    labels: Tensor


def cross_validate(
    model: RegionSpot,
    measured: list[Measured],
    extra: tuple[list[Photo], list[Prepared]],
    settings: Settings,
    folds: int,
    split: int,
    groups: int = 0,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Embeds the boxes of each photo by a head that was fitted to the other folds.

    Args:
        model: its head is fitted in place.
        measured: the labeled photos, which are split into folds.
        extra: photos that every fit sees.
        settings: of the fit.
        folds: how many there are.
        split: seed of the random folds and groups.
        groups: the names are split into so many, and a head for the boxes of a group is fitted
            without the boxes of its names; 0 hides no name.

    Returns:
        Per photo the embeddings of its boxes (R, D), and which of them have names unseen in the fit
        (R,); the fold of each photo.
    """
    order = torch.randperm(len(measured), generator=torch.Generator().manual_seed(split))
    fold_of = torch.empty(len(measured), dtype=torch.long)
    fold_of[order] = torch.arange(len(measured)) % folds
    regions = [torch.empty_like(m.prepared.baseline) for m in measured]
    unseen = [torch.empty(len(m.labels), dtype=torch.bool) for m in measured]
    hidden_sets = name_groups(measured, groups, split)
    for fold, hidden in itertools.product(range(folds), hidden_sets):
        inside = [without(m, hidden) for m, f in zip(measured, fold_of) if f != fold]
        photos = [m.photo for m in inside]
        fit(model, photos + extra[0], [m.prepared for m in inside] + extra[1], settings)
        seen = {clean_name(name) for photo in photos for name in photo.names}
        for i in (fold_of == fold).nonzero().flatten().tolist():
            prepared, names = measured[i].prepared, list(map(clean_name, measured[i].photo.names))
            rows = torch.tensor([name in hidden or not groups for name in names])
            with torch.no_grad():
                embedded = model.region_head.embed(prepared.baseline, prepared.descriptions)
            regions[i][rows] = embedded[rows]
            unseen[i][rows] = torch.tensor([name not in seen for name in names])[rows]
    return regions, unseen, fold_of


def name_groups(measured: list[Measured], count: int, seed: int) -> list[set[str]]:
    """The names of all boxes in groups drawn at random; one empty group if ``count`` is 0."""
    if not count:
        return [set()]
    names = sorted({clean_name(name) for m in measured for name in m.photo.names})
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{names[place] for place in order[group::count]} for group in range(count)]


def without(measured: Measured, names: set[str]) -> Measured:
    """A photo less the boxes of some names; its random boxes stay."""
    kept = torch.tensor([clean_name(name) not in names for name in measured.photo.names])
    photo, prepared = measured.photo, measured.prepared
    return Measured(
        replace(
            photo,
            boxes=photo.boxes[kept],
            names=[name for name, keep in zip(photo.names, kept.tolist()) if keep],
        ),
        replace(
            prepared,
            baseline=prepared.baseline[kept],
            descriptions=prepared.descriptions[kept],
        ),
        measured.dataset,
        measured.labels[kept],
    )
