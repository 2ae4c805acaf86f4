"""Output distributions of the decoder, and the Normal distribution of the posterior.

Pixels live in [-1, 1]. Everything is computed in float32 at least, whatever the precision of the
network: the logits are raised on the way in.

>>> from vae.distributions import decoder_channels, decoder_distribution
>>> logits = torch.zeros(2, decoder_channels("bin", image_channels=1), 4, 4)
>>> likelihood = decoder_distribution("bin", logits)
>>> round(likelihood.log_prob(torch.ones(2, 1, 4, 4))[0].sum().item() / math.log(2))  # bits
-16
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.layers import at_least_float32, soft_clamp
from vae.random import Rng, rand, randn

__all__ = [
    "DECODER_DISTRIBUTIONS",
    "Bernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Distribution",
    "Normal",
    "decoder_channels",
    "decoder_distribution",
]

DECODER_DISTRIBUTIONS = ("bin", "dml", "dl", "normal")
NUM_MIXTURES = 10
MIN_LOG_SCALE = -7.0
NORMAL_DECODER_CLAMP = 5.0
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Distribution(ABC):
    """A distribution over images (B, C, H, W)."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log probability (or density) of ``x`` (B, C, H, W), in nats, elementwise.

        (B, C, H, W), or (B, H, W) where the colours of a pixel are modelled together.
        """

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean (B, C, H, W) in the range of the data."""

    def mean_estimate(self, rng: Rng = None) -> Tensor:
        """Unbiased estimate of the mean, (B, C, H, W), which is what is shown.

        It is the mean itself, or where pixels depend on each other the conditional means along one
        draw.
        """
        return self.mean

    @abstractmethod
    def sample(self, rng: Rng = None, temperature: float = 1.0) -> Tensor:
        """Draw (B, C, H, W); a temperature in (0, 1) narrows the distribution."""


class Bernoulli(Distribution):
    """Independent pixels in {-1, 1}.

    Args:
        logits: Log odds of 1, (B, C, H, W).
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = at_least_float32(logits)

    def log_prob(self, x: Tensor) -> Tensor:
        target = (x.to(self.logits.dtype) + 1) / 2
        return target * self.logits - F.softplus(self.logits)

    @property
    def mean(self) -> Tensor:
        return 2 * torch.sigmoid(self.logits) - 1

    def sample(self, rng: Rng = None, temperature: float = 1.0) -> Tensor:
        uniform = rand(self.logits.shape, rng, device=self.logits.device)
        return (uniform < torch.sigmoid(self.logits / temperature)).to(self.logits.dtype) * 2 - 1


class Normal(Distribution):
    """Independent Normal elements of any shape (B, ...).

    Args:
        mu: Means.
        log_sigma: Log standard deviations, the shape of ``mu``.
    """

    def __init__(self, mu: Tensor, log_sigma: Tensor) -> None:
        self.mu = at_least_float32(mu)
        self.log_sigma = at_least_float32(log_sigma)

    def log_prob(self, x: Tensor) -> Tensor:
        standardized = (x - self.mu) * torch.exp(-self.log_sigma)
        return -0.5 * standardized.square() - HALF_LOG_2PI - self.log_sigma

    @property
    def mean(self) -> Tensor:
        return self.mu

    def sample(self, rng: Rng = None, temperature: float = 1.0) -> Tensor:
        noise = randn(self.mu.shape, rng, device=self.mu.device, dtype=self.mu.dtype)
        return self.mu + torch.exp(self.log_sigma) * (temperature * noise)


def _check_range(x: Tensor) -> None:
    # Looking at the values would make an accelerator wait at each step, so they are checked on the
    # CPU only.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = x.min().item(), x.max().item()
        if low < -1 or high > 1:
            raise ValueError(f"pixels must lie in [-1, 1], got [{low:g}, {high:g}]")


def _discretized_logistic_log_prob(
    x: Tensor, mean: Tensor, log_scale: Tensor, half_levels: float
) -> Tensor:
    """Log mass of the bin around ``x`` (half-width ``0.5 / half_levels``) of a logistic.

    The outermost bins reach to infinity (PixelCNN++, arXiv 1701.05517, eq. 2).
    """
    half_width = 0.5 / half_levels
    inverse_scale = torch.exp(-log_scale)
    centred = x - mean
    plus = inverse_scale * (centred + half_width)
    minus = inverse_scale * (centred - half_width)
    middle = inverse_scale * centred
    mass = torch.sigmoid(plus) - torch.sigmoid(minus)
    # Where the difference drowns in rounding: density at the centre times the width.
    narrow = middle - log_scale - 2 * F.softplus(middle) - math.log(half_levels)
    inner = torch.where(mass > 1e-5, torch.log(mass.clamp_min(1e-10)), narrow)
    low, high = F.logsigmoid(plus), F.logsigmoid(-minus)
    return torch.where(x < -0.999, low, torch.where(x > 0.999, high, inner))


def _logistic_quantile(uniform: Tensor) -> Tensor:
    return torch.log(uniform) - torch.log1p(-uniform)


def _open_uniform(shape: torch.Size | tuple[int, ...], rng: Rng, like: Tensor) -> Tensor:
    """Uniform in (1e-5, 1 - 1e-5), where logarithms of it and of its complement are harmless."""
    return rand(shape, rng, device=like.device, dtype=like.dtype) * (1 - 2e-5) + 1e-5


class DiscretizedLogistic(Distribution):
    """Independent logistics, integrated over the bins of ``2 ** num_bits`` levels in [-1, 1].

    Args:
        logits: (B, 2C, H, W): C means, then C log scales, which are kept above -7.
        num_bits: Bits per value.
    """

    def __init__(self, logits: Tensor, num_bits: int = 8) -> None:
        self.mu, log_scale = at_least_float32(logits).chunk(2, dim=1)
        self.log_scale = log_scale.clamp_min(MIN_LOG_SCALE)
        self.half_levels = (2**num_bits - 1) / 2

    def log_prob(self, x: Tensor) -> Tensor:
        _check_range(x)
        return _discretized_logistic_log_prob(x, self.mu, self.log_scale, self.half_levels)

    @property
    def mean(self) -> Tensor:
        return self.mu

    def sample(self, rng: Rng = None, temperature: float = 1.0) -> Tensor:
        uniform = _open_uniform(self.mu.shape, rng, self.mu)
        draw = self.mu + torch.exp(self.log_scale) * temperature * _logistic_quantile(uniform)
        return draw.clamp(-1, 1)


class DiscretizedLogisticMixture(Distribution):
    """A mixture of ten discretised logistics per pixel (PixelCNN++, arXiv 1701.05517, eq. 1-3).

    With three colours, the mean of green depends on red and the mean of blue on both, linearly.

    Args:
        logits: (B, 100, H, W) for colour: 10 mixture logits, then for each of the three colours 10
            means, 10 log scales (kept above -7) and 10 coefficients (through tanh): green on red,
            blue on red, blue on green. (B, 30, H, W) for grey, which has no coefficients.
        num_bits: Bits per value.

    Raises:
        ValueError: If the number of channels is neither 100 nor 30.
    """

    def __init__(self, logits: Tensor, num_bits: int = 8) -> None:
        logits = at_least_float32(logits)
        batch, channels, height, width = logits.shape
        if channels not in (3 * NUM_MIXTURES, 10 * NUM_MIXTURES):
            raise ValueError(f"a mixture of logistics takes 30 or 100 channels, got {channels}")
        self.colors = 3 if channels == 10 * NUM_MIXTURES else 1
        fields = 3 if self.colors == 3 else 2
        self.mixture_logits = logits[:, :NUM_MIXTURES]
        # (B, colours, fields, mixtures, H, W)
        rest = logits[:, NUM_MIXTURES:].reshape(
            batch, self.colors, fields, NUM_MIXTURES, height, width
        )
        self.means = rest[:, :, 0]
        self.log_scales = rest[:, :, 1].clamp_min(MIN_LOG_SCALE)
        self.coefficients = torch.tanh(rest[:, :, 2]) if self.colors == 3 else None
        self.half_levels = (2**num_bits - 1) / 2

    def log_prob(self, x: Tensor) -> Tensor:
        _check_range(x)
        x = x.to(self.means.dtype)[:, :, None]  # (B, colours, 1, H, W)
        means = self.means
        if self.coefficients is not None:
            c = self.coefficients
            green = means[:, 1] + c[:, 0] * x[:, 0]
            blue = means[:, 2] + c[:, 1] * x[:, 0] + c[:, 2] * x[:, 1]
            means = torch.stack([means[:, 0], green, blue], dim=1)
        log_mass = _discretized_logistic_log_prob(x, means, self.log_scales, self.half_levels)
        log_weight = F.log_softmax(self.mixture_logits, dim=1)
        return torch.logsumexp(log_mass.sum(1) + log_weight, dim=1)

    @property
    def mean(self) -> Tensor:
        weight = torch.softmax(self.mixture_logits, dim=1)[:, None]
        means = (weight * self.means).sum(2)
        if self.coefficients is None:
            return means.clamp(-1, 1)
        return self._couple(means, (weight * self.coefficients).sum(2))

    def sample(self, rng: Rng = None, temperature: float = 1.0) -> Tensor:
        batch, _, height, width = self.mixture_logits.shape
        u_mixture = _open_uniform(self.mixture_logits.shape, rng, self.means)
        u_logistic = _open_uniform((batch, self.colors, height, width), rng, self.means)
        return self.sample_from_uniforms(u_mixture, u_logistic, temperature)

    def sample_from_uniforms(
        self, u_mixture: Tensor, u_logistic: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """The draw that uniforms (B, 10, H, W) and (B, C, H, W) in (0, 1) give."""
        gumbel = -torch.log(-torch.log(u_mixture))
        component = torch.argmax(self.mixture_logits / temperature + gumbel, dim=1)
        index = component[:, None, None].expand(-1, self.colors, 1, -1, -1)
        means = self.means.gather(2, index).squeeze(2)
        scales = torch.exp(self.log_scales.gather(2, index).squeeze(2))
        draw = means + scales * temperature * _logistic_quantile(u_logistic)
        if self.coefficients is None:
            return draw.clamp(-1, 1)
        return self._couple(draw, self.coefficients.gather(2, index).squeeze(2))

    @staticmethod
    def _couple(x: Tensor, c: Tensor) -> Tensor:
        """Add to green and blue (of ``x`` (B, 3, H, W)) what they take from the colours before."""
        red = x[:, 0].clamp(-1, 1)
        green = (x[:, 1] + c[:, 0] * red).clamp(-1, 1)
        blue = (x[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
        return torch.stack([red, green, blue], dim=1)


def decoder_channels(kind: str, image_channels: int) -> int:
    """Number of channels of the logits of distribution ``kind`` for images of ``image_channels``.

    Raises:
        ValueError: If the distribution does not exist or does not fit the images.
    """
    if kind == "bin":
        return image_channels
    if kind in ("normal", "dl"):
        return 2 * image_channels
    if kind == "dml":
        if image_channels not in (1, 3):
            raise ValueError(f"dml needs 1 or 3 image channels, got {image_channels}")
        return NUM_MIXTURES * (10 if image_channels == 3 else 3)
    raise ValueError(f"decoder_dist must be one of {DECODER_DISTRIBUTIONS}, got {kind!r}")


def decoder_distribution(kind: str, logits: Tensor, num_bits: int = 8) -> Distribution:
    """The distribution ``kind`` that the decoder's ``logits`` (B, C_out, H, W) describe."""
    if kind == "bin":
        return Bernoulli(logits)
    if kind == "normal":
        return Normal(*soft_clamp(logits, NORMAL_DECODER_CLAMP).chunk(2, dim=1))
    if kind == "dl":
        return DiscretizedLogistic(logits, num_bits)
    if kind == "dml":
        return DiscretizedLogisticMixture(logits, num_bits)
    raise ValueError(f"decoder_dist must be one of {DECODER_DISTRIBUTIONS}, got {kind!r}")
