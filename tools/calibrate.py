#!/usr/bin/env python
"""Fits the numbers that make scores honest to labeled boxes, and writes them beside the head.

A softmax is divided by a temperature, and a sigmoid gets a temperature and a bias, so that of the
names with a score of 0.7 about seven of ten are right. They never change which name is best.
Predictors then use the file, FOLDER/head.calibration.json, without being told. Use boxes that the
head was not trained on, and the words that you will ask for::

    # a folder of save_pretrained, a config, or a name that 'regionspot models' lists
    python tools/calibrate.py --model output/my_model --coco val.json images/
    # only prints how far scores can be trusted, before and after, on held-out images
    python tools/calibrate.py --model mini --coco val.json images/ --dry-run

It prints the expected calibration error of the best names (ten bins of as many regions each): with
the scores as they are, and by cross-validation over the images with the fitted numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="NAME|FILE|FOLDER", help="the model, with its head")
    add(
        "--coco",
        nargs=2,
        action="append",
        required=True,
        metavar=("JSON", "IMAGES"),
        help="labeled boxes in COCO format and their image folder; may be repeated",
    )
    add("--vocabulary", metavar="FILE", help="yaml file; by default the categories of each JSON")
    add("--folds", type=int, default=5, help="of the images, for the cross-validation")
    add("--diagram", metavar="FILE.png", help="draw the reliability diagram of held-out images")
    add("--dry-run", action="store_true", help="write no calibration")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import torch
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from torch import Tensor

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.calibration import fit_sigmoid, fit_temperature, write_calibration
from regionspot_d2.data.datasets.validation import read_annotations
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.evaluation.calibration import (
    Bin,
    calibration_error,
    draw_reliability,
    reliability,
)
from regionspot_d2.files import local_weights
from regionspot_d2.modeling.names import clean_name
from regionspot_d2.modeling.scoring import Scoring, scores_of_names
from regionspot_d2.modeling.word_files import read_words
from regionspot_d2.modeling.words import as_vocabulary
from regionspot_d2.pretrained import read_pretrained

# The logits of the names for the boxes of an image (R, C), and the places of the true ones (R,).
Labeled = tuple[Tensor, Tensor]


def name_boxes(
    predictor: RegionSpotPredictor, json_file: str, images: str, words: str | None
) -> list[Labeled]:
    """Compares the boxes of each image with the names; boxes of other names are left out."""
    content = read_annotations(json_file)
    names = {category["id"]: category["name"] for category in content["categories"]}
    vocabulary = read_words(words) if words else as_vocabulary(sorted(set(names.values())))
    if not vocabulary.is_plain:
        raise ValueError(f"--vocabulary {words}: one list of names is expected, without groups.")
    places = {clean_name(name).lower(): i for i, name in enumerate(vocabulary.names)}
    found = []
    for record in load_coco_json(json_file, images):
        boxes, labels = [], []
        for annotation in record["annotations"]:
            place = places.get(clean_name(names[annotation["category_id"]]).lower())
            box = annotation["bbox"]
            if place is None or annotation.get("iscrowd") or min(box[2:]) <= 0:
                continue
            boxes.append(BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS))
            labels.append(place)
        if boxes:
            predictor.set_image(record["file_name"])
            regions = predictor.region_embeddings(boxes=boxes)
            logits = predictor.model.score(regions, vocabulary).cpu()
            found.append((logits, torch.tensor(labels)))
    return found


def fitted(labeled: list[Labeled]) -> Scoring:
    """Scores by temperatures and a bias that suit these boxes."""
    logits, labels = zip(*labeled)
    temperature = fit_temperature(logits, labels)
    sigmoid_temperature, bias = fit_sigmoid(logits, labels)
    return Scoring(
        temperature=temperature, sigmoid_temperature=sigmoid_temperature, sigmoid_bias=bias
    )


def trust(labeled: list[Labeled], scorings: list[Scoring], kind: str) -> list[Bin]:
    """How the scores of the best names, image by image, go with how often they are right."""
    best, right = [], []
    for (logits, labels), scoring in zip(labeled, scorings):
        scores = scores_of_names(logits, None, scoring.changed(None, kind))
        best.append(scores.amax(1))
        right.append(scores.argmax(1) == labels)
    return reliability(torch.cat(best), torch.cat(right))


def held_out(labeled: list[Labeled], folds: int) -> list[Scoring]:
    """For each image the scoring that was fitted to the other folds."""
    scorings = []
    for fold in range(folds):
        scorings.append(fitted([x for i, x in enumerate(labeled) if i % folds != fold]))
    return [scorings[i % folds] for i in range(len(labeled))]


def report(labeled: list[Labeled], folds: int, diagram: str | None) -> dict[str, list[float]]:
    """Prints the calibration errors, and returns them: before and after, for each kind."""
    scorings = held_out(labeled, folds)
    errors = {}
    for kind in ("softmax", "sigmoid"):
        before = trust(labeled, [Scoring()] * len(labeled), kind)
        after = trust(labeled, scorings, kind)
        errors[kind] = [calibration_error(before), calibration_error(after)]
        print(
            f"{kind}: ECE {errors[kind][0]:.3f} as it is, {errors[kind][1]:.3f} on held-out images"
        )
        if kind == "softmax" and diagram:
            draw_reliability(diagram, after, "held-out images")
    return errors


@told_in_a_line("calibrate.py")
def main() -> None:
    args: argparse.Namespace = argument_parser().parse_args()
    cfg, _ = read_pretrained(args.model)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.NAMING.CALIBRATED = False
    head = local_weights(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
    if head is None and not args.dry_run:
        raise ValueError("MODEL.WEIGHTS is empty: there is no head to calibrate.")
    predictor = RegionSpotPredictor(cfg)
    labeled = [
        image
        for json_file, images in args.coco
        for image in name_boxes(predictor, json_file, images, args.vocabulary)
    ]
    if len(labeled) < args.folds or args.folds < 2:
        raise ValueError(
            f"{len(labeled)} images with labeled boxes do not make {args.folds} folds of at least "
            "two; give more with --coco, or fewer --folds."
        )
    regions = sum(len(labels) for _, labels in labeled)
    print(f"{regions} boxes in {len(labeled)} images")
    errors = report(labeled, args.folds, args.diagram)
    scoring = fitted(labeled)
    naming = {
        "TEMPERATURE": scoring.temperature,
        "SIGMOID_TEMPERATURE": scoring.sigmoid_temperature,
        "SIGMOID_BIAS": scoring.sigmoid_bias,
    }
    print(" ".join(f"MODEL.NAMING.{key} {value:.4g}" for key, value in naming.items()))
    if args.dry_run or head is None:
        return
    about = {
        "fitted_to": [Path(json_file).name for json_file, _ in args.coco],
        "regions": regions,
        "ece_before_and_on_held_out_images": errors,
    }
    print(f"Written: {write_calibration(head, naming, about)}")


if __name__ == "__main__":
    main()
