"""The demo's command line, and the run it starts."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.logger import setup_logger
from PIL import Image
from tqdm import tqdm

from ..data.images import ImageReadError, read_image
from ..engine import load_config
from ..files import write_atomically
from ..journal import Journal, JournalError
from ..modeling import RegionHead
from ..predictor import RegionSpotPredictor
from .arguments import parse_arguments, settings
from .drawing import draw_attention, draw_regions, side_by_side
from .inputs import find_inputs, read_vocabulary, tell
from .names import OutputFolder, one_line, printable
from .results import Entry, OtherResults, is_entry, table, to_coco, to_entry
from .sources import RegionSource, choose_source
from .video import VIDEO_SUFFIXES, Video, VideoReadError, video_writer

_INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


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

    def photo(self, path: Path, pictures: Sequence[Path]) -> None:
        """Names the regions of a photo and draws them, and with --attention where the head looks.

        Results are kept even if the picture cannot be drawn or written.
        """
        entry = self.known(str(path))
        if entry is None or not all(map(Path.exists, pictures)):
            image = read_image(str(path))
            entry, attention = self.name_regions(str(path), image)
            self.journal.add(path, entry)
            self.entries.append(entry)
            _save(self.draw(entry, image), pictures[0])
            if attention is not None:
                panels = draw_attention(image, attention, entry["annotations"], self.names)
                _save(panels, pictures[1])
        else:
            self.entries.append(entry)

    def video(self, path: Path, pictures: Sequence[Path]) -> None:
        """Names the regions of a video's frames and draws them as a video."""
        video = Video(path, self.args.every)
        label = printable(path.name)
        frames = tqdm(video, desc=label, unit="frame", total=video.expected_frames, leave=False)
        with video_writer(pictures[0], video.fps) as write:
            for number, image in frames:
                name = f"{path}#{number}"
                # An unfinished video is written again, from what the journal has of its frames.
                entry = self.known(name)
                if entry is None:
                    entry, _ = self.name_regions(name, image)
                    self.journal.add(name, entry)
                self.entries.append(entry)
                write(self.draw(entry, image))
        # Only now, so that what could be read is kept.
        video.check_whole()

    def known(self, name: str) -> Entry | None:
        """The results that a run which is continued has of an image."""
        entry = self.journal.entries.get(name)
        return entry if is_entry(entry, self.names) else None

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
            _write(f"{file_name}: there is no region to name.")
        # Only background points can leave an empty mask; a name for nothing would mislead.
        empty = ~found.pred_boxes.nonempty()
        for region in found.region_index[empty].unique().tolist():
            _write(
                f"{file_name}: region {region} is left out: it has only background points, and "
                "its mask is empty."
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
        title = printable("/".join(Path(self.args.compare).absolute().parts[-2:]))
        annotations = self.other.of(entry["file_name"])
        if annotations is None:
            return side_by_side([(f"{title}: no results", image), ("this run", ours)])
        theirs = draw_regions(image, annotations, self.other.names)
        return side_by_side([(title, theirs), ("this run", ours)])


def _save(picture: np.ndarray, path: Path) -> None:
    # Whole or not at all: --resume takes a picture that exists for finished.
    with write_atomically(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def _write(message: str) -> None:
    tqdm.write(one_line(message), file=sys.stderr)


def output_folder(args: argparse.Namespace, paths: Sequence[Path]) -> OutputFolder:
    """Makes the folder, or exits if an output would replace a file that the command names."""
    given = [args.config_file, args.proposals, args.compare, args.vocabulary]
    given += [args.detector_config, args.detector_weights]
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output: a folder is expected: {error}") from error
    folder = OutputFolder(output, [*paths, *filter(None, given)])
    for name in ("results.json", "results.jsonl"):
        if folder.is_input(output / name):
            raise SystemExit(
                f"error: --output {output}: its {name} is an input of this command and would be "
                "replaced; give another folder."
            )
    return folder


def prepare(args: argparse.Namespace, paths: Sequence[Path], output: Path) -> Run:
    """Builds everything a run needs, or exits with one line that says what is wrong."""
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
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: the package {error.name} is missing: pip install regionspot_d2[demo]"
        ) from error
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


def name_all(run: Run, paths: Sequence[Path], folder: OutputFolder) -> tuple[Counter[str], bool]:
    """Runs over the inputs, whatever is wrong with some.

    Returns:
        How many inputs had each outcome, and whether Ctrl-C came.
    """
    outcomes: Counter[str] = Counter()
    endings = [".png", ".attention.png"] if run.args.attention else [".png"]
    # Before any of them is read, so that a run that goes on finds the same names.
    jobs = [(path, folder.claim(path.name, *_endings(path, endings))) for path in paths]
    try:
        for path, pictures in tqdm(jobs, desc="Naming regions", unit="image"):
            before = len(run.entries)
            try:
                if path.exists() and not path.is_file() and not path.is_dir():
                    raise OSError("it is a pipe or a device, not a file.")
                (run.video if is_video(path) else run.photo)(path, pictures)
                found = any(entry["annotations"] for entry in run.entries[before:])
                outcomes["named" if found else "without regions"] += 1
            # Each library has its own errors for files that are damaged. None ends the run.
            except Exception as error:
                outcomes[_kind(error)] += 1
                known = isinstance(error, (OSError, ValueError))
                _write(f"{path}: {'' if known else type(error).__name__ + ': '}{error}")
    except KeyboardInterrupt:
        return outcomes, True
    return outcomes, False


def _endings(path: Path, of_photos: list[str]) -> list[str]:
    return [".mp4"] if is_video(path) else of_photos


def _kind(error: Exception) -> str:
    kinds = {
        ImageReadError: "unreadable images",
        VideoReadError: "unreadable videos",
        OSError: "files or folders that cannot be read or written",
        ValueError: "unsuitable regions or images",
        MemoryError: "out of memory",
    }
    return next((text for kind, text in kinds.items() if isinstance(error, kind)), "other errors")


def report(run: Run, outcomes: Counter[str], total: int) -> int:
    """Writes results.json and prints the table and the outcomes; returns how many failed."""
    output = Path(run.args.output)
    results = to_coco(run.entries, run.predictor.vocabulary)
    try:
        with write_atomically(output / "results.json", "w") as file:
            json.dump(results, file, indent=1)
    except OSError as error:
        raise SystemExit(
            f"error: {output / 'results.json'} cannot be written: {error}. Results so far are in "
            "results.jsonl; the same command with --resume goes on."
        ) from error
    print(table(run.entries, run.names))
    named, empty = outcomes.pop("named", 0), outcomes.pop("without regions", 0)
    failed = outcomes.total()
    kinds = ", ".join(f"{count} {kind}" for kind, count in outcomes.most_common())
    print(f"\n{named + empty} pictures and results.json are in {printable(output)}.")
    print(f"{named} named, {empty} without regions, {failed} failed{kinds and f' ({kinds})'}.")
    if failed:
        print(f"{failed} of {total} images failed; see above.", file=sys.stderr)
    return failed


def run_demo(args: argparse.Namespace) -> int:
    """Names what the command line names; returns the exit status."""
    paths = find_inputs(args.input)
    folder = output_folder(args, paths)
    run = prepare(args, paths, Path(args.output))
    outcomes, stopped = name_all(run, paths, folder)
    done = outcomes.total()
    failed = report(run, outcomes, len(paths))
    if stopped:
        tell(
            f"Stopped after {done} of {len(paths)} images; their results are written. The same "
            "command with --resume goes on."
        )
        return _INTERRUPTED
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Returns:
        The exit status: 1 if an image failed, 130 after Ctrl-C.

    Raises:
        SystemExit: the command makes no sense, with one line that says why.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            # A terminal that has no letter for a name shows its number.
            stream.reconfigure(errors="backslashreplace")
    args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    setup_logger(name="regionspot_d2")
    try:
        return run_demo(args)
    except KeyboardInterrupt:
        tell("Stopped before the first image; nothing was done.")
        return _INTERRUPTED
    except SystemExit as stop:
        raise SystemExit(one_line(stop.code) if isinstance(stop.code, str) else stop.code) from None
