#!/usr/bin/env python
"""Where the time and the memory of naming many boxes of one image go.

Real architectures with random weights (speed does not depend on them). Prints the share of the time spent outside the two
image encoders and SAM's mask decoder, and how much the peak memory grows from few boxes to many, each measured in a process
of its own.

Example::

    python tools/benchmarks/inference.py --boxes 50 300
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from regionspot_d2 import add_regionspot_config

NUM_NAMES = 1203


class Stopwatch:
    """Adds up the time spent inside a method, by wrapping it."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds = 0.0
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += now() - start

        setattr(owner, name, timed)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def build(args: argparse.Namespace) -> Any:
    cfg = get_cfg()
    add_regionspot_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.MODEL.LOCALIZER.WEIGHTS = cfg.MODEL.VISION_LANGUAGE.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.MODEL.MASK_ON = not args.no_masks
    model = build_model(cfg).eval()
    names = [f"name {i}" for i in range(NUM_NAMES)]
    MetadataCatalog.get("benchmark").thing_classes = names
    # The words are embedded once per vocabulary; they are not what is measured.
    words = torch.nn.functional.normalize(torch.randn(NUM_NAMES, model.vision_language.text_dim))
    model.text_embedder._known[(model.device, tuple(names))] = words.to(model.device)
    return model


def random_input(boxes: int, size: tuple[int, int] = (480, 640)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(boxes, 2, 2, generator=generator).sort(dim=1).values
    proposals = Instances(size)
    scale = torch.tensor([size[1], size[0]])
    proposals.proposal_boxes = Boxes((corners * scale).reshape(-1, 4))
    proposals.objectness_logits = torch.rand(boxes, generator=generator)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    x = {"image": image, "height": size[0], "width": size[1], "dataset_name": "benchmark"}
    return {**x, "proposals": proposals}


def measure(args: argparse.Namespace, boxes: int, results: Any) -> None:
    torch.set_num_threads(args.threads)
    model = build(args)
    inputs = [random_input(boxes)]
    model([random_input(1)])  # warm up
    reset_peak()
    watches = {
        "SAM image encoder": Stopwatch(model.localizer.image_encoder, "forward"),
        "CLIP image encoder": Stopwatch(model.vision_language, "forward"),
        "SAM mask decoder": Stopwatch(model.localizer.token_decoder, "forward"),
    }
    totals, outside = [], []
    for _ in range(args.repeats):
        for watch in watches.values():
            watch.seconds = 0.0
        start = now()
        model(inputs)
        totals.append(now() - start)
        outside.append(totals[-1] - sum(watch.seconds for watch in watches.values()))
    parts = {name: watch.seconds for name, watch in watches.items()}
    results.put((statistics.median(totals), statistics.median(outside), parts, peak_bytes()))


def reset_peak() -> None:
    """Forgets what building the model took, which is more than running it does."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Since :func:`reset_peak`; of the process, on a CPU (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default="configs/regionspot_L_336.yaml")
    parser.add_argument("--boxes", type=int, nargs="+", default=[50, 300])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-masks", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for boxes in args.boxes:
        results = context.Queue()
        process = context.Process(target=measure, args=(args, boxes, results))
        process.start()
        total, outside, parts, peak = results.get()
        process.join()
        peaks[boxes] = peak
        print(f"{boxes} boxes: {total:.2f} s an image (median of {args.repeats})")
        for name, seconds in parts.items():
            print(f"  {name:20s} {seconds:6.2f} s  {100 * seconds / total:5.1f} %")
        print(f"  {'everything else':20s} {outside:6.2f} s  {100 * outside / total:5.1f} %")
        print(f"  peak memory {peak / 1e9:.2f} GB")
    first, last = min(peaks), max(peaks)
    print(f"peak memory from {first} to {last} boxes: +{(peaks[last] - peaks[first]) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
