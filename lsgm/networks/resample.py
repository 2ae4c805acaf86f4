"""Doubling and halving of the resolution, plain or with an anti-aliasing FIR filter.

arXiv 1904.11486.

The FIR filter is ``[1, 3, 3, 1] / 8`` along each axis; zeros lie outside the image. It runs as a
depthwise convolution, so no kernel has to be compiled.

>>> from lsgm.networks.resample import make_resampler
>>> x = torch.ones(1, 1, 8, 8)
>>> halved, doubled = make_resampler("down", fir=True)(x), make_resampler("up", fir=False)(x)
>>> tuple(halved.shape), tuple(doubled.shape)
((1, 1, 4, 4), (1, 1, 16, 16))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsgm.networks.layers import conv

__all__ = [
    "ConvDownsample",
    "ConvUpsample",
    "Downsample",
    "FIRConvDownsample",
    "FIRConvUpsample",
    "FIRDownsample",
    "FIRUpsample",
    "Upsample",
    "make_conv_resampler",
    "make_resampler",
    "restore_filters",
]


class _FIR(nn.Module):
    """Holds the separable 4x4 filter, normalised to sum to ``gain``."""

    kernel: Tensor

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.register_buffer("kernel", self._taps(), persistent=False)

    def _taps(self) -> Tensor:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        return self.gain * torch.outer(taps, taps)[None, None]

    def filter(self, x: Tensor, convolution: Callable[..., Tensor], **options: int) -> Tensor:
        """Apply ``convolution`` with the filter to each channel of ``x``; keeps the dtype."""
        # a few taps a pixel gain nothing from half precision, and on a CPU its depthwise kernel is
        # ten times slower
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.kernel.to(dtype).expand(x.shape[1], 1, 4, 4)
        with torch.autocast(x.device.type, enabled=False):
            return convolution(x.to(dtype), weight, groups=x.shape[1], **options).to(x.dtype)


class FIRUpsample(_FIR):
    """FIR doubling, ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``.

    ``y[2m] = x[m-1]/4 + 3x[m]/4``, ``y[2m+1] = 3x[m]/4 + x[m+1]/4`` along each axis.
    """

    def __init__(self) -> None:
        super().__init__(gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(x, F.conv_transpose2d, stride=2, padding=1)


class FIRDownsample(_FIR):
    """FIR halving, ``(B, C, H, W)`` to ``(B, C, H/2, W/2)``.

    ``y[m] = (x[2m-1] + 3x[2m] + 3x[2m+1] + x[2m+2]) / 8`` along each axis.
    """

    def __init__(self) -> None:
        super().__init__(gain=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.filter(x, F.conv2d, stride=2, padding=1)


class Upsample(nn.Module):
    """Nearest-neighbour doubling."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


class Downsample(nn.Module):
    """Mean of 2x2 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class ConvUpsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 whose padding lies right and below."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class FIRConvUpsample(_FIR):
    """Zeros between the pixels, a 3x3 convolution, then the FIR filter (arXiv 1912.04958)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(gain=4.0)
        self.conv = conv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight.transpose(0, 1).flip(2, 3)
        h = F.conv_transpose2d(x, weight, stride=2)
        h = self.filter(h, F.conv2d, padding=1)
        assert self.conv.bias is not None
        return h + self.conv.bias.to(h.dtype)[:, None, None]


class FIRConvDownsample(_FIR):
    """The FIR filter, then a 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(gain=1.0)
        self.conv = conv(in_channels, out_channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.filter(x, F.conv2d, padding=2))


def restore_filters(network: nn.Module) -> None:
    """Give the filters of a network that was built on the meta device, whose weights were put in
    afterwards, their values: they are constants, which no file of weights holds.
    """
    for module in network.modules():
        if isinstance(module, _FIR):
            module.kernel = module._taps()


def make_resampler(direction: str, fir: bool) -> nn.Module:
    """Resampler without weights; ``direction`` is ``"up"`` or ``"down"``."""
    kinds = {
        ("up", False): Upsample,
        ("down", False): Downsample,
        ("up", True): FIRUpsample,
        ("down", True): FIRDownsample,
    }
    return kinds[direction, fir]()


def make_conv_resampler(
    direction: str, fir: bool, in_channels: int, out_channels: int
) -> nn.Module:
    """Resampler with a learned 3x3 convolution; ``direction`` is ``"up"`` or ``"down"``."""
    kinds = {
        ("up", False): ConvUpsample,
        ("down", False): ConvDownsample,
        ("up", True): FIRConvUpsample,
        ("down", True): FIRConvDownsample,
    }
    return kinds[direction, fir](in_channels, out_channels)
