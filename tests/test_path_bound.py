"""The chain of Gaussians and its importance weights, where densities are known."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianOracle, MixtureOracle
from sde_cases import CASES, all_sdes
from torch import Tensor

from lsgm.path_bound import PathPrior, path_steps
from lsgm.sde import VPSDE
from lsgm.solvers import GRIDS

MEAN = torch.tensor([0.5, -1.0, 0.0])
VARIANCE = torch.tensor([0.3, 2.0, 0.1])


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_log_prob(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def gaussian_data(num: int, seed: int) -> tuple[Tensor, Tensor]:
    noise = torch.randn(num, 3, generator=gen(seed), dtype=torch.float64)
    log_prob = normal_log_prob(noise) - 0.5 * VARIANCE.double().log().sum()
    return MEAN + VARIANCE.double().sqrt() * noise, log_prob


def mixture_data(oracle: MixtureOracle, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples of the data at t = 0, where some kernels have variance, and their log-density."""
    rng = gen(seed)
    index = torch.randint(len(oracle.means), (num,), generator=rng)
    noise = torch.randn((num, *oracle.means.shape[1:]), generator=rng, dtype=torch.float64)
    z = oracle.means[index] + oracle.std * noise
    distance = (z.flatten(1)[:, None] - oracle.means.flatten(1)).square().sum(-1)
    norm = 0.5 * z[0].numel() * math.log(2 * math.pi * oracle.std**2)
    log_prob = (-0.5 * distance / oracle.std**2 - norm).logsumexp(1) - math.log(len(oracle.means))
    return z, log_prob


def mean_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("steps", [1, 2, 7])
@all_sdes
def test_a_normal_prior_is_exact_with_any_number_of_steps(sde, steps):
    """Path by path, not only on average; what is left is that the SDE's smoothing adds variance and
    that its prior is not quite the end of the process.
    """
    z = torch.randn(200, 2, 3, 1, generator=gen(), dtype=torch.float64)
    prior = PathPrior.of(sde, sde.normal_component, steps)
    error = prior.log_weight(z, gen(1)) - normal_log_prob(z)
    end = sde.total_var(torch.ones(1, dtype=torch.float64)).item() / sde.prior_var - 1
    slack = abs(end) + 2 * sde.sigma2_0
    assert error.abs().max() < 1e-9 + 6 * slack * z[0].numel()
    assert abs(error.mean()) < 1e-9 + slack


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["vp", "geometric-s0", "subvp-s0"])
def test_weights_average_to_the_density_of_the_chain(name, steps):
    """With some noise prediction and variances, against quadrature over the chain."""
    sde = CASES[name]

    def eps(z: Tensor, t: Tensor) -> Tensor:
        shift = sde.mean_coef(t)[:, None] * torch.sin(2 * z + t[:, None])
        return sde.normal_component(z, t) + 0.3 * shift

    base = PathPrior.of(sde, eps, steps)
    variances = tuple(v * (1.5 + 0.3 * i) for i, v in enumerate(base.variances))
    prior = PathPrior(sde, eps, base.steps, variances, (1.0, 0.8, 0.9)[:steps])
    grid = torch.linspace(-8, 8, 1201, dtype=torch.float64)
    density = sde.prior_log_prob(grid[:, None]).exp()
    for step, variance, shrinkage in zip(
        prior.steps, prior.variances, prior.shrinkage, strict=True
    ):
        time = torch.full((len(grid),), step.t, dtype=torch.float64)
        normal = sde.normal_component(grid, time)
        network = eps(grid[:, None], time)[:, 0]
        mean = step.mean(grid, normal + shrinkage * (network - normal))
        kernel = (-0.5 * (grid - mean[:, None]).square() / variance).exp()
        kernel = kernel / (2 * math.pi * variance).sqrt()
        density = torch.trapezoid(kernel * density[:, None], grid, dim=0)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-3)
    points = torch.tensor([-1.2, 0.3, 1.5], dtype=torch.float64)
    index = torch.searchsorted(grid, points)
    z = grid[index].repeat_interleave(20000)[:, None]
    weights = prior.log_weight(z, gen(2)).exp().reshape(3, -1)
    error = weights.std(1) / math.sqrt(weights.shape[1])
    assert (error < 0.05 * density[index]).all()
    assert ((weights.mean(1) - density[index]).abs() < 4 * error + 1e-5).all()
    drawn = prior.sample((20000, 1), gen(3), dtype=torch.float64)[:, 0]
    below = torch.cumulative_trapezoid(density, grid)
    for i, point in zip(index, grid[index], strict=True):
        share = below[i - 1].item()
        observed = (drawn <= point).double().mean().item()
        assert abs(observed - share) < 4 * math.sqrt(share * (1 - share) / len(drawn)) + 1e-3


@all_sdes
def test_paths_follow_the_forward_chain(sde):
    """Moments of the states that the network sees: kernel at each time, Markov from each to the
    next.
    """
    seen: list[Tensor] = []

    def eps(z: Tensor, t: Tensor) -> Tensor:
        seen.append(z[:, 0].double())
        return sde.normal_component(z, t)

    num, z0 = 20000, 0.8
    prior = PathPrior.of(sde, eps, 4)
    prior.log_weight(torch.full((num, 1), z0, dtype=torch.float64), gen())
    for step, z in zip(prior.steps, seen, strict=True):
        error = math.sqrt(step.var / num)
        assert abs(z.mean().item() - step.m * z0) < 4 * error
        assert z.var().item() == pytest.approx(step.var, rel=4 * math.sqrt(2 / num))
    for step, z_t, z_s in zip(prior.steps, seen, seen[1:], strict=False):
        transition = (z_t - step.a * z_s) / math.sqrt(step.b2)
        assert abs(transition.mean().item()) < 4 / math.sqrt(num)
        assert transition.var().item() == pytest.approx(1, rel=4 * math.sqrt(2 / num))
        assert abs((transition * (z_s - step.m_next * z0)).mean().item()) < 4 * math.sqrt(
            step.var_next / num
        )


@all_sdes
def test_calibration_finds_the_variances_of_gaussian_data(sde):
    oracle = GaussianOracle(sde, MEAN, VARIANCE)
    z, _ = gaussian_data(8000, 1)
    prior = PathPrior.of(sde, oracle.eps, 4).calibrated(z, gen(), chunk=8000)
    for step, variance in zip(prior.steps, prior.variances, strict=True):
        total = step.m**2 * oracle.variance + step.var
        total_next = step.m_next**2 * oracle.variance + step.var_next
        torch.testing.assert_close(variance, step.b2 * total_next / total, rtol=0.06, atol=0)
        assert (variance >= step.posterior_var).all()


@all_sdes
def test_calibration_keeps_a_normal_prior_exact(sde):
    """The network's error equals its control variate: the few latents leave no noise but that of
    their own second moment.
    """
    z = torch.randn(64, 3, generator=gen(), dtype=torch.float64)
    z = (z - z.mean(0)) / z.std(0, correction=0)
    base = PathPrior.of(sde, sde.normal_component, 5)
    fitted = base.calibrated(z, gen(1))
    for variance, expected in zip(fitted.variances, base.variances, strict=True):
        torch.testing.assert_close(
            variance, expected.expand(3), rtol=1e-9 + 2 * sde.sigma2_0, atol=0
        )


@all_sdes
def test_gaussian_data_need_one_calibrated_step(sde):
    """Tight with any number of steps, up to the prior's mismatch at t = 1; with the variances of a
    Normal prior the gap falls with the steps.
    """
    oracle = GaussianOracle(sde, MEAN, VARIANCE)
    z, truth = gaussian_data(1000, 2)
    sample, _ = gaussian_data(8000, 3)
    gaps = []
    for steps in (1, 4, 16):
        prior = PathPrior.of(sde, oracle.eps, steps)
        fitted = prior.calibrated(sample, gen(), chunk=8000)
        gap, error = mean_error(truth - fitted.log_weight(z, gen(1)))
        assert -4 * error < gap < 0.06
        gaps.append(mean_error(truth - prior.log_weight(z, gen(1))))
    assert gaps[0][0] > gaps[1][0] > gaps[2][0] > 4 * gaps[2][1]


@pytest.mark.parametrize("name", ["vp", "geometric", "subvp", "ve"])
def test_the_bound_of_a_mixture_tightens_with_steps_and_draws(name):
    sde = CASES[name]
    oracle = MixtureOracle.ring(sde, (4, 1, 1))
    z, truth = mixture_data(oracle, 300, 0)
    sample, _ = mixture_data(oracle, 2000, 1)
    gaps = {}
    for steps in (5, 20):
        prior = PathPrior.of(sde, oracle.eps, steps).calibrated(sample, gen(), chunk=2000)
        log_w = torch.stack([prior.log_weight(z, gen(i)) for i in range(16)])
        for k in (1, 4, 16):
            groups = log_w.unflatten(0, (16 // k, k))
            bound = groups.logsumexp(1).mean(0) - math.log(k)
            gaps[steps, k] = mean_error(truth - bound)
            assert gaps[steps, k][0] > -4 * gaps[steps, k][1]
        assert gaps[steps, 1][0] > gaps[steps, 4][0] > gaps[steps, 16][0]
    # the gap of one path is of first order in the step
    assert gaps[20, 1][0] == pytest.approx(gaps[5, 1][0] / 4, rel=0.4)
    assert gaps[20, 16][0] < 0.06


def test_calibration_leaves_out_a_network_that_is_wrong_where_steps_are_long():
    """A noise prediction with a small error at every time: harmless near the data, ruinous near t =
    1, where a step of the chain multiplies it; the fitted shrinkage brings the gap back.
    """
    sde = VPSDE()
    oracle = MixtureOracle.ring(sde, (4, 1, 1))
    z, truth = mixture_data(oracle, 500, 0)
    sample, _ = mixture_data(oracle, 2000, 1)

    def eps(z: Tensor, t: Tensor) -> Tensor:
        return oracle.eps(z, t) + 0.05 * torch.sin(5 * z)

    prior = PathPrior.of(sde, eps, 10)
    fitted = prior.calibrated(sample, gen(), chunk=2000)
    only = PathPrior(sde, eps, prior.steps, fitted.variances, prior.shrinkage)
    before, after = (mean_error(truth - p.log_weight(z, gen(1))) for p in (prior, fitted))
    assert fitted.shrinkage[0] < 0.1 and min(fitted.shrinkage[3:]) > 0.9
    assert before[0] > 2 * after[0] > -4 * after[1]
    assert mean_error(truth - only.log_weight(z, gen(1)))[0] > after[0] + 4 * after[1]


def test_the_default_grid_is_the_tightest_on_a_mixture():
    oracle = MixtureOracle.ring(VPSDE(), (4, 1, 1))
    z, truth = mixture_data(oracle, 1000, 0)
    sample, _ = mixture_data(oracle, 2000, 1)

    def gap(grid: str) -> tuple[float, float]:
        prior = PathPrior.of(oracle.sde, oracle.eps, 10, grid=grid)
        fitted = prior.calibrated(sample, gen(), chunk=2000)
        return mean_error(truth - fitted.log_weight(z, gen(1)))

    gaps = {grid: gap(grid) for grid in GRIDS}
    best, error = gaps.pop("phi")
    assert all(value > best + 2 * error for value, _ in gaps.values()), gaps


def test_the_network_keeps_its_dtype_and_the_seed_decides():
    sde, calls = VPSDE(), []

    def eps(z: Tensor, t: Tensor) -> Tensor:
        calls.append((z.dtype, t.dtype, tuple(t.shape)))
        return sde.normal_component(z, t)

    prior = PathPrior.of(sde, eps, 3)
    z = torch.randn(5, 2, generator=gen())
    first = prior.log_weight(z, gen(1))
    assert set(calls) == {(torch.float32, torch.float32, (5,))} and len(calls) == 3
    assert first.dtype == torch.float64 and torch.equal(first, prior.log_weight(z, gen(1)))
    torch.testing.assert_close(first, normal_log_prob(z.double()), rtol=0, atol=1e-4)


def test_bad_chains_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        path_steps(VPSDE(), 0, "phi", 1e-2)
    with pytest.raises(ValueError, match="unknown time grid 'cosine'"):
        path_steps(VPSDE(), 4, "cosine", 1e-2)
    with pytest.raises(ValueError, match="no variance at t_end=0"):
        path_steps(VPSDE(), 4, "time", 0.0)
