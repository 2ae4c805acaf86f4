"""Quadrature over ``[time_eps, 1]`` for tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["integrate", "panels"]

_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))


def panels(time_eps: float, size: int = 60) -> Tensor:
    """Ends of panels that are short near ``time_eps``: ``(size + 1,)`` float64."""
    start = max(time_eps, 1e-7)
    ends = torch.logspace(np.log10(start), 0, size + 1, dtype=torch.float64)
    ends = torch.unique(
        torch.cat([ends, torch.linspace(time_eps, 1, size + 1, dtype=torch.float64)])
    )
    return ends.clamp(time_eps, 1)


def integrate(fn: Callable[[Tensor], Tensor], time_eps: float, ends: Tensor | None = None) -> float:
    """Composite 16-point Gauss-Legendre rule of ``fn``, which maps float64 ``(N,)`` to ``(N,)``."""
    ends = panels(time_eps) if ends is None else ends
    half = ends.diff() / 2
    t = (ends[:-1] + half)[:, None] + half[:, None] * _NODES
    return float((fn(t.flatten()).view_as(t) * _WEIGHTS * half[:, None]).sum())
