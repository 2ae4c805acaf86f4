"""The levels of NCSN++: blocks at one resolution, image pyramids, steps to the next.

>>> from lsgm.networks.layers import ResidualBlock
>>> block = ResidualBlock(4, 4, time_width=8)
>>> state = Features(torch.zeros(2, 4, 8, 8), torch.zeros(2, 8), pyramid=torch.zeros(2, 3, 8, 8))
>>> DownLevel([block], [], None, None)(state)
>>> tuple(state.h.shape), len(state.skips)
((2, 4, 8, 8), 1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lsgm.networks.layers import (
    HALF_SQRT,
    TINY_SCALE,
    AttentionBlock,
    GroupNormSiLU,
    ResidualBlock,
    conv,
)
from lsgm.networks.resample import make_conv_resampler, make_resampler

__all__ = [
    "ConvStep",
    "DownLevel",
    "Features",
    "InputResidual",
    "InputSkip",
    "NormConv",
    "OutputResidual",
    "OutputResidualStart",
    "OutputSkip",
    "UpLevel",
    "run_block",
]


@dataclass
class Features:
    """What travels through the network: features, image pyramid, skips yet to be consumed."""

    h: Tensor
    time: Tensor
    pyramid: Tensor
    skips: list[Tensor] = field(default_factory=list)


class NormConv(nn.Module):
    """``conv3x3(silu(group_norm(x)))``, the network's head and the heads of the output pyramid."""

    def __init__(
        self, in_channels: int, out_channels: int, scale: float, groups: int | None = None
    ) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(in_channels, groups)
        self.conv = conv(in_channels, out_channels, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class ConvStep(nn.Module):
    """Step to another resolution by a learned convolution, in DDPM's place of a residual block."""

    def __init__(self, width: int, direction: str, fir: bool) -> None:
        super().__init__()
        self.resample = make_conv_resampler(direction, fir, width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.resample(x)


class InputSkip(nn.Module):
    """Input pyramid: the resampled input joins the features by sum or concatenation."""

    def __init__(self, in_channels: int, width: int, fir: bool, combine: str) -> None:
        super().__init__()
        self.resample = make_resampler("down", fir)
        self.conv = conv(in_channels, width, 1)
        self.concatenate = combine == "cat"

    def forward(self, state: Features) -> None:
        state.pyramid = self.resample(state.pyramid)
        joined = self.conv(state.pyramid)
        state.h = torch.cat([joined, state.h], dim=1) if self.concatenate else joined + state.h


class InputResidual(nn.Module):
    """Input pyramid with a learned downsampling, which carries the features on."""

    def __init__(self, in_channels: int, width: int, fir: bool) -> None:
        super().__init__()
        self.resample = make_conv_resampler("down", fir, in_channels, width)

    def forward(self, state: Features) -> None:
        state.pyramid = state.h = (self.resample(state.pyramid) + state.h) * HALF_SQRT


class OutputSkip(nn.Module):
    """Output pyramid: every level adds an image to the upsampled sum of those below it."""

    def __init__(
        self, width: int, out_channels: int, fir: bool, lowest: bool, groups: int | None = None
    ) -> None:
        super().__init__()
        self.resample = None if lowest else make_resampler("up", fir)
        self.head = NormConv(width, out_channels, TINY_SCALE, groups)

    def forward(self, state: Features) -> None:
        image = self.head(state.h)
        state.pyramid = image if self.resample is None else self.resample(state.pyramid) + image


class OutputResidualStart(nn.Module):
    """Lowest level of the residual output pyramid."""

    def __init__(self, width: int, groups: int | None = None) -> None:
        super().__init__()
        self.head = NormConv(width, width, 1.0, groups)

    def forward(self, state: Features) -> None:
        state.pyramid = self.head(state.h)


class OutputResidual(nn.Module):
    """Other levels of the residual output pyramid, which carries the features on."""

    def __init__(self, in_channels: int, width: int, fir: bool) -> None:
        super().__init__()
        self.resample = make_conv_resampler("up", fir, in_channels, width)

    def forward(self, state: Features) -> None:
        state.pyramid = state.h = (self.resample(state.pyramid) + state.h) * HALF_SQRT


def run_block(recompute: bool, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function(*inputs)``; with ``recompute`` its activations are computed again in the backward
    pass, with the same dropout, instead of being kept.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


class DownLevel(nn.Module):
    """One resolution of the encoder: blocks with attention, then the step down. ``checkpointing``:
    each block is recomputed in the backward pass.
    """

    def __init__(
        self,
        blocks: Sequence[ResidualBlock],
        attentions: Sequence[AttentionBlock],
        downsample: nn.Module | None,
        pyramid: nn.Module | None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions)
        self.downsample = downsample
        self.pyramid = pyramid
        self.checkpointing = checkpointing

    def _block(self, i: int, x: Tensor, time: Tensor) -> Tensor:
        h = self.blocks[i](x, time)
        return self.attentions[i](h) if self.attentions else h

    def forward(self, state: Features) -> None:
        for i in range(len(self.blocks)):
            block = partial(self._block, i)
            state.h = run_block(self.checkpointing, block, state.h, state.time)
            state.skips.append(state.h)
        if self.downsample is not None:
            state.h = run_block(self.checkpointing, self.downsample, state.h, state.time)
            if self.pyramid is not None:
                self.pyramid(state)
            state.skips.append(state.h)


class UpLevel(nn.Module):
    """One resolution of the decoder: blocks that each consume a skip, then the step up.
    ``checkpointing`` as in the encoder.
    """

    def __init__(
        self,
        blocks: Sequence[ResidualBlock],
        attention: AttentionBlock | None,
        pyramid: nn.Module | None,
        upsample: nn.Module | None,
        attentions: Sequence[AttentionBlock] = (),
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.attention = attention
        self.attentions = nn.ModuleList(attentions)
        self.pyramid = pyramid
        self.upsample = upsample
        self.checkpointing = checkpointing

    def _block(self, i: int, x: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        h = self.blocks[i](torch.cat([x, skip], dim=1), time)
        return self.attentions[i](h) if self.attentions else h

    def forward(self, state: Features) -> None:
        for i in range(len(self.blocks)):
            block, skip = partial(self._block, i), state.skips.pop()
            state.h = run_block(self.checkpointing, block, state.h, skip, state.time)
        if self.attention is not None:
            state.h = run_block(self.checkpointing, self.attention, state.h)
        if self.pyramid is not None:
            self.pyramid(state)
        if self.upsample is not None:
            state.h = run_block(self.checkpointing, self.upsample, state.h, state.time)
