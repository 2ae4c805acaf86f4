"""The published predictor-corrector samplers to the letter: their formulas by hand, and what they
refuse. (tests/parity compares them with the published code itself.)
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianOracle

from lsgm.discrete_noise import BetaTable
from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, SubVPSDE
from lsgm.solvers import make_grid, make_solver
from lsgm.solvers.discrete import table_at

VE, VP, SUB = VESDE(1e-4, 2500.0, 1e-5), VPSDE(time_eps=1e-5), SubVPSDE(time_eps=1e-5)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def run(sde, n, t_end, eps=None, seed=1, **options):
    eps = eps or GaussianOracle(sde, torch.tensor([0.3, -1.0]), torch.tensor(0.2)).eps
    x = torch.randn(3, 2, generator=rng(), dtype=torch.float64) * math.sqrt(sde.prior_var)
    times = make_grid("time", sde, n - 1, t_end)
    solver = make_solver("discrete_pc", **options)
    return solver, x, solver.solve(sde, eps, x, times, rng(seed))


def test_reverse_diffusion_by_hand():
    """VE, corrector first: algorithm 2 with both at every time, and the last mean as the result."""
    n, snr, end = 5, 0.16, 1e-5
    eps = GaussianOracle(VE, torch.tensor([0.3, -1.0]), torch.tensor(0.2)).eps
    options = {"predictor": "reverse_diffusion", "corrector_steps": 1, "snr": snr, "denoise": True}
    solver, x, solution = run(VE, n, end, **options)
    noise = rng(1)
    sigmas = torch.linspace(math.log(0.01), math.log(50.0), n, dtype=torch.float64).exp()
    times = torch.linspace(1, end, n)
    for t in times:
        index = int(t * (n - 1))
        s = float(VE.var(t.double()).sqrt())

        def score(x, t=t, s=s):
            return -eps(x, t.expand(len(x)).double()) / s

        z = torch.randn(3, 2, generator=noise, dtype=torch.float64)
        g = score(x)
        step = 2 * (snr * z.norm(dim=1).mean() / g.norm(dim=1).mean()) ** 2
        x = x + step * g + (2 * step).sqrt() * z
        gap = sigmas[index] ** 2 - (sigmas[index - 1] ** 2 if index else 0.0)
        mean = x + gap * score(x)
        if t != times[-1]:
            x = mean + gap.sqrt() * torch.randn(3, 2, generator=noise, dtype=torch.float64)
    torch.testing.assert_close(solution.x, mean, rtol=1e-6, atol=1e-9)
    assert solution.nfe == 2 * n == solver.evaluations(n - 1)


@pytest.mark.parametrize(("sde", "end", "n"), [(VE, 1e-5, 12), (VE, 1e-5, 2000), (VP, 1e-3, 1000)])
def test_every_time_has_a_level_of_its_own(sde, end, n):
    grid = table_at(sde, torch.linspace(1, end, n), n, False)
    assert grid.index == list(range(n - 1, -1, -1))


def test_scores_of_a_discrete_model_are_those_of_its_table():
    times = torch.linspace(1, 1e-3, 1000)
    table = BetaTable.of(VP, 1000)
    own = table_at(VP, times, 1000, True)
    abar = table.alphas_cumprod[torch.tensor(own.index)]
    assert own.score_std == pytest.approx((1 - abar).sqrt().tolist(), rel=1e-12)
    limit = table_at(VP, times, 1000, False).score_std
    assert limit[0] == pytest.approx(own.score_std[0], rel=1e-3)
    assert limit[-1] != pytest.approx(own.score_std[-1], rel=1e-2)


@pytest.mark.parametrize(
    ("sde", "predictor", "t_end"),
    [(VE, "ancestral", 1e-5), (VP, "ancestral", 1e-3), (SUB, "euler_maruyama", 1e-3)],
)
def test_samples_have_the_moments_of_the_data(sde, predictor, t_end):
    """Gaussian data, many samples."""
    mean, variance = torch.tensor([0.3, -1.0]), torch.tensor(0.2)
    eps = GaussianOracle(sde, mean, variance).eps
    x = torch.randn(20_000, 2, generator=rng(), dtype=torch.float64) * math.sqrt(sde.prior_var)
    solver = make_solver("discrete_pc", predictor=predictor, denoise=True)
    times = make_grid("time", sde, 399, t_end)
    found = solver.solve(sde, eps, x, times, rng(1)).x
    assert (found.mean(0) - mean).abs().max() < 0.03
    assert (found.var(0) / variance - 1).abs().max() < 0.06


def test_the_corrector_alone():
    solver, x, solution = run(VE, 4, 1e-5, predictor=None, corrector_steps=2, denoise=True)
    assert solution.nfe == 8 == solver.evaluations(3) and not torch.equal(solution.x, x)


def test_probability_flow_draws_nothing():
    options = {"predictor": "reverse_diffusion", "probability_flow": True}
    first, second = (run(VE, 30, 1e-5, seed=seed, **options)[2].x for seed in (1, 2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("sde", "options", "n", "message"),
    [
        (VP, {"predictor": "ancestral"}, 20, "more than beta_end = 20 times"),
        (VP, {"corrector_steps": 1}, 15, "more than beta_end = 20 times"),
        (SUB, {"corrector_steps": 1}, 30, "no table of levels"),
        (SUB, {"predictor": "ancestral"}, 30, "no table of levels"),
        (GeometricVPSDE(), {}, 30, "no published sampler"),
    ],
)
def test_refuses_what_is_not_published(sde, options, n, message):
    with pytest.raises(ValueError, match=message):
        run(sde, n, 1e-3, **options)


def test_refuses_uneven_times_and_other_levels():
    solver = make_solver("discrete_pc", levels=100, denoise=True)
    with pytest.raises(ValueError, match="equal steps"):
        solver.check(VP, make_grid("sqrt_time", VP, 9, 1e-3))
    assert solver.steps_for(100) == 99
    with pytest.raises(ValueError, match="100 noise levels, which take 100 evaluations, not 10"):
        solver.steps_for(10)
    with pytest.raises(ValueError, match="unknown predictor 'ancestral_large'"):
        make_solver("discrete_pc", predictor="ancestral_large")
