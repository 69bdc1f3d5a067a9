"""What the benchmarks share: clocks, peak memory, and class names without a text tower."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from regionspot_d2.modeling import RegionSpot
from regionspot_d2.modeling.words import as_vocabulary


def now() -> float:
    """The time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], object]) -> float:
    """How long a function takes."""
    start = now()
    work()
    return now() - start


class Ratio:
    """How many times as fast one side is as another, and which ratios are noise.

    Each side against itself, one run and the next, tells what the rest of the machine does to a
    ratio.

    Attributes:
        median: of the ratios of neighboring runs, which other load disturbs least.
        noise: the largest ratio of a side to itself; infinite if each ran once.
    """

    def __init__(self, base: Sequence[float], other: Sequence[float]) -> None:
        """
        Args:
            base: seconds of the runs of the side that counts as 1.
            other: seconds of the runs of the other side, each next to one of the base.
        """
        self._ratios = [one / another for one, another in zip(base, other)]
        self.median = statistics.median(self._ratios)
        pairs = [*itertools.pairwise(base), *itertools.pairwise(other)]
        self.noise = max((max(a / b, b / a) for a, b in pairs), default=math.inf)

    def __str__(self) -> str:
        text = f"{self.median:.2f}"
        if math.isinf(self.noise):
            return f"{text} (one run each, which does not tell what is noise)"
        low, high = min(self._ratios), max(self._ratios)
        is_noise = 1 / self.noise <= self.median <= self.noise
        verdict = "this is noise" if is_noise else "this is not noise"
        return (
            f"{text} ({low:.2f} to {high:.2f}; a side against itself: up to {self.noise:.2f}; "
            f"{verdict})"
        )


class Stopwatch:
    """Adds up the time spent inside methods.

    Attributes:
        seconds: the sum, by part.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def time(self, owner: Any, method: str, part: str) -> None:
        """Times every call of a method, by wrapping it. Timed methods must not call each other."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = original(*args, **kwargs)
            self.seconds[part] += now() - start
            return result

        setattr(owner, method, timed)


def reset_peak() -> int:
    """Resets the peak memory, and returns the bytes in use."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """The peak since :func:`reset_peak`; on a CPU that of the process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def use_random_text_embeddings(model: RegionSpot) -> None:
    """Makes random text embeddings, since the text encoder runs only once per vocabulary."""

    @functools.cache
    def random_text(count: int) -> Tensor:
        vectors = torch.randn(count, model.vision_language.text_dim)
        return normalize(vectors, dim=1).to(model.device)

    model.text_embedder = lambda words, device: random_text(
        len(as_vocabulary(words, repeats=True).texts)
    )
