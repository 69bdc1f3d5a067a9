"""Names regions of photos and videos. README.md beside this file has examples."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import find_inputs, parse_arguments, read_vocabulary
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from pictures import draw_attention, draw_regions, side_by_side, xyxy
from PIL import Image
from results import Entry, OtherResults, Record, to_coco, to_entry
from sources import RegionSource, from_arguments, from_detector, from_file, from_sam
from tabulate import tabulate
from tqdm import tqdm
from video import VIDEO_SUFFIXES, Video, video_writer

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.data.images import read_image
from regionspot_d2.engine import load_config
from regionspot_d2.modeling.interfaces import REGION_HEAD_REGISTRY
from regionspot_d2.modeling.vocabulary import clean_name


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def picture_paths(paths: Sequence[Path], output: Path) -> list[Path]:
    """Pictures are called after their images; images of the same name get a number."""
    names_seen: Counter[str] = Counter()
    pictures = []
    for path in paths:
        names_seen[path.name] += 1
        number = f"-{names_seen[path.name]}" if names_seen[path.name] > 1 else ""
        pictures.append(output / f"{path.name}{number}.{'mp4' if is_video(path) else 'png'}")
    return pictures


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # PyTorch raises AssertionError where it was built without CUDA.
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"error: MODEL.DEVICE {device}: {reason}") from error


def check_attention(cfg: CfgNode, paths: Sequence[Path]) -> None:
    head = cfg.MODEL.REGION_HEAD
    if not hasattr(REGION_HEAD_REGISTRY.get(head.NAME), "attention") or not head.IMAGE_TOKENS:
        raise SystemExit(
            f"error: --attention: {head.NAME} (MODEL.REGION_HEAD.NAME) has no attention to the image; a trained "
            "RegionSpotHead has: give its --config-file, and its weights by --opts MODEL.WEIGHTS."
        )
    for path in filter(is_video, paths):
        raise SystemExit(f"error: --attention: {path} is a video; attention is drawn of photos.")


def region_source(args: argparse.Namespace, predictor: RegionSpotPredictor) -> RegionSource:
    if args.detector_config:
        device = str(predictor.model.device)
        return from_detector(args.detector_config, args.detector_weights, device)
    if args.proposals == "sam":
        return from_sam(predictor.model.localizer)
    if args.proposals:
        return from_file(args.proposals)
    return from_arguments(args.boxes, args.points)


def settings(args: argparse.Namespace, cfg: CfgNode, vocabulary: list[str]) -> dict[str, Any]:
    """What decides over the results of an image, by option."""
    plain = (
        "boxes points detector-config detector-weights topk confidence-threshold attention compare"
    )
    file = Path(args.proposals or "")
    return {
        "--config-file or --opts": digest(cfg.dump().encode()),
        "--vocabulary": vocabulary,
        "--proposals": [args.proposals, digest(file.read_bytes()) if file.is_file() else None],
        **{f"--{name}": getattr(args, name.replace("-", "_")) for name in plain.split()},
    }


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Run:
    """Names the regions of one image after another, draws them, and notes the results."""

    def __init__(
        self,
        args: argparse.Namespace,
        predictor: RegionSpotPredictor,
        source: RegionSource,
        record: Record,
        other: OtherResults | None,
    ) -> None:
        self.args = args
        self.predictor = predictor
        self.source = source
        self.record = record
        self.other = other
        self.names = dict(enumerate(predictor.vocabulary, start=1))
        self.entries: list[Entry] = []

    def photo(self, path: Path, picture: Path) -> None:
        entry = self.record.entries.get(str(path))
        attention_picture = picture.with_suffix(".attention.png")
        pictures = [picture, attention_picture] if self.args.attention else [picture]
        if entry is None or not all(map(Path.exists, pictures)):
            image = read_image(str(path))
            entry, attention = self.name_regions(str(path), image)
            Image.fromarray(self.draw(entry, image)).save(picture)
            if attention is not None:
                panels = draw_attention(image, attention, entry["annotations"], self.names)
                Image.fromarray(panels).save(attention_picture)
            self.record.add(entry)
        self.entries.append(entry)

    def video(self, path: Path, picture: Path) -> None:
        video = Video(path, self.args.every)
        frames = tqdm(video, desc=path.name, unit="frame", total=video.expected_frames, leave=False)
        with video_writer(picture, video.fps) as write:
            for number, image in frames:
                name = f"{path}#{number}"
                # A video that was not finished is drawn anew, from what was noted of its frames.
                entry = self.record.entries.get(name)
                if entry is None:
                    entry, _ = self.name_regions(name, image)
                    self.record.add(entry)
                self.entries.append(entry)
                write(self.draw(entry, image))
        # What could be read is kept.
        video.check_whole()

    def name_regions(self, file_name: str, image: np.ndarray) -> tuple[Entry, np.ndarray | None]:
        """The names, and if asked for the attention (R, rows, columns), of an image's regions."""
        regions = self.source(Path(file_name).name, image)
        prompts = {
            "boxes": regions.boxes,
            "points": regions.points,
            "point_labels": regions.point_labels,
        }
        self.predictor.set_image(image)
        found = self.predictor.predict(**prompts, topk=self.args.topk)
        if len(found) == 0:
            tqdm.write(f"{file_name}: there is no region to name.", file=sys.stderr)
        # Background points alone may leave an empty mask; a name for nothing would mislead.
        empty = ~found.pred_boxes.nonempty()
        for region in found.region_index[empty].unique().tolist():
            tqdm.write(
                f"{file_name}: region {region} is left out: it has background points alone, and its mask is empty.",
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
        """The picture of an image (H, W, 3), with the other run's beside it if there is one."""
        ours = draw_regions(image, entry["annotations"], self.names)
        if self.other is None:
            return ours
        title = "/".join(Path(self.args.compare).absolute().parts[-2:])
        annotations = self.other.of(entry["file_name"])
        if annotations is None:
            return side_by_side([(f"{title}: no results", image), ("this run", ours)])
        theirs = draw_regions(image, annotations, self.other.names)
        return side_by_side([(title, theirs), ("this run", ours)])

    def table(self) -> str:
        rows = []
        for entry in self.entries:
            for annotation in entry["annotations"]:
                box = ", ".join(f"{value:.0f}" for value in xyxy(annotation))
                name = clean_name(self.names[annotation["category_id"]])
                file_name = Path(entry["file_name"]).name
                rows.append(
                    [file_name, annotation["region"], box, name, f"{annotation['score']:.3f}"]
                )
        return tabulate(rows, headers=["image", "region", "box (x0, y0, x1, y1)", "name", "score"])


def main() -> int:
    args = parse_arguments()
    setup_logger(name="regionspot_d2")
    paths = find_inputs(args.input)
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output: a folder is expected: {error}") from error
    other = OtherResults(args.compare) if args.compare else None
    try:
        cfg = load_config(args.config_file, args.opts, training=False)
        check_device(cfg.MODEL.DEVICE)
        vocabulary = read_vocabulary(args.vocabulary)
        if args.attention:
            check_attention(cfg, paths)
        predictor = RegionSpotPredictor(cfg, vocabulary=vocabulary)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        # As text a KeyError is the repr of its message.
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise SystemExit(f"error: {reason}") from error
    source = region_source(args, predictor)
    decisive = settings(args, cfg, vocabulary)
    try:
        record = Record(output / "results.jsonl", decisive, resume=args.resume)
    except OSError as error:
        raise SystemExit(f"error: --output: a folder to write to is expected: {error}") from error
    run = Run(args, predictor, source, record, other)

    failures = []
    pictures = picture_paths(paths, output)
    for path, picture in tqdm(
        zip(paths, pictures), total=len(paths), desc="Naming regions", unit="image"
    ):
        try:
            (run.video if is_video(path) else run.photo)(path, picture)
        except (OSError, ValueError) as error:
            failures.append(path)
            tqdm.write(f"{path}: {error}", file=sys.stderr)

    results = to_coco(run.entries, predictor.vocabulary)
    (output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(run.table())
    done = len(paths) - len(failures)
    print(f"\n{done} pictures and results.json are in {output}.")
    if failures:
        print(f"{len(failures)} of {len(paths)} images failed; see above.", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
