"""The demo's command line."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..data.datasets.vocabularies import VOCABULARIES
from ..files import sha256_of_file
from ..model_zoo import MODELS, get_config_file
from .formats import FORMATS

# Options that change the results of an image, besides the config, the vocabulary and the file
# of --proposals.
_DECISIVE = (
    "boxes points detector detector-config detector-weights topk confidence-threshold attention "
    "compare"
)


def argument_parser(program: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description="Names regions of photos and videos.")
    add = parser.add_argument
    add(
        "--config-file",
        default="mini",
        metavar="FILE|NAME",
        help=f"model to use: a config, or {'|'.join(MODELS)}; by default mini, the small one that "
        "needs no download from a model hub",
    )
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="photos, videos, globs, or folders of photos",
    )
    _add_outputs(parser)
    _add_sources(parser)
    add(
        "--vocabulary",
        default="lvis",
        metavar="NAMES",
        help=f"{'|'.join(VOCABULARIES)}, names, and @FILE with one name per line, separated by "
        "commas",
    )
    add("--confidence-threshold", type=_share, default=0.0, help="drop names with a lower score")
    add("--topk", type=int, default=1, help="names per region")
    add(
        "--attention",
        action="store_true",
        help="also draw where a trained head looks to name each region",
    )
    add("--compare", metavar="RESULTS.json", help="draw the results of another run on the left")
    add("--every", type=int, default=1, metavar="N", help="name only every N-th frame of a video")
    add("--resume", action="store_true", help="continue a run that was stopped in --output")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config changes: KEY VALUE ...")
    return parser


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("results, besides results.json in COCO format").add_argument
    add(
        "--output",
        default="output/demo",
        metavar="FOLDER",
        help="for pictures and results, by default output/demo",
    )
    add("--no-pictures", action="store_true", help="draw nothing: no picture, no video")
    add(
        "--format",
        nargs="+",
        choices=list(FORMATS),
        default=[],
        help="also write the boxes as YOLO (data.yaml, labels/), Pascal VOC (annotations/) or "
        "results.csv",
    )


def _add_sources(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "regions, from one source; without one, whatever is found in the image"
    ).add_argument
    add("--boxes", nargs="+", metavar="X0,Y0,X1,Y1", help="regions, in pixels of each image")
    add(
        "--points",
        nargs="+",
        metavar="X,Y[,LABEL][;...]",
        help="regions by their points, in pixels of each image, with ; between those of one "
        "region; label 1 (default) is on the region, 0 beside it; may be given with --boxes",
    )
    add(
        "--proposals",
        metavar="FILE|sam",
        help='json {"file name": {"boxes": [[x0, y0, x1, y1], ...], "scores": [...]}}, or "sam": '
        "the masks that the localizer finds under a grid of points",
    )
    add(
        "--detector",
        metavar="SOURCE",
        help="hf:ID, a zero-shot detector on the Hugging Face hub or in a folder, which looks for "
        "the names of --vocabulary (hf:IDEA-Research/grounding-dino-tiny); torchvision:NAME "
        "(torchvision:fasterrcnn_resnet50_fpn_v2); or detectron2:FILE|NAME, a config or a name in "
        "the model zoo (detectron2:COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml)",
    )
    add(
        "--detector-config", metavar="FILE|NAME", help="the same as --detector detectron2:FILE|NAME"
    )
    add("--detector-weights", metavar="FILE|URL", help="by default the published ones")


def parse_arguments(arguments: Iterable[str], program: str | None = None) -> argparse.Namespace:
    parser = argument_parser(program)
    # argparse takes "-5,10,20,30" for an option; a leading space avoids that, and float() skips it.
    args = parser.parse_args([re.sub(r"^(-[\d.]+,)", r" \1", text) for text in arguments])
    sources = [args.boxes or args.points, args.proposals, args.detector, args.detector_config]
    if sum(bool(source) for source in sources) > 1:
        parser.error(
            "regions come from one source: --boxes and --points, --proposals, --detector, or "
            "--detector-config"
        )
    if args.detector_weights and not (args.detector or args.detector_config):
        parser.error("--detector-weights needs --detector")
    for option, value in [("every", args.every), ("topk", args.topk)]:
        if value < 1:
            parser.error(f"--{option} {value}: 1 or more is expected")
    for option in ("attention", "compare"):
        if args.no_pictures and vars(args)[option]:
            parser.error(f"--{option} is a picture, and --no-pictures draws none")
    if not args.output:
        parser.error("--output is empty; a folder is expected")
    for option in ("config_file", "output", "proposals", "detector_weights"):
        value = vars(args)[option]
        vars(args)[option] = value and os.path.expanduser(value)
    if args.config_file in MODELS:
        args.config_file = get_config_file(args.config_file)
    return args


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: scores are in 0..1, so is the threshold")
    return value


def settings(args: argparse.Namespace, cfg: CfgNode, vocabulary: list[str]) -> dict[str, Any]:
    """What the results of an image depend on, by option."""
    options = vars(args)
    is_file = Path(args.proposals or "").is_file()
    return {
        "--config-file or --opts": hashlib.sha256(cfg.dump().encode()).hexdigest(),
        "--vocabulary": vocabulary,
        "--proposals": [args.proposals, sha256_of_file(args.proposals) if is_file else None],
        **{f"--{name}": options[name.replace("-", "_")] for name in _DECISIVE.split()},
    }
