"""Likelihood of a dataset: every number with its bound, estimator and standard error.

All figures are nats an image (padding excluded); :func:`bits_per_dim` converts. Binary data are
evaluated on one fixed seeded Bernoulli draw per image (:func:`lsgm.data.fixed_binarisation`).

Every image has its own generator (:class:`vae.random.RowGenerators`), seeded by the seed and the
image's index in the data, so that its number does not depend on the batch size, on the other images
or on the number of processes. Adaptive ODE solvers share their steps over a batch, which is seen
within their tolerance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lsgm.data import Batches, DataSpec, ImageDataset, fixed_binarisation, preprocess
from lsgm.divergence import make_divergence
from lsgm.evaluation.likelihood.tails import warn_of_tail
from lsgm.likelihood import ode_log_density, tolerance_convergence
from lsgm.models.base import Model
from lsgm.models.latent import LSGM, NELBO, VAEModel
from lsgm.models.results import Estimate
from lsgm.tensors import sum_except_batch
from vae.objective import bits_per_dim, importance_weighted_bound, standard_normal_log_prob
from vae.random import Rng, RowGenerators

__all__ = [
    "Estimate",
    "ImageBatches",
    "LikelihoodReport",
    "PosteriorDraw",
    "Values",
    "evaluation_batches",
    "iw_bound",
    "nelbo",
    "nelbo_values",
    "normal_nelbo",
    "ode_nelbo",
    "posterior_draw",
    "with_generators",
]


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
    rank: int = 0,
    world_size: int = 1,
) -> ImageBatches:
    """Batches of all images or of a random subset of ``limit`` of them
    (:func:`lsgm.data.random_subset`), binarised once and for all where the data are binary; of
    several processes each gets its part of every batch.
    """
    fixed = fixed_binarisation(dataset, binarisation_seed) if spec.binary else dataset
    batches = Batches(fixed, batch_size, train=False, limit=limit, rank=rank, world_size=world_size)
    return ImageBatches(batches, spec, num_bits, device)


@dataclass(frozen=True)
class ImageBatches:
    """Images as a model sees them: iterates over batches ``(b, C, R, R)`` in [-1, 1]."""

    batches: Batches
    spec: DataSpec
    num_bits: int = 8
    device: torch.device | str = "cpu"

    @property
    def index(self) -> Tensor:
        """Places of the images in the dataset, in the order in which they come: ``(N,)``."""
        return torch.cat([self.batches.index(0, s) for s in range(self.batches.steps_per_epoch)])

    def __iter__(self) -> Iterator[Tensor]:
        for _, images in self.batches.epoch():
            yield preprocess(images.to(self.device), self.spec, self.num_bits)


def with_generators(batches: Iterable[Tensor], seed: int) -> Iterator[tuple[Tensor, RowGenerators]]:
    """Each batch with the generators of its images: by their places in the dataset
    (:class:`ImageBatches`), else in the order in which they come.
    """
    index = batches.index.tolist() if isinstance(batches, ImageBatches) else None
    done = 0
    for x in batches:
        rows = range(done, done + len(x))
        yield x, RowGenerators.of(seed, rows if index is None else [index[i] for i in rows])
        done += len(x)


@dataclass
class Values:
    """Per-image values of a pass over the data, one tensor ``(b,)`` a batch."""

    total: list[Tensor] = field(default_factory=list)
    reconstruction: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)
    """Of every draw the part that its diffusion time decides, for
    :func:`lsgm.evaluation.likelihood.tails.tail_share`."""

    def report(
        self, model: Model, bound: str, estimator: str, start: float, **settings: Any
    ) -> LikelihoodReport:
        per_image = torch.cat(self.total)
        nats = Estimate.of(per_image)
        if self.sampled:
            settings["tail_share"] = warn_of_tail(torch.cat(self.sampled), estimator)
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


@dataclass(frozen=True)
class PosteriorDraw:
    """One draw of an LSGM's latents for a batch of images.

    ``top``: latents of the coarsest scale, ``(B, C, H, W)``; in nats, ``(B,)`` float64:
    ``reconstruction`` ``-log p(x | z)``, ``log_q`` ``log q(z | x)`` of all latents, ``log_p_rest``
    the log-density of the finer scales under N(0, I).
    """

    top: Tensor
    reconstruction: Tensor
    log_q: Tensor
    log_p_rest: Tensor

    def log_weight(self, log_p_top: Tensor) -> Tensor:
        """``log p(x, z) - log q(z | x)``, ``(B,)``, given the log-density of ``top``."""
        return log_p_top.double() + self.log_p_rest - self.reconstruction - self.log_q


def posterior_draw(model: LSGM, taps: Sequence[Tensor], x: Tensor, rng: Rng) -> PosteriorDraw:
    """Draw latents for ``x`` from the encoder's features ``taps``, which several draws share."""
    output = model.vae.infer(taps, rng)
    eps = output.posterior.eps
    reconstruction = model.vae.reconstruction(output, x).double()
    log_p_rest = torch.zeros_like(reconstruction)
    for e in eps[model.vae.num_groups_per_scale :]:
        log_p_rest = log_p_rest + sum_except_batch(standard_normal_log_prob(e).double())
    zero = torch.zeros_like(reconstruction)
    log_q = sum((sum_except_batch(part.double()) for part in output.posterior.log_q), zero)
    return PosteriorDraw(model.vae.concat_top(eps).float(), reconstruction, log_q, log_p_rest)


@torch.no_grad()
def nelbo_values(
    model: VAEModel,
    batches: Iterable[Tensor],
    *,
    samples: int = 1,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
) -> Values:
    """What :func:`nelbo` averages."""
    values = Values()
    for x, rng in with_generators(batches, seed):
        draws: list[NELBO] = [model.nelbo(x, rng) for _ in range(samples)]
        values.total.append(torch.stack([d.total for d in draws]).mean(0).cpu())
        values.reconstruction.append(torch.stack([d.reconstruction for d in draws]).mean(0).cpu())
        values.kl.append(torch.stack([d.kl for d in draws]).mean(0).cpu())
        values.sampled.extend(d.sampled.cpu() for d in draws if d.sampled is not None)
        if callback:
            callback(len(x))
    return values


def nelbo(
    model: VAEModel,
    batches: Iterable[Tensor],
    *,
    samples: int = 1,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """Negative ELBO over ``batches``, the mean of ``samples`` posterior draws per image (and of one
    diffusion time per draw).

    Under a score-based prior the cross-entropy is the variational bound, importance-sampled in
    time; its standard error includes the scatter from the times. The settings of the report hold
    ``tail_share``, the share of that scatter that a hundredth of the draws makes.

    Warns:
        HeavyTailWarning: If that share is so large that the mean is likely too low.
    """
    start = time.perf_counter()
    values = nelbo_values(model, batches, samples=samples, seed=seed, callback=callback)
    return values.report(
        model,
        model.bound_name,
        model.estimator,
        start,
        samples=samples,
        seed=seed,
        **settings,
    )


def normal_nelbo(model: LSGM, batches: Iterable[Tensor], **options: Any) -> LikelihoodReport:
    """:func:`nelbo` of an LSGM's own VAE under N(0, I): what the same weights give without the
    score-based prior.
    """
    return nelbo(model.under_normal(), batches, **options)


@torch.no_grad()
def iw_bound(
    model: VAEModel,
    batches: Iterable[Tensor],
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
    values, model = Values(), model.under_normal()
    for x, rng in with_generators(batches, seed):
        log_w = torch.stack([-model.nelbo(x, rng).total for _ in range(k)])
        values.total.append(-importance_weighted_bound(log_w).cpu())
        if callback:
            callback(len(x))
    return values.report(
        model, f"IW-{k}, N(0, I) prior", "analytic prior", start, k=k, seed=seed, **settings
    )


@torch.no_grad()
def ode_nelbo(
    model: LSGM,
    batches: Iterable[Tensor],
    *,
    t_end: float = 1e-5,
    tolerance: float = 1e-5,
    divergence: str = "hutchinson",
    probes: int = 1,
    check_images: int = 8,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """NELBO with ``-log p(z)`` from the probability-flow ODE (2106.05931, Sec. 5; 2011.13456, App.
    D.2), one draw per image.

    The settings of the report hold ``probe_variance``, the mean over images of the variance that
    one probe's log-density has (None for one probe, 0 for an exact divergence), and
    ``tolerance_change``, the root mean square difference in nats that a tenfold tolerance makes on
    the first ``check_images`` images (None where there are none).
    """
    start = time.perf_counter()
    options = {"num_probes": probes} if divergence == "hutchinson" else {}
    estimator = make_divergence(divergence, **options)
    values = Values()
    evaluations, variances = [], []
    first = torch.empty(0, *model.vae.top_shape, device=model.device)
    for x, rng in with_generators(batches, seed):
        draw = posterior_draw(model, model.vae.encoder(x), x, rng)
        density = ode_log_density(
            model.sde,
            model.score,
            draw.top,
            divergence=estimator,
            t_end=t_end,
            rtol=tolerance,
            atol=tolerance,
            rng=rng,
        )
        first = torch.cat([first, draw.top[: check_images - len(first)]])
        total = -draw.log_weight(density.log_prob)
        values.total.append(total.cpu())
        values.reconstruction.append(draw.reconstruction.cpu())
        values.kl.append((total - draw.reconstruction).cpu())
        evaluations.append(density.nfe)
        if density.probe_variance is not None:
            variances.append(density.probe_variance.cpu())
        if callback:
            callback(len(x))
    change = None
    if len(first):
        tolerances = (10 * tolerance, tolerance)
        change = tolerance_convergence(
            model.sde, model.score, first, tolerances, seed=seed, divergence=estimator, t_end=t_end
        )[0].error
    return values.report(
        model,
        "NELBO, score-based prior by its ODE",
        f"{divergence} divergence, dopri5",
        start,
        t_end=t_end,
        tolerance=tolerance,
        tolerance_change=change,
        probes=probes if estimator.random else None,
        probe_variance=torch.cat(variances).mean().item() if variances else None,
        nfe=sum(evaluations) / max(len(evaluations), 1),
        seed=seed,
        **settings,
    )
