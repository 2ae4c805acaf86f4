"""Likelihood of a dataset: every number with its bound, estimator and standard error.

All figures are nats an image (padding excluded); :func:`bits_per_dim` converts. Binary data are
evaluated on one fixed seeded Bernoulli draw per image (:func:`lsgm.data.fixed_binarisation`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lsgm.data import DataSpec, ImageDataset, fixed_binarisation, preprocess
from lsgm.divergence import make_divergence
from lsgm.likelihood import ode_log_density
from lsgm.models import LSGM, NELBO, VAEModel
from vae.objective import bits_per_dim, importance_weighted_bound, standard_normal_log_prob

__all__ = [
    "Estimate",
    "LikelihoodReport",
    "evaluation_batches",
    "iw_bound",
    "nelbo",
    "normal_nelbo",
    "ode_nelbo",
]


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error, both in nats an image (None: a single image)."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From one value per image, ``(N,)``."""
        spread = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(values.mean().item(), spread)


@dataclass(frozen=True)
class LikelihoodReport:
    """One bound on the negative log-likelihood of a dataset.

    ``bound`` and ``estimator`` say in words what the number is; ``settings`` holds everything
    needed to repeat it.
    """

    bound: str
    estimator: str
    nats: Estimate
    bits_per_dim: float
    reconstruction: Estimate | None
    kl: Estimate | None
    num_images: int
    seconds: float
    settings: dict[str, Any]
    per_image: Tensor
    """``(N,)`` nats; two reports on the same images compare in pairs."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the values per image."""
        values = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name != "per_image"
        }
        return {
            key: asdict(value) if isinstance(value, Estimate) else value
            for key, value in values.items()
        }


def evaluation_batches(
    dataset: ImageDataset,
    spec: DataSpec,
    *,
    num_bits: int = 8,
    batch_size: int = 250,
    limit: int | None = None,
    binarisation_seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Batches ``(b, C, R, R)`` in [-1, 1] of the first ``limit`` images, binarised once and for all
    where the data are binary.
    """
    fixed = fixed_binarisation(dataset, binarisation_seed) if spec.binary else dataset
    count = len(fixed) if limit is None else min(limit, len(fixed))
    for index in torch.arange(count).split(batch_size):
        yield preprocess(fixed.batch(index).to(device), spec, num_bits)


@dataclass
class _Evaluation:
    """Per-image values of a pass over the data."""

    total: list[Tensor]
    reconstruction: list[Tensor]
    kl: list[Tensor]

    def report(
        self, model: VAEModel, bound: str, estimator: str, start: float, **settings: Any
    ) -> LikelihoodReport:
        per_image = torch.cat(self.total)
        nats = Estimate.of(per_image)
        return LikelihoodReport(
            bound=bound,
            estimator=estimator,
            nats=nats,
            bits_per_dim=float(bits_per_dim(nats.mean, model.spec.num_dims)),
            reconstruction=Estimate.of(torch.cat(self.reconstruction))
            if self.reconstruction
            else None,
            kl=Estimate.of(torch.cat(self.kl)) if self.kl else None,
            num_images=sum(map(len, self.total)),
            seconds=time.perf_counter() - start,
            settings=settings,
            per_image=per_image,
        )


@torch.no_grad()
def nelbo(
    model: VAEModel,
    batches: Iterator[Tensor],
    *,
    samples: int = 1,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """Negative ELBO over ``batches``, the mean of ``samples`` posterior draws per image (and of one
    diffusion time per draw).

    Under a score-based prior the cross-entropy is the variational bound, importance-sampled in
    time; its standard error includes the scatter from the times.
    """
    start = time.perf_counter()
    rng = torch.Generator().manual_seed(seed)
    values = _Evaluation([], [], [])
    for x in batches:
        draws: list[NELBO] = [model.nelbo(x, rng) for _ in range(samples)]
        values.total.append(torch.stack([d.total for d in draws]).mean(0).cpu())
        values.reconstruction.append(torch.stack([d.reconstruction for d in draws]).mean(0).cpu())
        values.kl.append(torch.stack([d.kl for d in draws]).mean(0).cpu())
        if callback:
            callback(len(x))
    prior = "score-based prior" if isinstance(model, LSGM) else "N(0, I) prior"
    estimator = (
        "importance-sampled variational cross-entropy"
        if isinstance(model, LSGM)
        else "analytic prior"
    )
    return values.report(
        model, f"NELBO, {prior}", estimator, start, samples=samples, seed=seed, **settings
    )


def normal_nelbo(model: LSGM, batches: Iterator[Tensor], **options: Any) -> LikelihoodReport:
    """:func:`nelbo` of an LSGM's own VAE under N(0, I): what the same weights give without the
    score-based prior.
    """
    return nelbo(VAEModel(model.vae, model.spec, model.vae_config), batches, **options)


@torch.no_grad()
def iw_bound(
    model: VAEModel,
    batches: Iterator[Tensor],
    *,
    k: int,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """Importance-weighted bound with ``k`` posterior draws under the prior N(0, I) (1509.00519, eq.
    8).

    Of an LSGM this evaluates its VAE under N(0, I): exp of the noisy cross-entropy estimate would
    bias the bound.
    """
    start = time.perf_counter()
    rng = torch.Generator().manual_seed(seed)
    values = _Evaluation([], [], [])
    for x in batches:
        log_w = torch.stack([-VAEModel.nelbo(model, x, rng).total for _ in range(k)])
        values.total.append(-importance_weighted_bound(log_w).cpu())
        if callback:
            callback(len(x))
    return values.report(
        model, f"IW-{k}, N(0, I) prior", "analytic prior", start, k=k, seed=seed, **settings
    )


@torch.no_grad()
def ode_nelbo(
    model: LSGM,
    batches: Iterator[Tensor],
    *,
    t_end: float = 1e-5,
    tolerance: float = 1e-5,
    divergence: str = "hutchinson",
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """NELBO with ``-log p(z)`` from the probability-flow ODE (2106.05931, Sec. 5; 2011.13456, App.
    D.2), one draw per image.
    """
    start = time.perf_counter()
    rng = torch.Generator().manual_seed(seed)
    values = _Evaluation([], [], [])
    evaluations = []
    for x in batches:
        output = model.vae(x, rng=rng)
        eps = output.posterior.eps
        density = ode_log_density(
            model.sde,
            model.score,
            model.vae.concat_top(eps).float(),
            divergence=make_divergence(divergence),
            t_end=t_end,
            rtol=tolerance,
            atol=tolerance,
            rng=rng,
        )
        rest = sum(
            standard_normal_log_prob(e).double().flatten(1).sum(1)
            for e in eps[model.vae.num_groups_per_scale :]
        )
        log_q = sum(part.double().flatten(1).sum(1) for part in output.posterior.log_q)
        reconstruction = model.vae.reconstruction(output, x).double()
        kl = log_q - density.log_prob.double() - rest
        values.total.append((reconstruction + kl).cpu())
        values.reconstruction.append(reconstruction.cpu())
        values.kl.append(kl.cpu())
        evaluations.append(density.nfe)
        if callback:
            callback(len(x))
    return values.report(
        model,
        "NELBO, score-based prior by its ODE",
        f"{divergence} divergence, dopri5",
        start,
        t_end=t_end,
        tolerance=tolerance,
        nfe=sum(evaluations) / max(len(evaluations), 1),
        seed=seed,
        **settings,
    )
