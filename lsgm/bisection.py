"""Inverting functions that have no inverse in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["invert"]


def invert(function: Callable[[Tensor], Tensor], values: Tensor, low: float, high: float) -> Tensor:
    """The times in ``[low, high]`` at which a monotone function takes the given values, ``(n,)`` ->
    ``(n,)``, by bisection.
    """
    left, right = torch.full_like(values, low), torch.full_like(values, high)
    ends = function(torch.tensor([low, high], dtype=values.dtype, device=values.device))
    sign = 1.0 if ends[1] >= ends[0] else -1.0
    for _ in range(60):
        middle = 0.5 * (left + right)
        below = sign * (function(middle) - values) < 0
        left, right = torch.where(below, middle, left), torch.where(below, right, middle)
    return 0.5 * (left + right)
