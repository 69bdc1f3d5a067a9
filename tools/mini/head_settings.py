"""The hyperparameters of the mini model's head, as options of the tools that fit it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Settings:
    """Hyperparameters, chosen by cross-validation; the defaults are those of the shipped head."""

    share: float = 0.4
    # Of the baseline, on top of `share`, after the fit: more of it gives names without labels back
    # what the labels of others took from them, and takes from the names with labels.
    extra_share: float = 0.0
    ridge: float = 2.0
    width: float = 0.2
    radial_share: float = 0.5
    reserve: float = 3.0
    # Weight of a random box; a labeled one has 1.
    teacher_weight: float = 0.9
    # Share of the crop in the teacher's answer; the rest is the baseline's.
    crop_share: float = 0.5
    boxes_per_photo: int = 4
    # The view in which a labeled box is seen, as MODEL.ZOOM. Random boxes are seen in the whole
    # photo: that keeps what the head knows of whole photos.
    zoom: float = 2.0
    seed: int = 0


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds one option per hyperparameter."""
    for name, value in vars(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)


def add_cross_validation(parser: argparse.ArgumentParser) -> None:
    """Adds the photos and the folds of a cross-validation, and the hyperparameters."""
    for option, names in (("--coco", "its own names"), ("--lvis-names", "LVIS's names")):
        parser.add_argument(
            option,
            nargs=2,
            action="append",
            default=[],
            metavar=("JSON", "IMAGES"),
            help=f"a dataset in COCO format, named with {names}; may be repeated",
        )
    parser.add_argument(
        "--photos", type=Path, nargs="*", default=[], help="folders of photos without labels"
    )
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--splits", type=int, default=5, help="number of random splits into folds")
    add_settings(parser)


def settings_of(args: argparse.Namespace) -> Settings:
    if not 0 <= args.teacher_weight < 1:
        raise SystemExit(
            f"error: --teacher-weight is {args.teacher_weight}; it must be from 0 to below 1, "
            "the weight of a labeled box"
        )
    return Settings(**{name: getattr(args, name) for name in vars(Settings())})
