#!/usr/bin/env python
"""Measures training from cached mask tokens, on synthetic images.

    # where the time of a step goes: the embedded models, or the sizes of the paper with random weights
    python tools/benchmarks/training.py --measure step --config-file configs/mini/train_tinycoco.yaml
    python tools/benchmarks/training.py --measure step --config-file configs/regionspot_B.yaml --random-weights
    # images per second of two processes against one, the same batch in each, one thread in each
    python tools/benchmarks/training.py --measure processes --config-file configs/mini/train_tinycoco.yaml
    # memory of loss and head over the 13,204 names of V3Det
    python tools/benchmarks/training.py --measure vocabulary --config-file configs/regionspot_B.yaml --random-weights

``MODEL.DEVICE cpu`` at the end measures the CPU of a machine with a GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, launch
from detectron2.modeling import build_model
from detectron2.utils import comm
from PIL import Image

from regionspot_d2.data.cache_manifest import cache_manifest
from regionspot_d2.data.token_cache import TokenCacheWriter
from regionspot_d2.engine import RegionSpotTrainer, load_config
from regionspot_d2.files import module_fingerprint
from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.interfaces import LOCALIZER_REGISTRY

_IMAGES = 64
_SIZE = (640, 480)
_WARM_UP = 2
_V3DET_NAMES, _REGIONS = 13_204, 300


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", required=True, choices=["step", "processes", "vocabulary"])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--random-weights", action="store_true", help="download nothing")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--images", type=int, default=4, help="in a batch, of each process")
    parser.add_argument("--boxes", type=int, default=10, help="in an image")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser


def benchmark_config(args: argparse.Namespace, folder: Path, processes: int = 1) -> CfgNode:
    """Training on the synthetic data set in ``folder``, without evaluation."""
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
    torch.manual_seed(cfg.SEED)  # random weights are those the trainer will make
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


class Stopwatch(HookBase):
    """Adds up the time of parts of the steps after the first few, and of these steps as wholes."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.steps = 0

    def time(self, owner: Any, method: str, part: str) -> None:
        """Times every call of a method; the parts must not call each other."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = _now()
            result = original(*args, **kwargs)
            self.seconds[part] += _now() - start
            return result

        setattr(owner, method, timed)

    def before_step(self) -> None:
        if self.trainer.iter == _WARM_UP:
            self.seconds.clear()
            self._start = _now()

    def after_step(self) -> None:
        if self.trainer.iter >= _WARM_UP:
            self.steps = self.trainer.iter - _WARM_UP + 1
            self.total = _now() - self._start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(args: argparse.Namespace, folder: Path, processes: int) -> None:
    """Trains, and leaves the times in ``seconds.json``. Each process runs it."""
    torch.set_num_threads(args.threads)
    cfg = benchmark_config(args, folder, processes)
    torch.manual_seed(cfg.SEED)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=False)
    model = getattr(trainer.model, "module", trainer.model)
    _give_random_words(model)
    watch = Stopwatch()
    watch.time(model.vision_language, "forward", "vision-language encoder")
    watch.time(model.region_head, "forward", "head")
    watch.time(model, "score", "loss")
    watch.time(model, "losses", "loss")
    watch.time(trainer.optimizer, "step", "optimizer")
    watch.time(torch.Tensor, "backward", "backward of loss and head")
    trainer.register_hooks([watch])
    trainer.train()
    if comm.is_main_process():
        result = {"total": watch.total, "steps": watch.steps, "parts": watch.seconds}
        (folder / "seconds.json").write_text(json.dumps(result))


def measure(args: argparse.Namespace, folder: Path, processes: int) -> dict[str, Any]:
    launch(train, processes, dist_url="auto", args=(args, folder, processes))
    return json.loads((folder / "seconds.json").read_text())


def print_step(args: argparse.Namespace, folder: Path) -> None:
    found = measure(args, folder, 1)
    total = found["total"]
    parts = Counter(found["parts"])
    parts["all else (data, logs, hooks)"] = total - sum(parts.values())
    print(f"A step of {args.images} images of {args.boxes} boxes: {total / found['steps']:.3f} s")
    for part, seconds in parts.items():
        print(f"  {part:28s} {seconds / found['steps']:8.4f} s {seconds / total:7.1%}")


def print_processes(args: argparse.Namespace, folder: Path) -> None:
    speeds = []
    for processes in (1, 2):
        found = measure(args, folder, processes)
        speeds.append(processes * args.images * found["steps"] / found["total"])
        print(f"{processes} process(es) of {args.threads} thread(s): {speeds[-1]:.2f} images/s")
    print(f"Two are {speeds[1] / speeds[0]:.2f} times as fast as one.")


def print_vocabulary(args: argparse.Namespace, folder: Path) -> None:
    model = build_model(benchmark_config(args, folder)).train()
    _give_random_words(model)
    device, vision_language = model.device, model.vision_language
    tokens = [torch.randn(_REGIONS, model.localizer.token_dim, device=device)]
    length = vision_language.num_prefix_tokens + int(np.prod(vision_language.grid_size))
    image_tokens = torch.randn(1, length, vision_language.image_dim, device=device)
    classes = [torch.randint(_V3DET_NAMES, (_REGIONS,), device=device)]
    before = _reset_peak()
    embeddings = model.region_head(tokens, image_tokens)
    logits = [model.score(embedding, range(_V3DET_NAMES)) for embedding in embeddings]
    model.losses(logits, classes)["loss_cls"].backward()
    print(
        f"Head and loss, forward and backward, {_REGIONS} regions, {_V3DET_NAMES} names: "
        f"{(_peak() - before) / 2**20:.0f} MiB above the model"
    )


def _give_random_words(model: RegionSpot) -> None:
    """Spares the text encoder, which in training runs once for each vocabulary, before the first step."""

    @functools.cache
    def words(count: int) -> torch.Tensor:
        vectors = torch.randn(count, model.vision_language.text_dim, device=model.device)
        return torch.nn.functional.normalize(vectors, dim=1)

    model.text_embedder = lambda names, device: words(len(names))


def _reset_peak() -> int:
    """Forgets the peak of the memory so far; bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def main() -> None:
    args = argument_parser().parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    prints = {"step": print_step, "processes": print_processes, "vocabulary": print_vocabulary}
    with tempfile.TemporaryDirectory() as folder:
        write_data(args, Path(folder))
        prints[args.measure](args, Path(folder))


if __name__ == "__main__":
    main()
