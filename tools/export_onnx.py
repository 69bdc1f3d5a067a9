#!/usr/bin/env python
"""Exports a model with a vocabulary as ONNX, for places without torch.

    python tools/export_onnx.py --config-file configs/regionspot_L.yaml --vocabulary coco \\
        --output regionspot_onnx MODEL.WEIGHTS heads/regionspot_L.safetensors

The folder then holds

* ``model.json``: sizes, zoom, what the head reads, and which file is what.
* ``image_tower.onnx``: ``image`` (3, H, W) -> ``image_tokens`` (L, W). The image is float32, RGB,
  0..255 and of any size: resizing and normalization are in the graph.
* ``localizer_encoder.onnx``: ``image`` (3, h, w) -> ``embedding``. The long side of the image is
  ``side`` of ``model.json``; normalization and padding are in the graph.
* ``localizer_decoder.onnx``: ``embedding``, ``boxes`` (R, 4) in pixels of that image ->
  ``mask_tokens`` (R, T), ``mask_logits`` (R, 1, 4h', 4w').
* ``head.onnx``: what it reads of ``mask_tokens``, ``image_tokens`` and ``boxes`` (XYXY in 0..1 of
  the image), and ``text`` (C, D) -> ``logits`` (R, C).
* ``text.npy`` and ``names.json``: the vocabulary. For another one only these two change.

R, C, H, W, h and w may vary from call to call. Each graph is checked against torch before the
folder is kept. ``demo/onnx_inference.py`` reads the folder with onnxruntime, NumPy and PIL.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("--config-file", required=True, help="a config, or its name")
    parser.add_argument("--vocabulary", default="lvis", help="as of regionspot name")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--with-localizer",
        action="store_true",
        help="export the localizer too if the head reads no mask tokens, for its masks",
    )
    parser.add_argument("opts", nargs="*", help="config changes: KEY VALUE ...")
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regionspot_d2
from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.app.inputs import read_vocabulary
from regionspot_d2.engine import load_config
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.modeling import RegionSpot, RegionSpotHead, SamLocalizer
from regionspot_d2.modeling.interfaces import Localizer, RegionHead, VisionLanguageModel

try:
    import onnx  # noqa: F401
    import onnxruntime
    import onnxscript  # noqa: F401
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: the package {missing.name} is missing: pip install regionspot_d2[onnx]"
    ) from missing

TOLERANCE = 1e-4
# Of the whole folder; demo/onnx_inference.py reads no other.
FORMAT = 1
# A protocol buffer holds 2 GB. Larger weights go into a file beside the graph.
MAX_WEIGHTS_IN_GRAPH = 2**30


class Port(NamedTuple):
    """An input of a graph: its name, and the axes whose sizes vary, with names for the sizes."""

    name: str
    axes: dict[int, str]


class ImageTower(nn.Module):
    """The image tokens of one image, resizing and all."""

    ports = (Port("image", {1: "height", 2: "width"}),)
    outputs = ("image_tokens",)
    # The mini model keeps a cell's 50 best classes. Where the last of them ties with the next, the
    # smallest difference swaps them, in one of thousands of cells.
    agreeing = 0.99

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model([image])[0]


class LocalizerEncoder(nn.Module):
    """SAM's embedding of one image whose long side is already the localizer's."""

    ports = (Port("image", {1: "height", 2: "width"}),)
    outputs = ("embedding",)
    agreeing = 1.0

    def __init__(self, localizer: SamLocalizer) -> None:
        super().__init__()
        self.localizer = localizer

    def forward(self, image: Tensor) -> Tensor:
        pixels = (image - self.localizer.pixel_mean) / self.localizer.pixel_std
        side = self.localizer.side
        padding = (0, side - image.shape[2], 0, side - image.shape[1])
        return self.localizer.image_encoder(F.pad(pixels, padding)[None])


class LocalizerDecoder(nn.Module):
    """Mask tokens and low-resolution mask logits of boxes, pixels of the localizer's square."""

    ports = (Port("embedding", {}), Port("boxes", {0: "regions"}))
    outputs = ("mask_tokens", "mask_logits")
    agreeing = 1.0

    def __init__(self, localizer: SamLocalizer) -> None:
        super().__init__()
        self.localizer = localizer

    def forward(self, embedding: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        # SamLocalizer.decode without its chunks: a graph has no loop over regions.
        prompts = self.localizer.prompt_encoder
        sparse, _ = prompts(points=None, boxes=boxes, masks=None)
        dense = prompts.no_mask_embed.weight.view(1, -1, 1, 1).expand_as(embedding)
        mask_tokens, masks, _ = self.localizer.token_decoder(
            embedding, prompts.get_dense_pe(), sparse, dense, with_masks=True
        )
        tokens = {"mask": [mask_tokens], "prompt": [sparse.mean(1)]}
        tokens["both"] = tokens["prompt"] + tokens["mask"]
        return torch.cat(tokens[self.localizer.tokens], dim=1), masks


class ScoredHead(nn.Module):
    """The head for one image, or one view of it, and the comparison with the text embeddings."""

    outputs = ("logits",)
    agreeing = 1.0

    def __init__(self, head: RegionHead, logit_scale: Tensor, token_dim: int) -> None:
        """
        Args:
            head: must read nothing but mask tokens, image tokens and boxes.
            logit_scale: the logarithm that the vision-language model has.
            token_dim: width of a mask token.

        Raises:
            ValueError: the head cannot be exported.
        """
        super().__init__()
        kind = type(head).__name__
        if head.reads_images or head.mask_size is not None:
            raise ValueError(
                f"MODEL.REGION_HEAD.NAME is {kind}, which reads images or masks; only heads that "
                "read nothing but mask tokens, image tokens and boxes are exported."
            )
        if isinstance(head, RegionSpotHead) and not head.has_attention:
            raise ValueError(
                "MODEL.REGION_HEAD.IMAGE_TOKENS is False; that ablation is not exported."
            )
        self.head, self.token_dim = head, token_dim
        self.register_buffer("scale", logit_scale.detach().float().exp())
        ports = (
            (head.reads_mask_tokens, Port("mask_tokens", {0: "regions"})),
            (True, Port("image_tokens", {0: "tokens"} if head.has_attention else {})),
            (head.reads_boxes, Port("boxes", {0: "regions"})),
            (True, Port("text", {0: "names"})),
        )
        self.ports = tuple(port for read, port in ports if read)

    def forward(self, *inputs: Tensor) -> Tensor:
        given = {port.name: value for port, value in zip(self.ports, inputs)}
        embeddings = self._embed(given)
        return embeddings @ given["text"].T * self.scale

    def _embed(self, given: dict[str, Tensor]) -> Tensor:
        image_tokens = given["image_tokens"][None]
        if isinstance(self.head, RegionSpotHead):
            # Its forward without the padding of batches, which a graph cannot express.
            queries = self.head.to_clip(given["mask_tokens"])[None]
            decoded = self.head.decoder(queries, image_tokens)
            return F.normalize(self.head.projector(decoded)[0], dim=-1)
        count = next(given[name].shape[0] for name in ("boxes", "mask_tokens") if name in given)
        tokens = given.get("mask_tokens", image_tokens.new_zeros(count, self.token_dim))
        boxes = given.get("boxes", image_tokens.new_zeros(count, 4))
        [embeddings] = self.head([tokens], image_tokens, [boxes])
        return embeddings


def resize_weights(length: int, size: int, smooth: bool) -> Tensor:
    """What each of ``size`` places takes from each of ``length``: (size, length), rows sum to 1.

    torch's bilinear resizing of a line, with ``smooth`` its antialiased one: a triangle around the
    middle of each place, as wide as the place where that is more than a pixel.
    """
    step = torch.scalar_tensor(length, dtype=torch.float32) / size
    middles = (torch.arange(size) + 0.5) * step
    distances = (torch.arange(length) + 0.5 - middles[:, None]).abs()
    weights = (1 - distances / (step.clamp(min=1) if smooth else 1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _resized(smooth: bool) -> Callable[..., Tensor]:
    def resize(image: Tensor, size: Sequence[int], *_: object) -> Tensor:
        rows = resize_weights(image.shape[-2], size[0], smooth)
        return rows @ image @ resize_weights(image.shape[-1], size[1], smooth).T

    return resize


# ONNX's own Resize differs from torch's: its antialiasing by up to 2 % of a token, and the other
# by 2e-4, since it places its samples with other rounding.
RESIZING = {
    torch.ops.aten.upsample_bilinear2d.vec: _resized(smooth=False),
    torch.ops.aten.upsample_bilinear2d.default: _resized(smooth=False),
    torch.ops.aten._upsample_bilinear2d_aa.vec: _resized(smooth=True),
    torch.ops.aten._upsample_bilinear2d_aa.default: _resized(smooth=True),
}


@torch.no_grad()
def export(
    model: ImageTower | LocalizerEncoder | LocalizerDecoder | ScoredHead,
    examples: Sequence[tuple[Tensor, ...]],
    path: Path,
) -> float:
    """Exports one graph and compares it with torch.

    Args:
        model: on the CPU, with weights.
        examples: inputs of several sizes. The first is traced; the graph must agree on all.
        path: of the file to write.

    Returns:
        The largest difference between the graph and torch: of logits; of other values relative to
        the largest where that is above 1, and in the share of rows that ``model.agreeing`` says.

    Raises:
        ValueError: torch cannot export the model.
        RuntimeError: the difference exceeds ``TOLERANCE``; nothing is kept.
    """
    print(f"Exporting {path.name} and comparing it with torch", file=sys.stderr)
    model.eval()
    axes = [
        {axis: torch.export.Dim(name, min=1) for axis, name in port.axes.items()}
        for port in model.ports
    ]
    is_head = isinstance(model, ScoredHead)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        try:
            shapes = (tuple(axes),) if is_head else tuple(axes)
            program = torch.export.export(
                model,
                examples[0],
                dynamic_shapes=shapes,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            torch.onnx.export(
                program.run_decompositions(RESIZING),
                (),
                str(path),
                input_names=[port.name for port in model.ports],
                output_names=list(model.outputs),
                dynamo=True,
                external_data=weights > MAX_WEIGHTS_IN_GRAPH,
                verbose=False,
            )
        except Exception as error:  # torch's exporters raise everything, in many lines
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"torch cannot export {path.name}: {reason}") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for inputs in examples:
        found = session.run(None, {p.name: x.numpy() for p, x in zip(model.ports, inputs)})
        expected = model(*inputs)
        for value, right in zip(found, (expected,) if len(found) == 1 else expected):
            largest = 1.0 if is_head else max(1.0, float(right.abs().max()))
            rows = np.abs(value - right.numpy()).reshape(len(value), -1).max(1)
            worst = max(worst, float(np.quantile(rows, model.agreeing)) / largest)
    if not worst <= TOLERANCE:
        path.unlink()
        raise RuntimeError(
            f"{path.name} differs from torch by {worst:.1e}, more than {TOLERANCE:.0e}."
        )
    return worst


def head_examples(head: ScoredHead, image_tokens: Tensor, text_dim: int) -> list[tuple]:
    """Inputs of a head for several numbers of regions and names; the image tokens are real."""

    def inputs(regions: int, names: int) -> tuple[Tensor, ...]:
        corners = torch.rand(regions, 2, 2).sort(1).values
        values = {
            "mask_tokens": torch.randn(regions, head.token_dim),
            "image_tokens": image_tokens,
            "boxes": corners.flatten(1),
            "text": F.normalize(torch.randn(names, text_dim), dim=1),
        }
        return tuple(values[port.name] for port in head.ports)

    return [inputs(7, 11), inputs(1, 1), inputs(300, 1203)]


def export_localizer(localizer: Localizer, folder: Path) -> dict[str, float]:
    """Exports the two halves of SAM; says by file how far they are from torch."""
    if not isinstance(localizer, SamLocalizer):
        raise ValueError(
            f"MODEL.LOCALIZER.NAME is {type(localizer).__name__}; only SamLocalizer and its like "
            "are exported."
        )
    side = localizer.side
    encoder = LocalizerEncoder(localizer)
    images = [torch.rand(3, h, w) * 255 for h, w in ((side // 2, side), (side, side // 3))]
    with torch.no_grad():
        embedding = encoder(images[0])
    boxes = [(torch.rand(count, 2, 2) * side).sort(1).values.flatten(1) for count in (7, 1, 16)]
    graphs = {
        "localizer_encoder.onnx": (encoder, [(image,) for image in images]),
        "localizer_decoder.onnx": (LocalizerDecoder(localizer), [(embedding, b) for b in boxes]),
    }
    return {name: export(*graph, folder / name) for name, graph in graphs.items()}


def export_model(
    model: RegionSpot, class_names: Sequence[str], folder: Path, *, with_localizer: bool = False
) -> dict[str, float]:
    """Writes everything that a deployment needs.

    Args:
        model: on the CPU, in eval mode.
        class_names: the vocabulary.
        folder: exists and is empty.
        with_localizer: exports it even if the head reads no mask tokens.

    Returns:
        For each graph, by its file name, the largest difference from torch, see :func:`export`.

    Raises:
        ValueError: a part of the model cannot be exported.
        RuntimeError: a graph differs from torch.
    """
    vision_language, head = model.vision_language, model.region_head
    token_dim = model.localizer.token_dim
    scored = ScoredHead(head, vision_language.logit_scale, token_dim)
    localized = with_localizer or head.needs_localizer
    found = export_localizer(model.localizer, folder) if localized else {}
    images = [torch.rand(3, h, w) * 255 for h, w in ((120, 160), (48, 48), (720, 500))]
    tower = ImageTower(vision_language)
    found["image_tower.onnx"] = export(tower, [(x,) for x in images], folder / "image_tower.onnx")
    with torch.no_grad():
        image_tokens = tower(images[0])
    examples = head_examples(scored, image_tokens, vision_language.text_dim)
    found["head.onnx"] = export(scored, examples, folder / "head.onnx")
    np.save(folder / "text.npy", model.text_embedder(class_names).numpy())
    texts = {"names.json": list(class_names), "model.json": manifest(model, scored, localized)}
    for name, content in texts.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(f"{text}\n", encoding="utf-8")
    return found


def manifest(model: RegionSpot, head: ScoredHead, localized: bool) -> dict[str, object]:
    """What ``model.json`` says."""
    tower, localizer = model.vision_language, model.localizer
    parts: dict[str, object] = {"encoder": "localizer_encoder.onnx"}
    parts["decoder"] = "localizer_decoder.onnx"
    if isinstance(localizer, SamLocalizer):
        parts |= {"side": localizer.side, "chunk_size": localizer.chunk_size}
    return {
        "format": FORMAT,
        "regionspot_d2": regionspot_d2.__version__,
        "image_tower": {
            "file": "image_tower.onnx",
            "image_size": tower.image_size,
            "grid_size": tower.grid_size,
            "num_prefix_tokens": tower.num_prefix_tokens,
        },
        "localizer": parts | {"token_dim": localizer.token_dim} if localized else None,
        "head": {
            "file": "head.onnx",
            "reads": [port.name for port in head.ports if port.name != "text"],
            "max_regions": model.max_regions,
        },
        "logit_scale": float(head.scale),
        "zoom": {"factor": model.zoom, "max_views": model.zoom_max_views},
        "vocabulary": {"text": "text.npy", "names": "names.json"},
    }


@told_in_a_line("export_onnx.py")
def main() -> None:
    args = argument_parser().parse_args()
    output = args.output.expanduser()
    opts = [*args.opts, "MODEL.DEVICE", "cpu", "MODEL.COMPILE", "False"]
    cfg = load_config(args.config_file, opts, training=False)
    if output.suffix == ".onnx":
        raise ValueError(f"--output {output}: a folder is expected; it will hold head.onnx.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {output}: it exists; a new or empty folder is expected.")
    names = read_vocabulary(args.vocabulary)
    predictor = RegionSpotPredictor(cfg, vocabulary=names)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        part = Path(folder) / output.name
        part.mkdir()
        torch.manual_seed(0)  # of the inputs with which graphs are checked
        found = export_model(predictor.model, names, part, with_localizer=args.with_localizer)
        os.replace(part, output)
    sizes = ", ".join(f"{name} ({worst:.0e})" for name, worst in found.items())
    print(f"{output} holds {sizes}, with their difference from torch, and {len(names)} names.")


if __name__ == "__main__":
    main()
