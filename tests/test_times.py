from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from quadrature import integrate, panels
from scipy.stats import kstest
from sde_cases import CASES
from torch import Tensor

from lsgm.evaluation.likelihood.tails import HEAVY_TAIL, tail_share
from lsgm.sde import VPSDE, GeometricVPSDE, LinearSDE, SubVPSDE
from lsgm.times import (
    DEFENSIVE_SHARE,
    PROPOSALS,
    ClockTimes,
    TabulatedTimes,
    TimeProposal,
    UniformTimes,
    importance_times,
    make_proposal,
    normal_data_density,
    optimal_times,
)
from lsgm.weighting import WEIGHTINGS, Weighting, make_weighting
from vae.random import ShardedGenerator

COMBINATIONS = [
    pytest.param(sde, weighting(), id=f"{name}-{weighting.name}")
    for name, sde in CASES.items()
    for weighting in WEIGHTINGS.values()
    if sde.prior_var <= 1 or weighting.name != "rescaled"
]
every_combination = pytest.mark.parametrize(("sde", "weighting"), COMBINATIONS)
every_proposal = pytest.mark.parametrize(
    "name",
    [name for name in PROPOSALS if name != "weighted"],  # its table is coarse where a weight rises
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_error(sde: LinearSDE, t: Tensor) -> Tensor:
    """Expected squared error of the optimal prediction: ``1 - var / total_var``."""
    return (1 - sde.sigma2_0) * sde.mean_coef(t).square() / sde.total_var(t)


@every_combination
@every_proposal
def test_inverse_density_is_that_of_the_inverse_cdf(
    name: str, sde: LinearSDE, weighting: Weighting
) -> None:
    """``t(rho)`` rises from time_eps to 1 and ``dt / drho = 1 / p(t)``: the density integrates to
    one.
    """
    proposal = make_proposal(name, sde, weighting)
    ends = proposal.from_uniform(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).t
    assert ends[0].item() == pytest.approx(sde.time_eps, abs=1e-12)
    assert ends[1].item() == pytest.approx(1.0, abs=1e-7)
    rho = torch.linspace(0.001, 0.999, 997, dtype=torch.float64, requires_grad=True)
    sample = proposal.from_uniform(rho)
    assert sample.t.dtype == sample.inverse_density.dtype == torch.float64
    assert bool((sample.t.diff() > 0).all())
    (slope,) = torch.autograd.grad(sample.t.sum(), rho)
    torch.testing.assert_close(slope, sample.inverse_density.detach(), rtol=1e-7, atol=0)


@every_combination
@every_proposal
def test_samples_follow_the_density(name: str, sde: LinearSDE, weighting: Weighting) -> None:
    """Kolmogorov-Smirnov against the distribution function got by quadrature from the density it
    should have.
    """
    if name == "uniform":
        density: Callable[[Tensor], Tensor] = torch.ones_like
    elif name == "importance" and isinstance(sde, SubVPSDE) and weighting.name != "rescaled":

        def density(t: Tensor) -> Tensor:
            return normal_data_density(sde.vpsde, weighting, t)
    elif name == "mixture":
        normal = integrate(lambda t: normal_data_density(sde, weighting, t), sde.time_eps)
        weight = integrate(lambda t: weighting(sde, t), sde.time_eps)

        def density(t: Tensor) -> Tensor:
            optimum = normal_data_density(sde, weighting, t) / normal
            return 0.9 * optimum + 0.1 * weighting(sde, t) / weight
    else:

        def density(t: Tensor) -> Tensor:
            return normal_data_density(sde, weighting, t)

    t = make_proposal(name, sde, weighting).sample(3000, generator()).t.sort().values
    edges = torch.unique(torch.cat([panels(sde.time_eps), t]))
    masses = torch.tensor([0.0, *_masses(density, edges)], dtype=torch.float64).cumsum(0)
    cdf = masses[torch.searchsorted(edges, t)] / masses[-1]
    assert kstest(cdf.numpy(), "uniform").pvalue > 1e-4


def _masses(density: Callable[[Tensor], Tensor], edges: Tensor) -> list[float]:
    half = edges.diff() / 2
    middle = edges[:-1] + half
    simpson = (density(edges[:-1]) + 4 * density(middle) + density(edges[1:])) / 6
    return (simpson * 2 * half).tolist()


@every_combination
@every_proposal
def test_estimator_is_unbiased(name: str, sde: LinearSDE, weighting: Weighting) -> None:
    """The mean of ``w(t) l(t) / p(t)`` is the integral, for a loss other than the one the proposal
    is made for.
    """

    def integrand(t: Tensor) -> Tensor:
        return weighting(sde, t) * normal_error(sde, t) * (1 + 0.4 * torch.sin(9 * t)) * (1.5 - t)

    exact = integrate(integrand, sde.time_eps)
    proposal = make_proposal(name, sde, weighting)
    for stratified in (False, True):
        sample = proposal.sample(20_000, generator(1), stratified=stratified)
        terms = integrand(sample.t) * sample.inverse_density
        standard_error = terms.std().item() / math.sqrt(len(terms))
        assert abs(terms.mean().item() - exact) < 4.5 * standard_error + 1e-12
    # the lattice of the last round leaves far less than an independent sample would
    assert abs(terms.mean().item() - exact) < 0.2 * standard_error + 1e-9


@pytest.mark.parametrize("sde", ["vp", "subvp", "ve"])
@pytest.mark.parametrize("weighting", ["likelihood", "unweighted", "reweighted"])
def test_weighted_times_make_every_time_count_alike(sde: str, weighting: str) -> None:
    """``w(t) / p(t)`` is the integral of the weight, whatever the time."""
    weight = make_weighting(weighting)
    sample = make_proposal("weighted", CASES[sde], weight).sample(2000, generator(1))
    total = integrate(lambda t: weight(CASES[sde], t), CASES[sde].time_eps)
    counted = weight(CASES[sde], sample.t) * sample.inverse_density
    assert counted.mean().item() == pytest.approx(total, rel=2e-3)
    assert (counted - total).abs().median() < 2e-3 * total


@every_combination
def test_optimal_times_leave_no_variance_for_normal_data(
    sde: LinearSDE, weighting: Weighting
) -> None:
    sample = optimal_times(sde, weighting).sample(4000, generator(2))
    terms = normal_data_density(sde, weighting, sample.t) * sample.inverse_density
    exact = integrate(lambda t: normal_data_density(sde, weighting, t), sde.time_eps)
    assert terms.mean().item() == pytest.approx(exact, rel=1e-4)
    assert terms.std().item() / exact < 1e-3


@every_combination
def test_the_mixture_bounds_the_weights(sde: LinearSDE, weighting: Weighting) -> None:
    """``w / p`` is at most ten times the integral of the weight, at every time; and where it would
    be best to have the optimum alone, 1 / 0.9 times its weight.
    """
    integral = integrate(lambda t: weighting(sde, t), sde.time_eps)
    rho = torch.cat([torch.linspace(0, 1, 2001), 1 - torch.logspace(-15, -3, 100)]).double()
    mixture = make_proposal("mixture", sde, weighting).from_uniform(rho.clamp(max=1 - 2**-53))
    weights = weighting(sde, mixture.t) * mixture.inverse_density
    assert weights.isfinite().all()
    assert weights.max() <= 1.001 * integral / DEFENSIVE_SHARE
    normal = integrate(lambda t: normal_data_density(sde, weighting, t), sde.time_eps)
    values = normal_data_density(sde, weighting, mixture.t) * mixture.inverse_density
    assert values.max() <= 1.001 * normal / (1 - DEFENSIVE_SHARE)


@pytest.mark.parametrize("name", ["vp", "geometric", "ve", "subvp-dip"])
def test_an_error_that_stays_at_the_end_has_a_heavy_tail_without_the_mixture(name: str) -> None:
    """A network that is wrong by a constant: its error at t = 1 has the weight 1 / (1 - var), which
    importance sampling draws with a Pareto tail, so that most means are below the exact integral.
    The mixture's are on both sides, with less variance.
    """
    sde, w = CASES[name], make_weighting("likelihood")
    exact = integrate(lambda t: w(sde, t), sde.time_eps)
    means, shares = {}, {}
    for proposal in ("importance", "mixture"):
        times = make_proposal(proposal, sde, w).sample(500 * 200, generator(8))
        values = (w(sde, times.t) * times.inverse_density).view(200, 500)
        means[proposal] = values.mean(1)
        shares[proposal] = torch.tensor([tail_share(row) for row in values])
    below = {key: (value < exact).double().mean().item() for key, value in means.items()}
    assert below["importance"] > 0.55 and 0.4 < below["mixture"] < 0.6
    assert means["importance"].median() < 0.98 * exact < means["mixture"].median()
    assert means["mixture"].std() < 0.5 * means["importance"].std()
    error = means["mixture"].std().item() / math.sqrt(200)
    assert abs(means["mixture"].mean().item() - exact) < 4.5 * error
    # ... and a sample of 500 tells which it is
    assert (shares["importance"] > HEAVY_TAIL).double().mean() > 0.8
    assert (shares["mixture"] > HEAVY_TAIL).double().mean() < 0.05


@pytest.mark.parametrize("name", ["vp", "vp-s0", "geometric", "geometric-s0", "ve", "ve-wide"])
@pytest.mark.parametrize("weighting", ["likelihood", "unweighted", "reweighted"])
def test_closed_forms_leave_no_variance_for_normal_data(name: str, weighting: str) -> None:
    """The closed forms of the paper are the optimum for every SDE but sub-VP."""
    sde, w = CASES[name], make_weighting(weighting)
    proposal = importance_times(sde, w)
    closed = isinstance(proposal, ClockTimes)
    assert closed != (name.startswith("geometric") and weighting == "unweighted")
    sample = proposal.sample(2000, generator(3))
    terms = normal_data_density(sde, w, sample.t) * sample.inverse_density
    assert terms.std() / terms.mean() < (1e-8 if closed else 1e-3)


def test_the_closed_form_of_nearly_constant_beta_hands_over_to_the_table() -> None:
    weighting = make_weighting("unweighted")
    assert isinstance(importance_times(VPSDE(3.0, 3.0), weighting), TabulatedTimes)
    assert isinstance(importance_times(VPSDE(5.0, 5.01), weighting), TabulatedTimes)
    assert isinstance(importance_times(VPSDE(5.0, 7.0), weighting), ClockTimes)


def _losses(
    sde: LinearSDE, weighting: Weighting, proposal: TimeProposal, n: int = 20_000
) -> Tensor:
    """Monte-Carlo losses of 16 latent variables with N(0, 0.8) data and the Normal component as the
    network.
    """
    rng = generator(4)
    sample = proposal.sample(n, rng)
    z0 = math.sqrt(0.8) * torch.randn(n, 16, generator=rng, dtype=torch.float64)
    eps = torch.randn(n, 16, generator=rng, dtype=torch.float64)
    error = (eps - sde.normal_component(sde.perturb(z0, sample.t, eps), sample.t)).square().sum(1)
    return weighting(sde, sample.t) * sample.inverse_density * error


@every_combination
def test_importance_agrees_with_uniform_and_has_less_variance(
    sde: LinearSDE, weighting: Weighting
) -> None:
    uniform = _losses(sde, weighting, UniformTimes(sde.time_eps))
    importance = _losses(sde, weighting, importance_times(sde, weighting))
    difference = uniform.mean() - importance.mean()
    assert abs(difference) < 4.5 * ((uniform.var() + importance.var()) / len(uniform)).sqrt()
    ratio = (importance.var() / uniform.var()).item()
    print(f"{sde} {weighting.name}: variance ratio {ratio:.2e}")
    # where uniform times are (nearly) the optimum already, what is left is the noise of the errors
    assert ratio < 1.1


def test_likelihood_importance_sampling_pays_for_the_vpsde() -> None:
    """The figure behind arXiv 2106.05931 section 3.3: uniform times are hopeless for the
    likelihood.
    """
    sde, weighting = VPSDE(time_eps=1e-5), make_weighting("likelihood")
    uniform = _losses(sde, weighting, UniformTimes(sde.time_eps))
    importance = _losses(sde, weighting, importance_times(sde, weighting))
    ratio = importance.var() / uniform.var()
    print(f"variance ratio {ratio:.2e}")
    assert ratio < 5e-3


def test_geometric_uniform_is_likelihood_importance() -> None:
    sde, weighting = GeometricVPSDE(), make_weighting("likelihood")
    rho = torch.linspace(0, 1, 50, dtype=torch.float64)
    importance = importance_times(sde, weighting).from_uniform(rho)
    uniform = UniformTimes(0.0).from_uniform(rho)
    torch.testing.assert_close(importance.t, uniform.t, rtol=0, atol=1e-14)
    torch.testing.assert_close(importance.inverse_density, uniform.inverse_density)


def test_optimal_times_beat_the_papers_for_the_sub_vpsde() -> None:
    sde, weighting = SubVPSDE(), make_weighting("likelihood")
    rho = torch.rand(4000, generator=generator(5), dtype=torch.float64)
    variances = []
    for make in (importance_times, optimal_times):
        sample = make(sde, weighting).from_uniform(rho)
        variances.append(
            (normal_data_density(sde, weighting, sample.t) * sample.inverse_density).var()
        )
    assert variances[1] < 1e-3 * variances[0]


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 64, 90, 128])
def test_stratified_times_take_one_point_of_every_stratum(n: int) -> None:
    t = UniformTimes(0.0).sample(n, generator(n), stratified=True).t
    assert sorted((t * n).floor().int().tolist()) == list(range(n))
    if n >= 64:  # parts of the batch are spread as well
        assert kstest(t[: n // 8].numpy(), "uniform").statistic < 0.3
        assert kstest(t[-n // 8 :].numpy(), "uniform").statistic < 0.3


@pytest.mark.parametrize("stratified", [False, True])
def test_processes_share_the_times_of_one(stratified: bool) -> None:
    proposal = importance_times(VPSDE(), make_weighting("likelihood"))
    one = proposal.sample(12, generator(6), stratified=stratified)
    many = [
        proposal.sample(4, ShardedGenerator(generator(6), rank, 3), stratified=stratified)
        for rank in range(3)
    ]
    assert torch.equal(torch.cat([s.t for s in many]), one.t)
    assert torch.equal(torch.cat([s.inverse_density for s in many]), one.inverse_density)


def test_every_image_has_the_proposals_distribution_when_stratified() -> None:
    rng = generator(7)
    t = torch.stack([UniformTimes(0.0).sample(5, rng, stratified=True).t for _ in range(1500)])
    for i in range(5):
        assert kstest(t[:, i].numpy(), "uniform").pvalue > 1e-4


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="known: uniform, importance, optimal, mixture"):
        make_proposal("iw", VPSDE(), make_weighting("likelihood"))
    for name in ("importance", "optimal"):
        with pytest.raises(ValueError, match="time_eps > 0 or sigma2_0 > 0"):
            make_proposal(name, VPSDE(time_eps=0.0), make_weighting("likelihood"))
    with pytest.raises(ValueError, match="var < 1"):
        make_proposal("importance", CASES["ve"], make_weighting("rescaled"))
