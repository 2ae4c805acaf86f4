"""The VAE without what makes ours fast, as the baseline of a benchmark.

Same parameters, same function, same gradients; only the order and kind of the operations differ.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vae.cells import InvertedResidual, SkipUp
from vae.layers import BatchNorm, Conv2d, DepthwiseConv2d, WeightNormConv2d, upsample_nearest

__all__ = ["make_plain"]


class _PlainWeightNormConv2d(WeightNormConv2d):
    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, groups=self.groups)


class _PlainSkipUp(SkipUp):
    """Interpolates first, so that the convolution acts on four times as many pixels."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
        return self.conv(x)


class _PlainInvertedResidual(InvertedResidual):
    """Repeats the pixels at the very start."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_in(upsample_nearest(x) if self.up else x)
        x = self.depthwise(self.norm_expand(self.expand(x)))
        return self.norm_out(self.project(self.norm_depthwise(x)))


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    DepthwiseConv2d: Conv2d,
    WeightNormConv2d: _PlainWeightNormConv2d,
    SkipUp: _PlainSkipUp,
    InvertedResidual: _PlainInvertedResidual,
}
"""Fast layer -> the same parameters with a straightforward forward pass."""


def make_plain(model: nn.Module) -> None:
    """Undo, in place, what the layers of a VAE do for speed."""
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
        if isinstance(module, BatchNorm):
            module.multiplicity = 1  # it sees the repeated pixels themselves
