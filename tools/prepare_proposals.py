#!/usr/bin/env python
"""Writes the proposal file of a dataset, from any source of regions.

    # ground truth
    tools/prepare_proposals.py --dataset lvis_v1_val --source gt --output lvis_v1_val_gt.pkl
    # GLIP's boxes, or any detector's results json
    tools/prepare_proposals.py --dataset lvis_v1_val --source glip --boxes glip.json \\
        --output lvis_v1_val_glip.pkl
    tools/prepare_proposals.py --dataset coco_2017_val --source results --topk 100 \\
        --boxes coco_instances_results.json --min-score 0.05 --output coco_2017_val_detector.pkl
    # SAM's automatic masks, by the localizer of a RegionSpot config; run again to continue
    tools/prepare_proposals.py --dataset lvis_v1_minival --source sam \\
        --config-file configs/regionspot_B.yaml --points-per-side 32 --num-gpus 8 \\
        --output lvis_v1_minival_sam.pkl
    # any Detectron2 model: a yaml or LazyConfig file with its weights, or a name in the model zoo
    tools/prepare_proposals.py --dataset coco_2017_val --source detector --num-gpus 8 \\
        --config-file COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml --output coco_2017_val_frcnn.pkl
    # an existing proposal file: select some of its boxes, see their recall
    tools/prepare_proposals.py --dataset lvis_v1_val --source proposals --boxes all.pkl \\
        --topk 100 --output top100.pkl

Your own data needs no code: end the command with
DATASETS.COCO_FORMAT "[['mine', 'mine/val.json', 'mine/images']]". Evaluation reads the file with
MODEL.LOAD_PROPOSALS True DATASETS.PROPOSAL_FILES_TEST "('lvis_v1_val_gt.pkl',)".
"""

from __future__ import annotations

import signal

if __name__ in ("__main__", "__mp_main__"):
    # The imports below take seconds. Ctrl-C meanwhile ends this, and each process, without a word.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from regionspot_cli import CommandParser, begin

_SOURCES = ("gt", "glip", "results", "proposals", "sam", "detector")
# SAM's own, AUTOMATIC_MASK_SETTINGS, which would take seconds to import.
_SAM_OPTIONS: dict[str, int | float] = {
    "points-per-side": 32,
    "points-per-batch": 64,
    "pred-iou-thresh": 0.88,
    "stability-score-thresh": 0.95,
    "stability-score-offset": 1.0,
    "box-nms-thresh": 0.7,
    "crop-n-layers": 0,
    "crop-nms-thresh": 0.7,
    "crop-overlap-ratio": 512 / 1500,
    "crop-n-points-downscale-factor": 1,
    "min-mask-region-area": 0,
}


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--dataset", required=True, help="a registered dataset")
    parser.add_argument("--source", required=True, choices=_SOURCES)
    parser.add_argument("--output", required=True, help="the proposal file (.pkl) to write")
    parser.add_argument("--boxes", help="the file of --source glip, results or proposals")
    parser.add_argument("--topk", type=int, help="keep this many boxes per image")
    parser.add_argument("--min-score", type=float, help="drop boxes with a lower score")
    parser.add_argument(
        "--nms", type=float, help="drop boxes that overlap a better one by more than this IoU"
    )

    models = parser.add_argument_group("models (--source sam, detector)")
    models.add_argument("--config-file", default="", help="config of the model")
    models.add_argument(
        "--num-gpus", type=int, default=1, help="processes per machine, also on a CPU"
    )
    models.add_argument("--num-machines", type=int, default=1)
    models.add_argument("--machine-rank", type=int, default=0)
    models.add_argument("--dist-url", default="auto", help="needed with several machines")

    sam = parser.add_argument_group("SAM's automatic mask generator (--source sam)")
    for option, default in _SAM_OPTIONS.items():
        sam.add_argument(
            f"--{option}", type=type(default), default=default, help=f"default {default:.4g}"
        )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.data.detection_utils import check_image_size
from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from regionspot_d2.app.names import OutputFolder
from regionspot_d2.checkpoint import RegionSpotCheckpointer
from regionspot_d2.data import register_coco_format
from regionspot_d2.data.images import read_image
from regionspot_d2.data.proposal_sources import from_glip_json, from_instances, from_results_json
from regionspot_d2.data.proposals import (
    DatasetDict,
    Proposals,
    ProposalsByImage,
    fit_to_dataset,
    from_ground_truth,
    proposals_exist,
    read_proposals,
    select,
    write_proposals,
)
from regionspot_d2.engine import ConfigError, load_config
from regionspot_d2.engine.config import (
    check_datasets,
    explained,
    merge_config_file,
    told_in_a_line,
)
from regionspot_d2.files import fingerprint
from regionspot_d2.journal import Journal
from regionspot_d2.modeling.automatic_masks import AUTOMATIC_MASK_SETTINGS, automatic_boxes
from regionspot_d2.modeling.interfaces import LOCALIZER_REGISTRY

logger = logging.getLogger("regionspot_d2.prepare_proposals")

_FILES = {
    "glip": from_glip_json,
    "results": from_results_json,
    "proposals": lambda path: read_proposals(path)[0],
}
_MODELS = ("sam", "detector")

FindRegions = Callable[[DatasetDict], Instances]


def setup(args: argparse.Namespace) -> CfgNode:
    """Reads the config of the model, or of the datasets only; LazyConfigs are read later."""
    if args.source == "detector":
        cfg = _detector_config(args)
    else:
        # testing=False: the proposal files that the config names may be the ones written here.
        cfg = load_config(args.config_file, args.opts, training=False, testing=False)
        cfg.defrost()
    check_datasets("--dataset", [args.dataset])
    return cfg


def _detector_config(args: argparse.Namespace) -> CfgNode:
    cfg = get_cfg()
    # A detector's config is Detectron2's own; of RegionSpot's keys, only this one applies to it.
    cfg.DATASETS.COCO_FORMAT = []
    if _is_lazy(args.config_file):
        return cfg
    if os.path.exists(args.config_file):
        merge_config_file(cfg, args.config_file)
    else:
        try:
            merge_config_file(cfg, model_zoo.get_config_file(args.config_file))
            cfg.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(args.config_file)
        except RuntimeError as error:
            raise ConfigError(f"--config-file {args.config_file}: no such file; {error}") from error
    with explained(cfg, "the options"):
        cfg.merge_from_list(args.opts)
    with explained(cfg, ""):
        register_coco_format(cfg.DATASETS.COCO_FORMAT)
    return cfg


def _device(name: str) -> str:
    if name.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("There is no GPU; the model runs on the CPU.")
        return "cpu"
    return name


def _is_lazy(config_file: str) -> bool:
    return config_file.endswith(".py")


def sam_regions(args: argparse.Namespace, cfg: CfgNode) -> FindRegions:
    """Finds regions with the automatic mask generator and the localizer of a RegionSpot config."""
    localizer = LOCALIZER_REGISTRY.get(cfg.MODEL.LOCALIZER.NAME)(cfg).to(cfg.MODEL.DEVICE)
    settings = _sam_settings(args)

    def find(record: DatasetDict) -> Instances:
        image = read_image(record["file_name"], max_pixels=cfg.INPUT.MAX_PIXELS)  # RGB
        check_image_size(record, image)
        return automatic_boxes(localizer, torch.tensor(image).permute(2, 0, 1), **settings)

    return find


def _sam_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in AUTOMATIC_MASK_SETTINGS}


def detector_regions(args: argparse.Namespace, cfg: CfgNode) -> FindRegions:
    """Finds regions with any Detectron2 model: its detections, or else its proposals."""
    if _is_lazy(args.config_file):
        lazy = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
        model = instantiate(lazy.model).to(_device(lazy.train.device))
        mapper = instantiate(lazy.dataloader.test.mapper)
        weights = lazy.train.init_checkpoint
    else:
        model = build_model(cfg)
        mapper = DatasetMapper(cfg, is_train=False)
        weights = cfg.MODEL.WEIGHTS
    if not weights:
        logger.warning("The config names no weights (MODEL.WEIGHTS): these boxes are random.")
    RegionSpotCheckpointer(model).load(weights)
    model.eval()

    @torch.no_grad()
    def find(record: DatasetDict) -> Instances:
        output = model([mapper(record)])[0]
        return output["instances"] if "instances" in output else output["proposals"]

    return find


def run_model(
    args: argparse.Namespace, cfg: CfgNode, records: list[DatasetDict], folder: str
) -> ProposalsByImage:
    """Runs a model over this process's share of the images.

    Finished images are kept in ``folder`` until all are finished.

    Returns:
        The regions of all images in the main process, {} in the others.
    """
    config = Path(args.config_file).read_text() if _is_lazy(args.config_file) else cfg.dump()
    settings = {
        "dataset": args.dataset,
        "source": args.source,
        "config_file": args.config_file,
        "config_sha256": fingerprint((), config),
        "opts": args.opts,
        **(_sam_settings(args) if args.source == "sam" else {}),
    }
    # All processes divide the same list, since the journal lets none write before all have read.
    journal = Journal(Path(folder, "finished.jsonl"), settings, resume=True)
    todo = [record for record in records if str(record["image_id"]) not in journal.entries]
    logger.info(f"{len(journal.entries)} images are finished, {len(todo)} are left.")
    share = todo[comm.get_rank() :: comm.get_world_size()]
    if todo:
        find = (sam_regions if args.source == "sam" else detector_regions)(args, cfg)
        # None: a bar on a terminal only.
        hidden = None if comm.is_main_process() else True
        for record in tqdm(share, desc="Finding regions", unit="image", disable=hidden):
            entry = {k: v.tolist() for k, v in from_instances(find(record))._asdict().items()}
            journal.add(record["image_id"], entry)
    comm.synchronize()
    if not comm.is_main_process():
        return {}
    journal.reload()
    return {image_id: Proposals.create(**entry) for image_id, entry in journal.entries.items()}


def main(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Runs in each process."""
    setup_logger(distributed_rank=comm.get_rank(), name="regionspot_d2")
    setup_logger(distributed_rank=comm.get_rank())
    cfg.MODEL.DEVICE = _device(cfg.MODEL.DEVICE)
    register_coco_format(cfg.DATASETS.COCO_FORMAT)
    records = DatasetCatalog.get(args.dataset)
    unfinished = f"{args.output}.parts"
    info: dict[str, Any] = {"dataset": args.dataset, "source": args.source}
    if args.source == "gt":
        proposals, origin = from_ground_truth(records), args.dataset
    elif args.source in _FILES:
        proposals, origin = _FILES[args.source](args.boxes), args.boxes
        info["file"] = Path(args.boxes).name
    else:
        proposals, origin = run_model(args, cfg, records, unfinished), args.config_file
        info["config"] = args.config_file
        if args.source == "sam":
            info["settings"] = _sam_settings(args)
    if not comm.is_main_process():
        return
    info.update(topk=args.topk, min_score=args.min_score, nms=args.nms)
    limits = {"topk": args.topk, "min_score": args.min_score, "nms_threshold": args.nms}
    fitted = fit_to_dataset(proposals, records, origin)
    chosen = {image_id: select(regions, **limits) for image_id, regions in fitted.items()}
    print(summary(args.output, write_proposals(args.output, records, chosen, info)))
    if args.source in _MODELS:
        # Only what was written here: the folder may be somebody's.
        for file in Path(unfinished).glob("finished*.jsonl"):
            file.unlink()
        with contextlib.suppress(OSError):
            Path(unfinished).rmdir()


def summary(output: str, info: Mapping[str, Any]) -> str:
    """Describes the content of a proposal file in a few lines."""
    text = (
        f"{output}: {info['boxes']} boxes of {info['dataset']} from {info['source']}\n"
        f"  images: {info['images']}, without boxes: {info['images_without_boxes']}, "
        f"boxes per image: {info['boxes'] / max(info['images'], 1):.1f}\n"
    )
    recall = info["recall"]
    if recall is None:
        return text + "  recall: unknown, the dataset has no annotated boxes"
    return text + (
        f"  recall of {recall['objects']} annotated boxes: {100 * recall['recall_50']:.1f} % at "
        f"IoU 0.5, {100 * recall['recall_50_95']:.1f} % at IoU 0.5:0.95"
    )


def wrong_option(args: argparse.Namespace) -> str | None:
    """What is wrong with an option, before a model is built; None if nothing."""
    if args.topk is not None and args.topk < 1:
        return f"--topk {args.topk}: 1 or more is expected"
    if args.nms is not None and not 0 <= args.nms <= 1:
        return f"--nms {args.nms}: an IoU in 0..1 is expected"
    if args.min_score is not None and not 0 <= args.min_score <= 1:
        return f"--min-score {args.min_score}: scores are in 0..1"
    output, folder = args.output, os.path.dirname(os.path.abspath(args.output))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not output or os.path.isdir(output) or not os.path.isdir(folder):
        return f"--output {output}: a file to write is expected"
    if not os.access(folder, os.W_OK):
        return f"--output {output}: there is no right to write to {folder}"
    if OutputFolder(Path(folder), filter(None, [args.boxes])).is_input(Path(output)):
        return f"--output {output}: this is the file of --boxes, which would be replaced"
    return None


def invoke_main(arguments: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(arguments)
    for name in ("boxes", "output", "config_file"):
        vars(args)[name] = os.path.expanduser(vars(args)[name] or "")
    if fault := wrong_option(args):
        parser.error(fault)
    if args.source in _FILES and not args.boxes:
        parser.error(f"--source {args.source} needs --boxes FILE")
    if args.source in _FILES and not proposals_exist(args.boxes):
        parser.error(f"--boxes {args.boxes}: there is no such file")
    if args.source in _MODELS and not args.config_file:
        parser.error(f"--source {args.source} needs --config-file")
    if args.source not in _MODELS and args.num_gpus * args.num_machines > 1:
        parser.error(f"--source {args.source} runs in one process; leave out --num-gpus")
    go_on = "The same command goes on." if args.source in _MODELS else ""
    with told_in_a_line("prepare_proposals.py", lambda: go_on):
        cfg = setup(args)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, cfg),
        )


if __name__ == "__main__":
    invoke_main()
