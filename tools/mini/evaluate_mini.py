#!/usr/bin/env python
"""Measures the embedded model by k-fold cross-validation: no box is scored by a head that saw its photo.

Compares three ways to name given boxes: the training-free baseline, "crop and classify" (each box cut out and classified, see
``train_mini_head.py``), and the trained head, fitted anew for each fold on the other folds of all data sets. Prints, for each data
set, a Markdown table of top-1 and top-5 accuracy, in percent, mean and standard deviation over several ways to split; once more for
boxes whose name, as it is spelled, is on no box of the other folds; and the processor time of one photo with 20 boxes, from pixels to names. Example::

    python tools/mini/evaluate_mini.py --coco instances.json images/ \\
        --lvis-names package_photos/labelled/instances.json package_photos/labelled/images --photos package_photos/unlabelled
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from train_mini_head import (
    CropClassifier,
    Photo,
    Prepared,
    Settings,
    add_settings,
    check_names,
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
from regionspot_d2.mini import known_vocabulary
from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.vocabulary import clean_name

METHODS = ("PooledRegionHead", "crop and classify", "trained head")


@dataclass
class Measured:
    """A labelled photo.

    Attributes:
        photo: its boxes and their names.
        prepared: what the fit needs of it.
        dataset: place of its data set among those of the command line.
        labels: (R,), which of the names of the data set its boxes have; -1 for none of them: the box is only trained on.
    """

    photo: Photo
    prepared: Prepared
    dataset: int
    labels: Tensor


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, names in (("--coco", "the data set's names"), ("--lvis-names", "those of LVIS")):
        parser.add_argument(
            option,
            nargs=2,
            action="append",
            default=[],
            metavar=("JSON", "IMAGES"),
            help=f"data in COCO format, to be named with {names}; may be given several times",
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
    measured: list[Measured],
    extra: tuple[list[Photo], list[Prepared]],
    words: list[Tensor],
    settings: Settings,
    folds: int,
    split: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Per photo the hits of its boxes by a head that did not see it (R, 2), and which have a name it did not see (R,)."""
    order = torch.randperm(len(measured), generator=torch.Generator().manual_seed(split))
    fold_of = torch.empty(len(measured), dtype=torch.long)
    fold_of[order] = torch.arange(len(measured)) % folds
    right: list[Tensor] = [torch.empty(0)] * len(measured)
    unseen: list[Tensor] = [torch.empty(0)] * len(measured)
    for fold in range(folds):
        inside = [m for m, f in zip(measured, fold_of) if f != fold]
        photos = [m.photo for m in inside]
        fit(model, photos + extra[0], [m.prepared for m in inside] + extra[1], settings)
        seen = {clean_name(name) for photo in photos for name in photo.names}
        for i in (fold_of == fold).nonzero().flatten().tolist():
            m = measured[i]
            with torch.no_grad():
                regions = model.region_head.embed(m.prepared.baseline, m.prepared.descriptions)
            right[i] = hits(regions, words[m.dataset], m.labels)
            unseen[i] = torch.tensor([clean_name(name) not in seen for name in m.photo.names])
    return right, unseen


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
    """Mean and deviation, in percent, of the splits that have such boxes."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "–"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(set(values)) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def category_names(json_file: str) -> list[str]:
    with open(json_file, encoding="utf-8") as file:
        return sorted({category["name"] for category in json.load(file)["categories"]})


def main() -> None:
    args = parse_args()
    settings = settings_of(args)
    model = load_model()
    crop_classifier = CropClassifier(model)
    datasets = [(files, category_names(files[0])) for files in args.coco]
    datasets += [(files, known_vocabulary("lvis")) for files in args.lvis_names]
    loaded = [[p for p in labelled_photos(*files) if p.names] for files, _ in datasets]
    for (files, _), photos in zip(datasets, loaded):
        if not photos:
            raise SystemExit(f"error: {files[0]} has no photo with boxes")
    if sum(map(len, loaded)) < args.folds:
        raise SystemExit(
            f"error: {sum(map(len, loaded))} photos with boxes do not make {args.folds} folds; give --coco or --lvis-names"
        )
    check_names(model, [photo for photos in loaded for photo in photos])
    words = [model.text_embedder(names, model.device) for _, names in datasets]
    measured = []
    for number, (_, names) in enumerate(datasets):
        places = {clean_name(name): place for place, name in enumerate(names)}
        for photo in loaded[number]:
            labels = torch.tensor([places.get(clean_name(n), -1) for n in photo.names])
            prepared = prepare(model, photo, crop_classifier, settings)
            measured.append(Measured(photo, prepared, number, labels))
    more = unlabelled_photos(args.photos)
    extra = (more, [prepare(model, photo, crop_classifier, settings) for photo in more])

    fixed: dict[str, list[Tensor]] = {"PooledRegionHead": [], "crop and classify": []}
    for m in measured:
        crops = crop_classifier(read(m.photo), m.photo.boxes)
        fixed["crop and classify"].append(hits(crops, words[m.dataset], m.labels))
        fixed["PooledRegionHead"].append(hits(m.prepared.baseline, words[m.dataset], m.labels))
    rows: list[dict[str, list[list[float]]]] = [{m: [] for m in METHODS} for _ in datasets]
    for split in range(args.splits):
        right, unseen = cross_validate(model, measured, extra, words, settings, args.folds, split)
        for number in range(len(datasets)):
            chosen = [i for i, m in enumerate(measured) if m.dataset == number]
            known = torch.cat([measured[i].labels >= 0 for i in chosen])
            new = torch.cat([unseen[i] for i in chosen])[known]
            for method in METHODS:
                scored = torch.cat([fixed.get(method, right)[i] for i in chosen])[known]
                row = [*scored.mean(0).tolist(), *scored[new].mean(0).tolist(), new.sum().item()]
                rows[number][method].append(row)

    print(f"{args.folds} folds, {args.splits} splits; {len(more)} more photos; {settings}")
    for number, (files, names) in enumerate(datasets):
        labels = [m.labels for m in measured if m.dataset == number]
        boxes = int((torch.cat(labels) >= 0).sum())
        unseen_boxes = statistics.fmean(row[4] for row in rows[number][METHODS[0]])
        print(
            f"\n{files[0]}: {len(labels)} photos, {boxes} boxes, {unseen_boxes:.0f} of an unseen name, {len(names)} names\n"
        )
        print("| | top-1 | top-5 | unseen top-1 | unseen top-5 |")
        print("|---|---|---|---|---|")
        for method in METHODS:
            cells = [cell(list(column)) for column in list(zip(*rows[number][method]))[:4]]
            print(f"| {method} | {' | '.join(cells)} |")
    first = measured[0].photo
    head_time, crop_time = timings(model, crop_classifier, first, datasets[0][1], args.timing_boxes)
    print(
        f"\nProcessor time of {args.timing_boxes} boxes, {torch.get_num_threads()} threads: trained head {head_time:.3f} s, "
        f"crop and classify {crop_time:.3f} s, {crop_time / head_time:.1f} times as much."
    )


if __name__ == "__main__":
    main()
