#!/usr/bin/env python
"""Measures the search for regions among random embeddings, which is the hardest case.

    python tools/benchmarks/search.py
    python tools/benchmarks/search.py --regions 100000 --widths 512 --methods exact

Each method answers queries that are no region of the index, one by one and 16 at a time. What FAISS
finds is compared with the exact answer. The index is written to a file, and read from it.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    add = parser.add_argument
    add("--regions", type=int, default=1_000_000, help="by default a million")
    add(
        "--widths",
        type=int,
        nargs="+",
        default=[512, 768],
        help="of the embeddings: by default 512 (mini, CLIP ViT-B) and 768 (CLIP ViT-L)",
    )
    add("--methods", nargs="+", choices=["exact", "faiss"], default=["exact", "faiss"])
    add("--queries", type=int, default=32)
    add("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import torch
from measuring import peak_bytes, reset_peak, seconds
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import normalize

from regionspot_d2.region_index import RegionIndex

_TOPK, _TOGETHER = 10, 16
_CHUNK = 65536


def random_embeddings(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Unit vectors (count, width), float16, evenly distributed."""
    found = torch.empty(count, width, dtype=torch.float16)
    for part in found.split(_CHUNK):
        part.copy_(normalize(torch.randn(part.shape, generator=generator), dim=1))
    return found


def random_index(path: Path, count: int, width: int, generator: torch.Generator) -> RegionIndex:
    """An index of one image's ``count`` regions, in a file."""
    embeddings = random_embeddings(count, width, generator)
    boxes, places = torch.rand(count, 4), torch.zeros(count, dtype=torch.int64)
    RegionIndex(embeddings, boxes, places, ["photo.jpg"], folder=path.parent, model="").save(path)
    return RegionIndex.open(path)


def measure(index: RegionIndex, queries: Tensor, method: str) -> tuple[Tensor, list[float]]:
    """Answers the queries one by one, and several at a time.

    Returns:
        The places of the nearest (Q, K); the seconds of the first search, which prepares the index,
        and the medians of a query alone and of one among others.
    """
    first = seconds(lambda: index.search(queries[0], _TOPK, method=method))
    found: list[Tensor] = []
    alone = [
        seconds(lambda query=query: found.append(index.search(query, _TOPK, method=method).places))
        for query in queries
    ]
    together = [
        seconds(lambda part=part: index.search(part, _TOPK, method=method)) / len(part)
        for part in queries.split(_TOGETHER)
    ]
    return torch.cat(found), [first, statistics.median(alone), statistics.median(together)]


def main() -> None:
    args = argument_parser().parse_args()
    torch.set_num_threads(args.threads)
    if "faiss" in args.methods:
        import faiss

        faiss.omp_set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for width in args.widths:
        with tempfile.TemporaryDirectory() as folder:
            index = random_index(Path(folder, "index"), args.regions, width, generator)
            queries = random_embeddings(args.queries, width, generator).float()
            exact = None
            for method in args.methods:
                before = reset_peak()
                found, (first, alone, together) = measure(index, queries, method)
                exact = found if exact is None else exact
                same = [len({*a} & {*b}) for a, b in zip(found.tolist(), exact.tolist())]
                recall = sum(same) / found.numel() if args.methods[0] == "exact" else None
                memory = (peak_bytes() - before) / 1e9
                rows.append([width, method, first, 1e3 * alone, 1e3 * together, recall, memory])
    print(f"{args.regions:,} random regions, {args.threads} threads; medians")
    headers = ["width", "method", "first search (s)", "a query (ms)", f"one of {_TOGETHER} (ms)"]
    headers += [f"of the {_TOPK} nearest", "memory (GB)"]
    print(tabulate(rows, headers, floatfmt=("", "", ".1f", ".1f", ".1f", ".3f", ".1f")))


if __name__ == "__main__":
    main()
