"""What every solver promises: counted calls, precision, hooks, callbacks, shapes, errors; and the
time grids.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianOracle, MixtureOracle
from sde_cases import all_sdes

from lsgm.sde import VESDE, VPSDE
from lsgm.solvers import GRIDS, SOLVERS, Hook, make_grid, make_solver, times_of_noise_levels
from lsgm.solvers.grids import noise_level

ADAPTIVE = ("dopri5", "rk45")
OPTIONS = {"langevin": {"steps_per_level": 3, "denoise": True}, "ddim": {"eta": 0.3}}
GRID = {"discrete_pc": "time"}  # it takes no other
every_solver = pytest.mark.parametrize("name", sorted(SOLVERS))
SDE = VPSDE()


def run(name, x, eps_fn=None, n=5, seed=0, hooks=(), callback=None, **options):
    oracle = MixtureOracle.ring(SDE, tuple(x.shape[1:]))
    solver = make_solver(name, **OPTIONS.get(name, {}), **options)
    times = make_grid(GRID.get(name, "sqrt_time"), SDE, n, 1e-3)
    rng = torch.Generator().manual_seed(seed)
    return solver, solver.solve(SDE, eps_fn or oracle.eps, x, times, rng, hooks, callback)


def start(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@every_solver
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_nfe_counts_network_calls(name, n):
    oracle, calls = MixtureOracle.ring(SDE), []

    def eps(x, t):
        calls.append(t)
        return oracle.eps(x, t)

    solver, solution = run(name, start(3, 2), eps, n)
    assert solution.nfe == len(calls)
    if name in ADAPTIVE:
        assert solver.evaluations(n) is None
        with pytest.raises(ValueError, match="adaptive"):
            solver.steps_for(10)
    else:
        assert solution.nfe == solver.evaluations(n)
        assert solver.steps_for(solution.nfe) == n
        assert solver.steps_for(solution.nfe + solver.evaluations(n + 1)) > n
        with pytest.raises(ValueError, match="at least"):
            solver.steps_for(solver.evaluations(1) - 1)


@every_solver
def test_network_runs_in_its_own_precision(name):
    """float32 in, float32 calls and result; the float64 state keeps it within single precision of
    the float64 run.
    """
    oracle, x = MixtureOracle.ring(SDE), start(4, 2)
    x = x.float().double()

    def eps(x_t, t):
        assert x_t.dtype == t.dtype == torch.float32
        assert t.shape == (4,)
        return oracle.eps(x_t, t).to(torch.bfloat16 if name == "euler" else torch.float32)

    tolerances = {"rtol": 1e-6, "atol": 1e-6} if name in ADAPTIVE else {}
    _, single = run(name, x.float(), eps, n=20, keep_trajectory=True, **tolerances)
    assert single.x.dtype == torch.float32
    assert single.trajectory.dtype == torch.float64
    assert len(single.trajectory) == 21
    torch.testing.assert_close(single.trajectory[-1].float(), single.x)
    if not make_solver(name, **OPTIONS.get(name, {})).stochastic:
        _, double = run(name, x, n=20, **tolerances)
        tolerance = 5e-2 if name == "euler" else 2e-4
        torch.testing.assert_close(single.x.double(), double.x, atol=tolerance, rtol=0)
    _, low = run(name, x.float(), eps, n=20, state_dtype=torch.float32, **tolerances)
    torch.testing.assert_close(low.x, single.x, atol=1e-1 if name == "euler" else 2e-2, rtol=0)


@every_solver
def test_images_are_vectors(name):
    """(B, C, H, W) and the same numbers as (B, D) give the same samples."""
    images = start(3, 2, 2, 2)
    oracle = MixtureOracle.ring(SDE, (2, 2, 2))

    def flat_eps(x, t):
        return oracle.eps(x.reshape(-1, 2, 2, 2), t).flatten(1)

    _, from_images = run(name, images)
    _, from_vectors = run(name, images.flatten(1), flat_eps)
    torch.testing.assert_close(from_images.x.flatten(1), from_vectors.x, atol=1e-10, rtol=0)


@every_solver
def test_same_generator_state_same_samples(name):
    _, first = run(name, start(3, 2), seed=1)
    _, second = run(name, start(3, 2), seed=1)
    _, other = run(name, start(3, 2), seed=2)
    assert torch.equal(first.x, second.x)
    stochastic = make_solver(name, **OPTIONS.get(name, {})).stochastic
    assert torch.equal(first.x, other.x) != stochastic


@every_solver
def test_hooks_guide_and_project(name):
    class Guide(Hook):
        """Shift the prediction: the score of data moved by 1."""

        def adjust_eps(self, eps, x_t, t):
            return oracle.eps(x_t - SDE.mean_coef(t)[:, None], t)

    class Fix(Hook):
        """Hold the second coordinate at 3."""

        def project(self, x_t, t, rng):
            assert isinstance(rng, torch.Generator)
            assert t.shape == (400,)
            return torch.stack([x_t[:, 0], torch.full_like(t, 3.0)], 1)

    oracle, x = GaussianOracle(SDE, torch.zeros(2), torch.full((2,), 0.01)), start(400, 2)
    _, guided = run(name, x, oracle.eps, n=20, hooks=[Guide()])
    _, plain = run(name, x, oracle.eps, n=20)
    assert guided.nfe > 0
    torch.testing.assert_close(
        (guided.x - plain.x).mean(0), torch.ones(2).double(), atol=0.15, rtol=0
    )
    _, fixed = run(name, x, oracle.eps, n=20, hooks=[Fix()])
    assert (fixed.x[:, 1] == 3).all()


@every_solver
def test_callback_sees_every_step(name):
    seen = []
    _, solution = run(name, start(3, 2), callback=seen.append)
    steps = [p.step for p in seen]
    assert steps == list(range(1, len(steps) + 1))
    if name in ADAPTIVE:
        assert len(seen) == solution.nfe
        assert seen[0].total is None
    else:
        assert {p.total for p in seen} == {len(seen)}
        # the chain of ddpm has the level nearest to it
        assert seen[-1].t == pytest.approx(1e-3, rel=2e-3 if name == "ddpm" else 0)
    assert seen[-1].x.shape == (3, 2)


def test_solving_keeps_no_graph():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    _, solution = run("ddim", start(2, 2), lambda x, t: weight * x)
    assert not solution.x.requires_grad


@pytest.mark.parametrize(
    "times", [[1.0], [1.0, 1.0, 0.5], [1.0, 0.2, 0.5], [0.1, 1.0], [1.0, -0.1], [[1.0, 0.5]]]
)
def test_bad_times_are_refused(times):
    with pytest.raises(ValueError, match="times"):
        make_solver("ancestral").solve(SDE, SDE.normal_component, start(2, 2), torch.tensor(times))


def test_bad_names_and_options_are_named():
    with pytest.raises(ValueError, match="unknown solver 'dpm'.*ddim"):
        make_solver("dpm")
    with pytest.raises(ValueError, match="'ddim' has no option order.*eta"):
        make_solver("ddim", order=2)
    with pytest.raises(ValueError, match="unknown time grid 'cosine'.*karras"):
        make_grid("cosine", SDE, 5, 1e-3)
    for bad in ((0, 1e-3), (5, 1.0), (5, -0.1)):
        with pytest.raises(ValueError, match="step|t_end"):
            make_grid("phi", SDE, *bad)
    with pytest.raises(ValueError, match="noise at its end"):
        make_grid("log_snr", SDE, 5, 0.0)
    with pytest.raises(ValueError, match="var > 0"):
        make_solver("dpmpp_2m").solve(
            SDE, SDE.normal_component, start(2, 2), torch.tensor([1.0, 0.0])
        )


UNIFORM = {
    "time": lambda sde, t: t,
    "sqrt_time": lambda sde, t: t.sqrt(),
    "log_snr": lambda sde, t: sde.mean_coef(t).log() - 0.5 * sde.var(t).log(),
    "log_var": lambda sde, t: sde.var(t).log(),
    "phi": lambda sde, t: torch.atan2(sde.var(t).sqrt(), sde.mean_coef(t)),
    "karras": lambda sde, t: noise_level(sde, t) ** (1 / 7),
}


@all_sdes
@pytest.mark.parametrize("name", sorted(GRIDS))
def test_grids_are_uniform_in_what_they_say(sde, name):
    t_end = 0.02
    times = make_grid(name, sde, 12, t_end)
    assert times.dtype == torch.float64
    assert times.shape == (13,)
    assert times[0] == 1.0
    assert times[-1] == t_end
    values = UNIFORM[name](sde, times)
    expected = torch.linspace(values[0].item(), values[-1].item(), 13, dtype=torch.float64)
    torch.testing.assert_close(values, expected, rtol=1e-7, atol=1e-9)


def test_times_of_noise_levels():
    sde = VESDE(sigma2_min=1e-4, sigma2_max=1.0)
    levels = torch.logspace(0, -2, 10, dtype=torch.float64)  # the list of arXiv 1907.05600
    times = times_of_noise_levels(sde, levels)
    torch.testing.assert_close(sde.var(times).sqrt(), levels, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        times, torch.linspace(1, 0, 10, dtype=torch.float64), atol=1e-10, rtol=0
    )
    with pytest.raises(ValueError, match=r"\[0.01, 1\]"):
        times_of_noise_levels(sde, [2.0, 1.0])


def test_phi_is_the_angle_of_the_vp_sde():
    times = make_grid("phi", SDE, 4, 1e-2)
    phi = SDE.mean_coef(times).acos()
    assert phi.diff().std() < 1e-8
    assert phi[0] < math.pi / 2
