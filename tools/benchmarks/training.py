#!/usr/bin/env python
"""Measures training from cached mask tokens, on synthetic images, and the cache itself.

    # where the time of a step goes: the mini model, or the paper's sizes with random weights
    python tools/benchmarks/training.py step --config-file configs/mini/train_tinycoco.yaml
    python tools/benchmarks/training.py step --config-file configs/regionspot_B.yaml \\
        --random-weights
    # images per second of two processes against one, the same batch and one thread in each
    python tools/benchmarks/training.py processes --config-file configs/mini/train_tinycoco.yaml
    # memory of loss and head over the 13,204 names of V3Det
    python tools/benchmarks/training.py vocabulary --config-file configs/regionspot_B.yaml \\
        --random-weights
    # reading an image's mask tokens, against one file per image
    python tools/benchmarks/training.py token-cache --images 5000

``MODEL.DEVICE cpu`` at the end of the first three measures the CPU of a machine with a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from regionspot_cli import CommandParser, begin

_MEASUREMENTS = {
    "step": "the share of each part in the time of a training step",
    "processes": "how many times the images per second of one process two processes reach",
    "vocabulary": "the memory of head and loss over a vocabulary of 13,204 names",
}


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _MEASUREMENTS.items():
        one = commands.add_parser(name, help=text)
        one.add_argument("--config-file", required=True)
        one.add_argument("--random-weights", action="store_true", help="download nothing")
        one.add_argument("--steps", type=int, default=10)
        one.add_argument("--images", type=int, default=4, help="in a batch, of each process")
        one.add_argument("--boxes", type=int, default=10, help="in an image")
        one.add_argument("--threads", type=int, default=1, help="of each process")
        if name == "processes":
            one.add_argument("--repeats", type=int, default=2, help="of both, in turns")
        one.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    cache = commands.add_parser("token-cache", help="reading tokens, against a file per image")
    cache.add_argument("--images", type=int, default=5000)
    cache.add_argument("--boxes", type=int, default=12, help="per image, on average")
    cache.add_argument("--images-per-shard", type=int, default=1024)
    cache.add_argument("--folder", help="disk to measure on; by default that of temporary files")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import numpy as np
import token_cache
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from measuring import (
    Ratio,
    Stopwatch,
    now,
    peak_bytes,
    reset_peak,
    use_random_text_embeddings,
)
from PIL import Image

from regionspot_d2.data.build import cache_manifest
from regionspot_d2.data.token_cache import TokenCacheWriter
from regionspot_d2.engine import RegionSpotTrainer, load_config
from regionspot_d2.files import module_fingerprint
from regionspot_d2.modeling import LOCALIZER_REGISTRY

_IMAGES = 64
_SIZE = (640, 480)
_WARM_UP = 2
_V3DET_NAMES, _REGIONS = 13_204, 300


def benchmark_config(args: argparse.Namespace, folder: Path, processes: int = 1) -> CfgNode:
    """Training on the synthetic dataset in ``folder``, without evaluation."""
    values: dict[str, Any] = {
        "DATASETS.COCO_FORMAT": [["synthetic", f"{folder}/instances.json", f"{folder}/images"]],
        "DATASETS.TRAIN": ("synthetic",),
        "DATASETS.TRAIN_RATIOS": [],
        "DATASETS.TEST": (),
        "DATASETS.PROPOSAL_FILES_TEST": (),
        "DATALOADER.NUM_WORKERS": 1,
        "INPUT.TOKEN_CACHE": f"{folder}/tokens",
        "MODEL.WEIGHTS": "",
        "SOLVER.IMS_PER_BATCH": processes * args.images,
        "SOLVER.MAX_ITER": _WARM_UP + args.steps,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": 0,
        "TEST.EVAL_PERIOD": 0,
        "SEED": 0,
        "OUTPUT_DIR": f"{folder}/output",
    }
    if args.random_weights:
        values |= {"MODEL.LOCALIZER.WEIGHTS": "", "MODEL.VISION_LANGUAGE.WEIGHTS": ""}
    opts = [part for key, value in values.items() for part in (key, repr(value))]
    return load_config(args.config_file, opts + args.opts)


def write_data(args: argparse.Namespace, folder: Path) -> None:
    """Writes images of noise, boxes and names of COCO, and random mask tokens of them."""
    random = np.random.RandomState(0)
    names = MetadataCatalog.get("coco_2017_val").thing_classes
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(1, _IMAGES + 1):
        pixels = random.randint(0, 256, (12, 16, 3)).astype(np.uint8)
        path = folder / "images" / f"{number}.jpg"
        Image.fromarray(pixels).resize(_SIZE, Image.Resampling.BICUBIC).save(path)
        size = {"width": _SIZE[0], "height": _SIZE[1]}
        images.append({"id": number, "file_name": path.name, **size})
        for _ in range(args.boxes):
            x, y, w, h = (int(v) for v in random.randint(20, 200, 4))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(random.randint(len(names))) + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))

    cfg = benchmark_config(args, folder)
    torch.manual_seed(cfg.SEED)  # the same random weights as the trainer's
    localizer = LOCALIZER_REGISTRY.get(cfg.MODEL.LOCALIZER.NAME)(cfg)
    manifest = cache_manifest(cfg, "synthetic", module_fingerprint(localizer))
    writer = TokenCacheWriter(
        folder / "tokens" / "synthetic",
        manifest,
        [image["id"] for image in images],
        token_dim=localizer.token_dim,
        images_per_shard=_IMAGES,
    )
    shape = args.boxes, localizer.token_dim
    writer.write_shard(0, [torch.from_numpy(random.randn(*shape)) for _ in images])
    writer.finish()


class StepTimer(HookBase):
    """Starts a stopwatch after the first few steps, and times those that follow as a whole."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch
        self.steps = 0

    def before_step(self) -> None:
        if self.trainer.iter == _WARM_UP:
            self.watch.seconds.clear()
            self._start = now()

    def after_step(self) -> None:
        if self.trainer.iter >= _WARM_UP:
            self.steps = self.trainer.iter - _WARM_UP + 1
            self.total = now() - self._start


def train(args: argparse.Namespace, folder: Path, processes: int) -> None:
    """Trains in each process, and leaves the times in ``seconds.json``."""
    torch.set_num_threads(args.threads)
    cfg = benchmark_config(args, folder, processes)
    torch.manual_seed(cfg.SEED)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=False)
    model = trainer.checkpointer.model  # without the wrapper of several processes
    use_random_text_embeddings(model)
    watch = Stopwatch()
    timer = StepTimer(watch)
    watch.time(model.vision_language, "forward", "vision-language encoder")
    watch.time(model.region_head, "forward", "head")
    watch.time(model, "score", "loss")
    watch.time(model, "losses", "loss")
    watch.time(trainer.optimizer, "step", "optimizer")
    watch.time(torch.Tensor, "backward", "backward of loss and head")
    trainer.register_hooks([timer])
    trainer.train()
    if comm.is_main_process():
        result = {"total": timer.total, "steps": timer.steps, "parts": watch.seconds}
        (folder / "seconds.json").write_text(json.dumps(result))


def measure(args: argparse.Namespace, folder: Path, processes: int) -> dict[str, Any]:
    launch(train, processes, dist_url="auto", args=(args, folder, processes))
    return json.loads((folder / "seconds.json").read_text())


def print_step(args: argparse.Namespace, folder: Path) -> None:
    """Prints the share of each part in the time of a training step."""
    found = measure(args, folder, 1)
    total = found["total"]
    parts = Counter(found["parts"])
    parts["rest (data, logs, hooks)"] = total - sum(parts.values())
    print(f"A step of {args.images} images of {args.boxes} boxes: {total / found['steps']:.3f} s")
    for part, seconds in parts.items():
        print(f"  {part:28s} {seconds / found['steps']:8.4f} s {seconds / total:7.1%}")


def print_processes(args: argparse.Namespace, folder: Path) -> None:
    """Prints how many times the images per second of one process two processes reach."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.repeats):
        for processes, values in seconds.items():
            found = measure(args, folder, processes)
            values.append(found["total"] / (processes * args.images * found["steps"]))
    for processes, values in seconds.items():
        speed = 1 / statistics.median(values)
        print(f"{processes} process(es) of {args.threads} thread(s): {speed:.2f} images/s")
    print(f"Two processes against one, times as fast: {Ratio(seconds[1], seconds[2])}")


def print_vocabulary(args: argparse.Namespace, folder: Path) -> None:
    """Prints the memory of head and loss over a vocabulary of 13,204 names."""
    model = build_model(benchmark_config(args, folder)).train()
    use_random_text_embeddings(model)
    device, vision_language = model.device, model.vision_language
    tokens = [torch.randn(_REGIONS, model.localizer.token_dim, device=device)]
    length = vision_language.num_prefix_tokens + int(np.prod(vision_language.grid_size))
    image_tokens = torch.randn(1, length, vision_language.image_dim, device=device)
    classes = [torch.randint(_V3DET_NAMES, (_REGIONS,), device=device)]
    before = reset_peak()
    embeddings = model.region_head(tokens, image_tokens)
    logits = [model.score(embedding, range(_V3DET_NAMES)) for embedding in embeddings]
    model.losses(logits, classes)["loss_cls"].backward()
    print(
        f"Head and loss, forward and backward, {_REGIONS} regions, {_V3DET_NAMES} names: "
        f"{(peak_bytes() - before) / 2**20:.0f} MiB above the model"
    )


def run_training(args: argparse.Namespace) -> None:
    """Writes synthetic data to a temporary folder and runs the measurement of the command."""
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_data(args, Path(folder))
        PRINT_RESULTS[args.command](args, Path(folder))


PRINT_RESULTS = {
    "step": print_step,
    "processes": print_processes,
    "vocabulary": print_vocabulary,
}

if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    (token_cache.run if arguments.command == "token-cache" else run_training)(arguments)
