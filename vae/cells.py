"""Residual cells of the encoder and decoder towers (NVAE, arXiv 2007.03898, Fig. 3).

``out = skip(x) + 0.1 * SE(branch(x))``; a cell keeps the resolution, halves it or doubles it, and
only the first op of a branch changes size or width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vae.layers import (
    BatchNorm,
    BatchNormSwish,
    Conv2d,
    DepthwiseConv2d,
    SqueezeExcitation,
    WeightNormConv2d,
    frozen_statistics,
    upsample_nearest,
)

__all__ = [
    "CellKind",
    "InvertedResidual",
    "NormConv",
    "PlainNormConv",
    "Resample",
    "ResidualCell",
    "SkipDown",
    "SkipUp",
]

Resample: TypeAlias = Literal["none", "down", "up"]
CellKind: TypeAlias = Literal["conv", "plain_conv", "mbconv3", "mbconv6"]
RESIDUAL_SCALE = 0.1


class SkipDown(nn.Module):
    """Halve the resolution: swish, then one 1x1 convolution for each pixel of a 2x2 block."""

    OFFSETS = ((0, 0), (1, 1), (0, 1), (1, 0))

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        widths = (quarter, quarter, quarter, out_channels - 3 * quarter)
        self.convs = nn.ModuleList([WeightNormConv2d(in_channels, width, 1) for width in widths])

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        parts = [
            conv(x[:, :, i::2, j::2]) for conv, (i, j) in zip(self.convs, self.OFFSETS, strict=True)
        ]
        return torch.cat(parts, dim=1)


class SkipUp(nn.Module):
    """Double the resolution bilinearly, with a 1x1 convolution.

    The convolution comes first: it acts within pixels, the interpolation within channels, so they
    commute, and a quarter of the pixels are left to convolve.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=2.0, mode="bilinear", align_corners=True)


class NormConv(nn.Module):
    """Batch norm and swish, up-sampling if any, then a weight-normalised 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, resample: Resample = "none") -> None:
        super().__init__()
        self.norm = BatchNormSwish(in_channels)
        self.conv = WeightNormConv2d(
            in_channels, out_channels, 3, stride=2 if resample == "down" else 1
        )
        self.up = resample == "up"

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.conv(upsample_nearest(x) if self.up else x)


class PlainNormConv(nn.Module):
    """Batch norm, swish and 3x3 convolution, twice; the first convolution has no weight norm."""

    def __init__(self, in_channels: int, out_channels: int, resample: Resample = "none") -> None:
        super().__init__()
        stride = 2 if resample == "down" else 1
        self.norm_in = BatchNormSwish(in_channels)
        self.conv_in = Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm_out = BatchNormSwish(out_channels)
        self.conv_out = WeightNormConv2d(out_channels, out_channels, 3)
        self.up = resample == "up"

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_in(x)
        x = self.conv_in(upsample_nearest(x) if self.up else x)
        return self.conv_out(self.norm_out(x))


class InvertedResidual(nn.Module):
    """Mobile inverted residual: widen by ``expansion``, convolve 5x5 depth-wise, project (arXiv
    1801.04381).

    An up-sampling cell repeats pixels at the very start in the published order. What comes before
    the depth-wise convolution acts within pixels, so the repetition is moved there, at a quarter of
    the cost; ``multiplicity`` keeps the running variances exact.
    """

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, resample: Resample = "none"
    ) -> None:
        super().__init__()
        if resample == "down":
            raise ValueError("an inverted residual does not down-sample")
        self.up = resample == "up"
        multiplicity = 4 if self.up else 1
        hidden = in_channels * expansion
        self.norm_in = BatchNorm(in_channels, multiplicity)
        self.expand = Conv2d(in_channels, hidden, 1, bias=False)
        self.norm_expand = BatchNormSwish(hidden, multiplicity)
        self.depthwise = DepthwiseConv2d(hidden, 5)
        self.norm_depthwise = BatchNormSwish(hidden)
        self.project = Conv2d(hidden, out_channels, 1, bias=False)
        self.norm_out = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_expand(self.expand(self.norm_in(x)))
        x = self.depthwise(upsample_nearest(x) if self.up else x)
        return self.norm_out(self.project(self.norm_depthwise(x)))


class ResidualCell(nn.Module):
    """``skip(x) + 0.1 * SE(branch(x))``.

    Args:
        in_channels: ``C_in`` of (B, C_in, H, W).
        out_channels: ``C_out``; must be even for a down-sampling cell.
        kind: ``conv`` (two 3x3 convolutions), ``plain_conv`` (the first without weight norm) or
            ``mbconv3`` / ``mbconv6`` (inverted residual of that expansion).
        resample: Whether the cell halves or doubles H and W.
        use_se: Gate the branch with squeeze-and-excitation.
        checkpointing: Recompute the cell in the backward pass instead of keeping its activations.

    Raises:
        ValueError: If a cell that keeps the resolution changes the width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kind: CellKind,
        resample: Resample = "none",
        *,
        use_se: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.skip: nn.Module
        if resample == "down":
            self.skip = SkipDown(in_channels, out_channels)
        elif resample == "up":
            self.skip = SkipUp(in_channels, out_channels)
        elif in_channels == out_channels:
            self.skip = nn.Identity()
        else:
            raise ValueError(
                f"a cell without resampling keeps its width, got {in_channels} -> {out_channels}"
            )
        self.branch: nn.Module
        if kind == "conv":
            self.branch = nn.Sequential(
                NormConv(in_channels, out_channels, resample), NormConv(out_channels, out_channels)
            )
        elif kind == "plain_conv":
            self.branch = PlainNormConv(in_channels, out_channels, resample)
        else:
            self.branch = InvertedResidual(in_channels, out_channels, int(kind[-1]), resample)
        self.se = SqueezeExcitation(out_channels) if use_se else None

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            # The recomputation must not move the running statistics a second time.
            return checkpoint(
                self._forward,
                x,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), frozen_statistics(self)),
            )
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        skip, branch = self.skip(x), self.branch(x)
        if self.se is None:
            return torch.add(skip, branch, alpha=RESIDUAL_SCALE)
        gates = self.se(branch)
        # One fused pass. The gates are float32, and so the residual stream of a gated tower stays
        # float32 under autocast.
        return torch.addcmul(
            skip.to(gates.dtype), branch.to(gates.dtype), gates, value=RESIDUAL_SCALE
        )
