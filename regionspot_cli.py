"""The command ``regionspot``, and what all command lines of the project share.

It stands beside the package, which takes seconds to import: help and mistakes are told at once.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_COMMANDS = {
    "name": "name regions of photos and videos: regionspot name --input photo.jpg",
    "web": "serve a web page on which regions are drawn and named",
    "index": "note what is in photos, for search: regionspot index --input photos/ --output FILE",
    "search": 'find regions in an index: regionspot search "red mug" --index FILE',
    "models": "list the models by name, for --config-file and from_pretrained",
}
_NAME_EXAMPLES = """examples:
  regionspot name --input photo.jpg
  regionspot name --input photos/ --vocabulary coco,forklift --boxes 10,20,200,300
  regionspot name --input photos/ --proposals detections.json --vocabulary @words.txt --topk 3
  regionspot name --input photos/ --boxes 10,20,200,300 --vocabulary coco --examples logos/"""
_INDEX_EXAMPLES = """examples:
  regionspot index --input photos/ --output photos.index
  regionspot index --input photos/ --output photos.index --resume
  regionspot index --input photos/ --output photos.index --proposals detections.json"""
_SEARCH_EXAMPLES = """examples:
  regionspot search "red mug" --index photos.index
  regionspot search mug dog bicycle --index photos.index --topk 32 --output found"""

# What libraries say of lines of their own, which nobody who runs a command can change: fvcore
# compiles a loss in a way that torch gives up; Detectron2's model zoo and CLIP import a part of
# setuptools that setup.py keeps; more workers than cores, Detectron2's default, only take turns.
_FOREIGN_WARNINGS = (
    ("`torch.jit.script` is deprecated", FutureWarning),
    ("pkg_resources is deprecated as an API", UserWarning),
    ("This DataLoader will create", UserWarning),
    ("torch.meshgrid: in an upcoming release", UserWarning),
)


class CommandParser(argparse.ArgumentParser):
    """Tells a mistake in one line, and shows descriptions and examples as they are written."""

    def __init__(self, *args: Any, text: str = "", **options: Any) -> None:
        """
        Args:
            *args: as for ``argparse.ArgumentParser``.
            text: a script's docstring. Its first paragraph says what the script does; the rest,
                which has examples, stands below the options.
            **options: as for ``argparse.ArgumentParser``.
        """
        if text:
            first, _, rest = text.partition("\n\n")
            options = {"description": first, "epilog": rest, **options}
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def begin(parser: argparse.ArgumentParser, *, others: bool = False) -> None:
    """Answers ``--help`` and tells wrong options, before a script's imports, which take seconds.

    The script parses its command line again when they are done.

    Args:
        parser: the script's.
        others: whether options that the parser does not know are for another program.
    """
    silence_foreign_warnings()
    (parser.parse_known_args if others else parser.parse_args)()


def silence_foreign_warnings() -> None:
    """Hides, in this process, what libraries say of themselves at each start."""
    for message, category in _FOREIGN_WARNINGS:
        warnings.filterwarnings("ignore", re.escape(message), category)


def launch_parser(text: str) -> CommandParser:
    """A parser with the options of Detectron2's ``default_argument_parser``, without its imports.

    Processes of one machine find a free port; several machines need ``--dist-url``.

    Args:
        text: as for :class:`CommandParser`.
    """
    parser = CommandParser(text=text)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="path of the config")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="only evaluate")
    add("--num-gpus", type=int, default=1, help="processes per machine, also on a CPU")
    add("--num-machines", type=int, default=1)
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    add("--dist-url", default="auto", help="needed with several machines: tcp://HOST:PORT")
    add("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    return parser


def name_parser(program: str | None = None) -> CommandParser:
    """The parser of ``regionspot name``."""
    parser = CommandParser(
        program, description="Names regions of photos and videos.", epilog=_NAME_EXAMPLES
    )
    add = parser.add_argument
    _add_model(parser)
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="photos, videos, globs, or folders of photos, with the folders in them",
    )
    _add_outputs(parser)
    _add_sources(parser)
    add(
        "--vocabulary",
        metavar="NAMES",
        help="lvis|coco|objects365|openimages, names, and @FILE with one name per line, separated "
        "by commas; or a .yaml file with names, several texts for a name, or groups of names; by "
        "default lvis, and with --examples no names beside theirs",
    )
    add(
        "--examples",
        metavar="FOLDER|FILE",
        help="names that are shown: a folder with a folder of images for each name, boxes in a "
        "COCO json, or a .safetensors of Exemplars.save; a name of --vocabulary keeps its text",
    )
    add(
        "--confidence-threshold",
        type=_threshold,
        metavar="T|auto",
        help="drop names with a lower score; auto, the default for regions that come with scores: "
        "twenty times the score of a guess, at most 0.3",
    )
    add("--topk", type=int, default=1, help="names per region")
    add(
        "--attention",
        action="store_true",
        help="also draw where a trained head looks to name each region",
    )
    add("--compare", metavar="RESULTS.json", help="draw the results of another run on the left")
    add("--every", type=int, default=1, metavar="N", help="name only every N-th frame of a video")
    add(
        "--track",
        action="store_true",
        help="follow the boxes of --proposals or a detector through a video; what is one thing has "
        "one name and one track_id",
    )
    add("--resume", action="store_true", help="continue a run that was stopped in --output")
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config changes: KEY VALUE ...")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file",
        default="mini",
        metavar="FILE|NAME",
        help="model to use: a config, or a name that 'regionspot models' lists; by default mini, "
        "the small one that needs no download from a model hub",
    )


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
        choices=["yolo", "voc", "csv"],
        default=[],
        help="also write the boxes as YOLO (data.yaml, labels/), Pascal VOC (annotations/) or "
        "results.csv",
    )


def _add_sources(parser: argparse.ArgumentParser, *, prompts: bool = True) -> None:
    add = parser.add_argument_group(
        "regions, from one source; without one, whatever is found in the image"
    ).add_argument
    if prompts:
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
        metavar="FILE|FOLDER|sam",
        help='json {"file name": {"boxes": [[x0, y0, x1, y1], ...], "scores": [...]}}, COCO json, '
        'csv, or a folder of YOLO labels; or "sam": the masks that the localizer finds under a '
        "grid of points",
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


def parse_name(arguments: Iterable[str], program: str | None = None) -> argparse.Namespace:
    """The command line of ``regionspot name``, checked as far as no file need be opened.

    Args:
        arguments: what follows the command.
        program: how the command is called, for its messages.

    Raises:
        SystemExit: the options make no sense; standard error has one line that says why.
    """
    parser = name_parser(program)
    # argparse takes "-5,10,20,30" for an option; a leading space avoids that, and float() skips it.
    args = parser.parse_args([re.sub(r"^(-[\d.]+,)", r" \1", text) for text in arguments])
    _check_sources(parser, args)
    if args.track and (
        not (args.proposals or args.detector or args.detector_config) or args.proposals == "sam"
    ):
        parser.error("--track follows boxes that --proposals FILE or a detector has of each frame")
    for option, value in [("every", args.every), ("topk", args.topk)]:
        if value < 1:
            parser.error(f"--{option} {value}: 1 or more is expected")
    for option in ("attention", "compare"):
        if args.no_pictures and vars(args)[option]:
            parser.error(f"--{option} is a picture, and --no-pictures draws none")
    if not args.output:
        parser.error("--output is empty; a folder is expected")
    if args.examples == "":
        parser.error("--examples is empty; a folder or a file is expected")
    if args.vocabulary is None and args.examples is None:
        args.vocabulary = "lvis"
    _expand(args, "config_file", "output", "proposals", "detector_weights", "examples")
    return args


def _check_sources(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    given = vars(args)
    sources = [given.get("boxes") or given.get("points"), args.proposals]
    sources += [args.detector, args.detector_config]
    if sum(bool(source) for source in sources) > 1:
        parser.error(
            "regions come from one source: --boxes and --points, --proposals, --detector, or "
            "--detector-config"
        )
    if args.detector_weights and not (args.detector or args.detector_config):
        parser.error("--detector-weights needs --detector")


def _threshold(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: scores are in 0..1, so is the threshold")
    return value


def name(arguments: Sequence[str], program: str = "regionspot name") -> int:
    """Runs ``regionspot name``; returns the exit status."""
    silence_foreign_warnings()
    parse_name(arguments, program)  # before imports of seconds
    from regionspot_d2.app.main import main as name_regions

    return name_regions(arguments, program=program)


def web_parser(program: str | None = "regionspot web") -> CommandParser:
    """The parser of ``regionspot web``."""
    parser = CommandParser(
        program,
        description="Serves a web page on which regions of photos are drawn and named.",
        epilog="example:\n  regionspot web --port 8000",
    )
    add = parser.add_argument
    _add_model(parser)
    add(
        "--host",
        default="127.0.0.1",
        help="what to listen on; by default only this machine, 0.0.0.0 lets others in",
    )
    add("--port", type=int, help="by default the first free one from 7860 on")
    add(
        "--max-upload",
        type=int,
        default=20,
        metavar="MB",
        help="the largest file that is taken, by default 20",
    )
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config changes: KEY VALUE ...")
    return parser


def index_parser() -> CommandParser:
    """The parser of ``regionspot index``."""
    parser = CommandParser(
        "regionspot index",
        description="Notes what the regions of photos look like, in a file for regionspot search.",
        epilog=_INDEX_EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--input",
        required=True,
        metavar="FOLDER",
        help="folder of photos, with the folders in it; --proposals names photos by their paths "
        "in it",
    )
    add("--output", required=True, metavar="FILE", help="index to write, in safetensors format")
    add(
        "--resume",
        action="store_true",
        help="keep what --output has, and add the photos that are new",
    )
    _add_sources(parser, prompts=False)
    add(
        "--vocabulary",
        default="lvis",
        metavar="NAMES",
        help="what regions are looked for by, where none are given: as for regionspot name, by "
        "default lvis; a search takes any words",
    )
    _add_model(parser)
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config changes: KEY VALUE ...")
    return parser


def parse_web(arguments: Iterable[str]) -> argparse.Namespace:
    """The command line of ``regionspot web``, checked; raises as :func:`parse_name` does."""
    parser = web_parser()
    args = parser.parse_args(list(arguments))
    if args.max_upload < 1:
        parser.error(f"--max-upload {args.max_upload}: 1 or more is expected")
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port {args.port}: 1..65535 is expected")
    args.config_file = os.path.expanduser(args.config_file)
    return args


def web(arguments: Sequence[str]) -> int:
    """Runs ``regionspot web``; returns the exit status."""
    parse_web(arguments)  # before imports of seconds
    try:
        from regionspot_d2.app.web.main import main as serve
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "gradio_image_annotation"):
            raise
        sys.exit(f"error: the package {error.name} is missing: pip install regionspot_d2[web]")
    return serve(arguments)


def parse_index(arguments: Iterable[str]) -> argparse.Namespace:
    """The command line of ``regionspot index``, checked; raises as :func:`parse_name` does."""
    parser = index_parser()
    args = parser.parse_args(list(arguments))
    _check_sources(parser, args)
    _expand(args, "input", "output", "config_file", "proposals", "detector_weights")
    return args


def search_parser() -> CommandParser:
    """The parser of ``regionspot search``."""
    parser = CommandParser(
        "regionspot search",
        description="Finds the regions of an index that words fit best.",
        epilog=_SEARCH_EXAMPLES,
    )
    add = parser.add_argument
    add("query", nargs="+", metavar="WORDS", help="what to look for; each is a search of its own")
    add("--index", required=True, metavar="FILE", help="what regionspot index wrote")
    add("--topk", type=int, default=16, help="regions per search, by default 16")
    add(
        "--output",
        default="output/search",
        metavar="FOLDER",
        help="for a sheet of pictures per search and results.json, by default output/search",
    )
    add("--no-pictures", action="store_true", help="draw no sheets")
    add("--images", metavar="FOLDER", help="where the photos are now, if they have moved")
    add(
        "--method",
        choices=["auto", "exact", "faiss"],
        default="auto",
        help="compare all regions, or have FAISS find the nearest, which may miss some; auto, the "
        "default, is exact up to a million regions",
    )
    _add_model(parser)
    add("--opts", nargs=argparse.REMAINDER, default=[], help="config changes: KEY VALUE ...")
    return parser


def parse_search(arguments: Iterable[str]) -> argparse.Namespace:
    """The command line of ``regionspot search``, checked; raises as :func:`parse_name` does."""
    parser = search_parser()
    args = parser.parse_args(list(arguments))
    if args.topk < 1:
        parser.error(f"--topk {args.topk}: 1 or more is expected")
    if not args.output:
        parser.error("--output is empty; a folder is expected")
    _expand(args, "index", "output", "images", "config_file")
    return args


def _expand(args: argparse.Namespace, *options: str) -> None:
    for option in options:
        value = vars(args)[option]
        vars(args)[option] = value and os.path.expanduser(value)


def _index(arguments: Sequence[str]) -> int:
    parse_index(arguments)  # before imports of seconds
    from regionspot_d2.app.search import index_photos

    return index_photos(arguments)


def _search(arguments: Sequence[str]) -> int:
    parse_search(arguments)  # before imports of seconds
    from regionspot_d2.app.search import search_photos

    return search_photos(arguments)


def _models(arguments: Sequence[str]) -> int:
    CommandParser(
        "regionspot models",
        description="Lists the models by name.",
        epilog="example:\n  regionspot models",
    ).parse_args(arguments)
    from regionspot_d2.model_zoo import MODELS

    for model, (_, what) in MODELS.items():
        print(f"{model:<18}{what}")
    print("\nAll but mini and mini_pooled need a trained head: --opts MODEL.WEIGHTS FILE")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, by default that of this process; returns the exit status."""
    commands = "\n".join(f"  {command:<10}{what}" for command, what in _COMMANDS.items())
    parser = CommandParser(
        "regionspot",
        usage="regionspot COMMAND ...",
        description="Names any region of an image with any words.",
        epilog=f"commands:\n{commands}\n\nregionspot COMMAND --help lists the options of each.",
    )
    # Its choices stand below; a heading of its own would only lengthen the help.
    parser.add_argument(
        "command", choices=list(_COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(arguments)
    silence_foreign_warnings()
    run = {"name": name, "web": web, "index": _index, "search": _search, "models": _models}[
        args.command
    ]
    try:
        return run(args.arguments)
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is missing: pip install regionspot_d2[demo]")
    except KeyboardInterrupt:
        print("Stopped; nothing was done.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
