#!/usr/bin/env python
"""Measures how well names of ground-truth boxes stand up to bad boxes, bad images and an attack.

For each model and condition it gives top-1 accuracy and the expected calibration error (ECE, bins
of as many regions each), and writes robustness.md, robustness.json and robustness.png::

    python tools/evaluate_robustness.py --output output/robustness \\
        --model RegionSpot configs/eval_lvis_gt.yaml MODEL.WEIGHTS heads/regionspot_L.safetensors \\
        --model "CLIP on crops" configs/baselines/eval_crop_gt.yaml

A model is its name in the tables, a config and options of it. All models see the same regions, the
same noise and the same strengths; each is attacked through its own gradients. Corruptions of the
image need imagecorruptions: pip install --no-deps imagecorruptions (INSTALL.md says why).
"""

from __future__ import annotations

from pathlib import Path

from robustness.kinds import ATTACK, CORRUPTIONS, STRENGTHS

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument(
        "--model",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "CONFIG"),
        help="a name for the tables, a config file, and alternating keys and values of it",
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=list(STRENGTHS),
        default=list(STRENGTHS),
        help="by default all",
    )
    parser.add_argument("--steps", type=int, default=10, help="of the attack, for each budget")
    parser.add_argument("--images", type=int, help="only so many, the first of the dataset")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from robustness.attack import Named, attack, name_regions
from robustness.conditions import Regions, disturbed
from robustness.report import Result, draw, table
from tqdm import tqdm

from regionspot_d2.checkpoint import build_regionspot
from regionspot_d2.data.build import load_records
from regionspot_d2.data.mapper import RegionMapper
from regionspot_d2.engine.config import load_config, told_in_a_line
from regionspot_d2.evaluation.calibration import calibration_error, reliability
from regionspot_d2.files import write_atomically
from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.interfaces import to_rgb
from regionspot_d2.modeling.vocabulary import dataset_class_names


def measure(
    label: str,
    model: RegionSpot,
    dataset: Sequence[Regions],
    class_names: Sequence[str],
    kinds: Sequence[str],
    *,
    steps: int,
    seed: int = 0,
) -> list[Result]:
    """Measures a model under all strengths of some kinds of conditions."""
    named: dict[tuple[str, float], list[Named]] = {}
    for regions in tqdm(dataset, desc=label):
        for kind in kinds:
            strengths = STRENGTHS[kind]
            found: Iterator[Named]
            if kind == ATTACK:
                found = attack(model, regions, class_names, strengths, steps=steps, seed=seed)
            else:
                conditions = (disturbed(regions, kind, s, seed) for s in strengths)
                found = (name_regions(model, each, class_names) for each in conditions)
            for strength, each in zip(strengths, found):
                named.setdefault((kind, strength), []).append(each)
    results = []
    for (kind, strength), parts in named.items():
        scores, right = (torch.cat(column) for column in list(zip(*parts))[:2])
        ece = calibration_error(reliability(scores, right))
        top1 = float(right.double().mean())
        results.append(Result(label, kind, strength, 100 * top1, 100 * ece))
    return results


def load_regions(cfg: CfgNode) -> list[Regions]:
    """The labeled regions of ``DATASETS.TEST``, as evaluation sees them, of images that have some.

    Raises:
        ValueError: there is not one dataset but none or several.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(f"DATASETS.TEST is {cfg.DATASETS.TEST}; one dataset is expected.")
    records = load_records(cfg.DATASETS.TEST[0], with_annotations=True, filter_empty=True)
    # Images as in a test, with their annotations as in training.
    mapper = RegionMapper(**{**RegionMapper.from_config(cfg, False), "is_train": True})
    found = []
    for record in tqdm(records, desc="images"):
        x: Any = mapper(record)
        if len(truth := x["instances"]):
            image = to_rgb(x["image"], cfg.INPUT.FORMAT)
            key = str(record["image_id"])
            found.append(Regions(key, image, truth.gt_boxes.tensor, truth.gt_classes))
    return found


def configs_of(models: Sequence[Sequence[str]]) -> dict[str, CfgNode]:
    """The configs of the command line by the names of the models.

    Raises:
        ValueError: a model has no config, two have one name, or they are of different datasets.
    """
    found: dict[str, CfgNode] = {}
    for words in models:
        if len(words) < 2 or words[0] in found:
            raise ValueError(f"--model {' '.join(words)}: a name of its own and a config expected.")
        found[words[0]] = load_config(words[1], words[2:], training=False, testing=True)
    if len({tuple(cfg.DATASETS.TEST) for cfg in found.values()}) > 1:
        raise ValueError("The models have different DATASETS.TEST; one for all is expected.")
    return found


def check_corruptions() -> None:
    """Exits if the package is missing, before hours of work."""
    try:
        import imagecorruptions  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: the package {error.name} is missing: pip install --no-deps imagecorruptions, "
            f"or choose --kinds other than {' '.join(CORRUPTIONS)}"
        ) from error


@told_in_a_line("evaluate_robustness.py")
def main() -> None:
    args = argument_parser().parse_args()
    if set(args.kinds) & set(CORRUPTIONS):
        check_corruptions()
    configs = configs_of(args.model)
    args.output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for label, cfg in configs.items():
        dataset = load_regions(cfg)[: args.images]
        class_names = dataset_class_names(cfg.DATASETS.TEST[0])
        model = build_regionspot(cfg).eval()
        options = {"steps": args.steps, "seed": args.seed}
        results += measure(label, model, dataset, class_names, args.kinds, **options)
        # After each model: what was measured outlives what comes after it.
        count = sum(len(regions.labels) for regions in dataset)
        title = f"{cfg.DATASETS.TEST[0]}: {count} regions in {len(dataset)} images, top-1 / ECE\n"
        with write_atomically(args.output / "robustness.md", "w") as file:
            file.write(f"{title}\n{table(results)}\n")
        with write_atomically(args.output / "robustness.json", "w") as file:
            content = {"models": args.model, **options, "regions": count}
            json.dump({**content, "results": [r._asdict() for r in results]}, file, indent=1)
        draw(results, args.output / "robustness.png")
    print(f"{title}\n{table(results)}")


if __name__ == "__main__":
    main()
