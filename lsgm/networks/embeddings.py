"""Embeddings of the diffusion time, in the precision of their weights, autocast or not.

>>> from lsgm.networks.embeddings import TimeEmbedding
>>> embedding = TimeEmbedding(dim=8, kind="positional", scale=1000.0)
>>> tuple(embedding(torch.tensor([0.1, 0.9])).shape)
(2, 32)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsgm.networks.layers import linear

__all__ = ["TIME_FEATURES", "FourierFeatures", "PositionalFeatures", "TimeEmbedding"]


class PositionalFeatures(nn.Module):
    """Sinusoids of geometrically spaced frequencies from 1 to 1e-4 (arXiv 1706.03762 section 3.5).

    ``t (B,)`` -> ``[sin(scale t w), cos(scale t w)]``, ``(B, dim)``.
    """

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.dim, self.scale = dim, scale

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        exponents = torch.arange(half, dtype=t.dtype, device=t.device)
        frequencies = torch.exp(exponents * (-math.log(10000) / (half - 1)))
        angles = (self.scale * t)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierFeatures(nn.Module):
    """Sinusoids of frequencies drawn once from N(0, scale^2) (arXiv 2006.10739).

    ``t (B,)`` -> ``[sin(2 pi t w), cos(2 pi t w)]``, ``(B, dim)``.
    """

    frequencies: Tensor

    def __init__(self, dim: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(dim // 2) * scale)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * (2 * math.pi * self.frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


TIME_FEATURES: dict[str, type[PositionalFeatures] | type[FourierFeatures]] = {
    "positional": PositionalFeatures,
    "fourier": FourierFeatures,
}


class TimeEmbedding(nn.Module):
    """Time features and a two-layer perceptron: ``t (B,)`` or scalar to ``(B or 1, width)``.

    ``width`` is ``4 dim`` unless given. The output already passed the activation that every
    residual block would apply to it.

    Raises:
        ValueError: unknown ``kind``, or ``dim`` odd or below 4.
    """

    def __init__(self, dim: int, kind: str, scale: float, width: int | None = None) -> None:
        super().__init__()
        if kind not in TIME_FEATURES:
            raise ValueError(f"unknown embedding_type {kind!r}; known: {', '.join(TIME_FEATURES)}")
        if dim % 2 or dim < 4:
            raise ValueError(f"embedding_dim must be even and at least 4, got {dim}")
        self.width = 4 * dim if width is None else width
        self.features = TIME_FEATURES[kind](dim, scale)
        self.hidden = linear(dim, self.width)
        self.out = linear(self.width, self.width)

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            features = self.features(t.reshape(-1).to(self.hidden.weight.dtype))
            return F.silu(self.out(F.silu(self.hidden(features))))
