#!/usr/bin/env python
"""Exports the region head, with a vocabulary, as ONNX.

    python tools/export_onnx.py --config-file configs/regionspot_L.yaml --vocabulary coco \\
        --output head.onnx MODEL.WEIGHTS heads/regionspot_L.safetensors

The inputs of the graph are ``mask_tokens`` (R, 256), ``image_tokens`` (L, W) and ``text`` (C, D),
rows of unit length; its output is ``logits`` (R, C). R, L and C may vary from call to call. The
text matrix of the vocabulary is written next to it (``.npy``), so for another vocabulary only that
file changes. The graph is checked against torch before it is kept.

The localizer's decoder is exported by segment-anything's own ``scripts/export_onnx_model.py``; the
image encoders run in torch, or are exported by their libraries.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from regionspot_d2 import RegionSpotPredictor
from regionspot_d2.app.inputs import read_vocabulary
from regionspot_d2.data.datasets.vocabularies import VOCABULARIES
from regionspot_d2.engine import load_config
from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.modeling import RegionSpotHead

try:
    import onnx  # noqa: F401
    import onnxruntime
    import onnxscript  # noqa: F401
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: the package {missing.name} is missing: pip install regionspot_d2[onnx]"
    ) from missing

TOLERANCE = 1e-4


class ScoredHead(nn.Module):
    """The head for one image, and the comparison with the text embeddings."""

    def __init__(self, head: RegionSpotHead, logit_scale: Tensor) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("scale", logit_scale.detach().float().exp())

    def forward(self, mask_tokens: Tensor, image_tokens: Tensor, text: Tensor) -> Tensor:
        # RegionSpotHead.forward without the padding of batches, which a graph cannot express.
        queries = self.head.to_clip(mask_tokens)[None]
        regions = self.head.projector(self.head.decoder(queries, image_tokens[None]))[0]
        return nn.functional.normalize(regions, dim=-1) @ text.T * self.scale


def export(head: RegionSpotHead, logit_scale: Tensor, text_dim: int, path: Path) -> float:
    """Exports a head in eval mode and compares the graph with torch.

    ``logit_scale`` is the logarithm that the vision-language model has, ``text_dim`` is D.

    Returns:
        The largest difference of a logit between the graph and torch, over several sizes.

    Raises:
        RuntimeError: the difference exceeds ``TOLERANCE``; nothing is written.
    """
    model = ScoredHead(head, logit_scale).cpu().eval()
    scale = model.scale
    token_dim, image_dim = head.to_clip.in_features, head.to_clip.out_features

    def example(regions: int, tokens: int, names: int) -> tuple[Tensor, Tensor, Tensor]:
        text = nn.functional.normalize(torch.randn(names, text_dim), dim=1)
        return torch.randn(regions, token_dim), torch.randn(tokens, image_dim), text

    part = path.with_name(f".{path.name}")
    torch.onnx.export(
        model,
        example(7, 50, 11),
        str(part),
        input_names=["mask_tokens", "image_tokens", "text"],
        output_names=["logits"],
        dynamic_shapes={
            "mask_tokens": {0: torch.export.Dim("regions", min=1)},
            "image_tokens": {0: torch.export.Dim("tokens", min=1)},
            "text": {0: torch.export.Dim("names", min=1)},
        },
        dynamo=True,
        external_data=False,
    )
    session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
    worst = 0.0
    for sizes in [(7, 50, 11), (1, 197, 1), (300, 577, 1203)]:
        inputs = example(*sizes)
        names = ("mask_tokens", "image_tokens", "text")
        [found] = session.run(None, {n: x.numpy() for n, x in zip(names, inputs)})
        with torch.no_grad():
            [regions] = head([inputs[0]], inputs[1][None])
            expected = regions @ inputs[2].T * scale
        worst = max(worst, float(np.abs(found - expected.numpy()).max()))
    if worst > TOLERANCE:
        part.unlink()
        raise RuntimeError(
            f"The graph differs from torch by {worst:.1e}, more than {TOLERANCE:.0e}."
        )
    os.replace(part, path)
    return worst


@told_in_a_line("export_onnx.py")
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--vocabulary", default="lvis", help=f"{'|'.join(VOCABULARIES)} or a,b,c")
    parser.add_argument("--output", type=Path, required=True, help="file to write (.onnx)")
    parser.add_argument("opts", nargs="*", help="config changes: KEY VALUE ...")
    args = parser.parse_args()
    args.output = args.output.expanduser()
    if args.output.is_dir() or args.output.suffix != ".onnx":
        parser.error(f"--output {args.output}: a file that ends in .onnx is expected")
    cfg = load_config(args.config_file, args.opts, training=False)
    words = args.vocabulary
    names = read_vocabulary(words)
    predictor = RegionSpotPredictor(cfg, vocabulary=names)
    model = predictor.model
    if not isinstance(model.region_head, RegionSpotHead):
        kind = type(model.region_head).__name__
        raise ValueError(f"MODEL.REGION_HEAD.NAME is {kind}; only RegionSpotHead is exported.")
    scale, width = model.vision_language.logit_scale, model.vision_language.text_dim
    text = args.output.with_suffix(".npy")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    worst = export(model.region_head, scale, width, args.output)
    np.save(text, model.text_embedder(names).numpy())
    print(
        f"{args.output} differs from torch by at most {worst:.1e}. "
        f"The embeddings of its {len(names)} class names are in {text}."
    )


if __name__ == "__main__":
    main()
