#!/usr/bin/env python
"""Measures what the scores of the mini model mean, on photos that its head was not fitted to.

By the cross-validation of ``evaluate_mini.py``, with its options:

* Calibration: how far the score of the best name is from the share of right names (expected
  calibration error, ten bins of as many boxes each), with the scores as they are, and with a
  temperature that was fitted to the other folds.
* None of these: half of the names are hidden, drawn at random. How often does a box of a name that
  is left score more than a box of a hidden name (AUROC)? By the best softmax, by the best cosine,
  and with background names: those of Objects365 and LVIS that are neither left nor hidden.

Example::

    PHOTOS=output/package_photos
    python tools/mini/evaluate_scores.py --coco instances.json images/ \\
        --lvis-names $PHOTOS/labelled/instances.json $PHOTOS/labelled/images \\
        --photos $PHOTOS/unlabelled --splits 10 --write
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from head_settings import add_cross_validation, settings_of

from regionspot_cli import CommandParser, begin

NUM_HIDINGS = 10
FEW_NAMES = ("person", "tree", "building", "door", "window", "table", "paper")


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    add_cross_validation(parser)
    parser.add_argument("--diagram", metavar="FILE.png", help="draw the reliability diagram")
    parser.add_argument(
        "--write", action="store_true", help="write the calibration beside the shipped head"
    )
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import torch
from cross_validation import Measured, cross_validate
from evaluate_mini import load_datasets, measure
from torch import Tensor
from train_mini_head import CropClassifier, check_names, load_model, prepare, unlabeled_photos

from regionspot_d2.calibration import fit_sigmoid, fit_temperature, write_calibration
from regionspot_d2.data.datasets.vocabularies import known_vocabulary
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.evaluation.calibration import (
    auroc,
    calibration_error,
    draw_reliability,
    reliability,
)
from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.names import clean_name

HEAD = Path(__file__).parents[2] / "regionspot_d2/mini/mini_head.safetensors"


class Photo(NamedTuple):
    """The boxes of a photo that was held out.

    Attributes:
        dataset: its place on the command line.
        fold: of the photo; others were fitted to.
        logits: (R, C) of the names of the dataset.
        labels: (R,), the places of the true names.
        regions: (R, D).
    """

    dataset: int
    fold: int
    logits: Tensor
    labels: Tensor
    regions: Tensor


def held_out_photos(
    model: RegionSpot,
    measured: list[Measured],
    names: list[list[str]],
    regions: list[Tensor],
    folds: Tensor,
) -> list[Photo]:
    """The photos of one split that have boxes whose names are in the vocabulary."""
    photos = []
    for m, embedded, fold in zip(measured, regions, folds.tolist()):
        known = m.labels >= 0
        if known.any():
            logits = model.score(embedded[known], names[m.dataset])
            photos.append(Photo(m.dataset, fold, logits, m.labels[known], embedded[known]))
    return photos


class Trust:
    """Scores of best names and whether they are right, before and after calibration."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, Tensor, Tensor, Tensor]] = []
        self.temperatures: list[float] = []

    def add(self, split: int, photos: list[Photo], folds: int) -> None:
        for fold in range(folds):
            others = [photo for photo in photos if photo.fold != fold]
            temperature = fit_temperature([p.logits for p in others], [p.labels for p in others])
            self.temperatures.append(temperature)
            for photo in (photo for photo in photos if photo.fold == fold):
                before = photo.logits.softmax(1).amax(1)
                after = (photo.logits / temperature).softmax(1).amax(1)
                right = photo.logits.argmax(1) == photo.labels
                self.rows.append((split, photo.dataset, before, after, right))

    def columns(self, split: int | None = None, dataset: int | None = None) -> list[Tensor]:
        rows = [
            row[2:] for row in self.rows if split in (None, row[0]) and dataset in (None, row[1])
        ]
        return [torch.cat(column) for column in zip(*rows)]

    def report(self, datasets: list[str], splits: int, diagram: str | None) -> list[float]:
        """Prints the errors; returns those over all boxes, before and after."""
        print("\n| | accuracy | mean score | ECE | mean score, calibrated | ECE, calibrated |")
        print("|---|---|---|---|---|---|")
        errors: list[float] = []
        for number, name in [*enumerate(datasets), (None, "both")]:
            before, after, right = self.columns(dataset=number)
            errors = [calibration_error(reliability(each, right)) for each in (before, after)]
            means = [float(each.float().mean()) for each in (right, before, after)]
            cells = [*means[:2], errors[0], means[2], errors[1]]
            print(f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
        _, after, right = self.columns()
        if diagram:
            draw_reliability(diagram, reliability(after, right), "held-out photos, calibrated")
        finer = calibration_error(reliability(after, right, bins=15))
        alone, by_chance = [], []
        for split in range(splits):
            _, after, right = self.columns(split)
            alone.append(calibration_error(reliability(after, right)))
            guessed = torch.rand(len(after), generator=torch.Generator().manual_seed(split)) < after
            by_chance.append(calibration_error(reliability(after, guessed)))
        print(
            f"\nBoth, calibrated, in 15 bins: {finer:.3f}. Of single splits, in ten: mean "
            f"{statistics.fmean(alone):.3f}; scores that are true to the letter would have "
            f"{statistics.fmean(by_chance):.3f} with so few boxes. "
            f"Temperatures {min(self.temperatures):.2f} to {max(self.temperatures):.2f}."
        )
        return errors


def hide_names(
    model: RegionSpot, photos: list[Photo], names: list[list[str]], found: dict[str, list[float]]
) -> None:
    """Adds AUROC by dataset and method, for random halves of the names."""
    lists = {
        f"background of {len(FEW_NAMES)} common names": list(FEW_NAMES),
        "background from Objects365": known_vocabulary("objects365"),
        "background from LVIS": known_vocabulary("lvis"),
    }
    for dataset, words in enumerate(names):
        own = [photo for photo in photos if photo.dataset == dataset]
        logits, labels, regions = (
            torch.cat([photo[i] for photo in own]) for i in (2, 3, 4)  # type: ignore[misc]
        )
        spelled = {clean_name(name).lower() for name in words}
        others = {
            title: [name for name in given if clean_name(name).lower() not in spelled]
            for title, given in lists.items()
        }
        background = {t: model.score(regions, given) for t, given in others.items() if given}
        for seed in range(NUM_HIDINGS):
            generator = torch.Generator().manual_seed(seed)
            left = torch.randperm(len(words), generator=generator) < len(words) // 2
            inside, positive = logits[:, left], left[labels]
            scores = {
                "best softmax": inside.softmax(1).amax(1),
                "best cosine": inside.amax(1),
                **{
                    title: torch.cat([inside, more], 1).softmax(1)[:, : inside.shape[1]].amax(1)
                    for title, more in background.items()
                },
            }
            for title, values in scores.items():
                found[f"{dataset} {title}"].append(auroc(values, positive))


def report_hidden(found: dict[str, list[float]], datasets: list[str]) -> None:
    titles = list(dict.fromkeys(key.partition(" ")[2] for key in found))
    print(f"\n| | {' | '.join(datasets)} |\n|---|{'---|' * len(datasets)}")
    for title in titles:
        cells = []
        for dataset in range(len(datasets)):
            values = found.get(f"{dataset} {title}")
            cells.append(f"{statistics.fmean(values):.3f}" if values else "–")
        print(f"| {title} | {' | '.join(cells)} |")


@told_in_a_line("evaluate_scores.py")
def main() -> None:
    args = argument_parser().parse_args()
    settings = settings_of(args)
    model = load_model()
    crop_classifier = CropClassifier(model)
    datasets = load_datasets(args)
    check_names(model, [photo for dataset in datasets for photo in dataset.photos])
    measured = measure(model, crop_classifier, datasets, settings)
    more = unlabeled_photos(args.photos)
    extra = (more, [prepare(model, photo, crop_classifier, settings) for photo in more])
    names = [dataset.names for dataset in datasets]
    trust, hidden = Trust(), defaultdict[str, list[float]](list)
    last: list[Photo] = []
    every: list[Photo] = []
    for split in range(args.splits):
        regions, _, folds = cross_validate(model, measured, extra, settings, args.folds, split)
        last = held_out_photos(model, measured, names, regions, folds)
        trust.add(split, last, args.folds)
        hide_names(model, last, names, hidden)
        every += last
    titles = [dataset.json_file for dataset in datasets]
    print(f"{sum(len(p.labels) for p in last)} boxes, {args.folds} folds, {args.splits} splits")
    errors = trust.report(titles, args.splits, args.diagram)
    report_hidden(hidden, titles)
    logits, labels = [p.logits for p in every], [p.labels for p in every]
    sigmoid_temperature, bias = fit_sigmoid(logits, labels)
    naming = {
        "TEMPERATURE": fit_temperature(logits, labels),
        "SIGMOID_TEMPERATURE": sigmoid_temperature,
        "SIGMOID_BIAS": bias,
    }
    print("\n" + " ".join(f"MODEL.NAMING.{key} {value:.4g}" for key, value in naming.items()))
    if args.write:
        about = {
            "fitted_to": "held-out boxes of tools/mini/evaluate_scores.py",
            "boxes": sum(len(p.labels) for p in last),
            "splits": args.splits,
            "ece_before_and_on_held_out_folds": errors,
        }
        print(f"Written: {write_calibration(HEAD, naming, about)}")


if __name__ == "__main__":
    main()
