#!/usr/bin/env python
"""Measures the mini model by k-fold cross-validation: no head is scored on photos it was fitted to.

Compares three ways to name given boxes: the training-free baseline, "crop and classify" (each box
is cropped and classified, see ``train_mini_head.py``), and the trained head, fitted for each fold
to the other folds of all datasets. For each dataset it prints a Markdown table of top-1 and top-5
accuracy in percent (mean and standard deviation over several random splits), for all boxes and for
those whose name, as spelled, is on no box of the other folds; then the processor time of one photo
with 20 boxes, from pixels to names. With ``--hide-names 4`` every box is one of an unseen name: its
head was fitted without a random quarter of the names, its own among them. Example::

    PHOTOS=package_photos
    python tools/mini/evaluate_mini.py --coco instances.json images/ \\
        --lvis-names $PHOTOS/labelled/instances.json $PHOTOS/labelled/images \\
        --photos $PHOTOS/unlabelled
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from head_settings import Settings, add_cross_validation, settings_of

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    add_cross_validation(parser)
    parser.add_argument("--timing-boxes", type=int, default=20)
    parser.add_argument(
        "--hide-names",
        type=int,
        default=0,
        metavar="GROUPS",
        help="split the names into groups, and score the boxes of each by heads fitted without it",
    )
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import torch
from cross_validation import Measured, cross_validate
from torch import Tensor
from train_mini_head import (
    CropClassifier,
    Photo,
    check_names,
    labeled_photos,
    load_model,
    prepare,
    progress,
    random_boxes,
    read,
    unlabeled_photos,
)

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.data.datasets.validation import read_annotations
from regionspot_d2.data.datasets.vocabularies import known_vocabulary
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.names import clean_name

METHODS = ("PooledRegionHead", "crop and classify", "trained head")


@dataclass
class Dataset:
    """A dataset of the command line: its file, its vocabulary, its photos with boxes."""

    json_file: str
    names: list[str]
    photos: list[Photo] = field(default_factory=list)


def hits(regions: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """Whether the label ranks first, and among the first five: (R, 2)."""
    right = (regions @ text.T).topk(min(5, len(text))).indices == labels[:, None]
    return torch.stack([right[:, 0], right.any(1)], dim=1).float()


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Processor time of the fastest run; other work on the machine does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def timings(
    model: RegionSpot,
    crop_classifier: CropClassifier,
    photo: Photo,
    names: list[str],
    count: int,
    zoom: float,
) -> dict[str, float]:
    """Seconds from pixels to the names of ``count`` boxes, by method."""
    image = read(photo)
    boxes = random_boxes(count, "timing")
    pixels = boxes * torch.tensor([image.shape[2], image.shape[1]] * 2)
    predictor = RegionSpotPredictor(model, vocabulary=names)
    text = model.text_embedder(names, model.device)

    def with_head(zoom: float) -> None:
        predictor.set_image(image)
        predictor.predict(boxes=pixels, zoom=zoom)

    def with_crops() -> None:
        (crop_classifier(image, boxes) @ text.T).argmax(1)

    return {
        "trained head on the whole photo": seconds(lambda: with_head(0)),
        f"trained head with zoom {zoom:g}": seconds(lambda: with_head(zoom)),
        "crop and classify": seconds(with_crops),
    }


def cell(values: list[float]) -> str:
    """Mean and standard deviation in percent; NaN means a split without such boxes."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "–"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(set(values)) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def category_names(json_file: str) -> list[str]:
    return sorted({category["name"] for category in read_annotations(json_file)["categories"]})


def load_datasets(args: argparse.Namespace) -> list[Dataset]:
    """The labeled photos of the command line; exits if they are too few."""
    datasets = [Dataset(files[0], category_names(files[0])) for files in args.coco]
    datasets += [Dataset(files[0], known_vocabulary("lvis")) for files in args.lvis_names]
    for dataset, files in zip(datasets, args.coco + args.lvis_names):
        dataset.photos = [photo for photo in labeled_photos(*files) if photo.names]
        if not dataset.photos:
            raise SystemExit(f"error: {dataset.json_file} has no photo with boxes")
    count = sum(len(dataset.photos) for dataset in datasets)
    if count < args.folds:
        raise SystemExit(
            f"error: {count} photos with boxes do not make {args.folds} folds; "
            "give more with --coco or --lvis-names"
        )
    return datasets


def measure(
    model: RegionSpot, crop_classifier: CropClassifier, datasets: list[Dataset], settings: Settings
) -> list[Measured]:
    """Runs the frozen networks over all photos."""
    measured = []
    for number, dataset in enumerate(datasets):
        places = {clean_name(name): place for place, name in enumerate(dataset.names)}
        for photo in progress(dataset.photos, "Preparing photos"):
            labels = torch.tensor([places.get(clean_name(n), -1) for n in photo.names])
            prepared = prepare(model, photo, crop_classifier, settings)
            measured.append(Measured(photo, prepared, number, labels))
    return measured


def accuracies(
    measured: list[Measured], number: int, by_method: dict[str, list[Tensor]], unseen: list[Tensor]
) -> dict[str, list[float]]:
    """Accuracies of a dataset in one split.

    Args:
        measured: all photos.
        number: the dataset.
        by_method: per method and photo the hits of its boxes (R, 2).
        unseen: per photo which boxes have unseen names (R,).

    Returns:
        Per method top-1 and top-5, the same of unseen names, and the number of their boxes.
    """
    chosen = [i for i, m in enumerate(measured) if m.dataset == number]
    known = torch.cat([measured[i].labels >= 0 for i in chosen])
    new = torch.cat([unseen[i] for i in chosen])[known]
    rows = {}
    for method, photos in by_method.items():
        scored = torch.cat([photos[i] for i in chosen])[known]
        rows[method] = [*scored.mean(0).tolist(), *scored[new].mean(0).tolist(), new.sum().item()]
    return rows


def print_table(
    dataset: Dataset, labels: list[Tensor], splits: list[dict[str, list[float]]]
) -> None:
    """Prints a dataset's Markdown table.

    Args:
        dataset: names the table.
        labels: per photo, from :class:`Measured`.
        splits: per split what :func:`accuracies` returned.
    """
    boxes = int((torch.cat(labels) >= 0).sum())
    unseen_boxes = statistics.fmean(rows[METHODS[0]][4] for rows in splits)
    print(
        f"\n{dataset.json_file}: {len(labels)} photos, {boxes} boxes, {unseen_boxes:.0f} of an "
        f"unseen name, {len(dataset.names)} names\n"
    )
    print("| | top-1 | top-5 | unseen top-1 | unseen top-5 |")
    print("|---|---|---|---|---|")
    for method in METHODS:
        columns = list(zip(*(rows[method] for rows in splits)))[:4]
        print(f"| {method} | {' | '.join(cell(list(column)) for column in columns)} |")


@told_in_a_line("evaluate_mini.py")
def main() -> None:
    args = argument_parser().parse_args()
    settings = settings_of(args)
    if args.hide_names < 0:
        raise SystemExit(f"error: --hide-names is {args.hide_names}; it must be 0 or more")
    model = load_model()
    crop_classifier = CropClassifier(model)
    datasets = load_datasets(args)
    check_names(model, [photo for dataset in datasets for photo in dataset.photos])
    text = [model.text_embedder(dataset.names, model.device) for dataset in datasets]
    measured = measure(model, crop_classifier, datasets, settings)
    more = unlabeled_photos(args.photos)
    extra = (
        more,
        [prepare(model, p, crop_classifier, settings) for p in progress(more, "Other photos")],
    )

    by_method: dict[str, list[Tensor]] = {"PooledRegionHead": [], "crop and classify": []}
    for m in progress(measured, "Classifying crops"):
        crops = crop_classifier(read(m.photo), m.photo.boxes)
        by_method["crop and classify"].append(hits(crops, text[m.dataset], m.labels))
        by_method["PooledRegionHead"].append(hits(m.prepared.baseline, text[m.dataset], m.labels))
    splits: list[list[dict[str, list[float]]]] = [[] for _ in datasets]
    for split in progress(range(args.splits), "Cross-validating", unit="split"):
        trained, unseen, _ = cross_validate(
            model, measured, extra, settings, args.folds, split, args.hide_names
        )
        by_method["trained head"] = [
            hits(regions, text[m.dataset], m.labels) for regions, m in zip(trained, measured)
        ]
        for number, rows in enumerate(splits):
            rows.append(accuracies(measured, number, by_method, unseen))

    print(
        f"{args.folds} folds, {args.splits} splits, {args.hide_names} groups of hidden names; "
        f"{len(more)} more photos; {settings}"
    )
    for number, dataset in enumerate(datasets):
        print_table(dataset, [m.labels for m in measured if m.dataset == number], splits[number])
    names, photo, boxes = datasets[0].names, measured[0].photo, args.timing_boxes
    times = timings(model, crop_classifier, photo, names, boxes, settings.zoom)
    print(f"\nProcessor time of {boxes} boxes, {torch.get_num_threads()} threads:")
    for method, time_taken in times.items():
        print(f"{method}: {time_taken:.3f} s")


if __name__ == "__main__":
    main()
