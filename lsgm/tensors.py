"""Broadcasting and reductions: the first axis is the batch, all others are treated alike.

>>> from lsgm.tensors import expand_like, sum_except_batch
>>> x = torch.ones(2, 3, 4)
>>> sum_except_batch(expand_like(torch.tensor([1.0, 2.0]), x) * x)
tensor([12., 24.])
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expand_like", "norm_except_batch", "sum_except_batch"]


def expand_like(coefficient: Tensor | float, x: Tensor) -> Tensor:
    """Shape a per-image coefficient so that it multiplies ``x``.

    Args:
        coefficient: ``(B,)``, ``(1,)`` or a scalar.
        x: ``(B, *shape)``.

    Returns:
        ``(B, 1, ..., 1)`` (or a 0-d tensor for a scalar), on the device and in the dtype of ``x``.

    Raises:
        ValueError: ``coefficient`` is neither a scalar nor one number per image.
    """
    coefficient = torch.as_tensor(coefficient, dtype=x.dtype, device=x.device)
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.ndim != 1 or coefficient.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"expected a scalar or ({x.shape[0]},) coefficients for a batch of shape "
            f"{tuple(x.shape)}, got shape {tuple(coefficient.shape)}"
        )
    return coefficient.reshape(-1, *[1] * (x.ndim - 1))


def sum_except_batch(x: Tensor) -> Tensor:
    """Sum of ``x (B, *shape)`` over everything but the batch: ``(B,)``."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def norm_except_batch(x: Tensor) -> Tensor:
    """Euclidean norm of each image of ``x (B, *shape)``: ``(B,)``."""
    return x.flatten(1).norm(dim=1)
