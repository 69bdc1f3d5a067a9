#!/usr/bin/env python
"""Prints how many of a dataset's boxes are found, and named rightly, where no region is given.

    python tools/mini/evaluate_everything.py --coco datasets/tinycoco/instances.json \\
        datasets/tinycoco/images
"""

from __future__ import annotations

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--coco", nargs=2, required=True, metavar=("JSON", "IMAGES"))
    parser.add_argument("--config-file", default="mini", metavar="FILE|NAME")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.data.datasets.corrections import photos_of
from regionspot_d2.data.datasets.trained_on import warn_of_known_photos
from regionspot_d2.engine import load_config

KEPT = (5, 10, 20, 50, 100)
LARGE = 96 * 96  # COCO's


def hits(predictor: RegionSpotPredictor, record: dict) -> tuple[Tensor, Tensor]:
    """Which boxes of an image are found: (boxes, 2 * len(KEPT)) bool, and their areas.

    The first half of the columns takes any name, the second only the right one.
    """
    things = [a for a in record["annotations"] if not a.get("iscrowd")]
    corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in things]
    boxes = Boxes(torch.tensor(corners).reshape(-1, 4))
    classes = torch.tensor([a["category_id"] for a in things])
    predictor.set_image(record["file_name"])
    found = predictor.everything(max_regions=max(KEPT)).to("cpu")
    near = pairwise_iou(boxes, found.pred_boxes) >= 0.5
    right = near & (classes[:, None] == found.pred_classes)
    columns = [match[:, :kept].any(1) for match in (near, right) for kept in KEPT]
    return torch.stack(columns, dim=1), boxes.area()


def main() -> None:
    args = argument_parser().parse_args()
    records = load_coco_json(*args.coco, "to_evaluate")
    cfg = load_config(args.config_file, training=False)
    names = MetadataCatalog.get("to_evaluate").thing_classes
    predictor = RegionSpotPredictor(cfg, vocabulary=names)
    note = predictor.model.region_head.trained_on
    warn_of_known_photos(note, args.coco[0], photos_of(records))
    bar = tqdm(records, desc="Finding regions", unit="image", disable=None)
    rows = [hits(predictor, record) for record in bar if record["annotations"]]
    match, areas = (torch.cat(column) for column in zip(*rows))
    large = areas > LARGE
    recall, of_large = (100 * m.float().mean(0) for m in (match, match[large]))
    table = [
        [kept, recall[i], recall[i + len(KEPT)], of_large[i], of_large[i + len(KEPT)]]
        for i, kept in enumerate(KEPT)
    ]
    print(f"{len(match)} boxes, {int(large.sum())} of them large; recall at IoU 0.5, in percent")
    headers = ["regions kept", "any name", "right name", "large, any name", "large, right name"]
    print(tabulate(table, headers=headers, floatfmt=".1f"))


if __name__ == "__main__":
    main()
