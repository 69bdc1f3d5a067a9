#!/usr/bin/env python
"""Mask tokens of many prompts of one image: our decoder against segment_anything's, same weights.

The mask decoder is the same in SAM's ViT-B, ViT-L and ViT-H, and random weights will do, because
speed does not depend on them. Each side uses the chunk size that is fastest for it. Their runs
alternate. A ratio is the median of the ratios of neighbouring runs, which other load on the machine
disturbs least.

Example::

    python tools/benchmarks/mask_tokens.py --boxes 96 --repeats 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor

from regionspot_d2.modeling.mask_tokens import MaskTokenDecoder

Prompts = tuple[Tensor, Tensor]
NUM_TRIED = 24  # prompts, to find the fastest chunk size


class Comparison:
    """Both decoders on one image."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
        self.stock = decoder.to(device).eval()
        self.ours = MaskTokenDecoder(self.stock)
        self.encoder = PromptEncoder(256, (64, 64), (1024, 1024), mask_in_chans=16).to(device)
        self.image = torch.randn(1, 256, 64, 64, device=device), self.encoder.get_dense_pe()
        self.device = device

    def prompts(self, kind: str, number: int) -> Prompts:
        """Random prompts: "boxes", "points" (one each) or "masks" (a box and a mask each)."""
        boxes = 1024 * torch.rand(number, 4, device=self.device)
        points = 1024 * torch.rand(number, 1, 2, device=self.device)
        masks = torch.randn(number, 1, 256, 256, device=self.device)
        return self.encoder(
            points=(
                (points, torch.ones(number, 1, device=self.device)) if kind == "points" else None
            ),
            boxes=None if kind == "points" else boxes,
            masks=masks if kind == "masks" else None,
        )

    def run_stock(self, prompts: Prompts, chunk_size: int) -> None:
        for sparse, dense in zip(*(x.split(chunk_size) for x in prompts)):
            self.stock(*self.image, sparse, dense, multimask_output=False)

    def run_ours(self, prompts: Prompts, chunk_size: int, with_masks: bool) -> None:
        self.ours(*self.image, *prompts, with_masks=with_masks, chunk_size=chunk_size)

    def difference(self, prompts: Prompts) -> dict[str, float]:
        """The largest absolute difference of each output."""
        tokens = []
        hook = self.stock.transformer.register_forward_hook(
            lambda module, inputs, outputs: tokens.append(outputs[0][:, 1])
        )
        masks, ious = self.stock(*self.image, *prompts, multimask_output=False)
        hook.remove()
        expected = {"tokens": tokens[0], "masks": masks, "IoU": ious[:, 0]}
        actual = self.ours(*self.image, *prompts)
        return {name: (a - e).abs().max().item() for a, (name, e) in zip(actual, expected.items())}


def seconds(function: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fastest_chunk(
    run: Callable[[Prompts, int], None], prompts: Prompts, sizes: Iterable[int]
) -> int:
    """The best chunk size on some of the prompts, after a run to warm up."""
    prompts = prompts[0][:NUM_TRIED], prompts[1][:NUM_TRIED]
    run((prompts[0][:2], prompts[1][:2]), 2)
    return min(sizes, key=lambda size: seconds(partial(run, prompts, size)))


def compare(comparison: Comparison, kind: str, number: int, args: argparse.Namespace) -> None:
    prompts = comparison.prompts(kind, number)
    runs: dict[str, Callable[[Prompts, int], None]] = {
        "stock": comparison.run_stock,
        "tokens": partial(comparison.run_ours, with_masks=False),
        "tokens and masks": partial(comparison.run_ours, with_masks=True),
    }
    sizes = sorted({min(size, number) for size in args.chunk_sizes})
    chunks = {name: fastest_chunk(run, prompts, sizes) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(seconds(partial(run, prompts, chunks[name])))

    print(f"\n{number} {kind}")
    for name, values in times.items():
        ratio = statistics.median(s / v for s, v in zip(times["stock"], values))
        print(
            f"  {name:17s} {statistics.median(values):8.3f} s   chunks of {chunks[name]:3d}   "
            f"{ratio:.2f} times the speed of the stock decoder"
        )
    few = comparison.prompts(kind, min(number, 4))
    differences = comparison.difference(few)
    print("  largest difference: " + ", ".join(f"{n} {d:.1e}" for n, d in differences.items()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--boxes", type=int, default=96, help="box prompts of the image")
    parser.add_argument("--others", type=int, default=8, help="point prompts, and mask prompts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--chunk-sizes", type=int, nargs="+", default=[1, 4, 24], help="sizes each side tries"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.threads} threads, torch {torch.__version__}")
    comparison = Comparison(args.device)
    compare(comparison, "boxes", args.boxes, args)
    compare(comparison, "points", args.others, args)
    compare(comparison, "masks", args.others, args)


if __name__ == "__main__":
    main()
