"""Building blocks of NCSN++ (arXiv 2011.13456 appendix H)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "TINY_SCALE",
    "AttentionBlock",
    "BlockStyle",
    "GroupNorm",
    "GroupNormSiLU",
    "Resolution",
    "ResidualBlock",
    "check_halvings",
    "conv",
    "linear",
    "num_groups",
    "require_scales",
    "resolution",
    "scaled_uniform_",
]

TINY_SCALE = 1e-10
"""Initial variance scale of the layers that make every block, and the network, start as (almost)
zero.
"""

HALF_SQRT = math.sqrt(0.5)


@dataclass(frozen=True)
class BlockStyle:
    """What residual and attention blocks of published networks differ in.

    Attributes:
        groups: Of every normalisation; None: :func:`num_groups` of its width.
        rescale: Divide the sum of shortcut and branch by ``sqrt(2)``.
        shortcut_scale: Initial variance scale of a shortcut's 1x1 convolution.
    """

    groups: int | None = None
    rescale: bool = True
    shortcut_scale: float = 1.0

    def add(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """The block's output."""
        total = shortcut + branch
        return total * HALF_SQRT if self.rescale else total


NCSNPP_STYLE = BlockStyle()
"""The published NCSN++ and DDPM++."""


def scaled_uniform_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """Fill ``(out, in, *kernel)`` uniformly, with variance ``2 scale / (fan_in + fan_out)``."""
    area = math.prod(weight.shape[2:])
    bound = math.sqrt(6 * scale / (area * (weight.shape[0] + weight.shape[1])))
    return nn.init.uniform_(weight, -bound, bound)


def linear(in_features: int, out_features: int, scale: float = 1.0) -> nn.Linear:
    """Linear layer with zero bias and :func:`scaled_uniform_` weight."""
    layer = nn.Linear(in_features, out_features)
    scaled_uniform_(layer.weight.data, scale)
    nn.init.zeros_(layer.bias)
    return layer


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int = 3,
    *,
    stride: int = 1,
    padding: int | None = None,
    scale: float = 1.0,
) -> nn.Conv2d:
    """Convolution with zero bias and :func:`scaled_uniform_` weight; keeps the size."""
    padding = kernel // 2 if padding is None else padding
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding)
    scaled_uniform_(layer.weight.data, scale)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def num_groups(channels: int) -> int:
    """Groups of a normalisation layer: of four channels or more, at most 32."""
    return max(1, min(channels // 4, 32))


class GroupNorm(nn.GroupNorm):
    """Group normalisation with :func:`num_groups` groups unless given; keeps the memory format."""

    def __init__(self, channels: int, groups: int | None = None) -> None:
        super().__init__(groups or num_groups(channels), channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        # the CPU kernel for half precision in channels-last order is ten times slower than this
        # detour
        if (
            x.device.type == "cpu"
            and x.itemsize < 4
            and x.is_contiguous(memory_format=torch.channels_last)
        ):
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)


class GroupNormSiLU(GroupNorm):
    """Group normalisation and SiLU, before every convolution; one module, to be fused."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class ResidualBlock(nn.Module):
    """Pre-activation residual block in the style of BigGAN, conditioned on the time.

    ``h = conv(resample(silu(norm(x)))) + dense(time)``, then ``conv(dropout(silu(norm(h))))``,
    output ``(shortcut + h) / sqrt(2)`` (arXiv 2011.13456 appendix H.2). The shortcut is resampled
    too and passes a 1x1 convolution where the width or the resolution changes.

    Args:
        in_channels: width of ``x (B, in, H, W)``.
        out_channels: width of the output ``(B, out, H', W')``.
        time_width: width of the activated time embedding ``(B, time_width)``, or ``(1,
            time_width)``; 0 for a block without time.
        dropout: probability (drawn from torch's global generator, as every dropout).
        resample: doubles or halves the resolution; ``None`` keeps it.
        style: groups, scale of the sum, initialisation of the shortcut.
        groups_in: of the first normalisation, if not those of the style.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_width: int,
        dropout: float = 0.0,
        resample: nn.Module | None = None,
        style: BlockStyle = NCSNPP_STYLE,
        groups_in: int | None = None,
    ) -> None:
        super().__init__()
        self.style = style
        self.norm_in = GroupNormSiLU(in_channels, groups_in or style.groups)
        self.resample = resample
        self.conv_in = conv(in_channels, out_channels)
        self.time = linear(time_width, out_channels) if time_width else None
        self.norm_out = GroupNormSiLU(out_channels, style.groups)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = conv(out_channels, out_channels, scale=TINY_SCALE)
        changes = in_channels != out_channels or resample is not None
        self.shortcut = (
            conv(in_channels, out_channels, 1, scale=style.shortcut_scale) if changes else None
        )

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.norm_in(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h)
        if self.time is not None:
            with torch.autocast(x.device.type, enabled=False):
                shift = self.time(time)
            h = h + shift.to(h.dtype)[:, :, None, None]
        h = self.conv_out(self.dropout(self.norm_out(h)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return self.style.add(x, h)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels of ``x (B, C, H, W)``.

    ``(x + out(attention(norm(x)))) / sqrt(2)``, without the root if the style says so.
    """

    def __init__(self, channels: int, style: BlockStyle = NCSNPP_STYLE) -> None:
        super().__init__()
        self.style = style
        self.norm = GroupNorm(channels, style.groups)
        self.qkv = linear(channels, 3 * channels)
        # each third is a layer of its own to the initialisation, whose scale depends on the width
        for part in self.qkv.weight.data.chunk(3):
            scaled_uniform_(part, 0.1)
        self.out = linear(channels, channels, scale=TINY_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        pixels = self.norm(x).permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)
        q, k, v = self.qkv(pixels).chunk(3, dim=-1)
        h = self.out(F.scaled_dot_product_attention(q, k, v))
        h = h.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return self.style.add(x, h)


Resolution: TypeAlias = int | tuple[int, int]
"""Size of the images of a network in pixels: the side, or height and width."""


def resolution(sides: Sequence[int]) -> Resolution:
    """``(H, W)`` as a network takes it: the side alone of a square."""
    height, width = sides
    return height if height == width else (height, width)


def require_scales(num_scales: int) -> int:
    """``num_scales``, the number of resolutions inside a network.

    Raises:
        ValueError: There is none.
    """
    if num_scales < 1:
        raise ValueError(f"num_scales must be at least 1, got {num_scales}")
    return num_scales


def check_halvings(size: Resolution, halvings: int, words: str = "") -> int:
    """The shorter side of images all of whose sides can be halved so often.

    Raises:
        ValueError: One cannot.
    """
    sides = (size,) if isinstance(size, int) else size
    for side in sides:
        if side % (1 << halvings):
            raise ValueError(f"resolution {side} cannot be halved {halvings} times{words}")
    return min(sides)
