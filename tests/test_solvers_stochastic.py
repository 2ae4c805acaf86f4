"""Stochastic solvers: the law they sample, against exact moments.

On a Gaussian with zero mean every sampler here is linear in its start and its noises. Feeding it
one unit noise at a time gives the exact covariance of its output without any sampling error, and
with it the weak order.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import GaussianOracle, MixtureOracle

from lsgm.sde import VESDE, VPSDE, GeometricVPSDE
from lsgm.solvers import SOLVERS, base, make_grid, make_solver
from lsgm.solvers.base import NoiseSchedule
from vae.random import ShardedGenerator

T_END = 0.05
SDES = {
    "vp": VPSDE(),
    "geometric": GeometricVPSDE(sigma2_min=1e-4, sigma2_max=0.99, sigma2_0=1e-4),
    "ve": VESDE(sigma2_min=1e-3, sigma2_max=100.0),
}
WEAK = [
    ("reverse_diffusion", {}),
    ("euler_maruyama", {}),
    ("ancestral", {}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("sde_dpmpp_2m", {"order": 1}),
    ("sde_dpmpp_2m", {}),
    ("edm_churn", {}),
]
IDS = [f"{name}-{'-'.join(str(v) for v in options.values())}" for name, options in WEAK]


def output_variance(monkeypatch, solver, sde, data_variance, times, start_variance=None):
    """The exact variance of the solver's output for data N(0, data_variance)."""
    oracle = GaussianOracle(sde, torch.zeros(1), torch.tensor([data_variance], dtype=torch.float64))
    draws = 0

    def unit_noise(shape, rng, *, device, dtype):
        nonlocal draws
        draws += 1
        noise = torch.zeros(shape, dtype=dtype)
        noise[draws] = 1
        return noise

    monkeypatch.setattr(base, "randn", unit_noise)
    x = torch.zeros(solver.evaluations(len(times) - 1) + 2, 1, dtype=torch.float64)
    if start_variance is None:
        start_variance = oracle.marginal(times[0].item(), x[:1])[1].item()
    x[0] = math.sqrt(start_variance)
    result = solver.solve(sde, oracle.eps, x, times).x.square().sum().item()
    return result, oracle.marginal(times[-1].item(), x[:1])[1].item()


@pytest.mark.parametrize("sde", [SDES["vp"], SDES["geometric"]], ids=["vp", "geometric"])
@pytest.mark.parametrize(("name", "options"), WEAK, ids=IDS)
def test_weak_order(monkeypatch, sde, name, options):
    solver, counts, errors = make_solver(name, **options), (100, 200, 400), []
    for n in counts:
        times = make_grid("log_snr", sde, n, T_END)
        variance, exact = output_variance(monkeypatch, solver, sde, 0.3, times)
        errors.append(abs(variance / exact - 1))
    assert errors[-1] < 0.02
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - solver.order) < 0.2


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
def test_annealed_langevin_is_algorithm_1(monkeypatch, sde):
    """Its variance follows the recursion of Langevin steps on y = z / m with noise levels sigma /
    m.
    """
    times = make_grid("karras", sde, 12, T_END)
    solver = make_solver("langevin", steps_per_level=7, step_ratio=0.3)
    variance, _ = output_variance(monkeypatch, solver, sde, 0.3, times, start_variance=2.0)
    schedule = NoiseSchedule.of(sde, times)
    y = 2.0 / schedule.m[0] ** 2
    for level in schedule.sigma_hat:
        step = 0.3 * level**2
        for _ in range(7):
            y = (1 - step / (2 * (0.3 + level**2))) ** 2 * y + step
    assert variance == pytest.approx(y * schedule.m[-1] ** 2, rel=1e-10)
    assert solver.evaluations(12) == 13 * 7


def test_annealed_langevin_reaches_the_data(monkeypatch):
    """Many small steps at each level: the variance of the last marginal, from a start that is far
    off.
    """
    sde = SDES["ve"]
    solver = make_solver("langevin", steps_per_level=200, step_ratio=0.05)
    times = make_grid("log_snr", sde, 12, 0.5)
    variance, exact = output_variance(monkeypatch, solver, sde, 0.3, times, start_variance=1.0)
    assert variance == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama", "ancestral", None])
def test_corrector_repairs_a_coarse_predictor(monkeypatch, predictor):
    """Or, without a predictor, samples by itself if it is given the steps."""
    sde, errors = SDES["vp"], []
    times = make_grid("phi", sde, 30, T_END)
    for steps in (1, 20) if predictor else (20, 100):
        solver = make_solver(
            "predictor_corrector", predictor=predictor, corrector_steps=steps, norm="expected"
        )
        variance, exact = output_variance(monkeypatch, solver, sde, 0.3, times)
        errors.append(abs(variance / exact - 1))
        assert solver.order == 0
    assert errors[1] < 0.1
    assert errors[1] < 0.7 * errors[0]


SAMPLED = [
    ("sde_dpmpp_2m", {}, 60, T_END),
    ("edm_churn", {"churn": 20.0}, 60, T_END),
    ("ancestral", {}, 400, T_END),
    ("ddim", {"eta": 0.7}, 400, T_END),
    ("euler_maruyama", {}, 400, T_END),
    ("reverse_diffusion", {}, 400, T_END),
    ("predictor_corrector", {"norm": "expected", "snr": 0.05}, 300, T_END),
    ("discrete_pc", {}, 400, 1e-3),
    ("ddpm", {"clip": False, "denoise": True}, 400, 0.0),
    ("langevin", {"steps_per_level": 60, "step_ratio": 0.1}, 20, 0.25),
]


def test_no_stochastic_solver_is_forgotten():
    """Those that draw noise as they come, and those of declared weak order."""
    stochastic = {name for name in SOLVERS if make_solver(name).stochastic}
    assert stochastic <= {name for name, *_ in SAMPLED}
    assert {name for name in stochastic if make_solver(name).order > 0} <= {n for n, _ in WEAK}
    assert all(make_solver(name, **options).stochastic for name, options, *_ in SAMPLED)


@pytest.mark.parametrize(("name", "options", "steps", "t_end"), SAMPLED)
def test_samples_of_a_mixture_have_its_moments(name, options, steps, t_end):
    """Mean, covariance, mean fourth power and mean log-density of samples, within the error of
    sampling plus a small bias.
    """
    sde, num = SDES["vp"], 3000
    oracle = MixtureOracle.ring(sde)
    rng = torch.Generator().manual_seed(1)
    solver = make_solver(name, **options)
    start = sde.prior_sample((num, 2), rng, dtype=torch.float64)
    grid = "time" if name in ("ddpm", "discrete_pc") else "log_snr"  # they take no other
    x = solver.solve(sde, oracle.eps, start, make_grid(grid, sde, steps, t_end), rng).x
    exact = oracle.sample(30 * num, t_end, rng)

    def statistics(z):
        features = [
            z[:, 0],
            z[:, 1],
            z[:, 0] ** 2,
            z[:, 1] ** 2,
            z[:, 0] * z[:, 1],
            (z**2).sum(1) ** 2,
        ]
        return torch.stack([*features, oracle.log_prob(z, t_end)], 1)

    ours, theirs = statistics(x), statistics(exact)
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    difference = (ours.mean(0) - theirs.mean(0)).abs()
    assert (difference < 4 * error + 0.03 * theirs.std(0)).all(), difference / error


def test_ancestral_step_is_the_discrete_chain():
    """With the larger variance and the closing mean: DDPM's chain (arXiv 2006.11239) at times k /
    T, whose last step, from 1 / T to 0, is noiseless.
    """
    sde, total = VPSDE(), 8
    oracle = MixtureOracle.ring(sde)
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solver = make_solver(
        "predictor_corrector",
        predictor="ancestral_large",
        corrector_steps=0,
        denoise=True,
        noise_scale=0.9,
    )
    times = make_grid("time", sde, total, 0.0)[:-1]
    ours = solver.solve(sde, oracle.eps, x, times, torch.Generator().manual_seed(1))
    rng, z = torch.Generator().manual_seed(1), x
    alpha_bar = 1 - sde.var(torch.arange(total + 1, dtype=torch.float64) / total)
    for k in range(total, 0, -1):
        alpha = alpha_bar[k] / alpha_bar[k - 1]
        eps = oracle.eps(z, torch.full((5,), k / total, dtype=torch.float64))
        z = (z - (1 - alpha) / (1 - alpha_bar[k]).sqrt() * eps) / alpha.sqrt()
        if k > 1:
            z = z + 0.9 * (1 - alpha).sqrt() * torch.randn(5, 2, dtype=torch.float64, generator=rng)
    torch.testing.assert_close(ours.x, z, atol=1e-9, rtol=1e-9)
    assert ours.nfe == total


def test_ddim_with_full_noise_is_ancestral():
    oracle = MixtureOracle.ring(VPSDE())
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = make_grid("time", oracle.sde, 9, 1e-3)

    def run(name, **options):
        rng = torch.Generator().manual_seed(3)
        return make_solver(name, **options).solve(oracle.sde, oracle.eps, x, times, rng).x

    torch.testing.assert_close(run("ddim", eta=1.0), run("ancestral"), atol=1e-10, rtol=0)
    torch.testing.assert_close(run("sde_dpmpp_2m", order=1), run("ancestral"), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ancestral", {}),
        ("predictor_corrector", {}),
        ("langevin", {"steps_per_level": 2}),
        ("sde_dpmpp_2m", {}),
        ("edm_churn", {}),
    ],
)
def test_samples_do_not_depend_on_how_the_batch_is_split(name, options):
    oracle = MixtureOracle.ring(VPSDE(), (3, 2, 2))
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = make_grid("sqrt_time", oracle.sde, 6, 1e-3)
    solver = make_solver(name, **options)
    whole = solver.solve(oracle.sde, oracle.eps, x, times, torch.Generator().manual_seed(7)).x
    for rank in (0, 1):
        rng = ShardedGenerator(torch.Generator().manual_seed(7), rank, 2)
        rows = slice(2 * rank, 2 * rank + 2)
        part = solver.solve(oracle.sde, oracle.eps, x[rows], times, rng).x
        torch.testing.assert_close(part, whole[rows], atol=1e-10, rtol=0)


def test_published_corrector_norm_couples_the_batch():
    oracle = MixtureOracle.ring(VPSDE(), (3, 2, 2))
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = make_grid("time", oracle.sde, 3, 0.1)

    def run(norm, size):
        rng = torch.Generator().manual_seed(7)
        if size < 4:
            rng = ShardedGenerator(rng, 0, 2)
        solver = make_solver("predictor_corrector", norm=norm)
        return solver.solve(oracle.sde, oracle.eps, x[:size], times, rng).x[:2]

    assert torch.allclose(run("image", 4), run("image", 2))
    assert not torch.allclose(run("batch", 4), run("batch", 2))
    assert torch.allclose(run("batch", 4), run("image", 4), atol=0.3)
