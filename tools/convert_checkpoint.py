#!/usr/bin/env python
"""Extracts the trained head from a published RegionSpot checkpoint.

The authors' files (RegionSpot-BB, -BL, -BL@336) hold the frozen SAM and CLIP too, about 1 to 2 GB;
only the head was trained. Those weights are under CC BY-NC 4.0, not this project's license.

Example::

    python tools/convert_checkpoint.py regionspot_BL.pth regionspot_BL.safetensors
    python train_net.py --eval-only --config-file configs/eval_lvis_gt.yaml \\
        MODEL.WEIGHTS regionspot_BL.safetensors
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from regionspot_cli import CommandParser, begin


def argument_parser() -> CommandParser:
    parser = CommandParser(text=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the authors' file (.pth)")
    parser.add_argument("output", type=Path, help="the head to write (.safetensors)")
    parser.add_argument(
        "--keys", action="store_true", help="print every key, and whether it was used"
    )
    return parser


if __name__ == "__main__":
    begin(argument_parser())

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor

from regionspot_d2.engine.config import told_in_a_line
from regionspot_d2.files import explained_weights
from regionspot_d2.modeling import RegionSpotHead

# Prefixes of the trained and the frozen parts in the published files.
TRAINED = ("to_clip.", "decoder.", "projector.")
FROZEN = ("sam.", "clip_model.")
# The published models by the width of their image tokens and text embeddings.
PUBLISHED = {
    (768, 512): "RegionSpot-BB (configs/regionspot_B.yaml)",
    (1024, 768): (
        "RegionSpot-BL (configs/regionspot_L.yaml) or -BL@336 (configs/regionspot_L_336.yaml)"
    ),
}


class ConversionError(ValueError):
    """A state dict does not hold a whole RegionSpot head; the message says what is wrong."""


class Conversion(NamedTuple):
    """A head, and what was done with every key of the file.

    Attributes:
        head: state dict of a :class:`RegionSpotHead`.
        used: keys of the file that became the head.
        dropped: all other keys, most of them of the frozen models.
        unknown: those of ``dropped`` that belong to no part of the published model.
    """

    head: dict[str, Tensor]
    used: list[str]
    dropped: list[str]
    unknown: list[str]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a checkpoint, without running any code that may be in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a checkpoint of tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist.")
    with explained_weights(path, "a checkpoint of tensors"):
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(data, dict) and isinstance(data.get("model"), dict):
            data = data["model"]
        if not isinstance(data, dict) or not any(isinstance(v, Tensor) for v in data.values()):
            raise ValueError("it holds no state dict, which maps names to tensors")
    return {key: value for key, value in data.items() if isinstance(value, Tensor)}


def convert(state: dict[str, Tensor]) -> Conversion:
    """Picks the head out of a published state dict.

    Args:
        state: keys as ``model.to_clip.weight``; the prefix may be missing, or be preceded by that
            of a distributed run, ``module.``.

    Raises:
        ConversionError: a part of the head is missing or has a size that does not fit the rest.
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
            "This is not a RegionSpot checkpoint: 'model.to_clip.weight' and "
            f"'model.projector.weight' are expected, but its keys begin with {found}."
        )
    expected = _expected_head(head)
    missing = sorted(expected.keys() - head.keys())
    wrong = [k for k in expected.keys() & head.keys() if expected[k].shape != head[k].shape]
    unexpected = sorted(head.keys() - expected.keys())
    if missing or wrong or unexpected:
        lines = [f"  missing: {key}" for key in missing]
        lines += [f"  unknown: {key}" for key in unexpected]
        lines += [
            f"  {key}: {tuple(head[key].shape)}, expected {tuple(expected[key].shape)}"
            for key in wrong
        ]
        raise ConversionError("The head in this file is incomplete:\n" + "\n".join(lines[:20]))
    return Conversion(head, used, dropped, unknown)


def _expected_head(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a head with the sizes found in the file; its tensors take no memory."""
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
    """A table of the keys that were used and dropped, by part, and which published model it is."""
    rows = []
    for use, keys in (("used", conversion.used), ("dropped", conversion.dropped)):
        groups = Counter(
            key.removeprefix("module.").removeprefix("model.").split(".")[0] for key in keys
        )
        rows += [[use, group, count] for group, count in sorted(groups.items())]
    rows.append(["missing", "", 0])
    lines = [tabulate(rows, headers=["", "part", "keys"])]
    image_dim, text_dim = (len(conversion.head[f"{k}.bias"]) for k in ("to_clip", "projector"))
    name = PUBLISHED.get((image_dim, text_dim), "of no published size")
    parameters = sum(value.numel() for value in conversion.head.values())
    lines.append(f"The head is {name}: {parameters:,} parameters.")
    if conversion.unknown:
        lines.append("Dropped keys that belong to no part of the published model:")
        lines += [f"  {key}" for key in conversion.unknown]
    return "\n".join(lines)


@told_in_a_line("convert_checkpoint.py")
def main() -> None:
    args = argument_parser().parse_args()
    conversion = convert(read_state_dict(args.checkpoint))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"source": args.checkpoint.name, "license": "CC BY-NC 4.0 (RegionSpot's authors)"}
    save_file(conversion.head, args.output, metadata)
    if args.keys:
        print("\n".join(f"used     {key}" for key in conversion.used))
        print("\n".join(f"dropped  {key}" for key in conversion.dropped))
    print(report(conversion))
    print(f"Written to {args.output}.")


if __name__ == "__main__":
    main()
