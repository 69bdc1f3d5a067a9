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

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from regionspot_d2.data.token_cache import TokenCacheError
from regionspot_d2.engine import ConfigError, RegionSpotTrainer, load_config
from regionspot_d2.files import WeightsNotFoundError


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
    args = default_argument_parser(epilog=__doc__).parse_args()
    try:
        # Check here first: a mistake is reported once, before any process starts.
        _load_config(args)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except (ConfigError, TokenCacheError, WeightsNotFoundError) as error:
        sys.exit(f"train_net.py: {error}")


if __name__ == "__main__":
    invoke_main()
