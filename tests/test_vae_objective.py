"""Bounds and KL terms against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vae.distributions import Normal
from vae.hierarchical import Posterior
from vae.objective import (
    active_channels,
    bits_per_dim,
    importance_weighted_bound,
    kl_balance_alpha,
    kl_balance_weights,
    kl_coefficient,
    kl_per_channel,
    kl_per_group,
    standard_normal_log_prob,
)


def posterior(mu: Tensor, log_sigma: Tensor, generator: torch.Generator) -> Posterior:
    """A posterior of two groups with the same moments."""
    draws = [Normal(mu, log_sigma).sample(generator) for _ in range(2)]
    log_q = tuple(Normal(mu, log_sigma).log_prob(eps) for eps in draws)
    return Posterior(tuple(draws), log_q, (mu, mu), (log_sigma, log_sigma))


def test_kl_estimates_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    mu = torch.tensor([0.5, -1.0, 0.0]).view(1, 3, 1, 1).expand(20000, 3, 2, 2)
    log_sigma = torch.tensor([-1.0, 0.3, 0.0]).view(1, 3, 1, 1).expand(20000, 3, 2, 2)
    draw = posterior(mu, log_sigma, generator)
    exact = 0.5 * (mu**2 + (2 * log_sigma).exp() - 1) - log_sigma
    kl = kl_per_group(draw)
    assert kl.shape == (20000, 2)
    error = (kl.mean(0) - exact[0].sum()).abs()
    assert (error < 4 * kl.std(0) / math.sqrt(20000)).all()
    channels = kl_per_channel(draw)
    torch.testing.assert_close(channels.sum(1), kl.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(channels[0], exact[0].sum((1, 2)), rtol=0.05, atol=0.05)
    assert active_channels(channels[0]).tolist() == [True, True, False]


def test_standard_normal() -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x)
    torch.testing.assert_close(standard_normal_log_prob(x), expected)


def test_importance_weighted_bound_rises_to_the_evidence() -> None:
    """x = z + n, both standard normal, with a poor q: closed-form log p(x), and tighter with K."""
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1.3], dtype=torch.float64)
    runs, most = 400, 256
    q = Normal(torch.full((most, runs), 0.1).double(), torch.full((most, runs), 0.2).double())
    z = q.sample(generator)
    log_w = standard_normal_log_prob(z) + standard_normal_log_prob(x - z) - q.log_prob(z)
    evidence = -0.25 * float(x) ** 2 - 0.5 * math.log(2 * math.pi * 2)
    means = [float(importance_weighted_bound(log_w[:k]).mean()) for k in (1, 4, 16, 64, 256)]
    assert means == sorted(means)
    assert means[-1] <= evidence + 0.01
    assert abs(means[-1] - evidence) < 0.02
    # the mean of the log weights is the bound for K = 1, and never above
    assert (importance_weighted_bound(log_w) >= log_w.mean(0)).all()


def test_exact_posterior_has_a_tight_bound() -> None:
    x = torch.tensor([0.7, -2.0], dtype=torch.float64)
    q = Normal((x / 2).expand(5, 2), torch.full((5, 2), 0.5 * math.log(0.5)).double())
    z = q.sample(torch.Generator().manual_seed(1))
    log_w = standard_normal_log_prob(z) + standard_normal_log_prob(x - z) - q.log_prob(z)
    evidence = -0.25 * x**2 - 0.5 * math.log(4 * math.pi)
    torch.testing.assert_close(log_w, evidence.expand(5, 2))
    torch.testing.assert_close(importance_weighted_bound(log_w), evidence)


def test_annealing() -> None:
    def at(step: int) -> float:
        return kl_coefficient(
            step, 100, anneal_portion=0.5, const_portion=0.1, minimum=0.01, maximum=0.8
        )

    assert at(0) == at(10) == 0.01
    assert at(35) == pytest.approx(0.01 + 0.79 * 0.5)
    assert at(60) == at(100) == 0.8


def test_annealing_of_no_length() -> None:
    settings = {"const_portion": 0.1, "minimum": 0.0, "maximum": 1.0}
    steps = [kl_coefficient(s, 100, anneal_portion=0, **settings) for s in (0, 9, 10, 50)]
    assert steps == [0, 0, 1, 1]


def test_balancing_favours_groups_with_much_kl() -> None:
    kl = torch.tensor([[1.0, -3.0, 8.0, 0.0], [3.0, -1.0, 8.0, 0.0]], requires_grad=True)
    weights = kl_balance_weights(kl, [2, 2], 0.5)
    assert not weights.requires_grad
    assert float(weights.mean()) == pytest.approx(1)
    size = torch.tensor([2.01, 2.01, 8.01 / 4, 0.01 / 4])
    torch.testing.assert_close(weights, size / size.mean())
    assert kl_balance_weights(kl, [2, 2], 1.0).tolist() == [1, 1, 1, 1]


def test_shares_of_unequal_scales() -> None:
    torch.testing.assert_close(kl_balance_alpha([1, 2]), torch.tensor([1.0, 2.0, 2.0]))
    with pytest.raises(ValueError, match="rule"):
        kl_balance_alpha([1], "cubic")  # type: ignore[arg-type]


def test_conversions() -> None:
    assert bits_per_dim(784 * math.log(2), 784) == pytest.approx(1)
