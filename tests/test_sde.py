from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass

import pytest
import torch
from oracles import MixtureOracle
from sde_cases import CASES, all_sdes
from torch import Tensor

from lsgm.config.architecture import SDEConfig
from lsgm.objectives import NormalControlVariate
from lsgm.registry import PROPOSALS
from lsgm.sde import (
    SDES,
    VESDE,
    VPSDE,
    LinearSDE,
    SubVPSDE,
    largest_squared_distance,
    make_sde,
)
from lsgm.solvers import make_grid, make_solver
from lsgm.times import make_proposal
from lsgm.weighting import make_weighting


def times(n: int = 400) -> Tensor:
    return torch.cat([torch.logspace(-6, -2, 50), torch.linspace(0.01, 1, n)]).double()


def derivative(fn: object, t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    return torch.autograd.grad(fn(t).sum(), t)[0]  # type: ignore[operator]


@all_sdes
def test_kernel_solves_the_moment_equations(sde: LinearSDE) -> None:
    """m' = f m and var' = 2 f var + g2, from m(0) = 1 and var(0) = sigma2_0."""
    t = times()
    mean_rate = derivative(lambda u: sde.mean_coef(u) + 0 * u, t)
    torch.testing.assert_close(mean_rate, sde.f(t) * sde.mean_coef(t), rtol=1e-10, atol=1e-13)
    var_rate = 2 * sde.f(t) * sde.var(t) + sde.g2(t)
    scale = sde.g2(t)  # the two terms cancel where the SDE has reached equilibrium
    assert ((derivative(sde.var, t) - var_rate) / scale).abs().max() < 1e-10
    zero = torch.zeros((), dtype=torch.float64)
    assert sde.mean_coef(zero).item() == pytest.approx(1.0, abs=1e-14)
    assert sde.var(zero).item() == pytest.approx(sde.sigma2_0, abs=1e-15)


@all_sdes
def test_inverse_var_round_trip(sde: LinearSDE) -> None:
    t = times()
    if sde.sigma2_0 and isinstance(sde, SubVPSDE):
        # var falls at first, until 1 - exp(-B) = sigma2_0 / 2; of two times the later one is meant
        t = t[-torch.expm1(-sde.beta_integral(t)) >= sde.sigma2_0 / 2]
    torch.testing.assert_close(sde.inverse_var(sde.var(t)), t, rtol=1e-9, atol=1e-12)
    v = sde.var(t)
    torch.testing.assert_close(sde.var(sde.inverse_var(v)), v, rtol=1e-11, atol=0)


def test_inverse_var_at_the_start_of_a_beta_that_starts_at_zero() -> None:
    sde = VPSDE(0.0, 20.0)
    t = torch.tensor([0.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(sde.inverse_var(sde.var(t)), t)


@all_sdes
def test_complement_and_total_variance(sde: LinearSDE) -> None:
    t = times()
    torch.testing.assert_close(sde.one_minus_var(t), 1 - sde.var(t), rtol=1e-9, atol=1e-12)
    general = (1 - sde.sigma2_0) * sde.mean_coef(t).square() + sde.var(t)
    torch.testing.assert_close(sde.total_var(t), general, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["vp", "subvp", "geometric"])
def test_single_precision_keeps_its_digits(name: str) -> None:
    """The naive float32 forms lose 19% of VP's variance at t = 1e-6 and 1e-3 of ``1 - var`` at t =
    1.
    """
    sde = CASES[name]
    t = torch.cat([torch.logspace(-6, -1, 40), torch.linspace(0.9, 1, 40)])
    for fn in (sde.var, sde.one_minus_var, sde.g2):
        exact = fn(t.double())
        assert ((fn(t).double() - exact) / exact).abs().max() < 2e-5


@all_sdes
@pytest.mark.parametrize("shape", [(4,), (2, 3, 3)])
def test_perturb_has_the_kernels_moments(sde: LinearSDE, shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    n = 4000
    t = torch.full((n,), 0.4, dtype=torch.float64)
    x0 = torch.full((n, *shape), 1.5)
    eps = torch.randn(n, *shape, generator=rng)
    x_t = sde.perturb(x0, t, eps)
    assert x_t.dtype == torch.float32 and x_t.shape == x0.shape
    var = sde.var(t[:1]).item()
    count = x_t.numel()
    assert abs(x_t.mean().item() - 1.5 * sde.mean_coef(t[:1]).item()) < 4.5 * math.sqrt(var / count)
    assert abs(x_t.var().item() / var - 1) < 4.5 * math.sqrt(2 / count)


@all_sdes
def test_normal_component_is_the_best_prediction_for_normal_data(sde: LinearSDE) -> None:
    """Of all predictors of eps for N(0, (1 - sigma2_0) I) data, the regression on z_t has the least
    error.
    """
    rng = torch.Generator().manual_seed(1)
    n = 200_000
    for time in (0.02, 0.3, 0.9):
        t = torch.full((n,), time, dtype=torch.float64)
        z0 = math.sqrt(1 - sde.sigma2_0) * torch.randn(n, 1, generator=rng, dtype=torch.float64)
        eps = torch.randn(n, 1, generator=rng, dtype=torch.float64)
        z_t = sde.perturb(z0, t, eps)
        residual = eps - sde.normal_component(z_t, t)
        # orthogonality to z_t makes a linear predictor of Gaussian variables optimal
        product = residual * z_t
        assert abs(product.mean()) < 4.5 * product.std() / math.sqrt(n)
        expected = 1 - (sde.var(t[:1]) / sde.total_var(t[:1])).item()
        squares = residual.square()
        assert abs(squares.mean() - expected) < 4.5 * squares.std() / math.sqrt(n)


def test_normal_component_takes_a_scalar_time() -> None:
    x = torch.randn(3, 2, 4, 4)
    one = VPSDE().normal_component(x, torch.tensor(0.3))
    torch.testing.assert_close(one, VPSDE().normal_component(x, torch.full((3,), 0.3)))
    with pytest.raises(ValueError, match="coefficients for a batch"):
        VPSDE().normal_component(x, torch.rand(2))


@all_sdes
def test_prior(sde: LinearSDE) -> None:
    rng = torch.Generator().manual_seed(2)
    x = sde.prior_sample((2000, 3, 2), rng, dtype=torch.float64)
    assert abs(x.var().item() / sde.prior_var - 1) < 4.5 * math.sqrt(2 / x.numel())
    normal = torch.distributions.Normal(0.0, math.sqrt(sde.prior_var))
    torch.testing.assert_close(sde.prior_log_prob(x), normal.log_prob(x).sum((1, 2)))
    again = sde.prior_sample((2000, 3, 2), torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.equal(x, again)


@all_sdes
def test_cross_entropy_constant_is_the_kernels_entropy(sde: LinearSDE) -> None:
    for cutoff in (None, 1e-5, 0.3):
        var = sde.var(
            torch.tensor(sde.time_eps if cutoff is None else cutoff, dtype=torch.float64)
        ).item()
        if var > 0:
            entropy = torch.distributions.Normal(0.0, math.sqrt(var)).entropy().item()
            assert sde.cross_entropy_constant(cutoff) == pytest.approx(entropy, rel=1e-6)


def test_cross_entropy_constant_needs_variance() -> None:
    with pytest.raises(ValueError, match="time_eps > 0 or sigma2_0 > 0"):
        VPSDE(time_eps=0.0).cross_entropy_constant()


@all_sdes
def test_prior_is_the_end_of_the_diffusion(sde: LinearSDE) -> None:
    if sde == CASES["vp-constant-beta"]:
        pytest.skip("constant beta = 3 does not reach equilibrium")
    total = sde.total_var(torch.ones((), dtype=torch.float64)).item()
    assert total == pytest.approx(sde.prior_var, rel=2e-3)


def test_make_sde_takes_its_own_options() -> None:
    options = {
        "beta_start": 0.2,
        "beta_end": 15.0,
        "sigma2_0": 1e-3,
        "sigma2_min": 1e-4,
        "sigma2_max": 0.9,
        "time_eps": 0.02,
    }
    assert make_sde("vpsde", **options) == VPSDE(0.2, 15.0, 1e-3, 0.02)
    assert make_sde("vesde", **options) == VESDE(1e-4, 0.9, 0.02)
    assert {type(make_sde(kind, **options)) for kind in SDES} == set(SDES.values())
    with pytest.raises(ValueError, match="unknown SDE 'vp'"):
        make_sde("vp")
    with pytest.raises(ValueError, match="beta_stop"):
        make_sde("vpsde", beta_stop=3.0)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "vpsde",
            {"beta_start": 2.0, "beta_end": 1.0},
            "beta_start: must lie in [0, beta_end = 1]",
        ),
        ("vpsde", {"beta_end": 0.0, "beta_start": 0.0}, "beta_end: must be positive"),
        ("vpsde", {"beta_end": math.inf}, "beta_end: must lie in [0, inf)"),
        ("vpsde", {"beta_end": math.nan}, "beta_end: must lie in [0, inf)"),
        ("vpsde", {"sigma2_0": 1.0}, "sigma2_0: must lie in [0, 1), not 1.0"),
        ("vpsde", {"time_eps": 1.0}, "time_eps: must lie in [0, 1), not 1.0"),
        ("subvpsde", {"time_eps": -0.1}, "time_eps: must lie in [0, 1), not -0.1"),
        ("geometric", {"sigma2_max": 1.5}, "sigma2_max: the variance must stay below one"),
        (
            "geometric",
            {"sigma2_max": 0.99, "sigma2_min": 1e-4, "sigma2_0": 0.02},
            "sigma2_max: the variance must stay below one",
        ),
        ("geometric", {"sigma2_min": 0.0}, "sigma2_min: must lie between 0 and sigma2_max"),
        ("vesde", {"sigma2_min": 2.0, "sigma2_max": 1.0}, "sigma2_min: must lie between 0 and 1"),
        ("vesde", {"sigma2_min": 2.0, "sigma2_max": 5.0}, "sigma2_min: must lie between 0 and 1"),
        ("vesde", {"sigma2_max": math.inf}, "sigma2_max: must lie in [0, inf)"),
    ],
)
def test_values_out_of_range(kind: str, options: dict[str, float], message: str) -> None:
    """The field is named, and a configuration says the same."""
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make_sde(kind, **options)
    finite = all(map(math.isfinite, options.values()))
    message = message if finite else message.split(":")[0] + ": must be a finite number"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        SDEConfig(kind, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("vesde", {"time_eps": 0.0}),  # starts from sigma2_min
        ("vesde", {"time_eps": 0.0, "sigma2_max": 5e4, "beta_start": 3.0, "beta_end": 1.0}),
        ("vpsde", {"beta_start": 0.0}),
        ("vpsde", {"sigma2_min": 0.0, "sigma2_max": 0.0}),  # not its fields
        ("subvpsde", {"sigma2_0": 0.05, "time_eps": 0.0}),
        ("geometric", {"sigma2_0": 3e-5, "time_eps": 0.0, "beta_end": 0.0}),
    ],
)
def test_a_configuration_accepts_what_its_sde_accepts(kind: str, options: dict[str, float]) -> None:
    """... and trains: the proposals and the control variate of the likelihood exist."""
    sde = make_sde(**asdict(SDEConfig(kind, **options)))
    assert type(sde) is SDES[kind]
    make_proposal("importance", sde, make_weighting("likelihood"))
    assert math.isfinite(NormalControlVariate.of(sde).offset)


@pytest.mark.parametrize(
    ("kind", "cutoff"),
    [("vpsde", 0.0), ("geometric", 0.0), ("subvpsde", 0.0), ("subvpsde", 1e-200)],  # underflows
)
def test_a_configuration_needs_noise_at_its_cutoff(kind: str, cutoff: float) -> None:
    with pytest.raises(ValueError, match=r"^time_eps: the kernel has no variance"):
        SDEConfig(kind, time_eps=cutoff)


def test_largest_squared_distance() -> None:
    rng = torch.Generator().manual_seed(3)
    points = torch.randn(70, 3, 2, 2, generator=rng) + 50
    brute = (points.flatten(1)[:, None] - points.flatten(1)[None]).square().sum(-1).max().item()
    assert largest_squared_distance(points.split(16), block=11) == pytest.approx(brute, rel=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        largest_squared_distance([points[:1]])


@dataclass(frozen=True)
class OwnSDE(LinearSDE):
    """The VP SDE by its kernel alone, as somebody new would write one."""

    beta: float = 20.0

    def mean_coef(self, t: Tensor) -> Tensor:
        return torch.exp(-0.05 * t - 0.25 * (self.beta - 0.1) * t**2)

    def var(self, t: Tensor) -> Tensor:
        return -torch.expm1(-0.1 * t - 0.5 * (self.beta - 0.1) * t**2)


def test_a_kernel_makes_an_sde() -> None:
    """f, g2, inverse_var and the ends follow from ``mean_coef`` and ``var``."""
    own, closed = OwnSDE(), VPSDE(time_eps=1e-3)
    t = times()
    for name in ("f", "g2", "mean_coef", "var", "one_minus_var", "total_var"):
        found, expected = getattr(own, name)(t), getattr(closed, name)(t)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(own.inverse_var(own.var(t)), t, rtol=1e-9, atol=1e-12)
    for name in ("time_eps", "sigma2_0", "prior_var"):
        assert getattr(own, name) == pytest.approx(getattr(closed, name), abs=1e-15)
    assert own.cross_entropy_constant() == closed.cross_entropy_constant()
    single = own.g2(t.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), closed.g2(t), rtol=1e-6, atol=0)


def test_a_kernels_derivatives_ignore_the_callers_gradient_mode() -> None:
    t = torch.tensor([0.3, 0.7])
    expected = VPSDE().g2(t)
    for mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with mode:
            found = OwnSDE().g2(t)
            assert not found.requires_grad
            torch.testing.assert_close(found, expected)
    jacobian = torch.func.jacrev(lambda x: x * OwnSDE().g2(t))(t)
    torch.testing.assert_close(jacobian.diagonal(), expected)


def test_an_own_sde_samples_like_its_closed_form() -> None:
    oracle = MixtureOracle.ring(VPSDE())
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for solver in ("normal_reference", "dpmpp_3m"):
        ends = [
            make_solver(solver).solve(sde, oracle.eps, x, make_grid("log_snr", sde, 12, 1e-3)).x
            for sde in (VPSDE(), OwnSDE())
        ]
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-7, atol=1e-7)


def test_every_proposal_and_bound_takes_an_own_sde() -> None:
    for name in PROPOSALS:
        sample = make_proposal(name, OwnSDE(), make_weighting("likelihood")).sample(500)
        assert sample.t.min() >= OwnSDE().time_eps and sample.t.max() <= 1
    assert math.isfinite(NormalControlVariate.of(OwnSDE()).offset)
