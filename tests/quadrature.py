"""Quadrature over ``[t_min, 1]`` for tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["integrate", "panels"]

_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))


def panels(t_min: float, size: int = 60) -> Tensor:
    """Ends of panels that are short near ``t_min``: ``(size + 1,)`` float64."""
    start = max(t_min, 1e-7)
    ends = torch.logspace(np.log10(start), 0, size + 1, dtype=torch.float64)
    ends = torch.unique(torch.cat([ends, torch.linspace(t_min, 1, size + 1, dtype=torch.float64)]))
    return ends.clamp(t_min, 1)


def integrate(fn: Callable[[Tensor], Tensor], t_min: float, ends: Tensor | None = None) -> float:
    """Composite 16-point Gauss-Legendre rule of ``fn``, which maps float64 ``(N,)`` to ``(N,)``."""
    ends = panels(t_min) if ends is None else ends
    half = ends.diff() / 2
    t = (ends[:-1] + half)[:, None] + half[:, None] * _NODES
    return float((fn(t.flatten()).view_as(t) * _WEIGHTS * half[:, None]).sum())
