"""ODE log-density against closed forms, for every SDE."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianOracle, MixtureOracle
from sde_cases import all_sdes

from lsgm.divergence import ExactDivergence, HutchinsonDivergence
from lsgm.likelihood import ode_log_density, tolerance_convergence
from lsgm.sde import VPSDE

T_END = 1e-2


@all_sdes
@pytest.mark.parametrize("shape", [(3,), (2, 2, 1)], ids=["vectors", "images"])
def test_gaussian_log_density(sde, shape):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(shape, generator=generator)
    variance = torch.rand(shape, generator=generator) + 0.2
    oracle = GaussianOracle(sde, mean, variance)
    z = oracle.sample(4, T_END, generator)
    density = ode_log_density(sde, oracle.eps, z, t_end=T_END, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(density.log_prob, oracle.ode_log_prob(z, T_END), atol=1e-3, rtol=0)
    torch.testing.assert_close(density.latent, oracle.flow(z, T_END, 1.0), atol=1e-3, rtol=1e-4)


def test_mixture_log_density():
    """The prior at t = 1 is N(0, I) to within m(1) = 0.7%, so the data's own density comes out."""
    sde = VPSDE()
    oracle = MixtureOracle.ring(sde)
    z = oracle.sample(32, T_END, torch.Generator().manual_seed(0))
    density = ode_log_density(sde, oracle.eps, z, t_end=T_END, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(density.log_prob, oracle.log_prob(z, T_END), atol=1e-3, rtol=0)


def test_density_integrates_to_one():
    sde = VPSDE()
    oracle = MixtureOracle.ring(sde, (1,), components=4)
    grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
    density = ode_log_density(sde, oracle.eps, grid[:, None], t_end=T_END, rtol=1e-6, atol=1e-6)
    assert torch.trapezoid(density.log_prob.exp(), grid).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_agrees_with_the_exact_trace_in_expectation(distribution):
    sde = VPSDE()
    oracle = MixtureOracle.ring(sde)
    z = torch.tensor([[0.9, 0.5]], dtype=torch.float64).expand(1500, 2)
    settings = {"t_end": T_END, "rtol": 1e-5, "atol": 1e-5}
    exact = ode_log_density(sde, oracle.eps, z[:1], divergence=ExactDivergence(), **settings)
    noisy = ode_log_density(
        sde,
        oracle.eps,
        z,
        divergence=HutchinsonDivergence(distribution),
        rng=torch.Generator().manual_seed(0),
        **settings,
    )
    error = noisy.log_prob.std() / math.sqrt(len(z))
    assert error > 0
    assert (noisy.log_prob.mean() - exact.log_prob[0]).abs() < 4 * error


def test_several_probes_report_their_own_variance():
    """The spread over probes, measured image by image, is that over independent solves."""
    sde = VPSDE()
    oracle = MixtureOracle.ring(sde)
    z = torch.tensor([[0.9, 0.5]], dtype=torch.float64).expand(1000, 2)

    def solve(probes, seed):
        return ode_log_density(
            sde,
            oracle.eps,
            z,
            divergence=HutchinsonDivergence("gaussian", probes),
            t_end=T_END,
            rtol=1e-3,
            atol=1e-3,
            rng=torch.Generator().manual_seed(seed),
        )

    one, four = solve(1, 0), solve(4, 1)
    assert one.probe_variance is None and four.per_probe.shape == (4, 1000)
    torch.testing.assert_close(four.log_prob, four.per_probe.mean(0))
    variance = one.log_prob.var().item()
    assert four.probe_variance.mean().item() == pytest.approx(variance, rel=0.2)
    assert four.log_prob.var().item() == pytest.approx(variance / 4, rel=0.2)
    exact = ode_log_density(sde, oracle.eps, z[:2], t_end=T_END)
    assert torch.equal(exact.probe_variance, torch.zeros(2, dtype=torch.float64))
    assert exact.exact() is exact.log_prob
    with pytest.raises(ValueError, match="cannot be exponentiated"):
        four.exact()


@pytest.mark.parametrize("divergence", [None, HutchinsonDivergence("gaussian", 2)])
def test_the_tolerance_table_converges(divergence):
    """To the same probes' own limit; the exact one's is known."""
    sde = VPSDE()
    oracle = GaussianOracle(sde, torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0]))
    z = oracle.sample(16, T_END, torch.Generator().manual_seed(0))
    options = {"divergence": divergence, "t_end": T_END}
    rows = tolerance_convergence(sde, oracle.eps, z, (1e-6, 1e-2, 1e-4), **options)
    assert [row.tolerance for row in rows] == [1e-2, 1e-4, 1e-6]
    assert rows[0].error > 4 * rows[1].error > 0 and rows[2].error == 0
    assert rows[0].nfe < rows[1].nfe < rows[2].nfe
    if divergence is None:
        truth = oracle.ode_log_prob(z, T_END).mean().item()
        assert rows[2].log_prob == pytest.approx(truth, abs=1e-4)
        found = ode_log_density(sde, oracle.eps, z, rtol=1e-2, atol=1e-2, t_end=T_END)
        limit = ode_log_density(sde, oracle.eps, z, rtol=1e-6, atol=1e-6, t_end=T_END)
        difference = (found.log_prob - limit.log_prob).square().mean().sqrt().item()
        assert rows[0].error == pytest.approx(difference)


def test_a_fixed_probe_makes_the_solve_a_function_and_cheaper():
    sde = VPSDE()
    oracle = MixtureOracle.ring(sde)
    z = oracle.sample(16, T_END, torch.Generator().manual_seed(0))

    def solve(published, seed=3, method="rk45"):
        return ode_log_density(
            sde,
            oracle.eps,
            z.float(),
            divergence=HutchinsonDivergence("gaussian"),
            t_end=T_END,
            rtol=1e-3,
            atol=1e-3,
            rng=torch.Generator().manual_seed(seed),
            method=method,
            published=published,
        )

    fixed = solve(False)
    assert torch.equal(fixed.log_prob, solve(False).log_prob)
    assert fixed.log_prob.dtype == torch.float64
    torch.testing.assert_close(
        solve(False, method="dopri5").log_prob, fixed.log_prob, atol=0.05, rtol=0
    )
    redrawn = solve(True)
    assert redrawn.nfe > fixed.nfe
    assert redrawn.log_prob.isfinite().all()


def test_the_network_gets_its_own_dtype_and_calls_are_counted():
    sde, calls = VPSDE(), []

    def eps(x, t):
        calls.append((x.dtype, t.dtype, t.shape))
        return sde.normal_component(x, t)

    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    density = ode_log_density(sde, eps, z)
    assert set(calls) == {(torch.float32, torch.float32, (3,))}
    assert density.nfe == len(calls)
    torch.testing.assert_close(density.log_prob, sde.prior_log_prob(z.double()), atol=1e-4, rtol=0)


def test_bad_arguments_are_refused():
    sde, z = VPSDE(), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="t_end=0"):
        ode_log_density(sde, sde.normal_component, z, t_end=0.0)
    with pytest.raises(ValueError, match="unknown method 'euler'.*rk45"):
        ode_log_density(sde, sde.normal_component, z, method="euler")
    with pytest.raises(ValueError, match="tolerances"):
        ode_log_density(sde, sde.normal_component, z, rtol=0.0)
