#!/usr/bin/env python
"""Measures the embedded model by k-fold cross-validation: no box is scored by a head that saw its photo.

Compares three ways to name given boxes among the names of the data set: the training-free baseline, "crop and classify"
(each box cut out and classified, see ``train_mini_head.py``), and the trained head, fitted anew for each fold. Prints a
Markdown table of top-1 and top-5 accuracy, in percent, mean and standard deviation over several ways to split; once more for
boxes whose class is in no photo of the other folds; and the processor time of one photo with 20 boxes, from pixels to names. Example::

    python tools/evaluate_mini.py --coco instances.json images/
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from train_mini_head import (
    CropClassifier,
    Photo,
    Prepared,
    Settings,
    add_settings,
    fit,
    labelled_photos,
    load_model,
    prepare,
    random_boxes,
    read,
    settings_of,
    unlabelled_photos,
)

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.modeling import RegionSpot

METHODS = ("PooledRegionHead", "crop and classify", "trained head")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--coco", nargs=2, required=True, metavar=("JSON", "IMAGES"), help="data in COCO format"
    )
    parser.add_argument(
        "--photos", type=Path, nargs="*", default=[], help="folders of photos without labels"
    )
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--splits", type=int, default=5, help="ways to split the photos into folds")
    parser.add_argument("--timing-boxes", type=int, default=20)
    add_settings(parser)
    return parser.parse_args()


def hits(regions: Tensor, words: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is first, and among the first five: (R, 2)."""
    right = (regions @ words.T).topk(min(5, len(words))).indices == labels[:, None]
    return torch.stack([right[:, 0], right.any(1)], dim=1).float()


def cross_validate(
    model: RegionSpot,
    photos: list[Photo],
    prepared: list[Prepared],
    extra: tuple[list[Photo], list[Prepared]],
    words: Tensor,
    labels: list[Tensor],
    settings: Settings,
    folds: int,
    split: int,
) -> tuple[Tensor, Tensor]:
    """Hits of every box by a head that did not see its photo (R, 2), and which boxes have a class it did not see (R,)."""
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(split))
    fold_of = torch.empty(len(photos), dtype=torch.long)
    fold_of[order] = torch.arange(len(photos)) % folds
    right: list[Tensor] = [torch.empty(0)] * len(photos)
    unseen: list[Tensor] = [torch.empty(0)] * len(photos)
    for fold in range(folds):
        inside = [i for i in range(len(photos)) if fold_of[i] != fold]
        fit(
            model,
            [photos[i] for i in inside] + extra[0],
            [prepared[i] for i in inside] + extra[1],
            settings,
        )
        seen = torch.cat([labels[i] for i in inside])
        for i in (fold_of == fold).nonzero().flatten().tolist():
            with torch.no_grad():
                regions = model.region_head.embed(prepared[i].baseline, prepared[i].features)
            right[i] = hits(regions, words, labels[i])
            unseen[i] = ~torch.isin(labels[i], seen)
    return torch.cat(right), torch.cat(unseen)


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Of the processor, so that other work on the machine does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def timings(
    model: RegionSpot, crop_classifier: CropClassifier, photo: Photo, names: list[str], count: int
) -> tuple[float, float]:
    """Seconds of a photo with so many boxes, from pixels to names: with the head, and crop by crop."""
    image = read(photo)
    boxes = random_boxes(count, "timing")
    pixels = boxes * torch.tensor([image.shape[2], image.shape[1]] * 2)
    predictor = RegionSpotPredictor(model, vocabulary=names)
    words = model.text_embedder(names, model.device)

    def with_head() -> None:
        predictor.set_image(image)
        predictor.predict(boxes=pixels)

    def with_crops() -> None:
        (crop_classifier(image, boxes) @ words.T).argmax(1)

    return seconds(with_head), seconds(with_crops)


def cell(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(set(values)) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def all_names(json_file: str) -> list[str]:
    with open(json_file, encoding="utf-8") as file:
        return [category["name"] for category in json.load(file)["categories"]]


def main() -> None:
    args = parse_args()
    settings = settings_of(args)
    model = load_model()
    crop_classifier = CropClassifier(model)
    photos = [photo for photo in labelled_photos(*args.coco) if photo.names]
    names = sorted(
        {name for photo in photos for name in photo.names} | set(all_names(args.coco[0]))
    )
    words = model.text_embedder(names, model.device)
    labels = [torch.tensor([names.index(name) for name in photo.names]) for photo in photos]
    prepared = [prepare(model, photo, crop_classifier, settings) for photo in photos]
    more = unlabelled_photos(args.photos)
    extra = (more, [prepare(model, photo, crop_classifier, settings) for photo in more])

    crops = torch.cat([crop_classifier(read(photo), photo.boxes) for photo in photos])
    fixed = {
        "PooledRegionHead": hits(
            torch.cat([p.baseline for p in prepared]), words, torch.cat(labels)
        ),
        "crop and classify": hits(crops, words, torch.cat(labels)),
    }
    rows: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for split in range(args.splits):
        right, unseen = cross_validate(
            model, photos, prepared, extra, words, labels, settings, args.folds, split
        )
        for method in METHODS:
            scored = fixed.get(method, right)
            rows[method].append([*scored.mean(0).tolist(), *scored[unseen].mean(0).tolist()])

    head_time, crop_time = timings(model, crop_classifier, photos[0], names, args.timing_boxes)
    times = {"crop and classify": crop_time, "trained head": head_time}
    print(
        f"{len(photos)} photos, {len(crops)} boxes, {len(names)} names; {args.folds} folds, {args.splits} splits; "
        f"{torch.get_num_threads()} threads; {settings}\n"
    )
    print(f"| | top-1 | top-5 | unseen top-1 | unseen top-5 | CPU s, {args.timing_boxes} boxes |")
    print("|---|---|---|---|---|---|")
    for method in METHODS:
        cells = [cell(list(column)) for column in zip(*rows[method])]
        print(
            f"| {method} | {' | '.join(cells)} | {times[method]:.2f} |"
            if method in times
            else f"| {method} | {' | '.join(cells)} | |"
        )
    print(f"\nThe head is {crop_time / head_time:.1f} times as fast as crop and classify.")


if __name__ == "__main__":
    main()
