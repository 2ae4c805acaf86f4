"""Volume-preserving autoregressive flows of the posterior (inverse autoregressive flow, arXiv
1606.04934).

A cell maps ``z -> z - m(z)`` where ``m`` at one position sees only positions before it in raster
order (and, at the same pixel, only earlier channels): the Jacobian is unit triangular, so densities
do not change.

>>> from vae.flows import FlowCell
>>> cell, z = FlowCell(channels=2), torch.randn(1, 2, 4, 4)
>>> torch.allclose(cell.inverse(cell(z)), z, atol=1e-5)
True
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.layers import WeightNormConv2d

__all__ = ["FlowCell", "MaskedShift", "causal_mask"]

HIDDEN_PER_CHANNEL = 6


def causal_mask(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    groups: int = 1,
    strict: bool = False,
    mirrored: bool = False,
) -> Tensor:
    """Mask (C_out, C_in / groups, k, k) of a convolution that is causal in raster order.

    Args:
        in_channels: ``C_in``.
        out_channels: ``C_out``; one of the two must divide the other. Channels fall into
            ``min(C_in, C_out)`` blocks.
        kernel_size: Odd ``k``.
        groups: 1, or ``C_in`` for a depth-wise convolution.
        strict: Whether the centre tap sees only earlier channel blocks (else: up to its own).
        mirrored: Flip the mask in space (the order of the channels stays).

    Raises:
        ValueError: If neither channel number divides the other, or ``groups`` is neither 1 nor the
            channel number.
    """
    if groups == 1:
        if max(in_channels, out_channels) % min(in_channels, out_channels):
            raise ValueError(
                f"{in_channels} and {out_channels} channels do not fall into equal blocks"
            )
        blocks = min(in_channels, out_channels)
        block_in = torch.arange(in_channels) // (in_channels // blocks)
        block_out = torch.arange(out_channels) // (out_channels // blocks)
        centre = (
            block_in[None] < block_out[:, None] if strict else block_in[None] <= block_out[:, None]
        )
    elif groups == in_channels == out_channels:
        centre = torch.full((out_channels, 1), not strict)
    else:
        raise ValueError(f"groups must be 1 or the number of channels, got {groups}")
    half = kernel_size // 2
    mask = torch.zeros(out_channels, in_channels // groups, kernel_size, kernel_size)
    mask[:, :, :half] = 1
    mask[:, :, half, :half] = 1
    mask[:, :, half, half] = centre.to(mask.dtype)
    return mask.flip(2, 3) if mirrored else mask


def _masked_conv(
    in_channels: int,
    out_channels: int,
    size: int,
    mirrored: bool,
    *,
    groups: int = 1,
    strict: bool = False,
    bias: bool = False,
) -> WeightNormConv2d:
    mask = causal_mask(
        in_channels, out_channels, size, groups=groups, strict=strict, mirrored=mirrored
    )
    return WeightNormConv2d(in_channels, out_channels, size, groups=groups, bias=bias, mask=mask)


class MaskedShift(nn.Module):
    """``z -> z - m(z)`` for (B, L, H, W), with ``m`` strictly autoregressive.

    ``m`` consists of masked convolutions: 3x3, depth-wise 5x5, 1x1.
    """

    def __init__(self, channels: int, mirrored: bool) -> None:
        super().__init__()
        hidden = HIDDEN_PER_CHANNEL * channels

        self.conv_in = _masked_conv(channels, hidden, 3, mirrored, strict=True)
        self.depthwise = _masked_conv(hidden, hidden, 5, mirrored, groups=hidden)
        self.conv_out = _masked_conv(hidden, channels, 1, mirrored, bias=True)
        with torch.no_grad():  # start near the identity
            self.conv_out.log_weight_norm.add_(math.log(0.1))

    def shift(self, z: Tensor) -> Tensor:
        """``m(z)``, the shape of ``z``."""
        hidden = self.depthwise(F.elu(self.conv_in(z)))
        return self.conv_out(F.elu(hidden))

    def forward(self, z: Tensor) -> Tensor:
        return z - self.shift(z)

    @torch.no_grad()
    def inverse(self, y: Tensor) -> Tensor:
        """Solve ``z - m(z) = y`` by fixed-point iteration.

        Each round settles at least one more position, so it is exact after as many rounds as an
        image of ``y`` has positions, and mostly far sooner.
        """
        z = y
        for _ in range(y[0].numel()):
            previous, z = z, y + self.shift(z)
            if torch.equal(previous, z):
                break
        return z


class FlowCell(nn.Module):
    """A shift causal in raster order, then one in reverse raster order; log-determinant zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = MaskedShift(channels, mirrored=False)
        self.second = MaskedShift(channels, mirrored=True)

    def forward(self, z: Tensor) -> Tensor:
        return self.second(self.first(z))

    def inverse(self, y: Tensor) -> Tensor:
        """The ``z`` that :meth:`forward` maps to ``y``."""
        return self.first.inverse(self.second.inverse(y))
