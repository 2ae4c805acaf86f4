r"""Conditional generation with an unconditional model: hooks that any solver takes, and guidance.

*Inpainting.* Let ``P`` be an orthogonal projector and ``P x_0`` be known. The kernel's noise is
isotropic, so ``P x_t`` given ``x_0`` is ``m P x_0 + sigma P e``, whatever else is unknown.
:class:`ProjectionInpainting` replaces that part of the state after every step (arXiv 2011.13456
appendix I.2). A mask of pixels or latent entries is one such projector; the grey component of a
colour image is another (colourisation, ibid. appendix I.3).

This is approximate: the unknown part moves by the score of the joint law given *one* draw of the
known part at that time. Corrector steps, or annealed Langevin dynamics, let the unknown part come
to rest against the known one at every noise level, and since the last levels decide, make the law
of the result the conditional one in the limit of small last noise and many steps.

*Guidance.* With a classifier ``p(y | x_t)``, ``score(x_t | y) = score(x_t) + grad ln p(y | x_t)``,
that is ``eps - sigma grad ln p(y | x_t)`` (ibid. eq. 14, arXiv 2105.05233 algorithm 2). With a
network that takes the class, :func:`classifier_free` extrapolates from its unconditional to its
conditional prediction (arXiv 2207.12598).

>>> from lsgm.conditioning import ProjectionInpainting, mask_projector
>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers import make_grid, make_solver
>>> sde, rng = VPSDE(), torch.Generator().manual_seed(0)
>>> mask = torch.tensor([True, False])  # the first of two values is known
>>> hook = ProjectionInpainting(sde, torch.full((3, 2), 0.5), mask_projector(mask))
>>> start, times = sde.prior_sample((3, 2), rng), make_grid("time", sde, 20, 1e-3)
>>> x = make_solver("ancestral").solve(sde, sde.normal_component, start, times, rng, [hook]).x
>>> x[:, 0]
tensor([0.5000, 0.5000, 0.5000])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lsgm.sde import LinearSDE
from lsgm.solvers import EpsFn, Hook
from lsgm.tensors import expand_like
from vae.random import Rng, rand, randn

__all__ = [
    "ClassifierGuidance",
    "ConditionalEpsFn",
    "ProjectionInpainting",
    "Projector",
    "channel_projector",
    "classifier_free",
    "colour_basis",
    "grey_projector",
    "hide_labels",
    "mask_projector",
]

Projector = Callable[[Tensor], Tensor]
"""An orthogonal projector: ``(B, *shape)`` -> ``(B, *shape)``, linear, idempotent, symmetric."""


def mask_projector(mask: Tensor) -> Projector:
    """Keep the entries where ``mask`` (bool, broadcastable to ``(B, *shape)``) is true.

    Raises:
        ValueError: ``mask`` is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool, got {mask.dtype}")
    return lambda x: x * mask.to(x)


def colour_basis(channels: int = 3) -> Tensor:
    """An orthogonal ``(C, C)`` matrix, float64, whose first row is the grey component ``1 /
    sqrt(C)`` (arXiv 2011.13456 appendix I.3).
    """
    start = torch.eye(channels, dtype=torch.float64)
    start[:, 0] = 1
    basis = torch.linalg.qr(start)[0].T
    return basis * basis[0].sum().sign()


def channel_projector(rows: Tensor) -> Projector:
    """Keep the components along orthonormal ``rows (K, C)`` in the channels of ``(B, C, ...)``.

    Raises:
        ValueError: The rows are not orthonormal.
    """
    rows = rows.double()
    if not torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-9):
        raise ValueError("the rows of a channel projector must be orthonormal")
    matrix = rows.T @ rows
    return lambda x: torch.einsum("dc,bc...->bd...", matrix.to(x), x)


def grey_projector() -> Projector:
    """Keep the mean over the channels of ``(B, C, ...)``: what a grey image knows of a colour
    one.
    """
    return lambda x: x.mean(1, keepdim=True).expand_as(x)


class ProjectionInpainting(Hook):
    """Hold the part ``P x_0`` of the result that is known: with the noise of each time on the way,
    exactly in the result.

    Args:
        sde: The SDE that the solver runs.
        known: ``(B, *shape)``; only its projection matters.
        projector: The orthogonal projector ``P``.
    """

    def __init__(self, sde: LinearSDE, known: Tensor, projector: Projector) -> None:
        self.sde = sde
        self.known = known
        self.projector = projector

    def project(self, x_t: Tensor, t: Tensor, rng: Rng) -> Tensor:
        noise = randn(x_t.shape, rng, device=x_t.device, dtype=self.known.dtype)
        return self._replaced(x_t, self.sde.perturb(self.known.to(x_t), t, noise.to(x_t)))

    def finish(self, x: Tensor) -> Tensor:
        return self._replaced(x, self.known.to(x))

    def _replaced(self, x: Tensor, target: Tensor) -> Tensor:
        # In this order a mask's known entries are copied bit by bit.
        return self.projector(target) + (x - self.projector(x))


class ClassifierGuidance(Hook):
    """Steer towards what a noise-conditional classifier sees.

    Args:
        sde: The SDE that the solver runs.
        log_prob: ``x_t (B, *shape), t (B,)`` -> ``ln p(y | x_t) (B,)`` of the wanted ``y``, in
            nats, differentiable in ``x_t``; rows must not depend on each other.
        scale: 1 samples the conditional law, larger values sharpen it.
    """

    def __init__(
        self, sde: LinearSDE, log_prob: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0
    ) -> None:
        self.sde = sde
        self.log_prob = log_prob
        self.scale = scale

    def adjust_eps(self, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_prob(x, t).sum(), x)
        sigma = self.sde.var(t.double()).sqrt()
        return eps - self.scale * expand_like(sigma, eps) * gradient.to(eps)


class ConditionalEpsFn(Protocol):
    """A noise prediction given classes: ``x_t (B, *shape)``, ``t (B,)``, ``labels (B,)`` int64 (or
    None: no class) -> ``eps (B, *shape)``.
    """

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None, /) -> Tensor: ...


def classifier_free(eps_fn: ConditionalEpsFn, labels: Tensor, scale: float = 1.0) -> EpsFn:
    """``eps(x) + scale (eps(x | y) - eps(x))`` as a noise prediction for a solver.

    ``scale`` is 1 for the conditional law and 0 for the unconditional one, each at one evaluation;
    others take two, which the solver counts as one call (``1 + w`` in arXiv 2207.12598 eq. 6).

    Args:
        eps_fn: The conditional network.
        labels: The wanted class of each row ``(B,)``, int64.
        scale: Strength of the guidance.
    """

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        if scale == 1:
            return eps_fn(x_t, t, labels)
        unconditional = eps_fn(x_t, t, None)
        if scale == 0:
            return unconditional
        return torch.lerp(unconditional, eps_fn(x_t, t, labels), scale)

    return guided


def hide_labels(labels: Tensor, num_classes: int, fraction: float, rng: Rng = None) -> Tensor:
    """``labels (B,)`` with about ``fraction`` of them replaced by ``num_classes``, the class of no
    class, so that one network learns both laws (arXiv 2207.12598 algorithm 1).
    """
    hidden = rand(labels.shape, rng, device=labels.device) < fraction
    return torch.where(hidden, num_classes, labels)
