r"""Objectives of score models in data space: denoising and sliced score matching.

Both estimate, up to a constant in the network, the mean squared error of the score at ``x_t``.
Written for the noise prediction ``eps_hat = -sigma score`` and scaled by NCSN's ``lambda(sigma) =
sigma^2`` (arXiv 1907.05600 eq. 5, 6) they are

* denoising (arXiv 1907.05600 eq. 5, with ``x_t = m x_0 + sigma eps``):
  ``sigma^2 ||score + (x_t - m x_0) / sigma^2||^2 = ||eps_hat - eps||^2``, which is
  :func:`lsgm.objectives.denoising_score_matching`;
* sliced (arXiv 1905.07088 eq. 7, 8), which needs no ``x_0``: ``2 sigma^2 (v^T (d score / dx) v +
  (v^T score)^2 / 2) + D``, with ``||score||^2`` in place of ``(v^T score)^2`` in the
  variance-reduced form, for random ``v`` of zero mean and unit covariance.

By Stein's identity ``E <eps_hat(x_t), eps> = sigma E div eps_hat(x_t)`` the three have the same
expectation for every network, so any :mod:`lsgm.weighting` and :mod:`lsgm.times` serves them all.
Ladders are the proposal :class:`lsgm.noise_ladder.LadderTimes` with the weight 1.

A network that predicts zero has the error ``D``, in expectation or, sliced, for every draw:

>>> from lsgm.score_matching import score_loss
>>> from lsgm.sde import VPSDE
>>> from lsgm.times import make_proposal
>>> from lsgm.weighting import make_weighting
>>> sde, weighting, rng = VPSDE(), make_weighting("unweighted"), torch.Generator().manual_seed(0)
>>> x0 = torch.randn(4, 5, generator=rng)
>>> found = score_loss(
...     sde,
...     lambda x_t, t: 0 * x_t,
...     x0,
...     weighting=weighting,
...     proposal=make_proposal("uniform", sde, weighting),
...     estimator="ssm_vr",
...     rng=rng,
... )
>>> found.error
tensor([5., 5., 5., 5.])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsgm.divergence import HutchinsonDivergence
from lsgm.objectives import denoising_score_matching
from lsgm.score import EpsFn
from lsgm.sde import LinearSDE
from lsgm.tensors import expand_like, sum_except_batch
from lsgm.times import TimeProposal, TimeSample
from lsgm.weighting import Weighting
from vae.random import Rng, randn

__all__ = ["ESTIMATORS", "ScoreLoss", "score_loss", "sliced_error", "sliced_objective"]

ESTIMATORS = ("dsm", "ssm", "ssm_vr")
"""Denoising; sliced; sliced with reduced variance."""


def sliced_objective(
    score_fn: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor, *, reduced: bool = True
) -> Tensor:
    """Sliced score matching of ``x`` itself: ``(B,)``, differentiable in the network.

    In expectation ``E ||score_fn(x) - score(x)||^2 / 2`` less a constant (arXiv 1905.07088 theorem
    1, for densities that vanish at infinity).

    Args:
        score_fn: ``(B, *shape)`` to ``(B, *shape)``, each image by itself.
        x: ``(B, *shape)``.
        probes: ``(P, B, *shape)``, the projections ``v`` that are averaged over, as drawn by
            :meth:`lsgm.divergence.HutchinsonDivergence.probe`.
        reduced: use ``||score||^2``, whose mean over ``v`` is known (SSM-VR), not ``(v^T
            score)^2``.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():  # an evaluation needs these derivatives too
        with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
            score = score_fn(x)
        curvature = x.new_zeros(len(x))
        squares = sum_except_batch(score.square()) if reduced else torch.zeros_like(curvature)
        for v in probes:
            along = sum_except_batch(score * v)
            (gradient,) = torch.autograd.grad(
                along.sum(), x, create_graph=True, materialize_grads=True
            )
            curvature = curvature + sum_except_batch(gradient * v) / len(probes)
            if not reduced:
                squares = squares + along.square() / len(probes)
    return curvature + 0.5 * squares


def sliced_error(
    sde: LinearSDE,
    eps_fn: EpsFn,
    x_t: Tensor,
    t: Tensor,
    probes: Tensor,
    *,
    reduced: bool = True,
) -> Tensor:
    """Estimate of ``||eps_fn(x_t, t) - eps||^2`` without ``eps``: ``(B,)``.

    ``x_t (B, *shape)`` are draws of the SDE's kernel at ``t (B,)`` with positive variance; the
    rest as in :func:`sliced_objective`. The mean over them is that of the denoising error; single
    values can be negative.
    """
    sigma = expand_like(sde.var(t).sqrt(), x_t)

    def score(x: Tensor) -> Tensor:
        return -eps_fn(x, t).to(x.dtype) / sigma

    scaled = sliced_objective(score, x_t, probes, reduced=reduced)
    return 2 * sde.var(t).to(scaled) * scaled + x_t[0].numel()


@dataclass(frozen=True)
class ScoreLoss:
    """One-sample estimate of a score model's objective.

    Attributes:
        loss: scalar; the mean over images of ``w(t) / density(t) * error``.
        error: ``(B,)``; the squared error of the noise, summed over an image's values: ``D`` for a
            network that predicts zero. Detached.
        times: where.
    """

    loss: Tensor
    error: Tensor
    times: TimeSample


def score_loss(
    sde: LinearSDE,
    eps_fn: EpsFn,
    x0: Tensor,
    *,
    weighting: Weighting,
    proposal: TimeProposal,
    estimator: str = "dsm",
    num_projections: int = 1,
    stratified: bool = False,
    rng: Rng = None,
) -> ScoreLoss:
    """The training objective of a score model on images ``x0 (B, *shape)``.

    NCSN's objective (arXiv 1907.05600 eq. 6, times two) is the weighting ``unweighted`` with
    :class:`lsgm.noise_ladder.LadderTimes`; score-SDE's (arXiv 2011.13456 eq. 7) with ``lambda =
    sigma^2`` is ``unweighted`` with uniform times; its likelihood form (arXiv 2101.09258) is
    ``likelihood``.

    Args:
        sde: the diffusion.
        eps_fn: predicts the noise.
        x0: data.
        weighting: of the squared error over time.
        proposal: draws the times.
        estimator: one of :data:`ESTIMATORS`.
        num_projections: of the sliced estimators, which differentiate the network twice for each.
        stratified: spread the times of the batch evenly.
        rng: draws the noise, then the times, then the projections.

    Raises:
        ValueError: unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
    eps = randn(x0.shape, rng, device=x0.device, dtype=x0.dtype)
    times = proposal.sample(len(x0), rng, stratified=stratified, device=x0.device)
    t = times.t.to(x0)
    if estimator == "dsm":
        _, elements = denoising_score_matching(sde, eps_fn, x0, t, eps)
        error = sum_except_batch(elements)
    else:
        probes = HutchinsonDivergence(num_probes=num_projections).probe(x0, rng)
        reduced = estimator == "ssm_vr"
        error = sliced_error(sde, eps_fn, sde.perturb(x0, t, eps), t, probes, reduced=reduced)
    weight = (weighting(sde, times.t) * times.inverse_density).to(error)
    return ScoreLoss((weight * error).mean(), error.detach(), times)
