#!/usr/bin/env python
"""Turns a published RegionSpot checkpoint into the head alone.

The authors' files (RegionSpot-BB, -BL, -BL@336) hold the frozen SAM and CLIP too, about 1 to 2 GB; what was trained is the
head. Those weights are under CC BY-NC 4.0, not this project's licence.

Example::

    python tools/convert_checkpoint.py regionspot_BL.pth regionspot_BL.safetensors
    python train_net.py --eval-only --config-file configs/eval_lvis_gt.yaml MODEL.WEIGHTS regionspot_BL.safetensors
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor

from regionspot_d2.modeling import RegionSpotHead

# What the published files call the trained parts, and what the frozen ones.
TRAINED = ("to_clip.", "decoder.", "projector.")
FROZEN = ("sam.", "clip_model.")
# Width of the image tokens and of the text, by which the published models are told apart.
PUBLISHED = {
    (768, 512): "RegionSpot-BB (configs/regionspot_B.yaml)",
    (
        1024,
        768,
    ): "RegionSpot-BL (configs/regionspot_L.yaml) or -BL@336 (configs/regionspot_L_336.yaml)",
}


class ConversionError(ValueError):
    """The file is not what it should be; the message says why."""


class Conversion(NamedTuple):
    """A head, and what became of every key of the file.

    Attributes:
        head: state dict of a :class:`RegionSpotHead`.
        used: keys of the file that became the head.
        dropped: keys of frozen models, and of nothing we know.
        unknown: those of ``dropped`` that no part of the published model explains.
    """

    head: dict[str, Tensor]
    used: list[str]
    dropped: list[str]
    unknown: list[str]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint, running nothing that may be in it.

    Raises:
        ConversionError: if the file is missing, damaged, or no checkpoint.
    """
    if not path.is_file():
        raise ConversionError(f"{path} does not exist.")
    try:
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(
            f"{path} cannot be read as a checkpoint of tensors ({reason}). Is the download complete?"
        ) from error
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    if not isinstance(data, dict) or not any(isinstance(v, Tensor) for v in data.values()):
        raise ConversionError(
            f"{path} holds no state dict: a dict from names to tensors is expected."
        )
    return {key: value for key, value in data.items() if isinstance(value, Tensor)}


def convert(state: dict[str, Tensor]) -> Conversion:
    """Picks the head out of a published state dict.

    Args:
        state: keys as ``model.to_clip.weight``; the prefix (and that of a distributed run, ``module.``) may be missing.

    Raises:
        ConversionError: if a part of the head is missing or has a size that does not fit the rest.
    """
    head: dict[str, Tensor] = {}
    used, dropped, unknown = [], [], []
    for key, value in state.items():
        name = key.removeprefix("module.").removeprefix("model.")
        if name.startswith(TRAINED):
            head[name] = value.float().contiguous()
            used.append(key)
        else:
            dropped.append(key)
            if not name.startswith(FROZEN):
                unknown.append(key)
    if "to_clip.weight" not in head or "projector.weight" not in head:
        found = ", ".join(sorted({key.split(".")[0] for key in state})[:8])
        raise ConversionError(
            "This is no RegionSpot checkpoint: 'model.to_clip.weight' and 'model.projector.weight' are expected; "
            f"its keys begin with {found}."
        )
    expected = _expected_head(head)
    missing = sorted(expected.keys() - head.keys())
    wrong = [k for k in expected.keys() & head.keys() if expected[k].shape != head[k].shape]
    strangers = sorted(head.keys() - expected.keys())
    if missing or wrong or strangers:
        lines = [f"  missing: {key}" for key in missing]
        lines += [f"  not known: {key}" for key in strangers]
        lines += [
            f"  {key}: {tuple(head[key].shape)}, expected {tuple(expected[key].shape)}"
            for key in wrong
        ]
        raise ConversionError("The head in this file is not whole:\n" + "\n".join(lines[:20]))
    return Conversion(head, used, dropped, unknown)


def _expected_head(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the head that the sizes in the file ask for, without memory."""
    layers = {key.split(".")[2] for key in head if key.startswith("decoder.layers.")}
    ffn = head.get("decoder.layers.0.linear1.weight", torch.empty(2048, 0))
    with torch.device("meta"):
        built = RegionSpotHead(
            token_dim=head["to_clip.weight"].shape[1],
            image_dim=head["to_clip.weight"].shape[0],
            text_dim=head["projector.weight"].shape[0],
            depth=max(1, len(layers)),
            ffn_dim=ffn.shape[0],
        )
    return built.state_dict()


def report(conversion: Conversion) -> str:
    """What became of every key, by groups, and which model it is."""
    rows = []
    for fate, keys in (("used", conversion.used), ("dropped", conversion.dropped)):
        groups = Counter(
            key.removeprefix("module.").removeprefix("model.").split(".")[0] for key in keys
        )
        rows += [[fate, group, count] for group, count in sorted(groups.items())]
    rows.append(["missing", "", 0])
    lines = [tabulate(rows, headers=["", "part", "keys"])]
    image_dim, text_dim = (len(conversion.head[f"{k}.bias"]) for k in ("to_clip", "projector"))
    name = PUBLISHED.get((image_dim, text_dim), "of no published size")
    parameters = sum(value.numel() for value in conversion.head.values())
    lines.append(f"The head is {name}: {parameters:,} parameters.")
    if conversion.unknown:
        lines.append("Keys that no part of the published model explains, dropped:")
        lines += [f"  {key}" for key in conversion.unknown]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="file of the authors (.pth)")
    parser.add_argument("output", type=Path, help="head alone (.safetensors)")
    parser.add_argument("--keys", action="store_true", help="print every key and its fate")
    args = parser.parse_args()
    try:
        conversion = convert(read_state_dict(args.checkpoint))
    except ConversionError as error:
        raise SystemExit(f"error: {error}") from error
    args.output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"source": args.checkpoint.name, "licence": "CC BY-NC 4.0 (RegionSpot's authors)"}
    save_file(conversion.head, args.output, metadata)
    if args.keys:
        print("\n".join(f"used     {key}" for key in conversion.used))
        print("\n".join(f"dropped  {key}" for key in conversion.dropped))
    print(report(conversion))
    print(f"Written to {args.output}.")


if __name__ == "__main__":
    main()
