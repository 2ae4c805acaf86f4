r"""Objectives of the latent prior: one scalar whose gradient is right for prior and VAE alike
(arXiv 2106.05931 section 3.2 and algorithms 1-3).

With ``z_t = m(t) z_0 + sigma(t) eps`` every objective of the paper is an expectation of a weighted
squared error

    E_{t, eps} [ w(t) / density(t) * || eps_hat(z_t, t) - eps ||^2 ].

Two of them are needed at each step: the *prior's* (weighting ``w_p``), which trains the parameters
of ``eps_hat``, and the *VAE's* cross-entropy (always the likelihood weighting
``w_q = g^2 / (2 sigma^2)``), which trains the encoder through ``z_0``. They are not the same
function, so the gradient of a plain sum would be wrong for both. The functions here return a scalar
for which one ordinary ``backward()`` is exactly right for both:

* where the VAE's weights are one number per image, both objectives scale the same residual, and the
  gradient that leaves the prior's input is rescaled by ``w_q / w_p`` (:func:`scale_gradient`): no
  extra network evaluation;
* otherwise the VAE's gradient with respect to ``z_0`` is computed first and injected
  (:func:`inject_gradient`).

A mixed-Normal prior is nearly N(0, I), and the cross-entropy to N(0, I) is known in closed form.
Its one-sample estimate from the same noise and time is therefore an excellent control variate
(:class:`NormalControlVariate`): what is left to estimate is the difference that the network makes,
of the order of the mixing coefficient. It leaves every expectation as it is.

>>> from lsgm.objectives import NormalControlVariate, prior_losses
>>> from lsgm.sde import VPSDE
>>> from lsgm.times import make_proposal
>>> from lsgm.weighting import make_weighting
>>> sde, likelihood = VPSDE(), make_weighting("likelihood")
>>> z0 = torch.randn(512, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
>>> losses = prior_losses(
...     sde,
...     sde.normal_component,  # the best noise prediction for latents from N(0, I)
...     z0,
...     weighting_p=likelihood,
...     proposal_p=make_proposal("importance", sde, likelihood),
...     likelihood=likelihood,
...     control_variate=NormalControlVariate.of(sde),
...     rng=torch.Generator().manual_seed(1),
... )
>>> losses.surrogate.backward()  # for the encoder, through z0, and for the prior's parameters
>>> tuple(z0.grad.shape)
(512, 3)
>>> round(losses.cross_entropy.mean().item(), 1)  # exactly (1 + ln(2 pi)) / 2 = 1.42 nats a value
1.4
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsgm.score import EpsFn
from lsgm.sde import LinearSDE
from lsgm.tensors import expand_like, sum_except_batch
from lsgm.times import TimeProposal, TimeSample
from lsgm.weighting import Weighting
from vae.random import Rng, randn

__all__ = [
    "CrossEntropy",
    "NormalControlVariate",
    "PriorLosses",
    "denoising_score_matching",
    "endpoint_cross_entropy",
    "inject_gradient",
    "latent_cross_entropy",
    "prior_losses",
    "scale_gradient",
]

Balance = float | Callable[[Tensor], Tensor]
"""Factor on the cross-entropy as the VAE sees it; a callable maps weighted errors ``(B, C, H, W)``
to factors that broadcast.
"""


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor.to(grad.dtype), None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """Return ``x`` unchanged; its gradient is multiplied by ``factor`` (broadcastable to ``x``)."""
    return _ScaleGradient.apply(x, factor)


def inject_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Return a scalar zero whose gradient with respect to ``x`` is ``gradient`` (same shape as
    ``x``).
    """
    inner = (x * gradient.detach()).sum()
    return inner - inner.detach()


def denoising_score_matching(
    sde: LinearSDE, eps_fn: EpsFn, x0: Tensor, t: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor]:
    """Squared error of the noise prediction, per element (arXiv 2011.13456 eq. 7).

    Args:
        sde: The forward SDE.
        eps_fn: The noise prediction.
        x0: Data, ``(B, *shape)``.
        t: Times, ``(B,)``.
        eps: Noise, ``(B, *shape)``.

    Returns:
        ``x_t`` and ``(eps_fn(x_t, t) - eps)^2``, both ``(B, *shape)``.
    """
    x_t = sde.perturb(x0, t, eps)
    return x_t, (eps_fn(x_t, t).float() - eps).square()


def endpoint_cross_entropy(sde: LinearSDE, x0: Tensor) -> Tensor:
    r"""The two ends of the variational bound that the integral over ``[time_eps, 1]`` leaves out.

    With ``x_eps`` the state at ``time_eps``, and ``m``, ``v`` the kernel's moments there:

    * ``-log p(x_0 | x_eps)`` in expectation over ``x_eps``, with the decoder
      ``N(m x_eps / (m^2 + v), v / (m^2 + v))``, the exact posterior for data from N(0, I). With
      unit second moment of ``x_0`` and ``m^2 + v = 1`` this is the constant
      ``(1 + ln(2 pi v)) / 2`` per element that the paper uses (arXiv 2106.05931 eq. 8); in general
      only this form gives a bound.
    * ``KL( q(x_1 | x_0) || p(x_1) )``, which the paper takes as zero.

    Args:
        sde: The forward SDE, with variance at ``time_eps``.
        x0: Data, ``(B, *shape)``.

    Returns:
        ``(B,)`` nats, float64.
    """
    # float64: the terms are large, of both signs, and divided by the small variance at time_eps
    ends = torch.tensor([sde.time_eps, 1.0], dtype=torch.float64, device=x0.device)
    mean, var = sde.mean_coef(ends), sde.var(ends)
    size = x0[0].numel()
    second_moment = sum_except_batch(x0.double().square())
    gain = mean[0] / (mean[0].square() + var[0])
    decoder_var = var[0] / (mean[0].square() + var[0])
    # E || x_0 - gain x_eps ||^2 over x_eps ~ N(m x_0, v)
    squared = (1 - gain * mean[0]).square() * second_moment + gain.square() * var[0] * size
    decoder = 0.5 * (size * torch.log(2 * math.pi * decoder_var) + squared / decoder_var)
    ratio = var[1] / sde.prior_var
    prior = 0.5 * (
        mean[1].square() * second_moment / sde.prior_var + size * (ratio - 1 - torch.log(ratio))
    )
    return decoder + prior


@dataclass(frozen=True)
class NormalControlVariate:
    r"""The likelihood-weighted error of the Normal component, and its exact expectation.

    With ``N(z_t, t) = c(t) z_t`` the expectation over noise and time of ``w_q / density * (N -
    eps)^2`` is ``slope z_0^2 + offset`` an element, where ``slope = int w_q c^2 m^2 dt`` and
    ``offset = int w_q (c sigma - 1)^2 dt`` over ``[time_eps, 1]``.
    """

    sde: LinearSDE
    slope: float
    offset: float

    @classmethod
    def of(cls, sde: LinearSDE) -> NormalControlVariate:
        r"""Both integrals in closed form, for every linear SDE.

        The kernel ``q_t = N(m z_0, v)`` and ``p_t = N(0, T)`` with ``T`` the total variance follow
        the same diffusion, so (2106.05931, theorem 1) ``d/dt KL(q_t || p_t)`` is minus the
        integrand, and what is left of ``KL = (m^2 z_0^2 / T + v / T - 1 - ln(v / T)) / 2`` are
        its values at the two ends. No shape of ``v(t)`` is assumed: sub-VP's falls at first where
        ``sigma2_0 > 0``.

        Raises:
            ValueError: The kernel has no variance at ``time_eps``, where the integral diverges.
        """
        ends = torch.tensor([sde.time_eps, 1.0], dtype=torch.float64)
        signal, total = sde.mean_coef(ends).square(), sde.total_var(ends)
        if not (sde.var(ends) > 0).all():
            raise ValueError(
                f"the kernel has no variance at t = {sde.time_eps}, so no finite bound"
            )
        slope = 0.5 * signal / total
        # v / T = 1 - share, and v / T - 1 - ln(v / T) without cancellation where v is close to T
        share = (1 - sde.sigma2_0) * signal / total
        ratio = torch.where(share < 0.5, torch.log1p(-share), (sde.var(ends) / total).log())
        offset = -0.5 * (share + ratio)
        return cls(sde, (slope[0] - slope[1]).item(), (offset[0] - offset[1]).item())

    def expected(self, x0: Tensor) -> Tensor:
        """Expectation an element, ``(B, *shape)``."""
        return self.slope * x0.square() + self.offset

    def error(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The squared error of the Normal component for one draw, ``(B, *shape)``, not weighted."""
        x_t = self.sde.perturb(x0, t, eps)
        return (self.sde.normal_component(x_t, t) - eps).square()


@dataclass(frozen=True)
class CrossEntropy:
    """One-sample estimate of ``CE(q(z_0) || p(z_0))``.

    Attributes:
        elements: ``(B, *shape)`` nats, the weighted squared error plus the constant per element
            (arXiv 2106.05931 eq. 8).
        bound: ``(B,)`` nats, the same integral with :func:`endpoint_cross_entropy` in place of the
            constant.
        sampled: ``(B,)`` nats, the part of both that the drawn time decides (all of the integral
            but what a control variate knows).
    """

    elements: Tensor
    bound: Tensor
    sampled: Tensor


def latent_cross_entropy(
    sde: LinearSDE,
    eps_fn: EpsFn,
    z0: Tensor,
    times: TimeSample,
    likelihood: Weighting,
    rng: Rng = None,
    *,
    control_variate: NormalControlVariate | None = None,
) -> CrossEntropy:
    """Unbiased estimate of the cross-entropy of ``z0`` under the diffusion prior, for evaluation.

    Args:
        sde: The forward SDE.
        eps_fn: The noise prediction.
        z0: Latents, ``(B, *shape)``.
        times: One time per image.
        likelihood: The likelihood weighting.
        rng: Draws the noise.
        control_variate: For a prior close to N(0, I).
    """
    eps = randn(z0.shape, rng, device=z0.device)
    t = times.t.to(z0)
    _, error = denoising_score_matching(sde, eps_fn, z0, t, eps)
    weight = expand_like((likelihood(sde, times.t) * times.inverse_density).to(error), error)
    if control_variate is None:
        sampled = weighted = weight * error
    else:
        sampled = weight * (error - control_variate.error(z0, t, eps))
        weighted = sampled + control_variate.expected(z0)
    constant = sde.cross_entropy_constant()
    return CrossEntropy(
        elements=weighted + constant,
        bound=sum_except_batch(weighted).double() + endpoint_cross_entropy(sde, z0),
        sampled=sum_except_batch(sampled).double(),
    )


@dataclass(frozen=True)
class PriorLosses:
    """What the prior contributes to one training step.

    Attributes:
        surrogate: Scalar; its gradient with respect to the prior's parameters is that of ``prior``
            (its elements times ``balance`` where that is asked for), and with respect to ``z_0``
            that of ``mean_b sum_e balance * cross_entropy`` (zero when ``z_0`` carries no graph).
            Its value means nothing.
        prior: Scalar, mean over images of the prior's objective (detached).
        cross_entropy: ``(B, *shape)`` nats per element with the likelihood weighting (detached).
    """

    surrogate: Tensor
    prior: Tensor
    cross_entropy: Tensor


def _latent_gradient(
    sde: LinearSDE,
    eps_fn: EpsFn,
    z0: Tensor,
    t: Tensor,
    eps: Tensor,
    cotangent: Callable[[Tensor], Tensor],
    *,
    keep_graph: bool = False,
    loss_scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``(zero with the gradient of mean_b sum factor * error with respect to z0, error)``, with
    ``factor = cotangent(error)``.

    ``error`` ``(B, *shape)`` is attached to the network's parameters (when ``keep_graph``) and
    never to ``z0``.
    """
    leaf = z0.detach().requires_grad_()
    _, error = denoising_score_matching(sde, eps_fn, leaf, t, eps)
    # The loss scaler's factor, so that fp16 activations' gradients do not underflow here either: an
    # overflow reaches z0's parameters, where the scaler sees it and halves both.
    scaled = loss_scale * (cotangent(error.detach()) * error).sum() / len(z0)
    (gradient,) = torch.autograd.grad(scaled, leaf, retain_graph=keep_graph)
    return inject_gradient(z0, gradient / loss_scale), error


def prior_losses(
    sde: LinearSDE,
    eps_fn: EpsFn,
    z0: Tensor,
    *,
    weighting_p: Weighting,
    proposal_p: TimeProposal,
    likelihood: Weighting,
    proposal_q: TimeProposal | None = None,
    balance: Balance = 1.0,
    eps_fn_q: EpsFn | None = None,
    control_variate: NormalControlVariate | None = None,
    stratified: bool = False,
    balance_prior: bool = False,
    loss_scale: Tensor | float = 1.0,
    rng: Rng = None,
) -> PriorLosses:
    """Prior objective and cross-entropy of ``z0``, with the right gradient for prior and VAE.

    Args:
        sde: The forward SDE.
        eps_fn: The noise prediction, whose parameters the prior's objective trains.
        z0: Latents, ``(B, *shape)``; the VAE's gradient goes through them if they carry a graph.
        weighting_p: Weighting of the prior's objective.
        proposal_p: Times of the prior's objective.
        likelihood: The likelihood weighting.
        proposal_q: Times of the VAE's cross-entropy (algorithm 2 of arXiv 2106.05931, and the form
            of algorithm 1 with two draws), or None to share the prior's draw (algorithm 3).
        balance: Factor on the cross-entropy as the VAE sees it: a number (the KL coefficient), or a
            callable that maps the weighted errors ``(B, *shape)`` to factors that broadcast to
            them.
        eps_fn_q: Another network for the VAE's term (the running average of the prior).
        control_variate: For the cross-entropy and its gradient; the prior's objective does not
            change.
        stratified: Spread the times of the batch evenly.
        balance_prior: The prior's gradient gets the factor ``balance`` too, if prior and VAE share
            draw and network: with one weighting it is then the gradient of the VAE's loss, which
            the published joint step gives it.
        loss_scale: Factor of the backward pass that is made here, the one that the caller's own
            pass will have.
        rng: Draws the noise and then the times, in that order.
    """
    trains_encoder = z0.requires_grad
    shared = proposal_q is None and eps_fn_q is None
    balance_prior = balance_prior and shared
    n = len(z0)
    constant = sde.cross_entropy_constant()

    def draw(proposal: TimeProposal) -> tuple[Tensor, TimeSample]:
        eps = randn(z0.shape, rng, device=z0.device)
        return eps, proposal.sample(n, rng, stratified=stratified, device=z0.device)

    def weight(weighting: Weighting, times: TimeSample) -> Tensor:
        return expand_like((weighting(sde, times.t) * times.inverse_density).to(z0), z0)

    # The VAE's term comes first, so that a shared draw and one of its own take the same noise.
    eps, times = draw(proposal_p if shared else proposal_q or proposal_p)
    t = times.t.to(z0)
    weight_q = weight(likelihood, times)
    network_q = eps_fn_q or eps_fn
    control = z0.new_zeros(())
    if control_variate is not None:
        control = control_variate.expected(z0) - weight_q * control_variate.error(z0, t, eps)

    def factor(error: Tensor) -> Tensor | float:
        return balance(weight_q * error + control.detach()) if callable(balance) else balance

    injected = z0.new_zeros(())
    if trains_encoder and (callable(balance) or not shared):
        injected, error = _latent_gradient(
            sde,
            network_q,
            z0,
            t,
            eps,
            lambda error: weight_q * factor(error),
            keep_graph=shared,
            loss_scale=loss_scale,
        )
    elif trains_encoder:
        assert not callable(balance)
        scale = 1.0 if balance_prior else balance  # the prior's loss has the factor already
        source = scale_gradient(z0, scale * weight_q / weight(weighting_p, times))
        _, error = denoising_score_matching(sde, eps_fn, source, t, eps)
    else:
        with torch.set_grad_enabled(shared and torch.is_grad_enabled()):
            _, error = denoising_score_matching(sde, network_q, z0, t, eps)
    if trains_encoder and control_variate is not None:
        share = (factor(error.detach()) * control).sum() / n
        injected = injected + share - share.detach()
    cross_entropy = (weight_q * error + control).detach() + constant
    if not shared:  # z0 is detached: its gradient has been injected above
        eps, times = draw(proposal_p)
        _, error = denoising_score_matching(sde, eps_fn, z0.detach(), times.t.to(z0), eps)
    weighted = weight(weighting_p, times) * error
    prior = weighted.sum() / n
    trained = (factor(error.detach()) * weighted).sum() / n if balance_prior else prior
    return PriorLosses(trained + injected, prior.detach(), cross_entropy)
