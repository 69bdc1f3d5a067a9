"""What a run depends on, of the demo's command line."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ..files import sha256_of_file

# Options that change the results of an image, besides the config, the vocabulary and the file
# of --proposals.
_DECISIVE = (
    "boxes points detector-config detector-weights topk confidence-threshold attention compare"
)


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
