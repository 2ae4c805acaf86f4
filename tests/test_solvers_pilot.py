"""Grids and options fitted to pilot trajectories: they pay on new noise, and cost what they say."""

from __future__ import annotations

import pytest
import torch
from oracles import GaussianOracle, MixtureOracle

from lsgm.sde import VPSDE
from lsgm.solvers import (
    NormalReference,
    Pilot,
    choose_pilot,
    fit_pilot,
    make_grid,
    make_solver,
)

T_END = 1e-3
SDE = VPSDE()
ORACLE = MixtureOracle.ring(SDE)


def noise(num, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 2, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def pilot():
    return Pilot(SDE, ORACLE.eps, noise(32, 0), T_END)


@pytest.fixture(scope="module")
def new_noise():
    start = noise(256, 1)
    exact = make_solver("dopri5", rtol=1e-8, atol=1e-8)
    return start, exact.solve(SDE, ORACLE.eps, start, torch.tensor([1.0, T_END])).x


def rms(new_noise, solver, times):
    start, exact = new_noise
    return (solver.solve(SDE, ORACLE.eps, start, times).x - exact).square().sum(1).mean().sqrt()


@pytest.mark.parametrize(
    ("name", "nfe", "factor"),
    [
        ("normal_reference_pc", 3, 0.7),
        ("normal_reference_pc", 5, 0.6),
        ("normal_reference_pc", 8, 0.5),
    ],
)
def test_pilot_choice_beats_the_default_on_new_noise(pilot, new_noise, name, nfe, factor):
    solver = make_solver(name)
    fit = fit_pilot(pilot, solver, nfe)
    default = make_grid(solver.default_grid, SDE, solver.steps_for(nfe), T_END)
    assert fit.start_error == pytest.approx(pilot.error(solver, default), rel=1e-12)
    assert fit.error == pytest.approx(pilot.error(fit.solver, fit.times), rel=1e-9)
    new = rms(new_noise, fit.solver, fit.times)
    assert new < factor * rms(new_noise, solver, default)
    # Up to ten numbers from 64 equations.
    assert new < 4 * fit.error
    assert fit.solver.evaluations(len(fit.times) - 1) <= nfe


@pytest.mark.parametrize(
    ("name", "nfe"), [("ddim", 5), ("dpmpp_2m", 6), ("deis", 5), ("heun", 8), ("unipc", 20)]
)
def test_fitted_grid_of_any_deterministic_solver(new_noise, name, nfe):
    """The best of the named grids that it starts from is beaten on new noise."""
    solver = make_solver(name)
    pilot = Pilot(SDE, ORACLE.eps, noise(32, 0), T_END)
    times = fit_pilot(pilot, solver, nfe, fit_options=False).times
    assert times[0] == 1
    assert times[-1] == T_END
    assert (times.diff() < 0).all()
    named = [
        rms(new_noise, solver, make_grid(grid, SDE, len(times) - 1, T_END))
        for grid in {solver.default_grid, "sqrt_time", "phi", "time"}
    ]
    assert rms(new_noise, solver, times) < min(named)


def test_network_calls_are_counted():
    calls = []

    def eps(x, t):
        calls.append(len(x))
        return ORACLE.eps(x, t)

    pilot = Pilot(SDE, eps, noise(8, 0), T_END)
    reference = pilot.nfe
    fit = fit_pilot(pilot, make_solver("normal_reference"), 3)
    assert set(calls) == {8}
    assert len(calls) == pilot.nfe == reference + fit.nfe
    # The bound of the docstring: a scan of 4 x 6 + 9 solves and two refinements of 8 iterations.
    assert fit.nfe <= 3 * (24 + 9 + 2 * 8 * (3 + 2))


def test_reference_is_the_exact_flow():
    oracle = GaussianOracle(SDE, torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0]))
    start = noise(8, 0)
    pilot = Pilot(SDE, oracle.eps, start, T_END)
    expected = oracle.flow(start, 1.0, T_END)
    torch.testing.assert_close(pilot.reference, expected, atol=1e-5, rtol=0)
    single = Pilot(SDE, oracle.eps, start.float(), T_END)
    torch.testing.assert_close(single.reference, expected, atol=1e-3, rtol=0)


def test_alpha_of_the_pilots_in_closed_form():
    """A Normal channel has alpha 0, one whose noise prediction vanishes 1, and half the Normal's
    prediction gives 1/2; per channel, over batch and pixels.
    """
    share = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64).reshape(1, 3, 1, 1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=generator)
    pilot = Pilot(SDE, lambda x, t: share * SDE.normal_component(x, t), start, T_END)
    expected = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(pilot.alpha, expected, atol=1e-12, rtol=0)


def test_choose_pilot_repeats_itself(new_noise):
    """A solver and plain times, the same from the same pilots."""
    given = make_solver("normal_reference", order=2)
    found = [choose_pilot(SDE, ORACLE.eps, noise(16, 0), 3, T_END, given) for _ in range(2)]
    assert isinstance(found[0][0], NormalReference)
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert rms(new_noise, *found[0]) < 0.05


def test_what_pilots_cannot_fit_is_said(pilot):
    with pytest.raises(ValueError, match="stochastic"):
        fit_pilot(pilot, make_solver("sde_dpmpp_2m"), 5)
    with pytest.raises(ValueError, match="adaptive"):
        fit_pilot(pilot, make_solver("dopri5"), 5)
    with pytest.raises(ValueError, match="at least 2 network calls"):
        fit_pilot(pilot, make_solver("heun"), 1)
    with pytest.raises(ValueError, match="at least one starting point"):
        Pilot(SDE, ORACLE.eps, noise(0, 0), T_END)
