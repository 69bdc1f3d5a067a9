#!/usr/bin/env python
"""Asks the web page many questions at once and watches its answers and its memory.

    pip install regionspot_d2[web]
    python tools/benchmarks/web.py --requests 200 --sessions 8

Serves the page with the mini model in a process of its own. Each session uploads a photo, asks each
of its questions once while nobody else does, and then all sessions repeat their questions at the
same time. The exit status is 1 if a request failed, if an answer is not that of the same question
before, or if the memory of the server grew by more than 5 %. It is watched after 300 requests:
until then the C library keeps more and more of what was freed (set MALLOC_MMAP_THRESHOLD_=131072,
and it keeps nothing).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="of all sessions together")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=300, help="requests before those")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import numpy as np
from gradio_client import Client, handle_file
from PIL import Image

from regionspot_d2.app.web.page import example_photos

_WORDS = ("cat, dog, sofa", "cup, bowl, spoon", "person, helmet, flag", "coco")
_MAX_GROWTH = 1.05


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, int]]:
    """Serves the page; yields its address and the id of its process."""
    command = [sys.executable, "-m", "regionspot_cli", "web"]
    with open(folder / "errors.txt", "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise SystemExit(f"error: {(folder / 'errors.txt').read_text()}")
            yield found.group(), process.pid
        finally:
            process.terminate()
            process.wait()


def megabytes(process: int) -> float:
    """The memory that a process holds now (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


class Visitor:
    """A session with a photo and boxes of its own, which asks with several vocabularies.

    Attributes:
        expected: the tables of its answers, by question, when nobody else asked.
    """

    def __init__(self, address: str, photo: Path, seed: int) -> None:
        self.client = Client(address, verbose=False, download_files=False)
        self.photo = handle_file(photo)
        width, height = Image.open(photo).size
        sides = np.random.default_rng(seed).uniform(0.2, 0.8, (4, 2)) * (width, height)
        self.boxes = [
            dict(zip(("xmin", "ymin", "xmax", "ymax"), [0, 0, *corner])) for corner in sides
        ]
        self.expected = [self.ask(question) for question in range(len(_WORDS))]

    def ask(self, question: int) -> Any:
        """The table of an answer; all but the first ``question`` + 1 boxes are left out."""
        shown = {"image": self.photo, "boxes": self.boxes[: question + 1]}
        status, _, _, table, *_ = self.client.predict(
            shown, _WORDS[question], [], 2, api_name="/name"
        )
        if "error" in status:
            raise RuntimeError(status)
        return table["data"]


def prepare_photos(folder: Path, count: int) -> list[Path]:
    """Different parts of the page's examples, so that no two sessions have the same photo."""
    examples = [Image.open(path).convert("RGB") for path in example_photos()]
    photos = []
    for number in range(count):
        image = examples[number % len(examples)]
        image.crop((0, 0, image.width - 7 * number, image.height - 5 * number)).save(
            folder / f"{number}.png"
        )
        photos.append(folder / f"{number}.png")
    return photos


def main(requests: int, sessions: int, warm_up: int) -> int:
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as (address, process):
        photos = prepare_photos(Path(name), sessions)
        visitors = [Visitor(address, photo, seed) for seed, photo in enumerate(photos)]
        answers = [str(visitor.expected) for visitor in visitors]
        assert len(set(answers)) == sessions, "two sessions have the same answers"
        errors: list[str] = []
        mixed: list[int] = []

        def ask(number: int) -> None:
            visitor, question = visitors[number % sessions], number // sessions % len(_WORDS)
            try:
                table = visitor.ask(question)
            except Exception as error:  # of any kind: all of them are counted
                errors.append(str(error))
            else:
                if table != visitor.expected[question]:
                    mixed.append(number)

        with ThreadPoolExecutor(sessions) as pool:
            list(pool.map(ask, range(warm_up)))
            before, start = megabytes(process), time.perf_counter()
            list(pool.map(ask, range(requests)))
            after, took = megabytes(process), time.perf_counter() - start
    print(f"{requests} requests of {sessions} sessions at once: {took:.1f} s")
    print(f"errors: {len(errors)} {errors[:1]}; answers of another question: {len(mixed)}")
    print(f"memory of the server: {before:.0f} MB before, {after:.0f} MB after")
    return int(bool(errors or mixed) or after > before * _MAX_GROWTH)


if __name__ == "__main__":
    args = argument_parser().parse_args()
    sys.exit(main(args.requests, args.sessions, args.warm_up))
