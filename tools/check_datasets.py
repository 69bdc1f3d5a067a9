#!/usr/bin/env python
"""Reports which datasets are complete: files, image and box counts, unreadable images.

    tools/check_datasets.py                     # all datasets of the project
    tools/check_datasets.py --dataset lvis_v1_val --dataset coco_2017_val --sample 500
    tools/check_datasets.py --dataset mine \\
        DATASETS.COCO_FORMAT "[['mine', 'mine/val.json', 'mine/images']]"

With --dataset, the exit status is 1 if one of them is missing or damaged.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--config-file", default="", help="a config with your own data")
    parser.add_argument(
        "--dataset", action="append", default=[], help="check only this one; repeatable"
    )
    parser.add_argument("--sample", type=int, default=20, help="images to open, per dataset")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from tqdm import tqdm

from regionspot_d2.data import ODINW_13, ODINW_35
from regionspot_d2.data.datasets import AnnotationsError, checked_annotations, source_file
from regionspot_d2.data.images import MAX_PIXELS, ImageReadError, read_image
from regionspot_d2.engine import load_config
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.evaluation.lvis import check_federated
from regionspot_d2.files import data_root

_NAMED_OFFENDERS = 3


class Report(NamedTuple):
    """The findings on one dataset; ``problems`` is empty if it is complete."""

    name: str
    split: str
    images: int | None
    boxes: int | None
    classes: int | None
    problems: list[str]


def dataset_names() -> list[str]:
    """COCO, LVIS and the datasets this project registers; of ODinW, only the evaluated splits."""
    prefixes = ("objects365_", "openimages_", "v3det_")
    training = [name for name in DatasetCatalog.list() if name.startswith(prefixes)]
    coco_and_lvis = [
        "coco_2017_train",
        "coco_2017_val",
        "tinycoco",
        "lvis_v1_train",
        "lvis_v1_train_base",
        "lvis_v1_val",
        "lvis_v1_minival",
    ]
    return coco_and_lvis + sorted(training) + list(dict.fromkeys(ODINW_13 + ODINW_35))


def check_dataset(
    name: str, sample: int, backend: str = "hotcoco", max_pixels: int = MAX_PIXELS
) -> Report:
    """Checks the files of a registered dataset, and opens ``sample`` images spread over it.

    ``backend`` is ``TEST.EVALUATION_BACKEND``, ``max_pixels`` is ``INPUT.MAX_PIXELS``.
    """
    metadata = MetadataCatalog.get(name)
    split = metadata.get("split", "")
    paths = (metadata.get("json_file"), metadata.get("image_root"))
    json_file, image_root = (path and os.fspath(path) for path in paths)
    missing = []
    if json_file and not PathManager.exists(json_file):
        missing.append(source_file(json_file))
    if image_root and not PathManager.exists(image_root):
        missing.append(image_root)
    if missing:
        return Report(name, split, None, None, None, [f"missing: {', '.join(missing)}"])
    try:
        checked = checked_annotations(name) if json_file else None
        if checked and metadata.get("evaluator_type") == "lvis":
            check_federated(checked, backend)
        records = DatasetCatalog.get(name)
    except Exception as error:  # whatever is wrong with one dataset, check the others
        kind = "" if isinstance(error, AnnotationsError) else f"{type(error).__name__}: "
        return Report(name, split, None, None, None, [f"{kind}{error}"])
    boxes = sum(len(record.get("annotations", [])) for record in records)
    classes = len(metadata.get("thing_classes", []))
    return Report(
        name, split, len(records), boxes, classes, _check_images(records, sample, max_pixels)
    )


def _check_images(records: Sequence[dict[str, Any]], sample: int, max_pixels: int) -> list[str]:
    chosen = np.linspace(0, len(records) - 1, min(sample, len(records))).round().astype(int)
    offenders = []
    for index in chosen:
        problem = _image_problem(records[index], max_pixels)
        if problem:
            offenders.append(f"image '{records[index]['image_id']}': {problem}")
    named = offenders[:_NAMED_OFFENDERS]
    if len(offenders) > len(named):
        named.append(f"and {len(offenders) - len(named)} more of {len(chosen)} images checked")
    return named


def _image_problem(record: dict[str, Any], max_pixels: int) -> str:
    try:
        height, width = read_image(record["file_name"], max_pixels=max_pixels).shape[:2]
    except ImageReadError as error:
        return str(error)
    if (width, height) != (record["width"], record["height"]):
        return (
            f"{record['file_name']} is {width} x {height}, the annotations say "
            f"{record['width']} x {record['height']}"
        )
    return ""


def table(reports: Sequence[Report]) -> str:
    """Formats reports as a table, followed by the problems."""
    rows = [
        (
            report.name,
            report.split,
            *("" if n is None else f"{n:,}" for n in report[2:5]),
            "ok" if not report.problems else "missing" if report.images is None else "damaged",
        )
        for report in reports
    ]
    headers = ("dataset", "split", "images", "boxes", "classes", "state")
    lines = [tabulate(rows, headers, colalign=("left", "left", "right", "right", "right", "left"))]
    for report in reports:
        if report.problems:
            lines.append(f"{report.name}: {'; '.join(report.problems)}")
    return "\n".join(lines)


@told_in_a_line("check_datasets.py")
def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    # The report below says which datasets of the config are missing.
    cfg = load_config(args.config_file, args.opts, training=False, testing=False)

    own = [entry[0] for entry in cfg.DATASETS.COCO_FORMAT]
    names = args.dataset or list(dict.fromkeys(own + dataset_names()))
    unknown = [name for name in names if name not in DatasetCatalog]
    if unknown:
        parser.error(f"not registered: {', '.join(unknown)}")
    backend, max_pixels = cfg.TEST.EVALUATION_BACKEND, cfg.INPUT.MAX_PIXELS
    bar = tqdm(names, desc="Checking", unit="dataset", disable=None)
    reports = [check_dataset(name, args.sample, backend, max_pixels) for name in bar]
    print(f"Datasets in {data_root()}")
    print(table(reports))
    if args.dataset and any(report.problems for report in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
