"""The Normal-reference integrator: exactness, its weights, alpha per channel, and how few steps it
needs.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianOracle, MixtureOracle
from scipy.integrate import quad
from sde_cases import all_sdes

from lsgm.sde import VESDE, VPSDE
from lsgm.solvers import NormalReference, make_grid, make_solver
from lsgm.solvers.normal_reference import EXTRAPOLATION_VARIABLES, step_weights


def scalar(function, u):
    return function(torch.tensor([u], dtype=torch.float64)).item()


@all_sdes
@pytest.mark.parametrize("order", [1, 3])
def test_alpha_zero_is_exact_on_the_reference_for_any_step(sde, order):
    """Smoothed data N(0, I): z_t = sqrt(total_var) times what it was, whatever the step."""
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = make_grid("sqrt_time", sde, 3, 1e-3)
    solution = NormalReference(order=order, alpha=0.0).solve(sde, sde.normal_component, x, times)
    ratio = scalar(sde.total_var, 1e-3) / scalar(sde.total_var, 1.0)
    torch.testing.assert_close(solution.x, ratio**0.5 * x, atol=1e-10, rtol=1e-10)


def test_small_alpha_moves_the_reference_in_proportion():
    sde, x = VPSDE(), torch.ones(1, 2, dtype=torch.float64)
    times = make_grid("phi", sde, 3, 1e-3)
    moved = [
        (NormalReference(order=1, alpha=a).solve(sde, sde.normal_component, x, times).x - x)
        .abs()
        .max()
        for a in (1e-2, 1e-4, 1e-6)
    ]
    assert moved[0] < 5e-3
    assert moved[1] / moved[0] == pytest.approx(1e-2, rel=0.05)
    assert moved[2] / moved[1] == pytest.approx(1e-2, rel=0.05)


@all_sdes
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_weights_against_adaptive_quadrature(sde, alpha):
    """The propagator against the integral that defines it, the weights against scipy."""
    t, s, nodes = 0.6, 0.35, [0.6, 0.8, 0.95]
    weights = step_weights(sde, t, s, nodes, torch.tensor([alpha], dtype=torch.float64))
    x_of = lambda u: scalar(lambda v: EXTRAPOLATION_VARIABLES["phi"](sde, v), u)  # noqa: E731

    def rate(u):
        return scalar(sde.f, u) + 0.5 * (1 - alpha) * scalar(sde.g2, u) / scalar(sde.total_var, u)

    def propagator(u):
        return math.exp(quad(rate, u, s, epsabs=1e-13, epsrel=1e-13)[0])

    assert weights.propagator.item() == pytest.approx(propagator(t), rel=1e-10)
    for j, node in enumerate(nodes):

        def integrand(u, j=j, node=node):
            basis = 1.0
            for k, other in enumerate(nodes):
                if k != j:
                    basis *= (x_of(u) - x_of(other)) / (x_of(node) - x_of(other))
            return propagator(u) * scalar(sde.g2, u) / (2 * scalar(sde.var, u) ** 0.5) * basis

        expected = quad(integrand, t, s, epsabs=1e-9, epsrel=1e-9)[0]
        assert weights.residual[j, 0].item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_vp_propagator_is_a_power_of_the_mean_coefficient():
    sde, alpha = VPSDE(), torch.tensor([0.02, 0.7], dtype=torch.float64)
    weights = step_weights(sde, 0.9, 0.2, [0.9], alpha)
    ratio = scalar(sde.mean_coef, 0.2) / scalar(sde.mean_coef, 0.9)
    torch.testing.assert_close(weights.propagator, ratio**alpha)


def test_deis_is_alpha_one_and_of_first_order_ddim():
    oracle = MixtureOracle.ring(VPSDE())
    x = oracle.sample(16, 1.0, torch.Generator().manual_seed(0))
    times = make_grid("sqrt_time", oracle.sde, 5, 1e-3)

    def run(name, **options):
        return make_solver(name, **options).solve(oracle.sde, oracle.eps, x, times).x

    torch.testing.assert_close(run("deis", order=1), run("ddim"), atol=1e-11, rtol=0)
    deis = run("normal_reference", order=3, alpha=1.0)
    assert torch.equal(run("deis"), deis)
    # ... whose weights are those of exponential Adams-Bashforth on dy/dsigma_hat = eps, y = z / m.
    weights = step_weights(oracle.sde, 0.5, 0.3, [0.5], torch.ones(1, dtype=torch.float64))
    m, sigma = (
        torch.tensor([scalar(f, 0.5), scalar(f, 0.3)]).double()
        for f in (oracle.sde.mean_coef, lambda u: oracle.sde.var(u).sqrt())
    )
    expected = sigma[1] - m[1] / m[0] * sigma[0]
    assert weights.residual.item() == pytest.approx(expected.item(), rel=1e-6)


def test_alpha_per_channel_treats_each_channel_alone():
    """Channels of an independent Gaussian do not see each other, so each must move as with its own
    scalar alpha.
    """
    sde = VPSDE()
    variance = torch.tensor([0.2, 1.0, 3.0])[:, None, None].expand(3, 2, 2)
    oracle = GaussianOracle(sde, torch.zeros(3, 2, 2), variance)
    x = oracle.sample(4, 1.0, torch.Generator().manual_seed(0))
    times = make_grid("sqrt_time", sde, 6, 1e-3)
    alphas = torch.tensor([0.02, 0.5, 1.0]).reshape(1, 3, 1, 1)
    mixed = (
        NormalReference(order=3, alpha=alphas, corrector=True).solve(sde, oracle.eps, x, times).x
    )
    for c, alpha in enumerate(alphas.flatten().tolist()):
        alone = NormalReference(order=3, alpha=alpha, corrector=True)
        expected = alone.solve(sde, oracle.eps, x, times).x[:, c]
        torch.testing.assert_close(mixed[:, c], expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="2 values of alpha for 3 channels"):
        NormalReference(alpha=(0.1, 0.2)).solve(sde, oracle.eps, x, times)


@pytest.mark.parametrize("variable", sorted(EXTRAPOLATION_VARIABLES))
def test_every_extrapolation_variable_converges(variable):
    sde = VESDE(sigma2_min=1e-2, sigma2_max=50.0)
    oracle = GaussianOracle(sde, torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0]))
    x = oracle.sample(4, 1.0, torch.Generator().manual_seed(0))
    solver = NormalReference(order=3, variable=variable)
    solution = solver.solve(sde, oracle.eps, x, make_grid("log_snr", sde, 100, 0.05))
    torch.testing.assert_close(solution.x, oracle.flow(x, 1.0, 0.05), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("nfe", "options", "bound"),
    [
        (3, {"order": 2}, 0.065),
        (5, {"order": 2}, 0.040),
        (10, {"order": 2}, 0.012),
        (20, {"order": 2}, 0.0035),
        (5, {"order": 3, "corrector": True}, 0.015),
        (10, {"order": 3, "corrector": True}, 0.006),
    ],
)
def test_few_steps_on_a_mixture(nfe, options, bound):
    """RMS distance to the exact flow of an 8-component mixture, a third or less of DEIS's and
    DDIM's at the same NFE.
    """
    sde = VPSDE()
    oracle = MixtureOracle.ring(sde)
    x = torch.randn(256, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = make_solver("dopri5", rtol=1e-8, atol=1e-8).solve(
        sde, oracle.eps, x, torch.tensor([1.0, 1e-3])
    )

    def error(solver):
        solution = solver.solve(sde, oracle.eps, x, make_grid("sqrt_time", sde, nfe, 1e-3))
        assert solution.nfe == nfe
        return (solution.x - exact.x).square().sum(1).mean().sqrt().item()

    ours = error(NormalReference(alpha=0.02, **options))
    assert ours < bound
    assert ours < 0.4 * error(make_solver("deis", order=2))
    assert ours < 0.2 * error(make_solver("ddim"))


@pytest.mark.parametrize(
    ("nfe", "bound"), [(3, 0.05), (4, 0.04), (5, 0.014), (8, 0.004), (10, 0.0026), (20, 0.0005)]
)
def test_default_on_a_mixture(nfe, bound):
    """The preset that sampling uses; without the lower order at the end, 8 steps and more have half
    as much error again.
    """
    sde = VPSDE()
    oracle = MixtureOracle.ring(sde)
    x = torch.randn(256, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = make_solver("dopri5", rtol=1e-8, atol=1e-8).solve(
        sde, oracle.eps, x, torch.tensor([1.0, 1e-3])
    )

    def error(**options):
        solver = make_solver("normal_reference_pc", **options)
        solution = solver.solve(sde, oracle.eps, x, make_grid("sqrt_time", sde, nfe, 1e-3))
        assert solution.nfe == nfe
        return (solution.x - exact.x).square().sum(1).mean().sqrt().item()

    assert error() < bound
    if nfe >= 8:
        assert error(lower_order_final=False) > 1.5 * error()
    if nfe == 3:  # too few for a corrector
        assert error(corrector_from=1) > 2 * error()


@pytest.mark.parametrize("steps", [3, 4])
def test_corrector_begins_at_the_steps_asked_for(steps):
    oracle = MixtureOracle.ring(VPSDE())
    x = oracle.sample(8, 1.0, torch.Generator().manual_seed(0))
    times = make_grid("sqrt_time", oracle.sde, steps, 1e-3)

    def run(**options):
        return NormalReference(order=3, **options).solve(oracle.sde, oracle.eps, x, times).x

    late = run(corrector=True, lower_order_final=True, corrector_from=4)
    corrected = run(corrector=True, lower_order_final=True)
    assert torch.equal(late, corrected if steps >= 4 else run())
    assert not torch.equal(corrected, run())


@pytest.mark.parametrize("alpha", [0.3, (0.3, 0.0)])
def test_network_output_and_start_are_left_alone(alpha):
    """The steps add in place; what they add to is their own."""
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given, before, eps = x.clone(), x.clone(), torch.ones_like(x)
    solver = NormalReference(order=3, alpha=alpha, corrector=True, keep_trajectory=True)
    times = make_grid("sqrt_time", VPSDE(), 5, 1e-3)
    solution = solver.solve(VPSDE(), lambda x, t: eps, given, times)
    assert torch.equal(eps, torch.ones_like(x))
    assert torch.equal(given, before)
    assert torch.equal(solution.trajectory[0], before)
    assert len({tuple(state.flatten().tolist()) for state in solution.trajectory}) == 6


@pytest.mark.parametrize(
    "options",
    [
        {"order": 0},
        {"order": 5},
        {"alpha": 1.5},
        {"variable": "x"},
        {"corrector_from": 0},
        {"order": 1, "corrector": True},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options)) if len(options) == 1 else "order"):
        NormalReference(**options)
