#!/usr/bin/env python
"""Extracts mask tokens once, so that training never runs the localizer.

    python tools/extract_tokens.py --config-file configs/regionspot_L.yaml --num-gpus 8 \
        --dataset objects365_v1_train --output datasets/mask_tokens/vit_b

Training then reads them with ``INPUT.TOKEN_CACHE datasets/mask_tokens/vit_b``. After a crash, the
same command continues where it stopped, with any number of processes. Without a GPU,
``--num-gpus`` counts processes on the CPU. With several machines (``--num-machines``,
``--machine-rank``, ``--dist-url``) the output must be on a disk that they share.
"""

from __future__ import annotations

import signal

if __name__ in ("__main__", "__mp_main__"):
    # The imports below take seconds. Ctrl-C meanwhile ends this, and each process, without a word.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import datetime

from regionspot_cli import CommandParser, begin, launch_parser


def argument_parser() -> CommandParser:
    parser = launch_parser(__doc__)
    parser.add_argument(
        "--dataset", nargs="+", help="registered datasets; by default those of DATASETS.TRAIN"
    )
    parser.add_argument(
        "--output", help="folder for a token cache per dataset; by default INPUT.TOKEN_CACHE"
    )
    parser.add_argument("--images-per-batch", type=int, default=1, help="for the localizer")
    parser.add_argument(
        "--images-per-shard",
        type=int,
        help="the most that a crash can lose; by default 1024 or fewer",
    )
    parser.add_argument("--amp", action="store_true", help="run the localizer in half precision")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from regionspot_d2.data.datasets import register_coco_format
from regionspot_d2.data.token_extraction import extract_tokens
from regionspot_d2.engine import ConfigError, load_config
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.modeling.interfaces import LOCALIZER_REGISTRY

_GO_ON = "What is written stays; the same command goes on from there."


def main(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Runs in each process."""
    setup_logger(distributed_rank=comm.get_rank())
    setup_logger(distributed_rank=comm.get_rank(), name="regionspot_d2")
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    localizer = LOCALIZER_REGISTRY.get(cfg.MODEL.LOCALIZER.NAME)(cfg).to(cfg.MODEL.DEVICE)
    for name in cfg.DATASETS.TRAIN:
        extract_tokens(
            cfg,
            localizer,
            name,
            cfg.INPUT.TOKEN_CACHE,
            images_per_batch=args.images_per_batch,
            images_per_shard=args.images_per_shard,
            amp=args.amp,
        )


def invoke_main(arguments: list[str] | None = None) -> None:
    """Reads the command line and starts the processes."""
    args = argument_parser().parse_args(arguments)
    opts = list(args.opts)
    if args.dataset:
        opts += ["DATASETS.TRAIN", repr(tuple(args.dataset))]
    if args.output:
        opts += ["INPUT.TOKEN_CACHE", args.output]
    with told_in_a_line("extract_tokens.py", lambda: _GO_ON):
        # The datasets that the config evaluates on may be missing.
        cfg = load_config(args.config_file, opts, testing=False)
        if not cfg.INPUT.TOKEN_CACHE:
            raise ConfigError(
                "INPUT.TOKEN_CACHE is empty; set it or --output to the folder for the tokens."
            )
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, cfg),
            # A process that has written its shards waits for the slowest one.
            timeout=datetime.timedelta(days=1),
        )


if __name__ == "__main__":
    invoke_main()
