"""How samplers end: the posterior mean at time zero, times without noise, values that are not
finite.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import GaussianOracle

from lsgm.config.architecture import PriorNetworkConfig
from lsgm.config.command_line import load_config
from lsgm.config.training import NCSNTrainConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import NonFiniteError, UserError
from lsgm.models.images import build_data_model
from lsgm.sde import VESDE, VPSDE, GeometricVPSDE
from lsgm.solvers import SOLVERS, Hook, make_grid, make_solver

CONFIGS = Path(__file__).parent.parent / "configs" / "cifar10"
ADAPTIVE = ("dopri5", "rk45")
OPTIONS = {"langevin": {"steps_per_level": 3}}
SDES = {
    "geometric": GeometricVPSDE(1e-4, 0.99, sigma2_0=1e-4),
    "ve": VESDE(4e-4, 1e4, 1e-5),
}
GRID = {"discrete_pc": "time"}  # it takes no other
every_solver = pytest.mark.parametrize("name", sorted(SOLVERS))
continuous = pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"ddpm", "discrete_pc"}))


def make(name, **options):
    return make_solver(name, **OPTIONS.get(name, {}), **options)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# The posterior mean


@continuous  # of the others the last step is the posterior mean in the limit of many steps
@pytest.mark.parametrize("kind", SDES)
def test_every_solver_ends_at_the_posterior_mean(name, kind):
    """Of Gaussian data, in closed form from where the same solver ends without it; one call more.
    Data at one point are found exactly.
    """
    sde, x = SDES[kind], torch.randn(3, 2, generator=rng(), dtype=torch.float64)
    x = x * math.sqrt(sde.prior_var)
    times = make_grid("log_snr", sde, 9, 0.02)
    m, var = (c(times[-1:]).item() for c in (sde.mean_coef, sde.var))
    for variance in (0.3, 0.0):
        mean = torch.tensor([0.5, -2.0], dtype=torch.float64)
        oracle = GaussianOracle(sde, mean, torch.tensor(variance))
        kept = make(name).solve(sde, oracle.eps, x, times, rng(1))
        solver = make(name, denoise=True)
        ended = solver.solve(sde, oracle.eps, x, times, rng(1))
        expected = mean + variance * m / (m * m * variance + var) * (kept.x - m * mean)
        atol = 1e-9 * max(1.0, kept.x.abs().max().item())
        torch.testing.assert_close(ended.x, expected, atol=atol, rtol=0)
        assert ended.nfe == kept.nfe + 1
        if name not in ADAPTIVE:
            assert ended.nfe == solver.evaluations(9)


@pytest.mark.parametrize("name", ["score_ve", "score_vp", "score_subvp", "ncsnv2"])
def test_the_published_samplers_leave_no_noise(name):
    """Images at one point and their exact score, the whole published sampler: grey levels (root
    mean square) from the image. Without the closing mean 2.4, 1.8, 0.04 and 2.6 remain. That of a
    published Euler step of 1/N is not the posterior's.
    """
    config = load_config(NCSNTrainConfig, CONFIGS / f"{name}.yaml")
    network = PriorNetworkConfig(
        num_channels=8, num_scales=1, num_cells_per_scale=1, embedding_dim=8,
        attention_resolutions=(),
    )  # fmt: skip
    score = replace(config.score, ncsnpp=network)
    spec = DataSpec("cifar10", 3, 8, padding=0, binary=False)
    model = build_data_model(config.kind, score, config.sampler, spec)
    image = 2 * torch.rand(model.state_shape, generator=rng()) - 1
    oracle = GaussianOracle(model.sde, image, torch.tensor(0.0))
    model.eps_fn = lambda labels=None, guidance=1.0: oracle.eps
    sampler = model.sampler()
    start = model.prior_start(2, rng(1), solver=sampler.method)
    solution = sampler.solve(model.sde, oracle.eps, start, rng(2))
    limit = {"score_vp": 0.2, "score_subvp": 0.05}.get(name, 1e-3)
    assert 127.5 * (solution.x - image).square().mean().sqrt() < limit
    assert solution.nfe == (config.sampler.nfe or 0)


def test_encoding_and_states_without_noise_are_left_as_they_are():
    sde, x = VPSDE(), torch.randn(2, 2, generator=rng(), dtype=torch.float64)
    oracle = GaussianOracle(sde, torch.zeros(2), torch.tensor(0.3))
    times = make_grid("time", sde, 6, 1e-3)
    there = [make("heun", denoise=d).solve(sde, oracle.eps, x, times.flip(0)) for d in (0, 1)]
    assert torch.equal(there[0].x, there[1].x) and there[0].nfe == there[1].nfe
    ends = [
        make("ddim", denoise=d).solve(sde, oracle.eps, x, make_grid("time", sde, 6, 0.0))
        for d in (0, 1)
    ]
    assert torch.equal(ends[0].x, ends[1].x) and ends[0].nfe == ends[1].nfe == 6


def test_known_parts_hold_through_the_closing_mean():
    class Fix(Hook):
        def project(self, x_t, t, rng):
            return torch.where(torch.tensor([False, True]), 3.0 + t[:, None], x_t)

    sde = VPSDE()
    oracle = GaussianOracle(sde, torch.zeros(2), torch.tensor(0.3))
    x = torch.randn(2, 2, generator=rng(), dtype=torch.float64)
    times = make_grid("time", sde, 6, 1e-3)
    solution = make("predictor_corrector", denoise=True).solve(
        sde, oracle.eps, x, times, rng(), [Fix()]
    )
    assert (solution.x[:, 1] == 3.0).all()  # that of time zero


# The published predictor-corrector


def published_loop(sde, score, x, times, snr, noises):
    """Corrector, then predictor, at every time from t = 1 on; the mean of the last is returned
    (the loop of arXiv 2011.13456's code, for a variance-exploding SDE).
    """
    noises = iter(noises)
    sigmas = [*sde.var(times).sqrt().tolist(), 0.0]
    for t, sigma, below in zip(times.tolist(), sigmas, sigmas[1:], strict=False):
        z, s = next(noises), score(x, t)
        norm = [v.flatten(1).norm(dim=1).mean() for v in (z, s)]
        step = 2 * (snr * norm[0] / norm[1]) ** 2
        x = x + step * s + (2 * step).sqrt() * z
        mean = x + (sigma**2 - below**2) * score(x, t)
        x = mean + math.sqrt(sigma**2 - below**2) * next(noises)
    return mean


def test_the_predictor_corrector_is_the_published_loop(monkeypatch):
    sde, n = SDES["ve"], 12
    times = make_grid("time", sde, n - 1, 1e-5)
    oracle = GaussianOracle(sde, torch.zeros(2, 3), torch.tensor(0.2))
    noises = [torch.randn(4, 2, 3, generator=rng(k), dtype=torch.float64) for k in range(2 * n + 1)]
    start, drawn = 100 * noises[0], list(noises[1:])
    monkeypatch.setattr("lsgm.solvers.base.randn", lambda *_, **__: drawn.pop(0))
    solver = make("predictor_corrector", norm="batch", snr=0.2, denoise=True)
    solution = solver.solve(sde, oracle.eps, start, times)

    def score(x, t):
        t = torch.full((len(x),), t, dtype=torch.float64)
        return -oracle.eps(x, t) / sde.var(t).sqrt()[:, None, None]

    expected = published_loop(sde, score, start, times, 0.2, noises[1:])
    torch.testing.assert_close(solution.x, expected, atol=1e-9, rtol=1e-9)
    assert solution.nfe == 2 * n


def test_corrections_come_first_and_at_every_time():
    sde, called = VPSDE(), []

    def eps(x, t):
        called.append(t[0].item())
        return sde.normal_component(x, t)

    times = make_grid("time", sde, 3, 0.1)
    make("predictor_corrector", corrector_steps=2, denoise=True).solve(
        sde, eps, torch.ones(2, 4, dtype=torch.float64), times, rng()
    )
    assert called == [t for t in times.tolist() for _ in range(3)]


# Times without noise, and what is not finite


@every_solver
def test_a_solver_reaches_time_zero_or_refuses_before_any_call(name):
    sde, calls = VPSDE(), []
    oracle = GaussianOracle(sde, torch.zeros(2), torch.tensor(0.3))

    def eps(x, t):
        calls.append(t)
        return oracle.eps(x, t) / (t > 0)[:, None]  # as a network conditioned on ln sigma

    x = torch.randn(3, 2, generator=rng(), dtype=torch.float64)
    times = make_grid("time", sde, 5, 0.0)
    solver = make(name)
    if solver.needs_noise_at_end:
        with pytest.raises(ValueError, match="var > 0 at all times, and t = 0 has no noise"):
            solver.solve(sde, eps, x, times, rng())
        assert not calls
    else:
        assert solver.solve(sde, eps, x, times, rng()).x.isfinite().all()


def test_which_solvers_reach_time_zero():
    """Those that take the network at the start of their steps alone."""
    assert {name for name in SOLVERS if not make(name).needs_noise_at_end} == {
        "ancestral", "ddim", "ddpm", "deis", "edm_churn", "euler", "euler_maruyama", "heun",
        "normal_reference", "normal_reference_pc", "reverse_diffusion",
    }  # fmt: skip
    with pytest.raises(ValueError, match="no noise"):  # encoding starts there
        make("euler").check(VPSDE(), torch.tensor([0.0, 1.0]))


@every_solver
def test_samples_that_are_not_finite_are_an_error_that_counts_them(name):
    sde = VPSDE()

    def eps(x, t):
        return sde.normal_component(x, t) + torch.tensor([[0.0], [math.nan], [0.0]])

    x = torch.randn(3, 2, generator=rng(), dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"1 of 3 samples \(33%\) are not finite"):
        make(name).solve(sde, eps, x, make_grid(GRID.get(name, "sqrt_time"), sde, 6, 1e-3), rng())


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_solvers_stop(name):
    """At their bound, where the error control follows the network's rounding; and at once for a
    tolerance below its precision.
    """
    sde, calls = VPSDE(), []
    oracle = GaussianOracle(sde, torch.zeros(2), torch.tensor(0.3))

    def eps(x, t):
        calls.append(t)
        return oracle.eps(x, t) + 1e-3 * torch.randn(x.shape, generator=rng(len(calls)))

    x = torch.randn(3, 2, generator=rng())
    times = torch.tensor([1.0, 1e-3])
    solver = make(name, rtol=1e-6, atol=1e-6, max_nfe=200)
    with pytest.raises(UserError, match="after 200 evaluations: the tolerance 1e-06 is too small"):
        solver.solve(sde, eps, x, times)
    assert len(calls) == 200
    with pytest.raises(UserError, match=r"1e-09 is below the network's own precision \(.*float32"):
        make(name, rtol=1e-9, atol=1e-9).solve(sde, eps, x, times)
    assert len(calls) == 200
