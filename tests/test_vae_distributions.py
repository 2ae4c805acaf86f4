"""Decoder distributions: normalisation, edges, moments, gradients at extreme inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vae.distributions import (
    DECODER_DISTRIBUTIONS,
    Bernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Normal,
    decoder_channels,
    decoder_distribution,
)


def levels(bits: int) -> Tensor:
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float64)


def test_bernoulli_sums_to_one_and_has_its_mean() -> None:
    dist = Bernoulli(torch.linspace(-6, 6, 13, dtype=torch.float64).view(1, 1, 1, 13))
    p_low, p_high = (dist.log_prob(torch.full((1, 1, 1, 13), v)).exp() for v in (-1.0, 1.0))
    torch.testing.assert_close(p_low + p_high, torch.ones_like(p_low))
    torch.testing.assert_close(p_high - p_low, dist.mean)


def test_discretized_logistic_sums_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    mu = torch.rand(1, 50, generator=generator, dtype=torch.float64) * 2 - 1
    log_scale = torch.rand(1, 50, generator=generator, dtype=torch.float64) * 6 - 5
    logits = torch.cat([mu, log_scale]).view(1, 2, 1, 50).expand(256, -1, -1, -1)
    x = levels(8).view(256, 1, 1, 1).expand(-1, 1, 1, 50)
    total = DiscretizedLogistic(logits).log_prob(x).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [2, 3])
def test_mixture_over_all_colours_sums_to_one(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    logits = torch.randn(1, 100, 1, 1, generator=generator, dtype=torch.float64)
    values = levels(bits)
    colours = torch.cartesian_prod(values, values, values)
    x = colours.view(-1, 3, 1, 1)
    dist = DiscretizedLogisticMixture(logits.expand(len(x), -1, -1, -1), bits)
    assert float(dist.log_prob(x).exp().sum()) == pytest.approx(1, abs=1e-6)


def test_grey_mixture_sums_to_one() -> None:
    logits = torch.randn(1, 30, 1, 1, dtype=torch.float64)
    x = levels(5).view(-1, 1, 1, 1)
    dist = DiscretizedLogisticMixture(logits.expand(len(x), -1, -1, -1), 5)
    assert float(dist.log_prob(x).exp().sum()) == pytest.approx(1, abs=1e-6)
    assert dist.mean.shape == dist.sample(torch.Generator().manual_seed(0)).shape == (32, 1, 1, 1)


def test_edges_hold_the_tails() -> None:
    """A logistic far outside the range puts all its mass on the outermost level."""
    for mu, edge in ((-3.0, -1.0), (3.0, 1.0)):
        dist = DiscretizedLogistic(torch.tensor([mu, -4.0]).view(1, 2, 1, 1))
        log_prob = dist.log_prob(torch.full((1, 1, 1, 1), edge))
        assert float(log_prob.exp()) == pytest.approx(1, abs=1e-6)


def test_narrow_bins_use_the_density() -> None:
    """Where the mass is below 1e-5, it is width times density at the centre."""
    scale, mu, x = math.exp(2.0), -300.0, 0.0
    dist = DiscretizedLogistic(torch.tensor([mu, 2.0], dtype=torch.float64).view(1, 2, 1, 1))
    z = (x - mu) / scale
    expected = -z - 2 * math.log1p(math.exp(-z)) - math.log(scale) + math.log(2 / 255)
    log_prob = dist.log_prob(torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    assert float(log_prob) == pytest.approx(expected, rel=1e-6)


def test_colours_depend_on_those_before_in_log_prob_and_draws() -> None:
    """With narrow components, a draw is the means with the coefficients put in."""
    logits = torch.full((1, 100, 1, 1), 0.0, dtype=torch.float64)
    logits[:, 0] = 50.0  # one component
    fields = logits[:, 10:].view(1, 3, 3, 10, 1, 1)
    fields[:, 0, 0], fields[:, 1, 0], fields[:, 2, 0] = 0.5, 0.1, -0.2
    fields[:, :, 1] = -7.0
    k = torch.tensor([0.4, -0.6, 0.8], dtype=torch.float64)
    fields[:, :, 2] = torch.atanh(k).view(1, 3, 1, 1, 1)
    dist = DiscretizedLogisticMixture(logits)
    red = 0.5
    green = 0.1 + 0.4 * red
    blue = -0.2 - 0.6 * red + 0.8 * green
    expected = torch.tensor([red, green, blue], dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close(dist.mean, expected)
    half = torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)
    drawn = dist.sample_from_uniforms(torch.full((1, 10, 1, 1), 0.5, dtype=torch.float64), half)
    torch.testing.assert_close(drawn, expected)
    shifted = expected + torch.tensor([0.0, 0.2, 0.0], dtype=torch.float64).view(1, 3, 1, 1)
    assert dist.log_prob(expected) > dist.log_prob(shifted) + 10


def test_mixture_draws_have_the_mean_of_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 30, 1, 1, generator=generator)
    logits[:, 10:20] *= 0.2
    logits[:, 20:] = -3.0
    dist = DiscretizedLogisticMixture(logits.expand(20000, -1, -1, -1))
    draws = dist.sample(generator)
    standard_error = float(draws.std()) / math.sqrt(len(draws))
    assert abs(float(draws.mean() - dist.mean.mean())) < 4 * standard_error


def test_temperature_narrows() -> None:
    dist = Normal(torch.zeros(2000), torch.zeros(2000))
    draws = [dist.sample(torch.Generator().manual_seed(0), t) for t in (1.0, 0.5)]
    torch.testing.assert_close(draws[0] * 0.5, draws[1])


def test_normal_agrees_with_torch() -> None:
    mu, log_sigma, x = torch.randn(3, 5, 7, dtype=torch.float64)
    expected = torch.distributions.Normal(mu, log_sigma.exp()).log_prob(x)
    torch.testing.assert_close(Normal(mu, log_sigma).log_prob(x), expected)


@pytest.mark.parametrize("kind", DECODER_DISTRIBUTIONS)
@pytest.mark.parametrize("size", [50.0, 6e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_extreme_logits(kind: str, size: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randn(4, decoder_channels(kind, 3), 6, 6, generator=generator).sign()
    logits = (signs * size).to(dtype).requires_grad_()
    x = (torch.rand(4, 3, 6, 6, generator=generator) * 255).round() / 127.5 - 1
    x = x.sign() if kind == "bin" else x
    dist = decoder_distribution(kind, logits, 8)
    log_prob = dist.log_prob(x)
    assert log_prob.dtype == torch.float32
    assert log_prob.isfinite().all()
    assert dist.mean.isfinite().all()
    log_prob.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_pixels_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        DiscretizedLogistic(torch.zeros(1, 2, 1, 1)).log_prob(torch.full((1, 1, 1, 1), 1.1))


def test_unknown_or_unfit_distributions() -> None:
    with pytest.raises(ValueError, match="decoder_dist"):
        decoder_channels("beta", 3)
    with pytest.raises(ValueError, match="1 or 3"):
        decoder_channels("dml", 2)
    with pytest.raises(ValueError, match="30 or 100"):
        DiscretizedLogisticMixture(torch.zeros(1, 50, 2, 2))
