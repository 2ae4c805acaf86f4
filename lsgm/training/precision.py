"""Devices, autocast and the gradient scaler."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch.amp import GradScaler

__all__ = [
    "AUTOCAST_DTYPES",
    "autocast",
    "make_scaler",
]

AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "float32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


_INITIAL_SCALE = 2.0**10


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Context in which networks compute in `precision` ("float32", "bf16" or "fp16").

    Raises:
        ValueError: If there is no such precision.
    """
    if precision not in AUTOCAST_DTYPES:
        raise ValueError(f"no precision {precision!r}; there are {', '.join(AUTOCAST_DTYPES)}")
    dtype = AUTOCAST_DTYPES[precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def make_scaler(device: torch.device, precision: str) -> GradScaler:
    """Loss scaler: active in fp16, where small gradients would vanish, and a no-op otherwise."""
    return GradScaler(device.type, init_scale=_INITIAL_SCALE, enabled=precision == "fp16")
