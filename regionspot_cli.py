"""The command ``regionspot``.

It stands beside the package, which takes seconds to import: help and mistakes are told at once.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

_COMMANDS = {
    "name": "name regions of photos and videos: regionspot name --input photo.jpg",
    "web": "serve a web page on which regions are drawn and named",
    "models": "list the models by name, for --config-file and from_pretrained",
}


def _name(arguments: Sequence[str]) -> int:
    from regionspot_d2.app.main import main as name_regions

    return name_regions(arguments, program="regionspot name")


def _web(arguments: Sequence[str]) -> int:
    try:
        from regionspot_d2.app.web.main import main as serve
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "gradio_image_annotation"):
            raise
        sys.exit(f"error: the package {error.name} is missing: pip install regionspot_d2[web]")
    return serve(arguments)


def _models(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(
        "regionspot models", description="Lists the models by name."
    ).parse_args(arguments)
    from regionspot_d2.model_zoo import MODELS

    for name, (_, what) in MODELS.items():
        print(f"{name:<18}{what}")
    print("\nAll but mini and mini_pooled need a trained head: --opts MODEL.WEIGHTS FILE")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, by default that of this process; returns the exit status."""
    commands = "\n".join(f"  {name:<10}{what}" for name, what in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        "regionspot",
        description="Names any region of an image with any words.",
        epilog=f"commands:\n{commands}\n\nregionspot COMMAND --help lists the options of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(_COMMANDS), metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    # Of libraries that others import; nothing that a reader could do about them.
    for message in ("`torch.jit.script` is deprecated", "pkg_resources is deprecated"):
        warnings.filterwarnings("ignore", message)
    run = {"name": _name, "web": _web, "models": _models}[args.command]
    try:
        return run(args.arguments)
    except ModuleNotFoundError as error:
        sys.exit(f"error: the package {error.name} is missing: pip install regionspot_d2[demo]")
    except KeyboardInterrupt:
        print("Stopped before the first image; nothing was done.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
