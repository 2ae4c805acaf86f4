"""Devices, autocast and the gradient scaler."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.amp import GradScaler

__all__ = [
    "AUTOCAST_DTYPES",
    "autocast",
    "caches_casts",
    "computes_bf16",
    "make_scaler",
    "usable_precision",
]

Precision: TypeAlias = Literal["float32", "bf16", "fp16"]
AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "float32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


_INITIAL_SCALE = 2.0**10
# Instructions of CPUs, as torch names them; without one of them bf16 is emulated.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")


def autocast(
    device: torch.device, precision: str, *, cache: bool = True
) -> AbstractContextManager[object]:
    """Context in which networks compute in `precision` ("float32", "bf16" or "fp16"); `cache`: keep
    what weights become in it until its end.

    Raises:
        ValueError: If there is no such precision.
    """
    if precision not in AUTOCAST_DTYPES:
        raise ValueError(f"no precision {precision!r}; there are {', '.join(AUTOCAST_DTYPES)}")
    dtype = AUTOCAST_DTYPES[precision]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=cache)


def caches_casts(module: nn.Module) -> bool:
    """Whether a training step of `module` gains by keeping half-precision copies of its weights:
    not where activations are recomputed (`checkpointing`), as the backward pass casts anew there.
    """
    return not any(getattr(part, "checkpointing", False) for part in module.modules())


def make_scaler(device: torch.device, precision: str) -> GradScaler:
    """Loss scaler: active in fp16, where small gradients would vanish, and a no-op otherwise."""
    return GradScaler(device.type, init_scale=_INITIAL_SCALE, enabled=precision == "fp16")


def computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16. On a CPU without them convolutions in bf16 take
    about ten times as long as in float32.
    """
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BF16_INSTRUCTIONS)


def usable_precision(precision: Precision, device: torch.device) -> Precision:
    """`precision`, but "float32" in place of bf16 where the device could only emulate that."""
    return "float32" if precision == "bf16" and not computes_bf16(device) else precision
