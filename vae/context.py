"""A decoder that sees the pixels it has already drawn: p(x | z) = prod_i p(x_i | x_<i, z).

Pixels in raster order, each a Bernoulli whose log odds come from the decoder's features at that
place and from a window of the pixels before it, by masked convolutions (PixelCNN, arXiv
1601.06759). As long as the window is small the latents keep the global structure and the window
takes the local one, thickness and smoothness of a stroke (PixelVAE, arXiv 1611.05013; variational
lossy autoencoder, arXiv 1611.02731). The likelihood is exact and parallel over pixels; drawing an
image takes one small evaluation per pixel.

>>> from vae.context import AutoregressiveBernoulli, CausalContext
>>> context = CausalContext(image_channels=1, width=8, kernel_size=3, num_blocks=1)
>>> likelihood = AutoregressiveBernoulli(torch.zeros(2, 8, 4, 4), context)
>>> x = likelihood.sample(torch.Generator().manual_seed(0))  # pixel by pixel
>>> tuple(likelihood.log_prob(x).shape)  # at once
(2, 1, 4, 4)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.distributions import Bernoulli, Distribution
from vae.layers import normalize_kernel
from vae.random import Rng, rand

__all__ = ["AutoregressiveBernoulli", "CausalContext", "CausalConv2d"]

MEAN_SEED = 0
ADDED_BLOCK_GAIN = 1e-2
"""Norm of the last kernels of a block that is added to a trained context: nearly the identity."""


class CausalConv2d(nn.Module):
    """Weight-normalised convolution that sees only pixels before a place in raster order, (B, C_in,
    H, W) to (B, C_out, H, W).

    Args:
        in_channels: ``C_in``.
        out_channels: ``C_out``.
        kernel_size: ``k``, odd: ``k // 2`` rows above, as many columns to either side.
        include_centre: Whether it sees the place itself (PixelCNN's mask B; not: mask A).

    Raises:
        ValueError: If ``k`` is even, or 1 without the centre.
    """

    mask: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, include_centre: bool
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or (kernel_size == 1 and not include_centre):
            raise ValueError(
                f"a causal kernel has an odd size that sees a pixel, not {kernel_size}"
            )
        self.reach = kernel_size // 2
        shape = (self.reach + 1, kernel_size)  # the rows below the centre would all be masked
        plain = nn.Conv2d(in_channels, out_channels, shape)
        mask = torch.ones(shape)
        mask[-1, self.reach + (1 if include_centre else 0) :] = 0
        self.register_buffer("mask", mask, persistent=False)
        self.weight, self.bias = plain.weight, plain.bias
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self.weight * mask, dim=(1, 2, 3), keepdim=True)
        self.log_weight_norm = nn.Parameter(torch.log(norm + 1e-2))

    def kernel(self) -> Tensor:
        """Effective kernel (C_out, C_in, k // 2 + 1, k), float32."""
        return normalize_kernel(self.weight * self.mask, self.log_weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, padding=self.reach)[:, :, : x.shape[2]]


class _PixelConv:
    """A causal convolution one place at a time; it keeps the inputs that it has been given.

    ``conv`` maps (B, C_in, H, W); ``like`` is any (B, ?, H, W).
    """

    def __init__(self, conv: CausalConv2d, like: Tensor, fill: float = 0.0) -> None:
        batch, _, height, width = like.shape
        channels, reach = conv.weight.shape[1], conv.reach
        assert conv.bias is not None  # every causal convolution has one
        self.reach, self.bias = reach, conv.bias
        self.matrix = conv.kernel().flatten(1).t().contiguous()
        padded = (batch, channels, height + reach, width + 2 * reach)
        self.seen = torch.zeros(padded, dtype=conv.weight.dtype, device=like.device)
        self.seen[:, :, reach:, reach : reach + width] = fill

    def put(self, value: Tensor, i: int, j: int) -> None:
        """The input at (i, j) is ``value`` (B, C_in)."""
        self.seen[:, :, i + self.reach, j + self.reach] = value

    def at(self, i: int, j: int) -> Tensor:
        """The output at (i, j), (B, C_out)."""
        patch = self.seen[:, :, i : i + self.reach + 1, j : j + 2 * self.reach + 1]
        return torch.addmm(self.bias, patch.flatten(1), self.matrix)

    def __call__(self, value: Tensor, i: int, j: int) -> Tensor:
        self.put(value, i, j)
        return self.at(i, j)


class _CausalBlock(nn.Module):
    """``h + conv(swish(conv(swish(h))))``, the first 3x3 and causal, the second within pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.causal = CausalConv2d(width, width, 3, include_centre=True)
        self.pointwise = CausalConv2d(width, width, 1, include_centre=True)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.pointwise(F.silu(self.causal(F.silu(h))))


class CausalContext(nn.Module):
    """Log odds of each pixel given the decoder's features and the pixels before it.

    Args:
        image_channels: ``C``; the channels of a pixel are independent given what is before it.
        width: Channels ``F`` of the features.
        kernel_size: Side of the first window, odd.
        num_blocks: Residual blocks after it, each of which widens the window by one pixel.
    """

    def __init__(self, image_channels: int, width: int, kernel_size: int, num_blocks: int) -> None:
        super().__init__()
        self.image_channels = image_channels
        self.first = CausalConv2d(image_channels, width, kernel_size, include_centre=False)
        self.blocks = nn.Sequential(*[_CausalBlock(width) for _ in range(num_blocks)])
        self.last = CausalConv2d(width, image_channels, 1, include_centre=True)
        self.reach = kernel_size // 2 + num_blocks

    def causal_blocks(self) -> list[_CausalBlock]:
        """The residual blocks, in order."""
        return [block for block in self.blocks if isinstance(block, _CausalBlock)]

    def deepen(self, count: int) -> None:
        """Add ``count`` residual blocks at the end that start nearly as the identity, so that a
        trained context keeps its log odds and gains capacity (Net2Net, arXiv 1511.05641).
        """
        width = self.last.weight.shape[1]
        for _ in range(count):
            block = _CausalBlock(width).to(self.last.weight.device, self.last.weight.dtype)
            nn.init.constant_(block.pointwise.log_weight_norm, math.log(ADDED_BLOCK_GAIN))
            assert block.pointwise.bias is not None
            nn.init.zeros_(block.pointwise.bias)
            self.blocks.append(block)
        self.reach += count

    def forward(self, features: Tensor, x: Tensor) -> Tensor:
        """Log odds (B, C, H, W) for ``features`` (B, F, H, W) and an image ``x`` (B, C, H, W)."""
        h = self.first(x.to(features.dtype)) + features
        return self.last(F.silu(self.blocks(h)))


class AutoregressiveBernoulli(Distribution):
    """Pixels in {-1, 1}, each a Bernoulli given those before it in raster order.

    Args:
        features: The decoder's features, (B, F, H, W).
        context: Maps them and an image to log odds.
        crop: Pixels at each border that are padding, always -1.
    """

    def __init__(self, features: Tensor, context: CausalContext, crop: int = 0) -> None:
        self.features, self.context, self.crop = features, context, crop

    def log_prob(self, x: Tensor) -> Tensor:
        return Bernoulli(self.context(self.features, x)).log_prob(x)

    @property
    def mean(self) -> Tensor:
        """:meth:`mean_estimate` from a fixed field of uniforms, the same for every image."""
        return self.mean_estimate()

    def mean_estimate(self, rng: Rng = None) -> Tensor:
        shape = (1 if rng is None else len(self.features), *self._image_shape()[1:])
        generator = torch.Generator().manual_seed(MEAN_SEED) if rng is None else rng
        uniform = rand(shape, generator, device=self.features.device if rng else "cpu")
        return self._draw(uniform.to(self.features.device))[1]

    def sample(self, rng: Rng = None, temperature: float = 1.0) -> Tensor:
        uniform = rand(self._image_shape(), rng, device=self.features.device)
        return self._draw(uniform, temperature)[0]

    def _image_shape(self) -> tuple[int, int, int, int]:
        batch, _, height, width = self.features.shape
        return batch, self.context.image_channels, height, width

    @torch.no_grad()
    def _draw(self, uniform: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """A draw and the conditional means along it, both (B, C, H, W) in [-1, 1], pixel by pixel
        from ``uniform`` (B or 1, C, H, W). Every layer is evaluated once at every pixel.
        """
        context, features = self.context, self.features.to(self.context.first.weight.dtype)
        x = -torch.ones(self._image_shape(), dtype=features.dtype, device=features.device)
        mean = x.clone()
        first = _PixelConv(context.first, x, fill=-1.0)
        last = _PixelConv(context.last, x)
        blocks = [
            (_PixelConv(block.causal, x), _PixelConv(block.pointwise, x))
            for block in context.causal_blocks()
        ]
        height, width = x.shape[2:]
        for i in range(height):
            for j in range(width):
                h = first.at(i, j) + features[..., i, j]
                for causal, pointwise in blocks:
                    h = h + pointwise(F.silu(causal(F.silu(h), i, j)), i, j)
                if not (self.crop <= i < height - self.crop and self.crop <= j < width - self.crop):
                    continue  # padding: known, but what is below it sees its features
                probability = torch.sigmoid(last(F.silu(h), i, j).float() / temperature)
                x[..., i, j] = 2.0 * (uniform[..., i, j] < probability) - 1.0
                mean[..., i, j] = 2.0 * probability - 1.0
                first.put(x[..., i, j], i, j)
        return x, mean
