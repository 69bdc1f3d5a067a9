#!/usr/bin/env python
"""Trains and evaluates RegionSpot.

    # train on all GPUs of a machine, or in as many processes on the CPU; resume a stopped run
    ./train_net.py --config-file configs/train_o365_L.yaml --num-gpus 8
    ./train_net.py --config-file configs/train_o365_L.yaml --num-gpus 8 --resume
    # evaluate
    ./train_net.py --config-file configs/eval_lvis_glip.yaml --eval-only \\
        MODEL.WEIGHTS output/train_o365_L/model_final.pth

Your own data needs no code, only DATASETS.COCO_FORMAT "[['mine', 'mine/train.json',
'mine/images']]" and DATASETS.TRAIN "('mine',)". GETTING_STARTED.md walks through it.
"""

from __future__ import annotations

import signal

if __name__ in ("__main__", "__mp_main__"):
    # The imports below take seconds. Ctrl-C meanwhile ends this, and each process, without a word.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regionspot_cli import begin, launch_parser

if __name__ == "__main__":
    begin(launch_parser(__doc__))

from detectron2.config import CfgNode
from detectron2.engine import default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from regionspot_d2.app.names import printable
from regionspot_d2.engine import RegionSpotTrainer, load_config
from regionspot_d2.engine.config import cause, told_in_a_line


def _load_config(args: argparse.Namespace) -> CfgNode:
    only = args.eval_only
    return load_config(args.config_file, args.opts, training=not only, testing=only or None)


def main(args: argparse.Namespace) -> Mapping[str, Any] | None:
    """Runs in each process.

    Returns:
        Results of ``--eval-only``, and of training if ``TEST.EXPECTED_RESULTS`` is set.
    """
    cfg = _load_config(args)
    default_setup(cfg, args)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="regionspot_d2")
    if args.eval_only:
        results = RegionSpotTrainer.evaluate_checkpoint(cfg, resume=args.resume)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def invoke_main() -> None:
    """Reads the command line and starts the processes."""
    args = launch_parser(__doc__).parse_args()
    cfg, start = None, time.time()
    with told_in_a_line("train_net.py", lambda: _what_is_done(args, cfg, start)):
        # Check here first: a mistake is reported once, before any process starts.
        cfg = _load_config(args)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )


def _what_is_done(args: argparse.Namespace, cfg: CfgNode | None, start: float) -> str:
    if cfg is None:
        return "Nothing was done."
    if args.eval_only:
        return "Nothing was evaluated to the end; run the same command again."
    marker = Path(cfg.OUTPUT_DIR, "last_checkpoint")
    if not marker.is_file():
        period = cfg.SOLVER.CHECKPOINT_PERIOD
        return f"No checkpoint was written yet: there is one every {period} iterations."
    # The marker's file may hold anything; RegionSpotCheckpointer checks it when it is used.
    last = marker.with_name(printable(marker.read_bytes()[:300].decode(errors="replace").strip()))
    if marker.stat().st_mtime < start and not args.resume:
        return (
            f"This run wrote no checkpoint yet; --resume would go on from an earlier run's, {last}."
        )
    return f"The last checkpoint is {last}; the same command with --resume goes on from it."


def _without_traceback(record: logging.LogRecord) -> bool:
    """Detectron2 logs the traceback of what stops a training; this logs one line."""
    if record.exc_info and os.environ.get("REGIONSPOT_DEBUG") != "1":
        error = record.exc_info[1]
        record.msg, record.args = "Training stops: %s", (cause(error),)
        record.exc_info = None
    return True


if __name__ == "__main__":
    invoke_main()
