"""The prior's losses: gradients to each side, the cross-entropy as a bound, its exact value on a
Gaussian.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianOracle
from quadrature import integrate, panels
from sde_cases import all_sdes
from torch import Tensor, nn

from lsgm.objectives import (
    NormalControlVariate,
    endpoint_cross_entropy,
    latent_cross_entropy,
    prior_losses,
    scale_gradient,
)
from lsgm.score import MixedNormalScore
from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, LinearSDE, SubVPSDE
from lsgm.tensors import expand_like, sum_except_batch
from lsgm.times import TimeProposal, make_proposal
from lsgm.weighting import Weighting, make_weighting
from vae.random import randn

SDES = [
    VPSDE(),
    GeometricVPSDE(sigma2_min=3e-5, sigma2_max=0.999, sigma2_0=3e-5, time_eps=0.0),
    SubVPSDE(),
    VESDE(sigma2_min=1e-4, sigma2_max=100.0, time_eps=1e-2),
]


class Encoder(nn.Module):
    """Stand-in for the VAE: latents from data through trained weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


class Network(nn.Module):
    """Stand-in for the score network, which mixes channels, pixels and time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x) + expand_like(t, x)))


def setup(sde: LinearSDE) -> tuple[Encoder, MixedNormalScore, Tensor]:
    torch.manual_seed(0)
    score = MixedNormalScore(Network(), sde, 4, mixing_init=-1.0).double()
    return Encoder(), score, torch.randn(6, 2, 4, 4, dtype=torch.float64)


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("weighting", ["likelihood", "unweighted", "reweighted"])
@pytest.mark.parametrize("separate_q", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_each_side_gets_exactly_its_own_gradient(
    weighting: str, separate_q: bool, balanced: bool
) -> None:
    """One backward pass of the surrogate against two of the objectives written out."""
    sde = VPSDE()
    encoder, score, x = setup(sde)
    likelihood, w_p = make_weighting("likelihood"), make_weighting(weighting)
    proposal_p = make_proposal("importance", sde, w_p)
    proposal_q = make_proposal("importance", sde, likelihood) if separate_q else None
    factors = torch.tensor([0.3, 1.1, 0.7, 1.9], dtype=torch.float64).view(1, -1, 1, 1)
    coefficient = 0.6

    losses = prior_losses(
        sde,
        score,
        encoder(x),
        weighting_p=w_p,
        proposal_p=proposal_p,
        likelihood=likelihood,
        proposal_q=proposal_q,
        balance=(lambda weighted: coefficient * factors) if balanced else coefficient,
        rng=torch.Generator().manual_seed(7),
    )
    losses.surrogate.backward()
    got_encoder, got_score = grads(encoder), grads(score)

    # The same draws, in the documented order, and both objectives as the paper writes them.
    rng = torch.Generator().manual_seed(7)
    draws = []
    for proposal in [proposal_q, proposal_p] if separate_q else [proposal_p]:
        eps = randn(x.shape[:1] + (4, 4, 4), rng, device="cpu").double()
        draws.append((eps, proposal.sample(len(x), rng)))
    (eps_q, times_q), (eps_p, times_p) = draws[0], draws[-1]

    def error(z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (score(sde.perturb(z, t, eps), t).float() - eps.float()).double().square()

    w = (likelihood(sde, times_q.t) * times_q.inverse_density).view(-1, 1, 1, 1)
    scale = coefficient * (factors if balanced else 1.0)
    q_loss = (scale * w * error(encoder(x), eps_q, times_q.t)).sum() / len(x)
    want_encoder = torch.autograd.grad(q_loss, list(encoder.parameters()))
    w = (w_p(sde, times_p.t) * times_p.inverse_density).view(-1, 1, 1, 1)
    p_loss = (w * error(encoder(x).detach(), eps_p, times_p.t)).sum() / len(x)
    want_score = torch.autograd.grad(p_loss, list(score.parameters()))

    assert losses.prior.item() == pytest.approx(p_loss.item(), rel=1e-6)
    for got, want in zip([*got_encoder, *got_score], [*want_encoder, *want_score], strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())


def test_frozen_encoder_gets_no_gradient() -> None:
    sde = VPSDE()
    encoder, score, x = setup(sde)
    likelihood = make_weighting("likelihood")
    losses = prior_losses(
        sde,
        score,
        encoder(x).detach(),
        weighting_p=likelihood,
        proposal_p=make_proposal("importance", sde, likelihood),
        likelihood=likelihood,
        rng=torch.Generator().manual_seed(0),
    )
    losses.surrogate.backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad is not None for p in score.parameters())


def test_scale_gradient() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    factor = torch.tensor([[1.0], [2.0], [-3.0]])
    y = scale_gradient(x, factor)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad((y**2).sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach() * factor)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_cross_entropy_of_normal_data_is_exact(sde: LinearSDE) -> None:
    """With data from N(0, I) and the exact score of N(0, I) the bound is tight: its mean is the
    entropy of N(0, I).
    """
    n, d = 40_000, 3
    rng = torch.Generator().manual_seed(0)
    likelihood = make_weighting("likelihood")
    oracle = GaussianOracle(
        sde, torch.zeros(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64)
    )
    z0 = torch.randn(n, d, generator=rng, dtype=torch.float64)
    times = make_proposal("importance", sde, likelihood).sample(n, rng)
    estimate = latent_cross_entropy(sde, oracle.eps, z0, times, likelihood, rng).bound
    exact = 0.5 * d * (1 + math.log(2 * math.pi))
    error = estimate.std().item() / math.sqrt(n)
    # The prior of the VE SDE is not its marginal at t = 1, a real gap of (1 / sigma2_max) / 2 a
    # dimension.
    slack = 0.5 * d / sde.prior_var if isinstance(sde, VESDE) else 1e-4 * d
    assert -4 * error < estimate.mean().item() - exact < 4 * error + slack
    assert error < 0.1


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_cross_entropy_bounds_a_gaussian_from_above(sde: LinearSDE) -> None:
    """For any data and the model's exact score the bound holds up to sampling error, and closes as
    time_eps falls.
    """
    n, d = 40_000, 2
    rng = torch.Generator().manual_seed(1)
    mean = torch.tensor([0.3, -0.5], dtype=torch.float64)
    var = torch.tensor([0.4, 1.3], dtype=torch.float64)
    likelihood = make_weighting("likelihood")
    oracle = GaussianOracle(sde, mean, var)
    z0 = mean + var.sqrt() * torch.randn(n, d, generator=rng, dtype=torch.float64)
    times = make_proposal("importance", sde, likelihood).sample(n, rng)
    estimate = latent_cross_entropy(sde, oracle.eps, z0, times, likelihood, rng).bound
    exact = 0.5 * (d + torch.log(2 * math.pi * var).sum().item())
    error = estimate.std().item() / math.sqrt(n)
    assert estimate.mean().item() > exact - 4 * error
    assert estimate.mean().item() < exact + 4 * error + 0.03


def test_endpoints_reduce_to_the_papers_constant() -> None:
    """For unit second moment and a variance-preserving kernel the ends are (1 + ln 2 pi v) / 2 an
    element.
    """
    sde = VPSDE()
    z0 = torch.ones(1, 5, dtype=torch.float64)
    expected = 5 * sde.cross_entropy_constant()
    assert sum_except_batch(z0).item() == 5
    # ... and KL( q(x_1 | x_0) || N(0, I) ), which the paper takes as zero.
    end = -2.5 * sde.var(torch.ones(1, dtype=torch.float64)).log().item()
    assert endpoint_cross_entropy(sde, z0).item() == pytest.approx(expected + end, abs=1e-9)


@pytest.mark.parametrize(
    ("sde", "tolerance"), [(VPSDE(), 1e-4), (SDES[1], 2e-3)], ids=["vp", "geometric"]
)
def test_control_variate_closes_the_bound_pointwise(sde: LinearSDE, tolerance: float) -> None:
    """The reverse process of N(0, I) is the exact posterior path, so integral and ends give -log
    N(z_0; 0, I) for every z_0.
    """
    control_variate = NormalControlVariate.of(sde)
    z0 = torch.tensor([[0.0, 0.0], [1.0, -1.0], [3.0, 0.5]], dtype=torch.float64)
    bound = sum_except_batch(control_variate.expected(z0)) + endpoint_cross_entropy(sde, z0)
    exact = 0.5 * z0.square().sum(1) + math.log(2 * math.pi)
    torch.testing.assert_close(bound, exact, rtol=0, atol=tolerance)


@all_sdes
def test_control_variate_is_its_integral_over_time(sde: LinearSDE) -> None:
    """Against quadrature in ``t``: no shape of the variance's course is assumed, and sub-VP's
    falls at first where ``sigma2_0 > 0``.
    """
    likelihood, ends = make_weighting("likelihood"), panels(sde.time_eps, 400)

    def slope(t: Tensor) -> Tensor:
        c = sde.var(t).sqrt() / sde.total_var(t)
        return likelihood(sde, t) * (c * sde.mean_coef(t)).square()

    def offset(t: Tensor) -> Tensor:
        return likelihood(sde, t) * (sde.var(t) / sde.total_var(t) - 1).square()

    control_variate = NormalControlVariate.of(sde)
    assert control_variate.slope == pytest.approx(integrate(slope, sde.time_eps, ends), rel=1e-12)
    assert control_variate.offset == pytest.approx(integrate(offset, sde.time_eps, ends), rel=1e-12)


def test_control_variate_needs_variance_at_the_cutoff() -> None:
    with pytest.raises(ValueError, match=r"no variance at t = 0"):
        NormalControlVariate.of(VPSDE(time_eps=0.0))


@all_sdes
def test_the_bound_of_normal_data_is_their_entropy(sde: LinearSDE) -> None:
    """256 dimensions, as evaluation computes it: data from N(0, I), their exact score, the control
    variate. The mean is ``0.5 d ln(2 pi e)``, here 363.25 nats, and what the prior of the SDE
    misses of its marginal at t = 1.
    """
    n, d = 4000, 256
    rng = torch.Generator().manual_seed(0)
    likelihood = make_weighting("likelihood")
    oracle = GaussianOracle(sde, torch.zeros(d), torch.ones(d))
    z0 = torch.randn(n, d, generator=rng, dtype=torch.float64)
    times = make_proposal("importance", sde, likelihood).sample(n, rng, stratified=True)
    bound = latent_cross_entropy(
        sde, oracle.eps, z0, times, likelihood, rng, control_variate=NormalControlVariate.of(sde)
    ).bound
    end = torch.ones(1, dtype=torch.float64)
    ratio = ((sde.mean_coef(end).square() + sde.var(end)) / sde.prior_var).item()
    exact = 0.5 * d * (1 + math.log(2 * math.pi) + ratio - 1 - math.log(ratio))
    # -log N(z_0; 0, I) has the same mean and nearly the same value
    log_p = -0.5 * sum_except_batch(z0.square() + math.log(2 * math.pi))
    values = bound + log_p + 0.5 * d * (1 + math.log(2 * math.pi))
    error = values.std().item() / math.sqrt(n)
    assert error < 0.25
    assert abs(values.mean().item() - exact) < 4 * error + 1e-3


@all_sdes
def test_the_encoders_gradient_of_normal_data_is_exact(sde: LinearSDE) -> None:
    """With the control variate and the Normal component as the network nothing random is left of
    the encoder's gradient: it is ``2 slope z_0`` with the integral's slope.
    """
    likelihood = make_weighting("likelihood")
    z0 = torch.tensor([[0.8, -1.1, 2.0]], dtype=torch.float64).requires_grad_()

    def slope(t: Tensor) -> Tensor:
        c = sde.var(t).sqrt() / sde.total_var(t)
        return likelihood(sde, t) * (c * sde.mean_coef(t)).square()

    def normal(x_t: Tensor, t: Tensor) -> Tensor:
        return sde.normal_component(x_t, t)

    losses = prior_losses(
        sde,
        normal,
        z0,
        weighting_p=likelihood,
        proposal_p=make_proposal("importance", sde, likelihood),
        likelihood=likelihood,
        control_variate=NormalControlVariate.of(sde),
        rng=torch.Generator().manual_seed(0),
    )
    (gradient,) = torch.autograd.grad(losses.surrogate, z0)
    exact = 2 * integrate(slope, sde.time_eps, panels(sde.time_eps, 400)) * z0.detach()
    # prior_losses rounds the network's answer to float32
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_control_variate_is_the_expectation_of_its_samples(sde: LinearSDE) -> None:
    n = 200_000
    rng = torch.Generator().manual_seed(0)
    likelihood = make_weighting("likelihood")
    control_variate = NormalControlVariate.of(sde)
    times = make_proposal("importance", sde, likelihood).sample(n, rng)
    eps = torch.randn(n, 1, generator=rng, dtype=torch.float64)
    for value in (0.0, 1.7):
        x0 = torch.full((n, 1), value, dtype=torch.float64)
        weight = (likelihood(sde, times.t) * times.inverse_density)[:, None]
        samples = weight * control_variate.error(x0, times.t, eps)
        error = samples.std().item() / math.sqrt(n)
        assert abs(samples.mean().item() - control_variate.expected(x0)[0].item()) < 4 * error


def test_control_variate_keeps_the_gradient_and_lowers_its_variance() -> None:
    """Encoder gradients with and without it agree in expectation; near N(0, I) the variance falls
    by more than ten times.
    """
    sde = VPSDE()
    _, score, _ = setup(sde)
    assert score.mixing_logit is not None
    score.mixing_logit.data.fill_(-3.0)
    likelihood = make_weighting("likelihood")
    proposal = make_proposal("importance", sde, likelihood)
    control_variate = NormalControlVariate.of(sde)
    z = torch.randn(1, 4, 2, 2, dtype=torch.float64).expand(4000, -1, -1, -1)
    results = {}
    for name, control in (("without", None), ("with", control_variate)):
        z0 = z.clone().requires_grad_()
        losses = prior_losses(
            sde,
            score,
            z0,
            weighting_p=likelihood,
            proposal_p=proposal,
            likelihood=likelihood,
            control_variate=control,
            rng=torch.Generator().manual_seed(3),
        )
        (gradient,) = torch.autograd.grad(losses.surrogate, z0)
        score_gradient = torch.autograd.grad(
            losses_again(sde, score, z, likelihood, proposal, control), score.mixing_logit
        )
        results[name] = (
            gradient * len(z0),
            sum_except_batch(losses.cross_entropy),
            score_gradient[0],
        )
    (g0, ce0, p0), (g1, ce1, p1) = results["without"], results["with"]
    error = (g0 - g1).std(0) / math.sqrt(len(z))
    assert ((g0.mean(0) - g1.mean(0)).abs() < 5 * error).all()
    assert g1.var(0).mean() < 0.1 * g0.var(0).mean()
    assert ce1.var() < 0.1 * ce0.var()
    assert abs(ce0.mean() - ce1.mean()) < 4 * (ce0 - ce1).std() / math.sqrt(len(z))
    torch.testing.assert_close(p0, p1)


def losses_again(
    sde: LinearSDE,
    score: MixedNormalScore,
    z: Tensor,
    likelihood: Weighting,
    proposal: TimeProposal,
    control: NormalControlVariate | None,
) -> Tensor:
    """The surrogate for a fixed seed, whose gradient reaches the prior."""
    return prior_losses(
        sde,
        score,
        z.clone().requires_grad_(),
        weighting_p=likelihood,
        proposal_p=proposal,
        likelihood=likelihood,
        control_variate=control,
        rng=torch.Generator().manual_seed(3),
    ).surrogate
