"""What the demo is told on its command line."""

from __future__ import annotations

import argparse
import glob
import re
import sys
from pathlib import Path

from regionspot_d2.data.datasets.vocabularies import VOCABULARIES, known_vocabulary

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Names regions of photos and videos.")
    parser.add_argument(
        "--config-file",
        default=str(ROOT / "configs" / "mini" / "regionspot_mini.yaml"),
        help="model to use; by default the small one that needs no download from a model hub",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="photos, videos, globs, or folders of photos",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for pictures and json")
    regions = parser.add_argument_group("regions, from one source")
    regions.add_argument(
        "--boxes", nargs="+", metavar="X0,Y0,X1,Y1", help="regions, in pixels of each image"
    )
    regions.add_argument(
        "--points",
        nargs="+",
        metavar="X,Y[,LABEL][;...]",
        help="regions by their points, in pixels of each image, with ; between those of one region; label 1 (default) is "
        "on the region, 0 beside it; may be given with --boxes",
    )
    regions.add_argument(
        "--proposals",
        metavar="FILE|sam",
        help='json {"file name": {"boxes": [[x0, y0, x1, y1], ...], "scores": [...]}}, or "sam": '
        "whatever the localizer's automatic mask generator finds",
    )
    regions.add_argument(
        "--detector-config",
        metavar="FILE|NAME",
        help="a detector of Detectron2: its config, or its name in the model zoo "
        "(COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml)",
    )
    regions.add_argument(
        "--detector-weights", metavar="FILE|URL", help="by default the zoo's, for a name of the zoo"
    )
    parser.add_argument(
        "--vocabulary",
        default="lvis",
        metavar="WORDS",
        help=f"{'|'.join(VOCABULARIES)}, or names with commas between, or a text file with a name per line",
    )
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.0, help="leave out names that score less"
    )
    parser.add_argument("--topk", type=int, default=1, help="names per region")
    parser.add_argument(
        "--attention",
        action="store_true",
        help="also draw where a trained head looks to name each region",
    )
    parser.add_argument(
        "--compare", metavar="RESULTS.json", help="draw the results of another run on the left"
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of videos each N-th frame alone"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run that was stopped in --output"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config changes: KEY VALUE ..."
    )
    # To argparse -5,10,20,30 is an option; to float() the space is nothing.
    args = parser.parse_args([re.sub(r"^(-[\d.]+,)", r" \1", text) for text in sys.argv[1:]])

    sources = [args.boxes or args.points, args.proposals, args.detector_config]
    if sum(bool(source) for source in sources) != 1:
        parser.error(
            "regions come from one source: --boxes and --points, --proposals, or --detector-config"
        )
    if args.detector_weights and not args.detector_config:
        parser.error("--detector-weights needs --detector-config")
    for option in ("every", "topk"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)}: 1 or more is expected")
    return args


def find_inputs(patterns: list[str]) -> list[Path]:
    found = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            inside = sorted(Path(pattern).iterdir())
            matches = [path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES]
        else:
            # A name that exists is meant as it is, brackets and all.
            exists = Path(pattern).exists()
            matches = [Path(p) for p in ([pattern] if exists else sorted(glob.glob(pattern)))]
        if not matches:
            raise SystemExit(f"error: --input {pattern}: there is no image.")
        found += matches
    return list(dict.fromkeys(found))


def read_vocabulary(words: str) -> list[str]:
    if words in VOCABULARIES:
        return known_vocabulary(words)
    if "," not in words and Path(words).is_file():
        try:
            # Some editors begin a file with a mark, which is no letter of the first name.
            lines = Path(words).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--vocabulary {words}: byte {error.start} is not UTF-8, in which names are expected."
            ) from error
        return [line.strip() for line in lines if line.strip()]
    return [word.strip() for word in words.split(",")]
