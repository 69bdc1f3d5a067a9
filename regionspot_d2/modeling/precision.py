"""The precision that frozen models run in.

They run under autocast, with their weights in float32. SAM ViT-B's image encoder takes 11.1 s of
one core with AMX in float32, 4.5 s under autocast in bfloat16, and 3.7 s with its weights cast,
which is off by 1.1 % (rms) rather than 0.8 %: autocast adds up residuals in float32. It also leaves
text embeddings as they are, and the fingerprints of weights that caches are known by.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": None,
}


def check_precision(name: str, key: str) -> str:
    """Returns ``name`` if it is one of MODEL.PRECISION; else raises a ValueError about ``key``."""
    if name not in _DTYPES:
        raise ValueError(f"{key} is '{name}'; it must be one of {', '.join(_DTYPES)}.")
    return name


def precision_on(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a name stands for on a device.

    "auto" is bfloat16 where the device computes in it, which makes it faster than float32: on GPUs
    since Ampere, and on CPUs with AVX-512 BF16 or AMX.
    """
    dtype = _DTYPES[name]
    if dtype is not None:
        return dtype
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        able = torch.cpu.get_capabilities()
        fast = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def running_in(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """A context in which models run in a dtype, whatever the context around it; None keeps that."""
    if dtype is None:
        return torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type))
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else None, enabled=half)


def precisions(
    name: str, weights: Tensor, *, training: bool
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """What the frozen models and the region head run in, as :func:`running_in` takes it.

    Args:
        name: MODEL.PRECISION.
        weights: of the model. After ``model.to(dtype)`` there is only that dtype to run in.
        training: the head, and frozen models in "float32", then follow the context (SOLVER.AMP).
    """
    frozen = precision_on(name, weights.device)
    if weights.dtype != torch.float32:
        return weights.dtype, weights.dtype
    if not training:
        return frozen, torch.float32
    return None if frozen == torch.float32 else frozen, None
