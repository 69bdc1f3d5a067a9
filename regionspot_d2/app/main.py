"""The demo's command line, and the run it starts."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from PIL import Image
from tqdm import tqdm

from ..data.datasets.vocabularies import VOCABULARIES
from ..data.images import read_image
from ..engine import load_config
from ..files import sha256_of_file
from ..journal import Journal, JournalError
from ..modeling import RegionHead
from ..predictor import RegionSpotPredictor
from .drawing import draw_attention, draw_regions, side_by_side
from .results import Entry, OtherResults, table, to_coco, to_entry
from .sources import RegionSource, choose_source, find_inputs, read_vocabulary
from .video import VIDEO_SUFFIXES, Video, video_writer

_CONFIG_FILE = Path(__file__).parents[2] / "configs" / "mini" / "regionspot_mini.yaml"
# Options that change the results of an image, besides the config, the vocabulary and the file
# of --proposals.
_DECISIVE = (
    "boxes points detector-config detector-weights topk confidence-threshold attention compare"
)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Names regions of photos and videos.")
    add = parser.add_argument
    add(
        "--config-file",
        default=str(_CONFIG_FILE),
        help="model to use; by default the small one that needs no download from a model hub",
    )
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="photos, videos, globs, or folders of photos",
    )
    add("--output", required=True, metavar="FOLDER", help="for pictures and json")
    _add_sources(parser)
    add(
        "--vocabulary",
        default="lvis",
        metavar="NAMES",
        help=f"{'|'.join(VOCABULARIES)}, or names separated by commas, or a text file with one "
        "name per line",
    )
    add("--confidence-threshold", type=float, default=0.0, help="drop names with a lower score")
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


def _add_sources(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("regions, from one source").add_argument
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
        "whatever the localizer's automatic mask generator finds",
    )
    add(
        "--detector-config",
        metavar="FILE|NAME",
        help="a Detectron2 detector: its config, or its name in the model zoo "
        "(COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml)",
    )
    add("--detector-weights", metavar="FILE|URL", help="by default the zoo's, for a name in it")


def parse_arguments(arguments: Iterable[str]) -> argparse.Namespace:
    parser = argument_parser()
    # argparse takes "-5,10,20,30" for an option; a leading space avoids that, and float() skips it.
    args = parser.parse_args([re.sub(r"^(-[\d.]+,)", r" \1", text) for text in arguments])
    sources = [args.boxes or args.points, args.proposals, args.detector_config]
    if sum(bool(source) for source in sources) != 1:
        parser.error(
            "regions come from one source: --boxes and --points, --proposals, or --detector-config"
        )
    if args.detector_weights and not args.detector_config:
        parser.error("--detector-weights needs --detector-config")
    for option, value in [("every", args.every), ("topk", args.topk)]:
        if value < 1:
            parser.error(f"--{option} {value}: 1 or more is expected")
    return args


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def picture_paths(paths: Sequence[Path], output: Path) -> list[Path]:
    """Pictures are named after their images; a repeated name gets a number."""
    names_seen: Counter[str] = Counter()
    pictures = []
    for path in paths:
        names_seen[path.name] += 1
        number = f"-{names_seen[path.name]}" if names_seen[path.name] > 1 else ""
        pictures.append(output / f"{path.name}{number}.{'mp4' if is_video(path) else 'png'}")
    return pictures


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # PyTorch raises AssertionError where it was built without CUDA.
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: MODEL.DEVICE {device}: {reason}") from error


def _check_attention(head: RegionHead, paths: Sequence[Path]) -> None:
    if not head.has_attention:
        raise SystemExit(
            f"error: --attention: {type(head).__name__} (MODEL.REGION_HEAD.NAME) has no attention "
            "to the image. A trained RegionSpotHead has: give its --config-file, and its weights "
            "by --opts MODEL.WEIGHTS."
        )
    for path in filter(is_video, paths):
        raise SystemExit(f"error: --attention: {path} is a video; only photos show attention.")


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


class Run:
    """Names the regions of one image after another, draws them, and notes the results."""

    def __init__(
        self,
        args: argparse.Namespace,
        predictor: RegionSpotPredictor,
        source: RegionSource,
        journal: Journal,
        other: OtherResults | None,
    ) -> None:
        self.args = args
        self.predictor = predictor
        self.source = source
        self.journal = journal
        self.other = other
        self.names = dict(enumerate(predictor.vocabulary, start=1))
        self.entries: list[Entry] = []

    def photo(self, path: Path, picture: Path) -> None:
        entry = self.journal.entries.get(str(path))
        attention_picture = picture.with_suffix(".attention.png")
        pictures = [picture, attention_picture] if self.args.attention else [picture]
        if entry is None or not all(map(Path.exists, pictures)):
            image = read_image(str(path))
            entry, attention = self.name_regions(str(path), image)
            Image.fromarray(self.draw(entry, image)).save(picture)
            if attention is not None:
                panels = draw_attention(image, attention, entry["annotations"], self.names)
                Image.fromarray(panels).save(attention_picture)
            self.journal.add(path, entry)
        self.entries.append(entry)

    def video(self, path: Path, picture: Path) -> None:
        video = Video(path, self.args.every)
        frames = tqdm(video, desc=path.name, unit="frame", total=video.expected_frames, leave=False)
        with video_writer(picture, video.fps) as write:
            for number, image in frames:
                name = f"{path}#{number}"
                # An unfinished video is written again, from what the journal has of its frames.
                entry = self.journal.entries.get(name)
                if entry is None:
                    entry, _ = self.name_regions(name, image)
                    self.journal.add(name, entry)
                self.entries.append(entry)
                write(self.draw(entry, image))
        # Only now, so that what could be read is kept.
        video.check_whole()

    def name_regions(self, file_name: str, image: np.ndarray) -> tuple[Entry, np.ndarray | None]:
        """The names of an image's regions, and with --attention (R, rows, columns) maps."""
        regions = self.source(Path(file_name).name, image)
        prompts: dict[str, Any] = {
            "boxes": regions.boxes,
            "points": regions.points,
            "point_labels": regions.point_labels,
        }
        self.predictor.set_image(image)
        found = self.predictor.predict(**prompts, topk=self.args.topk)
        if len(found) == 0:
            tqdm.write(f"{file_name}: there is no region to name.", file=sys.stderr)
        # Only background points can leave an empty mask; a name for nothing would mislead.
        empty = ~found.pred_boxes.nonempty()
        for region in found.region_index[empty].unique().tolist():
            tqdm.write(
                f"{file_name}: region {region} is left out: it has only background points, and "
                "its mask is empty.",
                file=sys.stderr,
            )
        if regions.scores is not None:
            scores = found.scores.new_tensor(regions.scores)
            found.scores = found.scores * scores[found.region_index]
        attention = None
        if self.args.attention:
            attention = self.predictor.attention_maps(**prompts).float().cpu().numpy()
        found = found[~empty & (found.scores >= self.args.confidence_threshold)]
        return to_entry(file_name, found), attention

    def draw(self, entry: Entry, image: np.ndarray) -> np.ndarray:
        """The picture of an image (H, W, 3), beside the other run's if there is one."""
        ours = draw_regions(image, entry["annotations"], self.names)
        if self.other is None:
            return ours
        title = "/".join(Path(self.args.compare).absolute().parts[-2:])
        annotations = self.other.of(entry["file_name"])
        if annotations is None:
            return side_by_side([(f"{title}: no results", image), ("this run", ours)])
        theirs = draw_regions(image, annotations, self.other.names)
        return side_by_side([(title, theirs), ("this run", ours)])


def prepare(args: argparse.Namespace, paths: Sequence[Path], output: Path) -> Run:
    """Builds everything a run needs, or exits with one line that says what is wrong."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output: a folder is expected: {error}") from error
    other = OtherResults(args.compare) if args.compare else None
    try:
        cfg = load_config(args.config_file, args.opts, training=False)
        _check_device(cfg.MODEL.DEVICE)
        vocabulary = read_vocabulary(args.vocabulary)
        predictor = RegionSpotPredictor(cfg, vocabulary=vocabulary)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        # str() of a KeyError is the repr of its message.
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise SystemExit(f"error: {reason}") from error
    if args.attention:
        _check_attention(predictor.model.region_head, paths)
    source = choose_source(args, predictor.model)
    decisive = settings(args, cfg, vocabulary)
    try:
        journal = Journal(output / "results.jsonl", decisive, resume=args.resume)
    except JournalError as error:
        raise SystemExit(f"error: --resume: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: --output: a folder to write to is expected: {error}") from error
    return Run(args, predictor, source, journal, other)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit status, 1 if an image failed."""
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    setup_logger(name="regionspot_d2")
    paths, output = find_inputs(args.input), Path(args.output)
    run = prepare(args, paths, output)
    failures = []
    pictures = zip(paths, picture_paths(paths, output))
    for path, picture in tqdm(pictures, total=len(paths), desc="Naming regions", unit="image"):
        try:
            (run.video if is_video(path) else run.photo)(path, picture)
        except (OSError, ValueError) as error:
            failures.append(path)
            tqdm.write(f"{path}: {error}", file=sys.stderr)
    results = to_coco(run.entries, run.predictor.vocabulary)
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(table(run.entries, run.names))
    print(f"\n{len(paths) - len(failures)} pictures and results.json are in {output}.")
    if failures:
        print(f"{len(failures)} of {len(paths)} images failed; see above.", file=sys.stderr)
    return 1 if failures else 0
