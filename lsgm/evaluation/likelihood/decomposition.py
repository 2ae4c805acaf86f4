"""Where the nats of a NELBO are: reconstruction and the KL of each latent group; and how the bound
tightens with the number of importance weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lsgm.evaluation.likelihood.bounds import Estimate, with_generators
from lsgm.evaluation.likelihood.importance import convergence, iw_of_groups
from lsgm.models.latent import LSGM, VAEModel
from lsgm.tensors import sum_except_batch
from vae.objective import bounds, elbo
from vae.random import Rng

__all__ = [
    "BoundCurve",
    "Decomposition",
    "Term",
    "bound_curves",
    "decompose",
]


@dataclass(frozen=True)
class Term:
    """One part of the NELBO, nats an image: ``name`` and the ``prior`` it is taken under, in
    words.
    """

    name: str
    prior: str
    nats: Estimate


@dataclass(frozen=True)
class Decomposition:
    """Parts of the NELBO of ``num_images`` images, one posterior draw each; they add up to
    ``total``.

    ``under_normal``: of an LSGM, the groups of the coarsest scale under N(0, I): what each would
    cost without the score-based prior, which takes them together.
    """

    terms: tuple[Term, ...]
    under_normal: tuple[Term, ...]
    total: Estimate
    num_images: int
    estimator: str
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def decompose(model: VAEModel, batches: Iterable[Tensor], *, seed: int = 0) -> Decomposition:
    """The parts of the one-draw NELBO of ``model`` over ``batches`` ``(b, C, R, R)`` in [-1, 1].

    The KL of a group is ``log q - log p`` at the draw. An LSGM's prior is one density on all groups
    of the coarsest scale: their KL is one number, with the variational cross-entropy of
    2106.05931, eq. 8, at one importance-sampled time an image.
    """
    reconstruction, groups, joint = [], [], []
    prior = model.diffusion
    coarse = 0 if prior is None else prior.state_groups
    for x, rng in with_generators(batches, seed):
        output = model.vae(x, rng=rng)
        parts = elbo(model.vae, output, x)
        reconstruction.append(parts.reconstruction.double().cpu())
        groups.append(parts.kl.double().cpu())
        if prior is not None:
            joint.append(_joint_kl(prior, output.posterior, rng).cpu())
    recon, kl = torch.cat(reconstruction), torch.cat(groups)
    terms = [Term("reconstruction", "-log p(x | z)", Estimate.of(recon))]
    normal = [
        Term(f"KL of group {i + 1}", "N(0, I)", Estimate.of(kl[:, i])) for i in range(kl.shape[1])
    ]
    total = recon + kl[:, coarse:].sum(1)
    estimator = "one posterior draw an image, analytic prior"
    if coarse:
        top = torch.cat(joint)
        total = total + top
        name = "KL of group 1" if coarse == 1 else f"KL of groups 1-{coarse}, together"
        terms.append(Term(name, "score-based prior", Estimate.of(top)))
        estimator = (
            "one posterior draw an image; score-based prior by the variational cross-entropy at "
            "one importance-sampled time"
        )
    return Decomposition(
        tuple(terms + normal[coarse:]),
        tuple(normal[:coarse]),
        Estimate.of(total),
        len(total),
        estimator,
        seed,
    )


def _joint_kl(model: LSGM, posterior: Any, rng: Rng) -> Tensor:
    """``log q - log p`` of the coarsest scale under the score-based prior: ``(B,)``, nats."""
    bound = model.prior_cross_entropy(model.vae.concat_top(posterior.eps).float(), rng).bound
    log_q = [sum_except_batch(part.double()) for part in posterior.log_q[: model.state_groups]]
    return bound + sum(log_q)


@dataclass(frozen=True)
class BoundCurve:
    """Importance-weighted bounds by number of draws, on the same images and nested draws.

    ``name``: bound and prior in words; ``k`` and ``nats`` go together.
    """

    name: str
    k: tuple[int, ...]
    nats: tuple[Estimate, ...]
    num_images: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def bound_curves(
    model: VAEModel, batches: Iterable[Tensor], *, k: Sequence[int], seed: int = 0, steps: int = 20
) -> tuple[BoundCurve, ...]:
    """IW-k bounds (1509.00519, eq. 8) of ``model`` on ``batches``: under its own prior, and of an
    LSGM also of its VAE under N(0, I). The largest ``k`` fixes the draws; a smaller one averages
    over groups of them. ``batches`` may be gone through twice.
    """
    ks = tuple(sorted(set(k)))
    weights = [
        bounds(model.vae, x, ks[-1], rng).log_weights.double().cpu()
        for x, rng in with_generators(batches, seed)
    ]
    log_w = torch.cat(weights, dim=1)
    num = log_w.shape[1]
    values = tuple(Estimate.of(iw_of_groups(log_w, n)) for n in ks)
    if model.diffusion is None:
        return (BoundCurve("IW-k, N(0, I) prior", ks, values, num, seed),)
    rows = convergence(model.diffusion, batches, k=ks, steps=(steps,), seed=seed)
    own = BoundCurve(
        f"IW-k, score-based prior, paths of {steps} steps",
        ks,
        tuple(row.nats for row in rows),
        num,
        seed,
    )
    return own, BoundCurve("IW-k of the same VAE, N(0, I) prior", ks, values, num, seed)
