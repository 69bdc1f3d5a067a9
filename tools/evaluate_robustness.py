#!/usr/bin/env python
"""Measures how well names of ground-truth regions stand up to bad boxes, bad images and an attack.

For each model and condition it gives top-1 accuracy and the expected calibration error (ECE, bins
of equal mass), and writes robustness.md, robustness.json and robustness.png::

    python tools/evaluate_robustness.py --output output/robustness \\
        --model RegionSpot configs/eval_lvis_gt.yaml MODEL.WEIGHTS heads/regionspot_L.safetensors \\
        --model "CLIP on crops" configs/baselines/eval_crop_gt.yaml

A model is its name in the tables, a config and options of it. All models see the same regions, the
same noise and the same strengths; each is attacked through its own gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from tabulate import tabulate
from torch import Tensor
from torchvision.transforms.v2 import functional as images
from tqdm import tqdm

from regionspot_d2.checkpoint import build_regionspot
from regionspot_d2.data.build import load_records
from regionspot_d2.data.mapper import RegionMapper
from regionspot_d2.engine.config import load_config, told_in_a_line
from regionspot_d2.files import write_atomically
from regionspot_d2.modeling import BoxPrompts, RegionSpot
from regionspot_d2.modeling.interfaces import to_rgb
from regionspot_d2.modeling.vocabulary import dataset_class_names

BOX_NOISE, LOOSE, ATTACK = "box noise", "loose boxes", "attack (L-infinity, of 255)"
# Those of ImageNet-C (Hendrycks & Dietterich, ICLR 2019), for RGB in 0..1, where torchvision has
# its operation. ImageNet-C adds to a color's value; the factors do about that to a medium one.
_NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
_BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)
_JPEG = (25, 18, 15, 10, 7)
_BRIGHTNESS = (1.2, 1.4, 1.6, 1.8, 2.0)
_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
_FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))


class Regions(NamedTuple):
    """The labeled regions of one image, on the CPU.

    Attributes:
        key: tells this image from others; random numbers follow from it.
        image: (3, H, W), RGB, uint8.
        boxes: (R, 4), XYXY, pixels of the image; R is at least 1.
        labels: (R,), int64.
    """

    key: str
    image: Tensor
    boxes: Tensor
    labels: Tensor


class Named(NamedTuple):
    """What a model says of the regions of an image.

    Attributes:
        scores: (R,), of the best name.
        right: (R,), bool, whether it is the true one.
        loss: cross-entropy of the true names, a scalar.
    """

    scores: Tensor
    right: Tensor
    loss: Tensor


class Result(NamedTuple):
    """Top-1 accuracy and ECE of a model under a condition, in percent."""

    model: str
    kind: str
    strength: float
    top1: float
    ece: float


def moved_boxes(boxes: Tensor, size: tuple[int, int], noise: float) -> Tensor:
    """Moves centers by up to ``noise`` of the side, and changes sides by up to as much.

    Args:
        boxes: (R, 4), XYXY, pixels of an image (H, W), at whose edges the result is cut.
    """
    low, high = boxes.chunk(2, dim=1)
    shift, growth = noise * (high - low) * (2 * torch.rand(2, len(boxes), 2) - 1)
    return _cut(torch.cat([low + shift - growth / 2, high + shift + growth / 2], dim=1), size)


def loose_boxes(boxes: Tensor, size: tuple[int, int], factor: float) -> Tensor:
    """Makes the sides of boxes longer around their centers; for the rest see moved_boxes."""
    low, high = boxes.chunk(2, dim=1)
    more = (factor - 1) * (high - low) / 2
    return _cut(torch.cat([low - more, high + more], dim=1), size)


def _cut(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    inside = Boxes(boxes)
    inside.clip(size)
    return inside.tensor


def add_noise(image: Tensor, strength: int) -> Tensor:
    sigma = _NOISE[strength - 1]
    return images.gaussian_noise(image.float() / 255, sigma=sigma, clip=True) * 255


def blur(image: Tensor, strength: int) -> Tensor:
    sigma = _BLUR[strength - 1]
    # The border is mirrored, which takes an image that is longer than the kernel's half.
    half = min(math.ceil(3 * sigma), min(image.shape[1:]) - 1)
    return images.gaussian_blur(image, [2 * half + 1] * 2, [sigma] * 2)


def add_fog(image: Tensor, strength: int) -> Tensor:
    """Haze of uneven density, as in ImageNet-C: octaves of noise, each finer and weaker."""
    thickness, decay = _FOG[strength - 1]
    density, side, weight = torch.zeros(image.shape[1:]), 2, 1.0
    while side < max(image.shape[1:]):
        octave = torch.rand(1, 1, side + 1, side + 1)
        smooth = F.interpolate(octave, image.shape[1:], mode="bilinear", align_corners=True)
        density += weight * smooth[0, 0]
        side, weight = 2 * side, weight / decay
    density = (density - density.min()) / (density.max() - density.min()).clamp(min=1e-6)
    pixels = image.float() / 255
    brightest = pixels.max()
    return (pixels + thickness * density) * brightest / (brightest + thickness) * 255


# torchvision, which is there anyway, keeps pace with torch. Of the collections of corruptions,
# imagecorruptions fails with NumPy 2 and scikit-image 0.19, and albumentations is kept no longer.
CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "noise": add_noise,
    "blur": blur,
    "JPEG": lambda image, strength: images.jpeg(image, _JPEG[strength - 1]),
    "brightness": lambda image, s: images.adjust_brightness(image, _BRIGHTNESS[s - 1]),
    "contrast": lambda image, s: images.adjust_contrast(image, _CONTRAST[s - 1]),
    "fog": add_fog,
}

STRENGTHS: dict[str, tuple[float, ...]] = {
    BOX_NOISE: (0, 0.1, 0.2, 0.4),
    LOOSE: (1.2, 1.5),
    **{kind: (1, 2, 3, 4, 5) for kind in CORRUPTIONS},
    ATTACK: (0, 1, 2, 4),
}


def disturbed(regions: Regions, kind: str, strength: float, seed: int = 0) -> Regions:
    """Regions with other boxes or another image, of 8 bits; the same whenever it is asked for."""
    size = (regions.image.shape[1], regions.image.shape[2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {regions.key} {kind} {strength}".encode()))
        if kind == BOX_NOISE:
            return regions._replace(boxes=moved_boxes(regions.boxes, size, strength))
        if kind == LOOSE:
            return regions._replace(boxes=loose_boxes(regions.boxes, size, strength))
        image = CORRUPTIONS[kind](regions.image, int(strength)).float()
    return regions._replace(image=image.round().clamp(0, 255).byte())


def name_regions(
    model: RegionSpot,
    regions: Regions,
    class_names: Sequence[str],
    image: Tensor | None = None,
) -> Named:
    """Names regions; with ``image`` in place of their own, gradients lead to it."""
    differentiable = image is not None
    pixels = regions.image.to(model.device) if image is None else image
    with torch.set_grad_enabled(differentiable):
        encoded = model.encode([pixels], differentiable=differentiable)
        prompts = BoxPrompts(Boxes(regions.boxes))
        [answer] = model.answer(encoded, [prompts], with_masks=False)
        labels = regions.labels.to(model.device)
        loss = F.cross_entropy(model.score(answer.embeddings, class_names), labels)
        found = model.name(answer, class_names, topk=1)
    return Named(found.scores.detach().cpu(), (found.pred_classes == labels).cpu(), loss)


def attack(
    model: RegionSpot,
    regions: Regions,
    class_names: Sequence[str],
    budgets: Sequence[float],
    *,
    steps: int,
    seed: int = 0,
) -> Iterator[Named]:
    """Projected gradient descent (Madry et al., ICLR 2018) against all regions of an image at once.

    Gradients go through the vision-language model and the head; the mask tokens follow the image,
    but no gradient goes through the localizer. Of all images that were tried, 8 bits each, the one
    with the fewest right names counts, then the one with the highest loss. A budget starts from the
    one found within the budget before it, so that a larger one never does worse.

    Args:
        budgets: the largest change of a value, of 255, in ascending order; 0 leaves the image.
        steps: gradients for each budget.

    Yields:
        The worst answer within each budget.
    """
    clean = regions.image.float().to(model.device)
    worst, best = name_regions(model, regions, class_names), clean
    before = 0.0
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {regions.key}".encode()))
    for budget in budgets:
        low, high = (clean - budget).clamp(min=0), (clean + budget).clamp(max=255)
        start = 2 * torch.rand(clean.shape, generator=generator).to(clean) - 1
        pixels = (best + (budget - before) * start).clamp(low, high)
        for step in range(steps + 1 if budget > 0 else 0):
            pixels.requires_grad_()
            whole = pixels + (pixels.round() - pixels).detach()
            found = name_regions(model, regions, class_names, whole)
            if _rank(found) < _rank(worst):
                worst, best = found._replace(loss=found.loss.detach()), whole.detach()
            if step < steps:
                [gradient] = torch.autograd.grad(found.loss, pixels)
                moved = pixels.detach() + 2.5 * budget / steps * gradient.sign()
                pixels = moved.clamp(low, high)
        before = budget
        yield worst


def _rank(named: Named) -> tuple[int, float]:
    return int(named.right.sum()), -float(named.loss.detach())


def calibration_error(scores: Tensor, right: Tensor, bins: int = 15) -> float:
    """Expected calibration error with bins of equal mass, in percent; scores and hits (N,)."""
    order = scores.argsort(stable=True)
    parts = order.tensor_split(min(bins, max(len(order), 1)))
    gaps = [abs(scores[part].mean() - right[part].float().mean()) * len(part) for part in parts]
    return 100 * float(sum(gaps)) / max(len(order), 1)


def measure(
    label: str,
    model: RegionSpot,
    dataset: Sequence[Regions],
    class_names: Sequence[str],
    kinds: Sequence[str],
    *,
    steps: int,
    seed: int = 0,
) -> list[Result]:
    """Measures a model under all strengths of some kinds of conditions."""
    named: dict[tuple[str, float], list[Named]] = {}
    for regions in tqdm(dataset, desc=label):
        for kind in kinds:
            strengths = STRENGTHS[kind]
            found: Iterator[Named]
            if kind == ATTACK:
                found = attack(model, regions, class_names, strengths, steps=steps, seed=seed)
            else:
                conditions = (disturbed(regions, kind, s, seed) for s in strengths)
                found = (name_regions(model, each, class_names) for each in conditions)
            for strength, each in zip(strengths, found):
                named.setdefault((kind, strength), []).append(each)
    results = []
    for (kind, strength), parts in named.items():
        scores, right = (torch.cat(column) for column in list(zip(*parts))[:2])
        top1 = 100 * float(right.float().mean())
        results.append(Result(label, kind, strength, top1, calibration_error(scores, right)))
    return results


def load_regions(cfg: CfgNode) -> list[Regions]:
    """The labeled regions of ``DATASETS.TEST``, as evaluation sees them, of images that have some.

    Raises:
        ValueError: there is not one dataset but none or several.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(f"DATASETS.TEST is {cfg.DATASETS.TEST}; one dataset is expected.")
    records = load_records(cfg.DATASETS.TEST[0], with_annotations=True, filter_empty=True)
    # Images as in a test, with their annotations as in training.
    mapper = RegionMapper(**{**RegionMapper.from_config(cfg, False), "is_train": True})
    found = []
    for record in tqdm(records, desc="images"):
        x: Any = mapper(record)
        if len(truth := x["instances"]):
            image = to_rgb(x["image"], cfg.INPUT.FORMAT)
            key = str(record["image_id"])
            found.append(Regions(key, image, truth.gt_boxes.tensor, truth.gt_classes))
    return found


def table(results: Sequence[Result]) -> str:
    """The results as Markdown: a row per condition, and for each model top-1 / ECE."""
    models = list(dict.fromkeys(result.model for result in results))
    conditions = dict.fromkeys((result.kind, result.strength) for result in results)
    cells = {result[:3]: f"{result.top1:.1f} / {result.ece:.1f}" for result in results}
    rows = [[*where, *(cells.get((m, *where), "–") for m in models)] for where in conditions]
    headers = ["condition", "strength", *models]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws top-1 (lines) and ECE (dashes) over the strength, a panel for each kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(result.kind for result in results))
    models = list(dict.fromkeys(result.model for result in results))
    columns = min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, kind in enumerate(kinds):
        axes = figure.add_subplot(rows, columns, place + 1, title=kind, ylim=(0, 100))
        for color, model in enumerate(models):
            of_model = [r for r in results if (r.model, r.kind) == (model, kind)]
            x = [result.strength for result in of_model]
            style: dict[str, Any] = {"color": f"C{color}", "marker": "."}
            axes.plot(x, [result.top1 for result in of_model], label=model, **style)
            axes.plot(x, [result.ece for result in of_model], linestyle=":", **style)
    figure.supylabel("top-1 (lines) and ECE (dots), percent", fontsize="medium")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "CONFIG"),
        help="a name for the tables, a config file, and alternating keys and values of it",
    )
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--kinds", nargs="+", choices=STRENGTHS, default=list(STRENGTHS))
    parser.add_argument("--steps", type=int, default=10, help="of the attack, for each budget")
    parser.add_argument("--images", type=int, help="only so many, the first of the dataset")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def configs_of(models: Sequence[Sequence[str]]) -> dict[str, CfgNode]:
    """The configs of the command line by the names of the models.

    Raises:
        ValueError: a model has no config, two have one name, or they are of different datasets.
    """
    found: dict[str, CfgNode] = {}
    for words in models:
        if len(words) < 2 or words[0] in found:
            raise ValueError(f"--model {' '.join(words)}: a name of its own and a config expected.")
        found[words[0]] = load_config(words[1], words[2:], training=False, testing=True)
    if len({tuple(cfg.DATASETS.TEST) for cfg in found.values()}) > 1:
        raise ValueError("The models have different DATASETS.TEST; one for all is expected.")
    return found


@told_in_a_line("evaluate_robustness.py")
def main() -> None:
    args = argument_parser().parse_args()
    configs = configs_of(args.model)
    args.output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for label, cfg in configs.items():
        dataset = load_regions(cfg)[: args.images]
        class_names = dataset_class_names(cfg.DATASETS.TEST[0])
        model = build_regionspot(cfg).eval()
        options = {"steps": args.steps, "seed": args.seed}
        results += measure(label, model, dataset, class_names, args.kinds, **options)
        # After each model: what was measured outlives what comes after it.
        count = sum(len(regions.labels) for regions in dataset)
        title = f"{cfg.DATASETS.TEST[0]}: {count} regions in {len(dataset)} images, top-1 / ECE\n"
        with write_atomically(args.output / "robustness.md", "w") as file:
            file.write(f"{title}\n{table(results)}\n")
        with write_atomically(args.output / "robustness.json", "w") as file:
            content = {"models": args.model, **options, "regions": count}
            json.dump({**content, "results": [r._asdict() for r in results]}, file, indent=1)
        draw(results, args.output / "robustness.png")
    print(f"{title}\n{table(results)}")


if __name__ == "__main__":
    main()
