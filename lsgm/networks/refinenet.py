"""Building blocks of NCSN's network: a RefineNet with dilated convolutions.

arXiv 1611.06612 (RefineNet); arXiv 1907.05600 appendix A (InstanceNorm++, dilation, ELU);
arXiv 2006.09011 appendix B (the unconditional version). Layers keep PyTorch's initialisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["InstanceNormPlus", "NoNorm", "RefineBlock", "ResidualStage", "StageBlock"]


class InstanceNormPlus(nn.Module):
    r"""InstanceNorm++: instance normalisation that keeps the channels' means, relative to them all.

    For channel means ``mu_k`` with mean ``m`` and standard deviation ``v`` over the channels,
    ``gamma_k ((x_k - mu_k) / s_k + alpha_k (mu_k - m) / v) + beta_k`` (arXiv 1907.05600 appendix
    A.1; its ``alpha`` is ``gamma alpha`` here, as in the published networks).

    Args:
        channels: ``C``, at least 2.
        num_levels: sets of ``(gamma, alpha, beta)``, one a noise level; one serves all levels.
    """

    def __init__(self, channels: int, num_levels: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(num_levels, 3 * channels)
        nn.init.normal_(self.table.weight[:, : 2 * channels].data, 1.0, 0.02)
        nn.init.zeros_(self.table.weight[:, 2 * channels :].data)

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        """``x (B, C, H, W)``; ``level (B,)`` or ``(1,)`` int64, ``None`` for a single set."""
        means = x.mean((2, 3))
        spread, centre = torch.var_mean(means, dim=1, keepdim=True)
        relative = (means - centre) / (spread + 1e-5).sqrt()
        rows = self.table.weight if level is None else self.table(level)
        gamma, alpha, beta = rows.to(x.dtype).chunk(3, dim=1)
        shift = gamma * alpha * relative + beta
        return torch.addcmul(shift[..., None, None], F.instance_norm(x), gamma[..., None, None])


class NoNorm(nn.Module):
    """Stands where another version of the network normalises."""

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        return x


def make_norm(channels: int, num_levels: int | None) -> nn.Module:
    """InstanceNorm++ with ``num_levels`` sets of parameters; ``None``: no normalisation."""
    return NoNorm() if num_levels is None else InstanceNormPlus(channels, num_levels)


def _conv(in_channels: int, out_channels: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)


class StageBlock(nn.Module):
    """Pre-activation residual block: norm, ELU and convolution, twice.

    Args:
        in_channels: width of ``x (B, in, H, W)``.
        out_channels: width of the output.
        num_levels: noise levels of the normalisation.
        dilation: of all 3x3 convolutions; keeps the resolution.
        opens: first block of a stage, which sees more of the image: without dilation it halves
            the resolution by the mean of 2x2 pixels after a 1x1 shortcut, with dilation its
            shortcut is a dilated convolution instead.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_levels: int, dilation: int, opens: bool
    ) -> None:
        super().__init__()
        self.halves = opens and dilation == 1
        self.norm_in = make_norm(in_channels, num_levels)
        self.conv_in = _conv(in_channels, in_channels, dilation)
        self.norm_out = make_norm(in_channels, num_levels)
        self.conv_out = _conv(in_channels, out_channels, dilation)
        self.shortcut: nn.Conv2d | None = None
        if opens and dilation == 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        elif opens:
            self.shortcut = _conv(in_channels, out_channels, dilation)

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        h = self.conv_in(F.elu(self.norm_in(x, level)))
        h = self.conv_out(F.elu(self.norm_out(h, level)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return F.avg_pool2d(x + h, 2) if self.halves else x + h


class ResidualStage(nn.Module):
    """Two residual blocks; the first opens the stage unless it is the network's first."""

    def __init__(
        self, in_channels: int, out_channels: int, num_levels: int, dilation: int, first: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                StageBlock(in_channels, out_channels, num_levels, dilation, opens=not first),
                StageBlock(out_channels, out_channels, num_levels, dilation, opens=False),
            ]
        )

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, level)
        return x


class ResidualUnits(nn.Module):
    """RefineNet's chain of residual convolution units, each norm, ELU and convolution twice."""

    def __init__(self, channels: int, num_units: int, num_levels: int | None) -> None:
        super().__init__()
        self.norms = nn.ModuleList(make_norm(channels, num_levels) for _ in range(2 * num_units))
        self.convs = nn.ModuleList(
            _conv(channels, channels, bias=False) for _ in range(2 * num_units)
        )

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        for i in range(0, len(self.convs), 2):
            h = x
            for norm, conv in zip(self.norms[i : i + 2], self.convs[i : i + 2], strict=True):
                h = conv(F.elu(norm(h, level)))
            x = x + h
        return x


class Fusion(nn.Module):
    """RefineNet's multi-resolution fusion: convolutions to one width, resized and summed."""

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, num_levels: int | None
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(make_norm(width, num_levels) for width in in_channels)
        self.convs = nn.ModuleList(_conv(width, out_channels) for width in in_channels)

    def forward(self, xs: Sequence[Tensor], level: Tensor | None) -> Tensor:
        size = xs[0].shape[2:]
        hs = [
            conv(norm(x, level)) for x, norm, conv in zip(xs, self.norms, self.convs, strict=True)
        ]
        return sum(
            (F.interpolate(h, size, mode="bilinear", align_corners=True) for h in hs[1:]), hs[0]
        )


class ChainedPooling(nn.Module):
    """RefineNet's chained residual pooling over 5x5 windows, two stages.

    The mean over the window where the block normalises (NCSN), the maximum where not (NCSNv2).
    """

    def __init__(self, channels: int, num_levels: int | None) -> None:
        super().__init__()
        self.norms = nn.ModuleList(make_norm(channels, num_levels) for _ in range(2))
        self.convs = nn.ModuleList(_conv(channels, channels, bias=False) for _ in range(2))
        self.pool = F.max_pool2d if num_levels is None else F.avg_pool2d

    def forward(self, x: Tensor, level: Tensor | None) -> Tensor:
        x = path = F.elu(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            path = conv(self.pool(norm(path, level), 5, stride=1, padding=2))
            x = x + path
        return x


class RefineBlock(nn.Module):
    """One step of the decoder: residual units on every input, fusion, pooling, residual units.

    Args:
        in_channels: widths of the inputs, finest first.
        out_channels: width of the output, at the resolution of the first input; a single input
            keeps its width.
        num_levels: noise levels of the normalisation, ``None`` for none.
        output_units: residual units after the pooling.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_levels: int | None,
        output_units: int = 1,
    ) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(ResidualUnits(width, 2, num_levels) for width in in_channels)
        fuses = len(in_channels) > 1
        self.fusion = Fusion(in_channels, out_channels, num_levels) if fuses else None
        self.pooling = ChainedPooling(out_channels, num_levels)
        self.output = ResidualUnits(out_channels, output_units, num_levels)

    def forward(self, xs: Sequence[Tensor], level: Tensor | None) -> Tensor:
        hs = [units(x, level) for units, x in zip(self.inputs, xs, strict=True)]
        h = hs[0] if self.fusion is None else self.fusion(hs, level)
        return self.output(self.pooling(h, level), level)
