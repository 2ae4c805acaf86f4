"""The variational bound of the hierarchical VAE: KL terms, their annealing and balancing, bounds.

All values are nats. ``B`` images, ``N`` latent groups, coarsest first.

>>> from vae.objective import importance_weighted_bound, kl_coefficient
>>> schedule = {"anneal_portion": 0.5, "const_portion": 0.1, "minimum": 0.1, "maximum": 1.0}
>>> [round(kl_coefficient(step, 100, **schedule), 2) for step in (0, 35, 100)]
[0.1, 0.55, 1.0]
>>> log_weights = torch.tensor([[-101.0], [-99.0]])  # two draws for one image
>>> round(importance_weighted_bound(log_weights).item(), 2)  # above their mean, -100
-99.57
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vae.distributions import HALF_LOG_2PI
from vae.hierarchical import HierarchicalVAE, Posterior, VAEOutput
from vae.random import Rng

__all__ = [
    "ELBO",
    "Bounds",
    "active_channels",
    "bits_per_dim",
    "bounds",
    "elbo",
    "importance_weighted_bound",
    "kl_balance_alpha",
    "kl_balance_weights",
    "kl_coefficient",
    "kl_per_channel",
    "kl_per_group",
    "standard_normal_log_prob",
]

Number = TypeVar("Number", Tensor, float)

BalanceRule = Literal["equal", "linear", "sqrt", "square"]


def standard_normal_log_prob(eps: Tensor) -> Tensor:
    """Log density of N(0, 1), elementwise."""
    return -0.5 * eps.square() - HALF_LOG_2PI


def kl_per_group(posterior: Posterior) -> Tensor:
    """One-sample estimate ``log q - log p`` of each group's KL: (B, N), may be negative."""
    return _group_sums(posterior.log_q) - _group_sums(
        [standard_normal_log_prob(eps) for eps in posterior.eps]
    )


def kl_per_channel(posterior: Posterior) -> Tensor:
    """Batch mean of the KL of each latent channel, summed over pixels: (N, L)."""
    terms = [
        (log_q - standard_normal_log_prob(eps)).sum((2, 3)).mean(0)
        for eps, log_q in zip(posterior.eps, posterior.log_q, strict=True)
    ]
    return torch.stack(terms)


def active_channels(kl_channels: Tensor, threshold: float = 0.1) -> Tensor:
    """Whether a latent channel carries information: mean KL above ``threshold`` nats. Any shape."""
    return kl_channels > threshold


def kl_coefficient(
    step: int,
    total_steps: int,
    *,
    anneal_portion: float,
    const_portion: float,
    minimum: float,
    maximum: float,
) -> float:
    """Weight of the KL term at ``step``: ``minimum``, then a linear rise to ``maximum``.

    Args:
        step: Global step, from 0.
        total_steps: Length of the training.
        anneal_portion: Length of the rise, as a fraction of the training.
        const_portion: Where it starts, as a fraction of the training.
        minimum: Weight before.
        maximum: Weight after.
    """
    start, length = const_portion * total_steps, anneal_portion * total_steps
    if length <= 0:
        return maximum if step >= start else minimum
    rise = minimum + (maximum - minimum) * (step - start) / length
    return max(min(rise, maximum), minimum)


def kl_balance_alpha(groups_per_scale: Sequence[int], rule: BalanceRule = "square") -> Tensor:
    """Constant share of each group in the balanced KL, (N,), smallest 1.

    A scale that is ``2^i`` times finer than the coarsest has ``4^i`` times the latents and, under
    the ``square`` rule, as much more KL to spend (NVAE, arXiv 2007.03898, App. A).

    Args:
        groups_per_scale: Groups at each scale, coarsest first.
        rule: How the share grows with the ratio r = 2^i: ``equal`` 1, ``linear`` r, ``sqrt``
            sqrt(r) or ``square`` r^2; all but ``equal`` are divided among the scale's groups.

    Raises:
        ValueError: If the rule does not exist.
    """
    powers = {"equal": 0.0, "linear": 1.0, "sqrt": 0.5, "square": 2.0}
    if rule not in powers:
        raise ValueError(f"rule must be one of {tuple(powers)}, got {rule!r}")
    shares = [
        2.0 ** (powers[rule] * i) / (1 if rule == "equal" else groups)
        for i, groups in enumerate(groups_per_scale)
        for _ in range(groups)
    ]
    alpha = torch.tensor(shares)
    return alpha / alpha.min()


def kl_balance_weights(
    kl: Tensor,
    groups_per_scale: Sequence[int],
    coefficient: float,
    *,
    rule: BalanceRule = "square",
    sync: bool = False,
) -> Tensor:
    """Weights (N,) of mean 1, without gradient, that press hardest on the groups with most KL.

    ``w_k ~ (E|KL_k| + 0.01) / alpha_k`` (NVAE, arXiv 2007.03898, App. A). They keep groups from
    falling idle while the KL is annealed; once the coefficient reaches 1 they are all 1.

    Args:
        kl: (B, N).
        groups_per_scale: Groups at each scale, coarsest first.
        coefficient: Weight of the KL term.
        rule: See :func:`kl_balance_alpha`.
        sync: Average over the batches of all processes, not of this one alone.
    """
    if coefficient >= 1:
        return kl.new_ones(kl.shape[1])
    size = kl.detach().abs().mean(0) + 0.01
    if sync and dist.is_available() and dist.is_initialized():
        dist.all_reduce(size)  # the weights do not depend on the common factor
    weights = size / kl_balance_alpha(groups_per_scale, rule).to(size)
    return weights / weights.mean()


@dataclass(frozen=True)
class ELBO:
    """Terms of the bound for one draw of the latents of each image, in nats.

    Attributes:
        reconstruction: -log p(x | eps), (B,).
        kl: log q - log p of each group, (B, N).
        log_q: log q(eps | x) over all groups, (B,).
        log_p: log p(eps) over all groups, (B,).
    """

    reconstruction: Tensor
    kl: Tensor
    log_q: Tensor
    log_p: Tensor

    @property
    def nelbo(self) -> Tensor:
        """Negative evidence lower bound, (B,)."""
        return self.reconstruction + self.kl.sum(1)

    @property
    def log_weight(self) -> Tensor:
        """Log importance weight ``log p(x, eps) - log q(eps | x)``, (B,)."""
        return -self.reconstruction - self.log_q + self.log_p


def elbo(vae: HierarchicalVAE, output: VAEOutput, x: Tensor) -> ELBO:
    """Terms of the bound under the prior N(0, I) for ``x``, where ``output = vae(x)``."""
    posterior = output.posterior
    log_q = _group_sums(posterior.log_q)
    log_p = _group_sums([standard_normal_log_prob(eps) for eps in posterior.eps])
    return ELBO(
        reconstruction=vae.reconstruction(output, x),
        kl=log_q - log_p,
        log_q=log_q.sum(1),
        log_p=log_p.sum(1),
    )


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """Lower bound on log p(x) from log weights (K, B): ``logmeanexp`` over K (arXiv 1509.00519)."""
    return torch.logsumexp(log_weights, dim=0) - math.log(log_weights.shape[0])


@dataclass(frozen=True)
class Bounds:
    """Bounds on -log p(x) per image from K draws, in nats.

    Attributes:
        nelbo: Negative ELBO averaged over the draws, (B,).
        importance_weighted: Importance-weighted bound, (B,); never above ``nelbo``.
        log_weights: (K, B).
    """

    nelbo: Tensor
    importance_weighted: Tensor
    log_weights: Tensor


@torch.no_grad()
def bounds(
    vae: HierarchicalVAE,
    x: Tensor,
    num_samples: int = 1,
    rng: Rng = None,
    noise: Sequence[Sequence[Tensor]] | None = None,
) -> Bounds:
    """Bounds under the prior N(0, I) from ``num_samples`` draws that share one encoder pass.

    Args:
        vae: In evaluation mode.
        x: (B, C, R, R) in [-1, 1].
        num_samples: ``K``.
        rng: Source of the noise.
        noise: The noise itself: for each draw, one tensor per group.
    """
    taps = vae.encoder(x)
    terms = [
        elbo(vae, vae.infer(taps, rng, noise[j] if noise is not None else None), x)
        for j in range(num_samples)
    ]
    log_weights = torch.stack([t.log_weight for t in terms])
    nelbo = torch.stack([t.nelbo for t in terms]).mean(0)
    return Bounds(nelbo, -importance_weighted_bound(log_weights), log_weights)


def bits_per_dim(nats: Number, dimensions: int) -> Number:
    """Convert ``nats`` per image of ``dimensions`` values."""
    return nats / (dimensions * math.log(2))


def _group_sums(parts: Sequence[Tensor]) -> Tensor:
    """Sum (B, L, h, w) per group over everything but the batch: (B, N)."""
    return torch.stack([part.flatten(1).sum(1) for part in parts], dim=1)
