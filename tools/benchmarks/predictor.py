#!/usr/bin/env python
"""What asking one image again and again costs beside the work that cannot be spared.

``RegionSpotPredictor.set_image`` and a number of ``predict`` calls, each with new boxes and another known vocabulary, against the bare
modules doing the same: the image encoders once, then the localizer's decoder, the region head and the comparison with the words for each
call. Prints the ratio, which is due to be at most 1.05. Then compares the answers with those of single runs that set the image afresh; they
may differ by 1e-5.

The mini models run anywhere. Architectures without their weights run with random ones, for speed does not depend on them, and the words get
random embeddings:

    python tools/benchmarks/predictor.py
    python tools/benchmarks/predictor.py --random --config-file configs/regionspot_L_336.yaml --boxes 50
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn.functional import normalize

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.data.datasets.vocabularies import known_vocabulary
from regionspot_d2.engine import ConfigError, load_config

LIMIT, TOLERANCE = 1.05, 1e-5

Question = tuple[Tensor, list[str]]


def build(args: argparse.Namespace) -> RegionSpotPredictor:
    keys = ("MODEL.WEIGHTS", "MODEL.LOCALIZER.WEIGHTS", "MODEL.VISION_LANGUAGE.WEIGHTS")
    no_weights = [part for key in keys for part in (key, "")] if args.random else []
    return RegionSpotPredictor(
        load_config(args.config_file, [*no_weights, *args.opts], training=False)
    )


def questions(args: argparse.Namespace, size: tuple[int, int]) -> list[Question]:
    """Random boxes, and as many vocabularies, each a shuffled part of the names of LVIS."""
    generator = torch.Generator().manual_seed(0)
    names = known_vocabulary("lvis")
    scale = torch.tensor([size[1], size[0]])
    asked = []
    for _ in range(args.calls):
        corners = torch.rand(args.boxes, 2, 2, generator=generator).sort(dim=1).values * scale
        order = torch.randperm(len(names), generator=generator)[: args.names]
        asked.append((corners.reshape(-1, 4), [names[i] for i in order]))
    return asked


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object]) -> float:
    start = now()
    work()
    return now() - start


def with_predictor(
    predictor: RegionSpotPredictor, image: Tensor, asked: Sequence[Question]
) -> list[Instances]:
    predictor.set_image(image)
    return [predictor.predict(boxes=boxes, vocabulary=names) for boxes, names in asked]


@torch.no_grad()
def bare(
    predictor: RegionSpotPredictor, image: Tensor, asked: Sequence[Question]
) -> list[tuple[Tensor, Tensor]]:
    """The frozen encoders once; per question decoder, masks, head and cosines, with everything at hand as they want it."""
    model = predictor.model
    size = (image.shape[-2], image.shape[-1])
    encoded = model.encode([image.to(model.device)])
    answers = []
    for corners, names in asked:
        boxes = Boxes(corners.to(model.device))
        [tokens], masks = model.localize(encoded, [boxes], with_masks=model.with_masks)
        if masks is not None:
            model.localizer.full_size_masks(masks[0], size)
        relative = boxes.tensor / boxes.tensor.new_tensor([size[1], size[0]] * 2)
        [embeddings] = model.region_head([tokens], encoded.image_tokens, [relative])
        words = model.text_embedder(names, model.device)
        logits = embeddings @ words.T * model.vision_language.logit_scale.exp()
        answers.append(logits.softmax(1).max(1))
    return answers


def largest_difference(
    predictor: RegionSpotPredictor, image: Tensor, asked: Sequence[Question]
) -> float:
    """Between the scores of one image asked many times and of single runs; infinite if a name or box differs."""
    worst = 0.0
    for question, found in zip(asked, with_predictor(predictor, image, asked)):
        [alone] = with_predictor(predictor, image, [question])
        same = torch.equal(found.pred_classes, alone.pred_classes)
        if not same or not torch.equal(found.pred_boxes.tensor, alone.pred_boxes.tensor):
            return float("inf")
        worst = max(worst, float((found.scores - alone.scores).abs().max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default="configs/mini/regionspot_mini.yaml")
    parser.add_argument("--random", action="store_true", help="random weights and text embeddings")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--boxes", type=int, default=20, help="of each call")
    parser.add_argument("--names", type=int, default=1000, help="of each vocabulary")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("opts", nargs="*", help="config changes: KEY VALUE ...")
    args = parser.parse_args()
    try:
        predictor = build(args)
    except (ConfigError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, *args.size), dtype=torch.uint8)
    asked = questions(args, (args.size[0], args.size[1]))
    model = predictor.model
    for _, names in asked:
        if args.random:
            words = normalize(torch.randn(len(names), model.vision_language.text_dim))
            model.text_embedder._known[(model.device, tuple(names))] = words.to(model.device)
        model.text_embedder(names, model.device)  # known from now on
    bare(predictor, image, asked[:1])  # warm up
    pairs = []
    for _ in range(args.repeats):
        # In turns, so that a slow minute of the machine hits both.
        spared = timed(lambda: bare(predictor, image, asked))
        pairs.append((timed(lambda: with_predictor(predictor, image, asked)), spared))
    used, needed = (statistics.median(times) for times in zip(*pairs))
    encoding = statistics.median(
        timed(lambda: predictor.set_image(image)) for _ in range(args.repeats)
    )
    ratio = statistics.median(ours / least for ours, least in pairs)
    print(f"set_image: {encoding:.3f} s; with {args.calls} calls of predict: {used:.3f} s")
    print(f"the bare modules: {needed:.3f} s; ratio {ratio:.3f} (at most {LIMIT} is due)")
    worst = largest_difference(predictor, image, asked)
    print(f"scores differ from single runs by {worst:.1e} at most ({TOLERANCE:.0e} is due)")
    if ratio > LIMIT or worst > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
