"""What a run depends on, of the demo's command line."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..files import sha256_of_file
from .region_formats import label_files

# Options that change the results of an image, besides the config, the vocabulary and the file
# of --proposals.
_DECISIVE = (
    "boxes points detector detector-config detector-weights topk confidence-threshold attention "
    "compare track"
)


def settings(
    args: argparse.Namespace, cfg: CfgNode, vocabulary: Any, examples: str | None = None
) -> dict[str, Any]:
    """What the results of an image depend on, by option.

    Args:
        args: the command line.
        cfg: the model's.
        vocabulary: plain values; what text stands for.
        examples: the digest of those that --examples gives.
    """
    options = vars(args)
    return {
        "--config-file or --opts": hashlib.sha256(cfg.dump().encode()).hexdigest(),
        "--vocabulary": vocabulary,
        "--examples": examples,
        "--proposals": [args.proposals, _digest(Path(args.proposals)) if args.proposals else None],
        **{f"--{name}": options[name.replace("-", "_")] for name in _DECISIVE.split()},
    }


def _digest(path: Path) -> str | None:
    """The sha256 of a file, or of all labels in a folder."""
    if path.is_dir():
        files = [f"{file} {sha256_of_file(file)}" for file in label_files(str(path))]
        return hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest()
    return sha256_of_file(path) if path.is_file() else None
