#!/usr/bin/env python
"""Measures naming: one image with many boxes, mask tokens, and repeated questions.

    # where the time and the memory of naming many boxes of one image go
    python tools/benchmarks/inference.py image --boxes 50 300
    # the same with zoom, whose cost is that of the views
    python tools/benchmarks/inference.py image --boxes 50 300 --zoom 2
    # one image in float32 and in bfloat16, against the plain way with the libraries themselves
    python tools/benchmarks/inference.py plain --boxes 300
    # float32 with and without MODEL.COMPILE
    python tools/benchmarks/inference.py plain --boxes 300 --sides float32 compiled
    # mask tokens of many prompts of one image: ours against segment_anything's decoder
    python tools/benchmarks/inference.py mask-tokens --boxes 96
    # set_image and 20 predict calls against the bare modules doing the same
    python tools/benchmarks/inference.py predictor
    python tools/benchmarks/inference.py predictor --random \\
        --config-file configs/regionspot_L_336.yaml --boxes 50

``image`` and ``mask-tokens`` build real architectures with random weights, on which speed does not
depend. ``predictor`` runs the mini model, or with ``--random`` any architecture without weights.
Both sides run in turns, and a ratio is the median of the ratios of neighboring runs, which other
load on the machine disturbs least. Beside it stands the largest ratio of a side to itself: what is
no further from 1 is noise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, repeats: int) -> Any:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("--repeats", type=int, default=repeats)
        one.add_argument("--threads", type=int, help="by default all cores")
        return one.add_argument

    add = command(
        "image",
        "Prints the time outside encoders and mask decoder, and how the peak memory grows.",
        3,
    )
    add("--config-file", default="configs/regionspot_L_336.yaml")
    add("--boxes", type=int, nargs="+", default=[50, 300])
    add("--no-masks", action="store_true")
    add("--zoom", type=float, default=0.0, help="MODEL.ZOOM")
    add("--precision", default="float32", help="MODEL.PRECISION")
    add = command(
        "plain",
        "Prints times, peak memory and ratios of ours to the plain way, each in its own process.",
        3,
    )
    add("--config-file", default="configs/regionspot_L_336.yaml")
    add("--boxes", type=int, default=300)
    add("--no-masks", action="store_true", help="ours gives none; the stock predictor always does")
    sides = ["plain", "float32", "bfloat16", "compiled"]
    add("--sides", nargs="+", choices=sides, default=sides[:3], help="the first counts as 1")
    add = command(
        "mask-tokens",
        "Prints how fast our decoder is against the stock one, each with its best chunk size.",
        3,
    )
    add("--boxes", type=int, default=96, help="box prompts of the image")
    add("--others", type=int, default=8, help="point prompts, and mask prompts")
    add("--chunk-sizes", type=int, nargs="+", default=[1, 4, 24], help="sizes each side tries")
    add = command(
        "predictor",
        "Prints the time against the bare modules; fails above ``LIMIT`` or ``TOLERANCE``.",
        5,
    )
    add("--config-file", default="configs/mini/regionspot_mini.yaml")
    add("--random", action="store_true", help="random weights and text embeddings")
    add("--calls", type=int, default=20)
    add("--boxes", type=int, default=20, help="in each call")
    add("--names", type=int, default=1000, help="in each vocabulary")
    add("--size", type=int, nargs=2, default=[480, 640], metavar=("H", "W"))
    add("opts", nargs="*", help="config changes: KEY VALUE ...")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from measuring import (
    Ratio,
    Stopwatch,
    peak_bytes,
    reset_peak,
    seconds,
    use_random_text_embeddings,
)
from plain import PlainNaming
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.data.datasets.vocabularies import known_vocabulary
from regionspot_d2.engine import ConfigError, load_config
from regionspot_d2.modeling import BoxPrompts, RegionSpot
from regionspot_d2.modeling.mask_tokens import MaskTokenDecoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_NAMES = 1203
# Of ``predictor``: time against the bare modules, and difference of scores from single questions.
LIMIT, TOLERANCE = 1.05, 1e-5
# Prompts that serve to find the fastest chunk size.
NUM_TRIED = 24

Question = tuple[Tensor, list[str]]
EncodedPrompts = tuple[Tensor, Tensor]


def random_boxes(number: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(R, 4) XYXY in an image of (H, W)."""
    corners = torch.rand(number, 2, 2, generator=generator).sort(dim=1).values
    return (corners * torch.tensor([size[1], size[0]])).reshape(-1, 4)


def run_image(args: argparse.Namespace) -> None:
    """Prints the time outside encoders and mask decoder, and how the peak memory grows."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for boxes in args.boxes:
        # A process of its own, so that the peak is that of this number of boxes.
        results = context.Queue()
        process = context.Process(target=measure_image, args=(args, boxes, results))
        process.start()
        total, outside, parts, views, peaks[boxes] = results.get()
        process.join()
        print(f"{boxes} boxes: {total:.2f} s an image (median of {args.repeats})")
        print(f"  views of the image   {views:6d}")
        for name, spent in {**parts, "everything else": outside}.items():
            print(f"  {name:20s} {spent:6.2f} s  {100 * spent / total:5.1f} %")
        print(f"  peak memory {peaks[boxes] / 1e9:.2f} GB")
    first, last = min(peaks), max(peaks)
    print(f"peak memory from {first} to {last} boxes: +{(peaks[last] - peaks[first]) / 1e9:.2f} GB")


def measure_image(args: argparse.Namespace, boxes: int, results: Any) -> None:
    torch.set_num_threads(args.threads)
    model = build_random(args, ["MODEL.ZOOM", str(args.zoom), "MODEL.PRECISION", args.precision])
    model([random_input(1)])  # warm up
    reset_peak()
    watch = Stopwatch()
    watch.time(model.localizer.image_encoder, "forward", "SAM image encoder")
    watch.time(model.vision_language, "forward", "CLIP image encoder")
    watch.time(model.localizer.token_decoder, "forward", "SAM mask decoder")
    totals, outside, views = [], [], [0]
    model.vision_language.register_forward_pre_hook(lambda _, given: views.append(len(given[0])))
    for _ in range(args.repeats):
        watch.seconds.clear()
        totals.append(seconds(lambda: model([random_input(boxes)])))
        outside.append(totals[-1] - watch.seconds.total())
    times = (statistics.median(totals), statistics.median(outside), watch.seconds)
    results.put((*times, sum(views) // args.repeats, peak_bytes()))


def build_random(args: argparse.Namespace, opts: list[str]) -> Any:
    """The architectures of a config with random weights, and names for :func:`random_input`."""
    opts += ["MODEL.LOCALIZER.WEIGHTS", "", "MODEL.VISION_LANGUAGE.WEIGHTS", ""]
    opts += ["MODEL.DEVICE", DEVICE, "MODEL.MASK_ON", str(not args.no_masks)]
    model = build_model(load_config(args.config_file, opts, training=False)).eval()
    use_random_text_embeddings(model)
    MetadataCatalog.get("benchmark").thing_classes = [f"name {i}" for i in range(NUM_NAMES)]
    return model


def random_input(boxes: int, size: tuple[int, int] = (480, 640)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    proposals = Instances(size)
    proposals.proposal_boxes = Boxes(random_boxes(boxes, size, generator))
    proposals.objectness_logits = torch.rand(boxes, generator=generator)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    return {"image": image, "dataset_name": "benchmark", "proposals": proposals}


class Side:
    """One side of ``plain``, which runs an image and tells how long it took and its parts."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        self.watch = Stopwatch()
        given = random_input(args.boxes)
        if name == "plain":
            plain = PlainNaming(NUM_NAMES, DEVICE)
            image = given["image"].permute(1, 2, 0).contiguous().numpy()
            boxes = given["proposals"].proposal_boxes.tensor
            self.run: Callable[[], object] = partial(plain, image, boxes)
            sam = plain.predictor.model
            self.watch.time(plain.clip.visual, "forward", "CLIP image encoder")
            self.watch.time(sam.mask_decoder, "forward", "SAM mask decoder")
            self.watch.time(plain.decoder, "forward", "region head")
        else:
            opts = ["MODEL.COMPILE", "True"] if name == "compiled" else ["MODEL.PRECISION", name]
            model = build_random(args, opts)
            self.run = partial(model, [given])
            if name == "compiled":
                warm_up = partial(model, [random_input(args.boxes + 1)])
                print(f"# compiled: {seconds(warm_up) + seconds(self.run):.0f} s to compile")
            sam = model.localizer
            self.watch.time(model.vision_language, "forward", "CLIP image encoder")
            self.watch.time(sam.token_decoder, "forward", "SAM mask decoder")
            self.watch.time(model.region_head, "forward", "region head")
        self.watch.time(sam.image_encoder, "forward", "SAM image encoder")

    def __call__(self) -> dict[str, float]:
        self.watch.seconds.clear()
        with torch.no_grad():
            whole = seconds(self.run)
        outside = whole - self.watch.seconds.total()
        return {"whole image": whole, **self.watch.seconds, "everything else": outside}


def serve_side(name: str, args: argparse.Namespace, asked: Any, results: Any) -> None:
    """Runs one side in a process of its own, an image whenever asked, until None."""
    side = Side(name, args)
    if DEVICE == "cuda":
        side()  # loads kernels, and chooses among them
    reset_peak()
    while asked.get() is not None:
        results.put((side(), peak_bytes()))


def run_plain(args: argparse.Namespace) -> None:
    """Prints times, peak memory and ratios of ours to the plain way, each in its own process."""
    context = multiprocessing.get_context("spawn")
    sides = {}
    for name in args.sides:
        queues = context.Queue(), context.Queue()
        process = context.Process(target=serve_side, args=(name, args, *queues), daemon=True)
        process.start()
        sides[name] = (process, *queues)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    peaks = {}
    for _ in range(args.repeats):
        for name, (process, asked, results) in sides.items():
            asked.put(True)
            while results.empty():
                process.join(0.5)
                if not process.is_alive() and results.empty():
                    raise SystemExit(f"error: the process of '{name}' died (out of memory?)")
            spent, peaks[name] = results.get()
            times[name].append(spent)
            print(f"# {name}: {spent['whole image']:.2f} s", flush=True)
    for _, asked, _ in sides.values():
        asked.put(None)
    masks = "without masks" if args.no_masks else "with masks"
    print(f"{args.boxes} boxes {masks}, {DEVICE}, {args.threads} threads, median of {args.repeats}")
    first = args.sides[0]
    for name, runs in times.items():
        print(f"{name}: peak memory {peaks[name] / 1e9:.2f} GB")
        for part in runs[0]:
            base, values = ([run[part] for run in each] for each in (times[first], runs))
            print(f"  {part:20s} {statistics.median(values):7.2f} s")
            if name != first:
                print(f"    times the speed of {first}: {Ratio(base, values)}")


class MaskDecoders:
    """Both decoders, with the same weights, on one image. All sizes of SAM have the same one."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
        decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
        self.stock = decoder.to(DEVICE).eval()
        self.ours = MaskTokenDecoder(self.stock)
        self.encoder = PromptEncoder(256, (64, 64), (1024, 1024), mask_in_chans=16).to(DEVICE)
        self.image = torch.randn(1, 256, 64, 64, device=DEVICE), self.encoder.get_dense_pe()

    def prompts(self, kind: str, number: int) -> EncodedPrompts:
        """Random prompts: "boxes", "points" (one each) or "masks" (a box and a mask each)."""
        boxes = 1024 * torch.rand(number, 4, device=DEVICE)
        points = 1024 * torch.rand(number, 1, 2, device=DEVICE)
        masks = torch.randn(number, 1, 256, 256, device=DEVICE)
        on = torch.ones(number, 1, device=DEVICE)
        return self.encoder(
            points=(points, on) if kind == "points" else None,
            boxes=None if kind == "points" else boxes,
            masks=masks if kind == "masks" else None,
        )

    def run_stock(self, prompts: EncodedPrompts, chunk_size: int) -> None:
        for sparse, dense in zip(*(x.split(chunk_size) for x in prompts)):
            self.stock(*self.image, sparse, dense, multimask_output=False)

    def run_ours(self, prompts: EncodedPrompts, chunk_size: int, with_masks: bool) -> None:
        self.ours(*self.image, *prompts, with_masks=with_masks, chunk_size=chunk_size)

    def difference(self, prompts: EncodedPrompts) -> dict[str, float]:
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


def fastest_chunk(
    run: Callable[[EncodedPrompts, int], None], prompts: EncodedPrompts, sizes: Iterable[int]
) -> int:
    """The best chunk size on some of the prompts, after a run to warm up."""
    prompts = prompts[0][:NUM_TRIED], prompts[1][:NUM_TRIED]
    run((prompts[0][:2], prompts[1][:2]), 2)
    return min(sizes, key=lambda size: seconds(partial(run, prompts, size)))


@torch.no_grad()
def run_mask_tokens(args: argparse.Namespace) -> None:
    """Prints how fast our decoder is against the stock one, each with its best chunk size."""
    torch.set_num_threads(args.threads)
    print(f"{DEVICE}, {args.threads} threads, torch {torch.__version__}")
    decoders = MaskDecoders()
    runs: dict[str, Callable[[EncodedPrompts, int], None]] = {
        "stock": decoders.run_stock,
        "tokens": partial(decoders.run_ours, with_masks=False),
        "tokens and masks": partial(decoders.run_ours, with_masks=True),
    }
    for kind, number in [("boxes", args.boxes), ("points", args.others), ("masks", args.others)]:
        prompts = decoders.prompts(kind, number)
        sizes = sorted({min(size, number) for size in args.chunk_sizes})
        chunks = {name: fastest_chunk(run, prompts, sizes) for name, run in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                times[name].append(seconds(partial(run, prompts, chunks[name])))
        print(f"\n{number} {kind}")
        for name, values in times.items():
            print(f"  {name:17s} {statistics.median(values):8.3f} s   chunks of {chunks[name]:3d}")
            if name != "stock":
                print(f"    times the speed of the stock decoder: {Ratio(times['stock'], values)}")
        differences = decoders.difference(decoders.prompts(kind, min(number, 4)))
        print("  largest difference: " + ", ".join(f"{n} {d:.1e}" for n, d in differences.items()))


def run_predictor(args: argparse.Namespace) -> None:
    """Prints the time against the bare modules; fails above ``LIMIT`` or ``TOLERANCE``."""
    torch.set_num_threads(args.threads)
    keys = ("MODEL.WEIGHTS", "MODEL.LOCALIZER.WEIGHTS", "MODEL.VISION_LANGUAGE.WEIGHTS")
    no_weights = [part for key in keys for part in (key, "")] if args.random else []
    try:
        # The bare modules see the whole image.
        opts = [*no_weights, "MODEL.ZOOM", "0", *args.opts]
        predictor = RegionSpotPredictor(load_config(args.config_file, opts, training=False))
    except (ConfigError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.random:
        use_random_text_embeddings(predictor.model)
    generator = torch.Generator().manual_seed(0)
    size = (args.size[0], args.size[1])
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    known = known_vocabulary("lvis")
    asked = []
    for _ in range(args.calls):
        order = torch.randperm(len(known), generator=generator)[: args.names]
        asked.append((random_boxes(args.boxes, size, generator), [known[i] for i in order]))
        predictor.set_vocabulary(asked[-1][1])  # embedded here, because it is not measured
    bare_modules(predictor.model, image, asked[:1])  # warm up
    pairs = [
        (
            seconds(lambda: bare_modules(predictor.model, image, asked)),
            seconds(lambda: with_predictor(predictor, image, asked)),
        )
        for _ in range(args.repeats)
    ]
    bare, ours = zip(*pairs)
    needed, used, ratio = statistics.median(bare), statistics.median(ours), Ratio(ours, bare)
    print(f"set_image and {args.calls} predict calls: {used:.3f} s; bare modules: {needed:.3f} s")
    print(f"ratio {ratio} (limit {LIMIT})")
    worst = largest_difference(predictor, image, asked)
    print(f"largest difference of a score from single questions: {worst:.1e} (limit {TOLERANCE})")
    if ratio.median > LIMIT or worst > TOLERANCE:
        raise SystemExit(1)


def with_predictor(
    predictor: RegionSpotPredictor, image: Tensor, asked: Sequence[Question]
) -> list[Instances]:
    predictor.set_image(image)
    return [predictor.predict(boxes=boxes, vocabulary=names) for boxes, names in asked]


@torch.no_grad()
def bare_modules(model: RegionSpot, image: Tensor, asked: Sequence[Question]) -> list[Any]:
    """Image encoders once; per question decoder, masks, head and cosines, and nothing else."""
    size = (image.shape[-2], image.shape[-1])
    encoded = model.encode([image.to(model.device)])
    answers = []
    for corners, names in asked:
        boxes = Boxes(corners.to(model.device))
        tokens, masks = boxes.tensor.new_zeros(len(boxes), model.localizer.token_dim), None
        if model.with_masks or model.region_head.reads_mask_tokens:
            tokens, masks = model.localizer.decode(
                encoded.embeddings[0], size, BoxPrompts(boxes), with_masks=model.with_masks
            )
        if masks is not None:
            model.localizer.full_size_masks(masks, size)
        relative = boxes.tensor / boxes.tensor.new_tensor([size[1], size[0]] * 2)
        [embeddings] = model.region_head([tokens], encoded.image_tokens, [relative])
        text = model.text_embedder(names, model.device)
        logits = embeddings @ text.T * model.vision_language.logit_scale.exp()
        answers.append(logits.softmax(1).max(1))
    return answers


def largest_difference(
    predictor: RegionSpotPredictor, image: Tensor, asked: Sequence[Question]
) -> float:
    """Scores of one image asked many times against single runs; infinite if a name differs."""
    worst = 0.0
    for question, found in zip(asked, with_predictor(predictor, image, asked)):
        [single] = with_predictor(predictor, image, [question])
        same = torch.equal(found.pred_classes, single.pred_classes)
        if not same or not torch.equal(found.pred_boxes.tensor, single.pred_boxes.tensor):
            return float("inf")
        worst = max(worst, float((found.scores - single.scores).abs().max()))
    return worst


RUN = {
    "image": run_image,
    "plain": run_plain,
    "mask-tokens": run_mask_tokens,
    "predictor": run_predictor,
}

if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    arguments.threads = arguments.threads or torch.get_num_threads()
    RUN[arguments.command](arguments)
