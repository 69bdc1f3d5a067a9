"""The run that the demo's command line starts."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from regionspot_cli import parse_name

from ..data.images import ImageReadError
from ..engine import load_config
from ..engine.config import find_config
from ..files import write_atomically
from ..journal import Journal, JournalError, JournalFullError
from ..modeling import RegionHead
from ..modeling.word_files import plain_words
from ..predictor import RegionSpotPredictor
from ..pretrained import check_device
from ..stopping import INTERRUPTED, stoppable
from .arguments import settings
from .example_files import Examples, find_examples
from .examples import as_list, show_examples, texts_of
from .formats import FORMATS, check_formats, write_formats
from .inputs import find_inputs, input_folders, read_vocabulary, tell
from .names import OutputFolder, one_line, printable
from .region_formats import label_files
from .results import OtherResults, table, to_coco, with_names
from .run import Run, write_line
from .sources import choose_source
from .tracking import check_tracking
from .video import Video, VideoReadError


def _check_attention(head: RegionHead, paths: Sequence[Path]) -> None:
    if not head.has_attention:
        raise SystemExit(
            f"error: --attention: {type(head).__name__} (MODEL.REGION_HEAD.NAME) has no attention "
            "to the image. A trained RegionSpotHead has: give its --config-file, and its weights "
            "by --opts MODEL.WEIGHTS."
        )
    for path in filter(Video.names, paths):
        raise SystemExit(f"error: --attention: {path} is a video; only photos show attention.")


def tell_what_stood_in(option: str, names: dict[str, str]) -> None:
    """Says in one line which known names stand in for those that the model does not know."""
    pairs = [f"'{known}' for '{name}'" for name, known in islice(names.items(), 8)]
    if len(names) > len(pairs):
        pairs.append(f"and {len(names) - len(pairs)} more")
    if pairs:
        tell(one_line(f"{option}: known names stand in: {', '.join(pairs)}."))


def output_folder(
    args: argparse.Namespace, paths: Sequence[Path], examples: Examples | None = None
) -> OutputFolder:
    """Makes the folder, or exits if an output would replace a file that the command names."""
    given = [args.config_file, args.proposals, args.compare, args.vocabulary]
    given += [args.detector_config, args.detector_weights, (args.detector or "").partition(":")[2]]
    given += [word.strip().removeprefix("@") for word in (args.vocabulary or "").split(",")]
    given += map(str, examples.files if examples else [])
    if args.proposals and Path(args.proposals).is_dir():
        given += map(str, label_files(args.proposals))
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --output: a folder is expected: {error}") from error
    folder = OutputFolder(output, [*paths, *filter(None, given)], input_folders(args.input))
    for name in ("results.json", "results.jsonl", *(FORMATS[each] for each in args.format)):
        if folder.is_input(output / name):
            raise SystemExit(
                f"error: --output {output}: its {name} is an input of this command and would be "
                "replaced; give another folder."
            )
    return folder


def build_predictor(
    args: argparse.Namespace, examples: Examples | None = None
) -> tuple[CfgNode, RegionSpotPredictor]:
    """Builds the model that the command line names, or exits with one line that says why not.

    Its vocabulary is that of --vocabulary, and what the examples show.
    """
    try:
        cfg = load_config(args.config_file, args.opts, training=False)
        check_device(cfg.MODEL.DEVICE)
        vocabulary = None
        if args.vocabulary is not None:
            vocabulary = read_vocabulary(args.vocabulary, is_all=examples is None)
        if examples is None:
            return cfg, RegionSpotPredictor(cfg, vocabulary=vocabulary)
        names = as_list(vocabulary)
        predictor = RegionSpotPredictor(cfg, vocabulary=None)
        show_examples(predictor, examples, names)
        return cfg, predictor
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        # str() of a KeyError is the repr of its message.
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise SystemExit(f"error: {reason}") from error
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: the package {error.name} is missing: pip install regionspot_d2[demo]"
        ) from error


def prepare(
    args: argparse.Namespace,
    paths: Sequence[Path],
    output: Path,
    examples: Examples | None = None,
) -> Run:
    """Builds everything a run needs, or exits with one line that says what is wrong."""
    other = OtherResults(args.compare) if args.compare else None
    cfg, predictor = build_predictor(args, examples)
    tell_what_stood_in("--vocabulary", predictor.stood_in)
    if args.attention:
        _check_attention(predictor.model.region_head, paths)
    source = choose_source(args, predictor.model, predictor.vocabulary)
    if examples is None:
        decisive = settings(args, cfg, plain_words(predictor.words))
    else:
        decisive = settings(args, cfg, texts_of(predictor.words), examples.digest())
    try:
        journal = Journal(output / "results.jsonl", decisive, resume=args.resume)
    except JournalError as error:
        option = "--resume" if args.resume else "--output"
        raise SystemExit(f"error: {option}: {error}") from error
    except OSError as error:
        raise SystemExit(f"error: --output: a folder to write to is expected: {error}") from error
    return Run(args, predictor, source, journal, other)


def name_all(
    run: Run, paths: Sequence[Path], folder: OutputFolder
) -> tuple[Counter[str], KeyboardInterrupt | JournalFullError | None]:
    """Runs over the inputs, whatever is wrong with some.

    Returns:
        How many inputs had each outcome, and what stopped the run before the last, if anything:
        Ctrl-C, SIGTERM, or a disk that takes no more results.
    """
    outcomes: Counter[str] = Counter()
    # Before any of them is read, so that a run that goes on finds the same names.
    jobs = [(path, folder.claim_for(path, path.name, *_endings(path, run.args))) for path in paths]
    try:
        for path, pictures in tqdm(jobs, desc="Naming regions", unit="image", disable=None):
            before = len(run.entries)
            try:
                if path.exists() and not path.is_file() and not path.is_dir():
                    raise OSError("it is a pipe or a device, not a file.")
                (run.video if Video.names(path) else run.photo)(path, pictures)
                found = any(entry["annotations"] for entry in run.entries[before:])
                outcomes["named" if found else "without regions"] += 1
            except JournalFullError:
                raise
            # Each library has its own errors for files that are damaged. None ends the run.
            except Exception as error:
                outcomes[_kind(error)] += 1
                known = isinstance(error, (OSError, ValueError))
                write_line(f"{path}: {'' if known else type(error).__name__ + ': '}{error}")
    except (KeyboardInterrupt, JournalFullError) as stop:
        return outcomes, stop
    return outcomes, None


def _endings(path: Path, args: argparse.Namespace) -> list[str]:
    """Those of the pictures of an input."""
    if args.no_pictures:
        return []
    if Video.names(path):
        return [".mp4"]
    # A photo of a phone takes seconds to write, and much space, as png.
    picture = ".jpg" if path.suffix.lower() in (".jpg", ".jpeg") else ".png"
    return [picture, f".attention{picture}"] if args.attention else [picture]


def _kind(error: Exception) -> str:
    kinds = {
        ImageReadError: "unreadable images",
        VideoReadError: "unreadable videos",
        OSError: "files or folders that cannot be read or written",
        ValueError: "unsuitable regions or images",
        MemoryError: "out of memory",
    }
    return next((text for kind, text in kinds.items() if isinstance(error, kind)), "other errors")


def report(run: Run, outcomes: Counter[str], total: int, folder: OutputFolder) -> int:
    """Writes all results and prints the table and the outcomes; returns how many failed."""
    output = folder.path
    entries = with_names(run.entries)
    results = to_coco(entries, run.predictor.vocabulary)
    print(table(run.entries, run.names))
    named, empty = outcomes.pop("named", 0), outcomes.pop("without regions", 0)
    failed = outcomes.total()
    kinds = ", ".join(f"{count} {kind}" for kind, count in outcomes.most_common())
    counts = f"{named} named, {empty} without regions, {failed} failed{kinds and f' ({kinds})'}."
    try:
        with write_atomically(output / "results.json", "w") as file:
            json.dump(results, file, indent=1)
    except OSError as error:
        print(f"\n{counts}")
        raise SystemExit(
            f"error: {output / 'results.json'} cannot be written: {error}. Results so far are in "
            "results.jsonl; the same command with --resume goes on."
        ) from error
    write_formats(run.args.format, entries, run.predictor.vocabulary, folder)
    written = (
        ""
        if run.args.no_pictures
        else f"{named + empty} {'picture' if named + empty == 1 else 'pictures'} and "
    )
    print(f"\nIn {printable(output)}: {written}results.json.\n{counts}")
    if failed:
        tell(f"{failed} of {total} images failed; see above.")
    return failed


def run_demo(args: argparse.Namespace) -> int:
    """Names what the command line names; returns the exit status."""
    check_formats(args.format)
    paths = find_inputs(args.input)
    if args.track:
        check_tracking()
        if not any(map(Video.names, paths)):
            raise SystemExit("error: --track: there is no video among the inputs.")
    examples = None if args.examples is None else find_examples(args.examples)
    folder = output_folder(args, paths, examples)
    run = prepare(args, paths, Path(args.output), examples)
    outcomes, stop = name_all(run, paths, folder)
    done = outcomes.total()
    try:
        failed = report(run, outcomes, len(paths), folder)
    except KeyboardInterrupt:
        tell("Stopped; the results are in results.jsonl. The same command with --resume goes on.")
        return INTERRUPTED
    if stop is not None:
        tell(
            f"Stopped after {done} of {len(paths)} images; their results are written. "
            f"{one_line(stop)}{' ' if str(stop) else ''}The same command with --resume goes on."
        )
        return 1 if isinstance(stop, JournalFullError) else INTERRUPTED
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Runs the demo.

    Args:
        arguments: the command line, by default that of this process.
        program: how the command is called, for its messages.

    Returns:
        The exit status: 1 if an image failed, 130 after Ctrl-C or SIGTERM.

    Raises:
        SystemExit: the command makes no sense, with one line that says why.
    """
    args = parse_name(sys.argv[1:] if arguments is None else arguments, program)
    return run_command(run_demo, args)


def run_command(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs what a command line asks for; its messages are single lines.

    Returns:
        The exit status: 130 after Ctrl-C or SIGTERM.

    Raises:
        SystemExit: as :func:`main`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            # A terminal that has no letter for a name shows its number.
            stream.reconfigure(errors="backslashreplace")
    setup_logger(name="regionspot_d2")
    try:
        args.config_file = find_config(args.config_file)
        with stoppable():
            return run(args)
    except KeyboardInterrupt:
        tell("Stopped before the first image; nothing was done.")
        return INTERRUPTED
    except SystemExit as stop:
        raise SystemExit(one_line(stop.code) if isinstance(stop.code, str) else stop.code) from None
