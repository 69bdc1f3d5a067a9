#!/usr/bin/env python
"""Draws results next to the ground truth, and plots where a model is right or wrong.

    tools/visualize_results.py --dataset coco_2017_val --output pictures \\
        --input output/inference/coco_2017_val/coco_instances_results.json
    tools/visualize_results.py --dataset lvis_v1_val --output pictures --images 50 \\
        --threshold 0.1 --input ours/lvis_instances_results.json \\
        --compare others/lvis_instances_results.json
    tools/visualize_results.py --dataset mine --output pictures --input results.json \\
        DATASETS.COCO_FORMAT "[['mine', 'mine/val.json', 'mine/images']]"

A picture shows, from left to right, the ground truth, --input and --compare, with the best name of
each region. The plots show, for each results file, precision and recall, AP of groups of classes,
TIDE's errors, and the most frequent confusions of one class with another.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--dataset", required=True, help="a registered dataset")
    parser.add_argument("--input", required=True, help="results json of an evaluation")
    parser.add_argument("--compare", help="a second results json on the same dataset")
    parser.add_argument("--output", required=True, help="folder for pictures and plots")
    parser.add_argument("--images", type=int, default=20, help="how many to draw, at random")
    parser.add_argument("--image-id", action="append", default=[], help="draw this one; repeatable")
    parser.add_argument("--threshold", type=float, default=0.2, help="lowest score that is drawn")
    parser.add_argument(
        "--task", choices=["bbox", "segm"], default="bbox", help="task of the plots"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import hotcoco
import hotcoco.plot
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api
from tqdm import tqdm

from regionspot_d2.app.names import OutputFolder
from regionspot_d2.app.results import is_number
from regionspot_d2.data.datasets import checked_annotations
from regionspot_d2.data.datasets.annotations import contiguous_ids
from regionspot_d2.data.images import MAX_PIXELS, read_image
from regionspot_d2.engine import load_config
from regionspot_d2.engine.config import check_datasets, told_in_a_line
from regionspot_d2.evaluation.coco import annotation_file, has_masks, load_truth
from regionspot_d2.files import write_atomically
from regionspot_d2.safe_loading import read_json

_TITLE_HEIGHT = 24
_GROUPS = {
    True: {"rare": "APr", "common": "APc", "frequent": "APf"},
    False: {"small": "APs", "medium": "APm", "large": "APl"},
}


def best_names(results: Sequence[Mapping[str, Any]], threshold: float) -> list[Mapping[str, Any]]:
    """Keeps the best name of each region, which may have several.

    Args:
        results: the results of one image, in COCO format.
        threshold: drop regions whose best name has a lower score.
    """
    best: dict[tuple[float, ...], Mapping[str, Any]] = {}
    for result in results:
        known = best.get(tuple(result["bbox"]))
        if known is None or result["score"] > known["score"]:
            best[tuple(result["bbox"])] = result
    return [result for result in best.values() if result["score"] >= threshold]


def to_instances(
    results: Sequence[Mapping[str, Any]],
    image_size: tuple[int, int],
    class_ids: Mapping[Any, int],
) -> Instances:
    """Converts results in COCO format to the Instances that Detectron2 draws."""
    found = Instances(image_size)
    boxes = np.array([result["bbox"] for result in results]).reshape(-1, 4)
    found.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    found.scores = torch.tensor([result["score"] for result in results])
    found.pred_classes = torch.tensor([class_ids[r["category_id"]] for r in results]).long()
    if results and all("segmentation" in result for result in results):
        found.pred_masks = np.stack([mask_api.decode(r["segmentation"]) for r in results])
    return found


def side_by_side(pictures: Mapping[str, np.ndarray]) -> Image.Image:
    """Puts pictures of one size in a row, each under its title."""
    height, width = next(iter(pictures.values())).shape[:2]
    row = Image.new("RGB", (width * len(pictures), height + _TITLE_HEIGHT), "white")
    for i, (title, picture) in enumerate(pictures.items()):
        row.paste(Image.fromarray(picture), (i * width, _TITLE_HEIGHT))
        ImageDraw.Draw(row).text((i * width + 6, 6), title, fill="black")
    return row


def draw_images(
    dataset: str,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    output: Path,
    image_ids: Sequence[Any],
    threshold: float,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Writes ``<image id>.jpg`` to an existing folder for each of the images.

    What cannot be part of a file name is replaced, and an id whose name is taken gets a number.

    Args:
        dataset: a registered dataset.
        runs: results by title.
        output: the folder.
        image_ids: the images to draw.
        threshold: the lowest score of a drawn region.
        max_pixels: larger images are refused.
    """
    metadata = MetadataCatalog.get(dataset)
    wanted = set(image_ids)
    records = [r for r in DatasetCatalog.get(dataset) if r["image_id"] in wanted]
    class_ids = contiguous_ids(dataset)
    by_image: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for title, results in runs.items():
        for result in results:
            if result["image_id"] in wanted:
                by_image.setdefault((title, result["image_id"]), []).append(result)
    names = OutputFolder(output, [r["file_name"] for r in DatasetCatalog.get(dataset)])
    for record in tqdm(records, desc="Drawing", unit="image", disable=None):
        image = read_image(record["file_name"], max_pixels=max_pixels)
        truth = Visualizer(image, metadata).draw_dataset_dict(record)
        pictures = {"ground truth": truth.get_image()}
        for title in runs:
            best = best_names(by_image.get((title, record["image_id"]), []), threshold)
            found = to_instances(best, image.shape[:2], class_ids)
            drawn = Visualizer(image, metadata).draw_instance_predictions(found)
            pictures[title] = drawn.get_image()
        [path] = names.claim(str(record["image_id"]), ".jpg")
        with write_atomically(path) as file:
            side_by_side(pictures).save(file, format="JPEG", quality=90)


def evaluate(
    annotations: hotcoco.COCO, results: Sequence[Mapping[str, Any]], task: str, is_lvis: bool
) -> hotcoco.COCOeval:
    """Evaluates results by the rules of LVIS or of COCO, for hotcoco's plots."""
    unwanted = "bbox" if task == "segm" else "segmentation"
    found = [{k: v for k, v in result.items() if k != unwanted} for result in results]
    evaluation = hotcoco.COCOeval(
        annotations, annotations.load_res(found), task, lvis_style=is_lvis
    )
    evaluation.run()
    return evaluation


def confusions(
    annotations: hotcoco.COCO, results: Sequence[Mapping[str, Any]], task: str
) -> dict[str, Any]:
    """Counts which names each object was given, in hotcoco's format.

    The background does not count: a second name of a region that was found is not a false positive.
    """
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for result in results:
        by_image.setdefault(result["image_id"], []).append(result)
    best = [result for found in by_image.values() for result in best_names(found, 0)]
    found = evaluate(annotations, best, task, is_lvis=False).confusion_matrix()
    for key in ("matrix", "normalized"):
        found[key] = np.array(found[key])
        found[key][-1] = found[key][:, -1] = 0
    return found


def plot_run(
    annotations: hotcoco.COCO,
    results: Sequence[Mapping[str, Any]],
    evaluation: hotcoco.COCOeval,
    task: str,
    output: Path,
) -> None:
    """Plots precision and recall, TIDE's errors and confusions of one run.

    Args:
        annotations: the ground truth.
        results: the content of one results file.
        evaluation: the evaluation of these results.
        task: "bbox" or "segm".
        output: an existing folder.
    """
    hotcoco.plot.pr_curve(
        evaluation, iou_thrs=[0.5, 0.75, 0.9], save_path=output / "precision_recall.png"
    )
    hotcoco.plot.tide_errors(evaluation.tide_errors(), save_path=output / "tide_errors.png")
    hotcoco.plot.top_confusions(
        confusions(annotations, results, task), save_path=output / "top_confusions.png"
    )


def plot_groups(runs: Mapping[str, hotcoco.COCOeval], is_lvis: bool, output: Path) -> None:
    """Plots AP by frequency (LVIS) or size of the objects, with a bar for each run."""
    import matplotlib.pyplot as plt

    groups = {"all": "AP", **_GROUPS[is_lvis]}
    figure, axes = plt.subplots(figsize=(6, 4))
    width = 0.8 / len(runs)
    for i, (title, evaluation) in enumerate(runs.items()):
        metrics = evaluation.get_results()
        # -1 means that the group has no objects.
        values = [max(100 * metrics[name], 0) for name in groups.values()]
        bars = axes.bar(np.arange(len(groups)) + i * width, values, width, label=title)
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks(np.arange(len(groups)) + width * (len(runs) - 1) / 2, list(groups))
    axes.set_ylabel("AP")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(output / "ap_by_group.png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def titles(paths: Sequence[str]) -> list[str]:
    """The file names, or the names of the closest parent folders, that distinguish the paths."""
    parts = [Path(path).absolute().with_suffix("").parts[::-1] for path in paths]
    return next(
        (list(names) for names in zip(*parts) if len(set(names)) == len(paths)), list(paths)
    )


def read_results(path: str) -> list[dict[str, Any]]:
    """Reads a results json.

    Raises:
        ValueError: it has another format.
        OSError: it does not exist.
    """
    results = read_json(path)
    needed = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(results, list):
        raise ValueError(f"{path} is not a results json, a list of dicts with {sorted(needed)}.")
    for number, result in enumerate(results):
        if not isinstance(result, dict) or not needed <= result.keys():
            raise ValueError(f"{path}: entry {number} is not a dict with {sorted(needed)}.")
        ids = [type(result[key]) for key in ("image_id", "category_id")]
        box, score = result["bbox"], result["score"]
        is_box = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
        if not is_box or not is_number(score) or not set(ids) <= {int, str}:
            raise ValueError(
                f"{path}: entry {number} must have ids (numbers or texts), four numbers as 'bbox' "
                "and a number as 'score'."
            )
    if not results:
        raise ValueError(f"{path} has no results.")
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(arguments)
    if args.images < 0 or not 0 <= args.threshold <= 1:
        parser.error("--images must be 0 or more, --threshold in 0..1")
    paths = [args.input, args.compare] if args.compare else [args.input]
    with told_in_a_line("visualize_results.py"):
        cfg = load_config("", args.opts, training=False, testing=False)
        check_datasets("--dataset", [args.dataset])
        runs = {title: read_results(path) for title, path in zip(titles(paths), paths)}
        draw(args, runs, cfg.INPUT.MAX_PIXELS)


def check_results(
    dataset: str, runs: Mapping[str, list[dict[str, Any]]], task: str, image_ids: Collection[Any]
) -> None:
    """Raises a ValueError for the first result that does not fit the dataset and the task."""
    known = {"category_id": contiguous_ids(dataset), "image_id": set(image_ids)}
    for title, results in runs.items():
        for number, result in enumerate(results):
            for key, ids in known.items():
                if result[key] not in ids:
                    raise ValueError(
                        f"{title}: entry {number} has the {key} {result[key]!r}, which {dataset} "
                        "does not have."
                    )
            if task == "segm" and "segmentation" not in result:
                raise ValueError(
                    f"{title}: entry {number} has no 'segmentation', which --task segm needs."
                )


def draw(
    args: argparse.Namespace, runs: Mapping[str, list[dict[str, Any]]], max_pixels: int
) -> None:
    """Draws the pictures and the plots of the command."""
    records = DatasetCatalog.get(args.dataset)
    ids = [record["image_id"] for record in records]
    check_results(args.dataset, runs, args.task, ids)
    is_lvis = MetadataCatalog.get(args.dataset).get("evaluator_type") == "lvis"
    with annotation_file(args.dataset) as kept:
        checked = checked_annotations(args.dataset, keep=kept)
        truth = load_truth(hotcoco, checked.path)
    if args.task == "segm" and not has_masks(checked):
        raise ValueError(f"{args.dataset} lacks masks, which --task segm needs.")
    output = Path(args.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)

    chosen = [image_id for image_id in ids if str(image_id) in args.image_id]
    if not args.image_id:
        chosen = random.Random(0).sample(ids, min(args.images, len(ids)))
    draw_images(args.dataset, runs, output, chosen, args.threshold, max_pixels)

    evaluations = {}
    for i, (title, found) in enumerate(runs.items()):
        results = truth.renumber(found)
        evaluations[title] = evaluate(truth.annotations, results, args.task, is_lvis)
        folder = output / ("compare" if i else "input")
        folder.mkdir(exist_ok=True)
        plot_run(truth.annotations, results, evaluations[title], args.task, folder)
    plot_groups(evaluations, is_lvis, output)
    print(f"{len(chosen)} pictures and the plots are in {output}.")


if __name__ == "__main__":
    main()
