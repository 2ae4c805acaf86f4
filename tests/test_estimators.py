"""Estimators against exact integrals: the prior's loss, the encoder's gradient and the
cross-entropy.

With Gaussian data and a linear noise prediction every expectation over noise is closed, and what is
left is an integral over time; with the exact prediction for a mixture the integral over time is a
difference of two mutual informations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from oracles import GaussianOracle, MixtureOracle
from quadrature import integrate
from sde_cases import CASES, all_sdes
from torch import Tensor

from lsgm.objectives import (
    NormalControlVariate,
    PriorLosses,
    endpoint_cross_entropy,
    latent_cross_entropy,
    prior_losses,
)
from lsgm.sde import VPSDE, LinearSDE
from lsgm.tensors import expand_like
from lsgm.times import PROPOSALS, TimeProposal, make_proposal
from lsgm.weighting import WEIGHTINGS, Weighting, make_weighting

LIKELIHOOD = make_weighting("likelihood")
every_combination = pytest.mark.parametrize(
    ("sde", "weighting"),
    [
        pytest.param(sde, name, id=f"{case}-{name}")
        for case, sde in CASES.items()
        for name in WEIGHTINGS
        if sde.prior_var <= 1 or name != "rescaled"
    ],
)


@dataclass(frozen=True)
class Imperfect:
    """A wrong linear noise prediction: that for N(0.2, 0.6) data, made 10 % too large."""

    sde: LinearSDE

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset, ``(B,)`` each."""
        m, var = self.sde.mean_coef(t), self.sde.var(t)
        slope = 1.1 * var.sqrt() / (0.6 * m.square() + var)
        return slope, -slope * m * 0.2

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        slope, offset = self.coefficients(t)
        return expand_like(slope, x_t) * x_t + expand_like(offset, x_t)

    def error(self, t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Expected squared error for ``z_0 ~ N(mean, variance)``, summed over the coordinates."""
        slope, offset = (c[:, None] for c in self.coefficients(t))
        m, sigma = self.sde.mean_coef(t)[:, None], self.sde.var(t).sqrt()[:, None]
        bias = slope * m * mean + offset
        errors = bias.square() + (slope * m).square() * variance + (slope * sigma - 1).square()
        return errors.sum(1)

    def slope_of_error(self, t: Tensor, z0: Tensor) -> Tensor:
        """Derivative by each coordinate of ``z_0`` of the expected error given it: ``(B, D)``."""
        slope, offset = (c[:, None] for c in self.coefficients(t))
        m = self.sde.mean_coef(t)[:, None]
        return 2 * slope * m * (slope * m * z0 + offset)


def losses(
    sde: LinearSDE,
    weighting: Weighting,
    proposal: TimeProposal,
    z0: Tensor,
    seed: int,
    *,
    stratified: bool = False,
) -> PriorLosses:
    """As a training step computes them, with a wrong prediction of the noise."""
    return prior_losses(
        sde,
        Imperfect(sde),
        z0,
        weighting_p=weighting,
        proposal_p=proposal,
        likelihood=LIKELIHOOD,
        stratified=stratified,
        rng=torch.Generator().manual_seed(seed),
    )


MEAN, VARIANCE = torch.tensor([0.4, -0.6]).double(), torch.tensor([0.5, 1.2]).double()
BATCHES, BATCH, REPEATED = 40, 256, 8  # the coordinates come REPEATED times: 16 in all


def batch_losses(sde: LinearSDE, weighting: str, proposal: str, *, stratified: bool) -> Tensor:
    """The prior's loss on independent batches of Gaussian data: ``(BATCHES,)``."""
    oracle = GaussianOracle(sde, MEAN.repeat(REPEATED), VARIANCE.repeat(REPEATED))
    rng = torch.Generator().manual_seed(1)
    w = make_weighting(weighting)
    times = make_proposal(proposal, sde, w)
    values = []
    for seed in range(BATCHES):
        noise = torch.randn(BATCH, 2 * REPEATED, generator=rng, dtype=torch.float64)
        z0 = oracle.mean + oracle.variance.sqrt() * noise
        values.append(losses(sde, w, times, z0, seed, stratified=stratified).prior)
    return torch.stack(values)


@every_combination
def test_every_estimator_of_the_priors_loss_has_the_exact_mean(
    sde: LinearSDE, weighting: str, record_property: Callable[[str, object], None]
) -> None:
    """The mean is the integral for uniform and importance-sampled times, stratified or not; what
    the latter leave of the former's variance is reported.
    """
    model, w = Imperfect(sde), make_weighting(weighting)
    exact = integrate(lambda t: w(sde, t) * model.error(t, MEAN, VARIANCE), sde.time_eps) * REPEATED
    variances = {}
    for proposal in PROPOSALS:
        for stratified in (False, True):
            values = batch_losses(sde, weighting, proposal, stratified=stratified)
            error = values.std().item() / math.sqrt(BATCHES)
            # float32 noise and errors in prior_losses limit what can be asked
            assert abs(values.mean().item() - exact) < 4.5 * error + 1e-5 * exact, proposal
            variances[proposal, stratified] = values.var().item()
    ratio = variances["importance", False] / variances["uniform", False]
    record_property("importance_over_uniform_variance", ratio)
    print(f"{sde} {weighting}: variance ratio {ratio:.2e}")
    if isinstance(sde, VPSDE) and weighting == "likelihood":
        assert ratio < 0.1


@every_combination
def test_the_encoders_gradient_has_the_exact_mean_whatever_the_priors_times(
    sde: LinearSDE, weighting: str
) -> None:
    """On the prior's draw, reweighted to the likelihood, the gradient by ``z_0`` is that of the
    cross-entropy.
    """
    model, n, w = Imperfect(sde), 20_000, make_weighting(weighting)
    point = torch.tensor([0.8, -1.1], dtype=torch.float64)
    exact = torch.tensor(
        [
            integrate(
                lambda t, i=i: LIKELIHOOD(sde, t) * model.slope_of_error(t, point)[:, i],
                sde.time_eps,
            )
            for i in range(2)
        ],
        dtype=torch.float64,
    )
    for proposal in PROPOSALS:
        z0 = point.repeat(n, 1).requires_grad_()
        surrogate = losses(sde, w, make_proposal(proposal, sde, w), z0, 2).surrogate
        values = n * torch.autograd.grad(surrogate, z0)[0]
        error = values.std(0) / math.sqrt(n)
        assert ((values.mean(0) - exact).abs() < 4.5 * error).all(), proposal


def differential_entropy(oracle: MixtureOracle, t: float, reach: float) -> float:
    """Entropy of ``z_t`` in nats by the trapezoidal rule, which converges faster than any power for
    a density that is smooth on the scale of the mesh and vanishes at its ends.
    """
    dims = oracle.means.shape[1]
    axis = torch.linspace(-reach, reach, 4001 if dims == 1 else 401, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * dims).view(-1, dims)
    log_p = torch.cat([oracle.log_prob(part, t) for part in grid.split(40_000)])
    cell = (axis[1] - axis[0]).item() ** dims
    mass = log_p.exp().sum().item() * cell
    assert mass == pytest.approx(1, abs=1e-9)
    return -(log_p.exp() * log_p).sum().item() * cell


def mixture(sde: LinearSDE, dims: int) -> MixtureOracle:
    if dims == 2:
        return MixtureOracle.ring(sde, components=5)
    return MixtureOracle(sde, torch.tensor([[-1.4], [-0.1], [1.2]]), std=0.4)


def reach(oracle: MixtureOracle, t: float) -> float:
    """Half the side of a box outside which ``z_t`` has no mass to speak of."""
    time = torch.tensor([t], dtype=torch.float64)
    m, var = oracle.sde.mean_coef(time).item(), oracle.sde.var(time).item()
    return m * oracle.means.abs().max().item() + 8 * math.sqrt(m**2 * oracle.std**2 + var)


def exact_integral(oracle: MixtureOracle) -> float:
    """Expectation of the likelihood-weighted error of the optimal prediction over [time_eps, 1], by
    the I-MMSE identity: ``I(z_0; z_tmin) - I(z_0; z_1)``, where ``I = H(z_t) - H(z_t | z_0)``.
    """
    sde, dims = oracle.sde, oracle.means.shape[1]

    def information(t: float) -> float:
        kernel = 0.5 * dims * (1 + math.log(2 * math.pi * _var(sde, t)))
        return differential_entropy(oracle, t, reach(oracle, t)) - kernel

    return information(sde.time_eps) - information(1.0)


def _var(sde: LinearSDE, t: float) -> float:
    return sde.var(torch.tensor(t, dtype=torch.float64)).item()


def exact_ends(oracle: MixtureOracle) -> float:
    """Expectation of the two ends of the bound, which are quadratic in ``z_0``."""
    second_moment = oracle.means.square().sum(1).mean() + oracle.means.shape[1] * oracle.std**2
    point = torch.zeros(1, oracle.means.shape[1], dtype=torch.float64)
    point[0, 0] = second_moment.sqrt()
    return endpoint_cross_entropy(oracle.sde, point).item()


@all_sdes
@pytest.mark.parametrize("dims", [1, 2])
def test_cross_entropy_of_a_mixture_is_exact(sde: LinearSDE, dims: int) -> None:
    """Both forms of the estimate, with and without control variate, have the exact mean; the exact
    bound lies above the mixture's entropy by what its two ends cost.
    """
    oracle, n = mixture(sde, dims), 20_000
    rng = torch.Generator().manual_seed(dims)
    index = torch.randint(len(oracle.means), (n,), generator=rng)
    noise = torch.randn(n, dims, generator=rng, dtype=torch.float64)
    z0 = oracle.means[index] + oracle.std * noise
    integral, ends = exact_integral(oracle), exact_ends(oracle)
    for control_variate in (None, NormalControlVariate.of(sde)):
        times = make_proposal("importance", sde, LIKELIHOOD).sample(n, rng)
        estimate = latent_cross_entropy(
            sde, oracle.eps, z0, times, LIKELIHOOD, rng, control_variate=control_variate
        )
        elements = estimate.elements.sum(1)
        for values, exact in (
            (elements, integral + dims * sde.cross_entropy_constant()),
            (estimate.bound, integral + ends),
        ):
            error = values.std().item() / math.sqrt(n)
            assert abs(values.mean().item() - exact) < 4.5 * error
    gap = integral + ends - entropy_of_data(oracle)
    # KL( q(z_0 | z_tmin) || decoder ), of the order of var(time_eps), is what remains
    assert 0 < gap - divergence_from_prior(oracle) < 2 * dims * _var(sde, sde.time_eps)


def divergence_from_prior(oracle: MixtureOracle) -> float:
    """``KL( q(z_1) || N(0, prior_var) )`` in nats."""
    sde, dims = oracle.sde, oracle.means.shape[1]
    m = sde.mean_coef(torch.tensor(1.0, dtype=torch.float64)).item()
    second_moment = oracle.means.square().mean().item() + oracle.std**2
    share = (m**2 * second_moment + _var(sde, 1.0)) / sde.prior_var
    cross_entropy = 0.5 * dims * (math.log(2 * math.pi * sde.prior_var) + share)
    return cross_entropy - differential_entropy(oracle, 1.0, reach(oracle, 1.0))


def entropy_of_data(oracle: MixtureOracle) -> float:
    """Entropy of ``z_0`` itself: that of a process without noise at its start."""
    still = MixtureOracle(VPSDE(), oracle.means, oracle.std)
    return differential_entropy(still, 0.0, reach(still, 0.0))


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
def test_cross_entropy_of_a_fine_vpsde_is_the_entropy(data: str) -> None:
    """With ``time_eps = 1e-5`` the ends cost less than 1e-4 nats, and the mean of the bound is
    ``-E log p(z_0)`` itself, within 0.2 % of a nat of sampling error.
    """
    sde, n = VPSDE(time_eps=1e-5), 200_000
    rng = torch.Generator().manual_seed(3)
    if data == "gaussian":
        mean, var = torch.tensor([0.3, -0.5]).double(), torch.tensor([0.4, 1.3]).double()
        eps_fn = GaussianOracle(sde, mean, var).eps
        z0 = mean + var.sqrt() * torch.randn(n, 2, generator=rng, dtype=torch.float64)
        entropy = 0.5 * (2 + torch.log(2 * math.pi * var).sum().item())
        log_p = torch.distributions.Normal(mean, var.sqrt()).log_prob(z0).sum(1)
    else:
        oracle = mixture(sde, 2)
        eps_fn = oracle.eps
        index = torch.randint(len(oracle.means), (n,), generator=rng)
        noise = torch.randn(n, 2, generator=rng, dtype=torch.float64)
        z0 = oracle.means[index] + oracle.std * noise
        entropy = entropy_of_data(oracle)
        log_p = MixtureOracle(sde, oracle.means, oracle.std).log_prob(z0, 0.0)
        assert exact_integral(oracle) + exact_ends(oracle) == pytest.approx(entropy, abs=1e-4)
    times = make_proposal("importance", sde, LIKELIHOOD).sample(n, rng, stratified=True)
    control_variate = NormalControlVariate.of(sde)
    bound = latent_cross_entropy(
        sde, eps_fn, z0, times, LIKELIHOOD, rng, control_variate=control_variate
    ).bound
    error = bound.std().item() / math.sqrt(n)
    assert abs(bound.mean().item() - entropy) < 4 * error + 1e-4
    # ... and the same images' own log-density takes out their share of the noise
    pairs = bound + log_p
    assert abs(pairs.mean().item()) < 4 * pairs.std().item() / math.sqrt(n) + 1e-4
