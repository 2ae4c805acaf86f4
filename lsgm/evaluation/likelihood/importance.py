"""Importance-weighted bounds of a model, and how they converge.

An LSGM's prior has no density that one network call could give, and exponentiating an unbiased
estimate of its logarithm would put the "bound" below the truth. Two kinds of weights are right:

* :func:`path_iw_bound` takes the path of the diffusion among the latents
  (:mod:`lsgm.path_bound`): a valid bound for every number of draws and steps, of any latent size;
* :func:`exact_iw_bound` takes the density of the probability-flow ODE with the exact divergence:
  valid up to the solver's tolerance, for latents of few dimensions.

The first bounds the density of the chain (which tends to that of the generative SDE), the second
that of the ODE, which agree for an exact score.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsgm.divergence import make_divergence
from lsgm.errors import UserError
from lsgm.evaluation.likelihood.bounds import (
    Estimate,
    LikelihoodReport,
    Values,
    iw_bound,
    posterior_draw,
    with_generators,
)
from lsgm.likelihood import ode_log_density
from lsgm.models.latent import LSGM, VAEModel
from lsgm.path_bound import PathPrior
from vae.objective import importance_weighted_bound
from vae.random import Rng

__all__ = [
    "ConvergenceRow",
    "convergence",
    "exact_iw_bound",
    "iw",
    "iw_of_groups",
    "path_iw_bound",
    "path_prior",
]

STEPS = 20


CALIBRATION = 256


MAX_EXACT_DIMS = 256


LogPrior = Callable[[Tensor, Rng], Tensor]
"""Log-density, or log weight, of the coarsest latents ``(B, C, H, W)``: ``(B,)`` nats."""


def iw(
    model: VAEModel, batches: Iterable[Tensor], *, k: int, steps: int = STEPS, **options: Any
) -> LikelihoodReport:
    """IW-``k`` under the model's own prior: :func:`path_iw_bound` of an LSGM with ``steps`` steps,
    :func:`lsgm.evaluation.likelihood.bounds.iw_bound` of a VAE.
    """
    if model.diffusion is not None:
        return path_iw_bound(model.diffusion, batches, k=k, steps=steps, **options)
    return iw_bound(model, batches, k=k, **options)


@torch.no_grad()
def path_prior(
    model: LSGM,
    steps: int = STEPS,
    *,
    grid: str = "phi",
    calibration: int = CALIBRATION,
    rng: Rng = None,
    chunk: int = 64,
) -> PathPrior:
    """The prior of ``model`` as a chain of ``steps`` Gaussians.

    Args:
        model: Its network is called ``steps`` times a path.
        steps: ``N``.
        grid: Time grid by name.
        calibration: Latents drawn from the model (by at least 20 ancestral steps, even in log-SNR)
            to fit the chain to; no data are used. 0: the chain that is exact for N(0, I).
        rng: Source of those latents and of their noise.
        chunk: Latents at a time.

    Raises:
        UserError: Steps or grid that the SDE does not allow.
    """
    try:
        prior = PathPrior.of(model.sde, model.score, steps, grid=grid)
    except ValueError as error:
        raise UserError(f"path bound: {error}") from None
    if not calibration:
        return prior
    shape = model.vae.top_shape
    sizes = [min(chunk, calibration - i) for i in range(0, calibration, chunk)]
    source = PathPrior.of(model.sde, model.score, max(steps, STEPS), grid="log_snr")
    drawn = [source.sample((size, *shape), rng, device=model.device) for size in sizes]
    return prior.calibrated(torch.cat(drawn), rng, chunk=chunk)


@torch.no_grad()
def path_iw_bound(
    model: LSGM,
    batches: Iterable[Tensor],
    *,
    k: int,
    steps: int = STEPS,
    grid: str = "phi",
    calibration: int = CALIBRATION,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """Importance-weighted bound with ``k`` draws of the latents and of their path to ``t = 1``.

    Costs ``k * steps`` network calls and ``k`` decodings a batch. The settings of the report hold
    the NELBO of the same draws (``k = 1``) and the mean effective number of draws.

    Raises:
        UserError: Steps or grid that the SDE does not allow.
    """
    rng = torch.Generator().manual_seed(seed)
    prior = path_prior(model, steps, grid=grid, calibration=calibration, rng=rng)
    return _importance_weighted(
        model,
        batches,
        prior.log_weight,
        k=k,
        seed=seed,
        callback=callback,
        bound=f"IW-{k}, score-based prior, paths of {steps} steps",
        estimator="diffusion path among the latents",
        settings={
            "steps": steps,
            "grid": grid,
            "calibration": calibration,
            **settings,
        },
    )


@torch.no_grad()
def exact_iw_bound(
    model: LSGM,
    batches: Iterable[Tensor],
    *,
    k: int,
    t_end: float = 1e-5,
    tolerance: float = 1e-5,
    divergence: str = "exact",
    max_dims: int = MAX_EXACT_DIMS,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """Importance-weighted bound with ``k`` draws and the exact density of the probability-flow ODE.

    Each of the 50 to 200 network calls of a solve takes one backward pass per latent dimension, and
    each batch takes ``k`` solves.

    Raises:
        UserError: Latents of more than ``max_dims`` dimensions, or an estimated divergence.
    """
    dims = math.prod(model.vae.top_shape)
    estimator = make_divergence(divergence)
    if estimator.random:
        raise UserError(
            f"iw_exact: the {divergence} divergence is an estimate, and exponentiating it would "
            "put the bound below the truth; use divergence exact, or the metric iw"
        )
    if dims > max_dims:
        raise UserError(
            f"iw_exact: {dims} latent dimensions cost {dims} backward passes at each network call "
            f"of {k} ODE solves a batch, more than the limit of {max_dims}; use the metric iw"
        )
    calls: list[int] = []

    def log_prior(top: Tensor, rng: Rng) -> Tensor:
        density = ode_log_density(
            model.sde,
            model.score,
            top,
            divergence=estimator,
            t_end=t_end,
            rtol=tolerance,
            atol=tolerance,
        )
        calls.append(density.nfe)
        return density.exact()

    report = _importance_weighted(
        model,
        batches,
        log_prior,
        k=k,
        seed=seed,
        callback=callback,
        bound=f"IW-{k}, score-based prior by its ODE",
        estimator="exact divergence, dopri5",
        settings={"t_end": t_end, "tolerance": tolerance, **settings},
    )
    report.settings["nfe"] = sum(calls) / max(len(calls), 1)
    return report


def _log_weights(model: LSGM, x: Tensor, log_prior: LogPrior, k: int, rng: Rng) -> Tensor:
    """``log p(x, z) - log q(z | x)`` of k draws for each image, ``(k, B)``, one draw at a time."""
    taps = model.vae.encoder(x)
    rows = []
    for _ in range(k):
        draw = posterior_draw(model, taps, x, rng)
        rows.append(draw.log_weight(log_prior(draw.top, rng)))
    return torch.stack(rows)


def _importance_weighted(
    model: LSGM,
    batches: Iterable[Tensor],
    log_prior: LogPrior,
    *,
    k: int,
    seed: int,
    callback: Callable[[int], None] | None,
    bound: str,
    estimator: str,
    settings: dict[str, Any],
) -> LikelihoodReport:
    start = time.perf_counter()
    values, nelbos, effective = Values(), [], []
    for x, rng in with_generators(batches, seed):
        log_w = _log_weights(model, x, log_prior, k, rng)
        values.total.append(-importance_weighted_bound(log_w).cpu())
        nelbos.append(-log_w.mean(0).cpu())
        effective.append((1 / log_w.softmax(0).square().sum(0)).cpu())
        if callback:
            callback(len(x))
    nelbo = Estimate.of(torch.cat(nelbos)).mean
    draws = torch.cat(effective).mean().item()
    return values.report(
        model,
        bound,
        estimator,
        start,
        k=k,
        seed=seed,
        nelbo=nelbo,
        effective_draws=draws,
        **settings,
    )


def iw_of_groups(log_weights: Tensor, k: int) -> Tensor:
    """IW-``k`` bound on ``-log p(x)``, ``(B,)``, from ``(K, B)`` log weights with ``K >= k``: the
    mean over disjoint groups of k draws, as unbiased for IW-k as one group and less noisy.

    For the same weights it falls with every k that the larger one is a multiple of.

    Raises:
        ValueError: k is not in [1, K].
    """
    draws = len(log_weights)
    if not 1 <= k <= draws:
        raise ValueError(f"k must lie in [1, {draws}], got {k}")
    groups = draws // k
    log_w = log_weights[: groups * k].unflatten(0, (groups, k))
    return math.log(k) - log_w.logsumexp(1).mean(0)


@dataclass(frozen=True)
class ConvergenceRow:
    """IW-``k`` with paths of ``steps`` steps; ``nats`` an image, with its standard error over
    images.
    """

    steps: int
    k: int
    nats: Estimate


@torch.no_grad()
def convergence(
    model: LSGM,
    batches: Iterable[Tensor],
    *,
    k: Sequence[int] = (1, 2, 4, 8, 16),
    steps: Sequence[int] = (5, 10, 20, 40),
    grid: str = "phi",
    calibration: int = CALIBRATION,
    seed: int = 0,
) -> tuple[ConvergenceRow, ...]:
    """The path-wise bound by number of draws and of steps, all on the same images; the values of
    one row of ``steps`` share their draws. ``batches`` is gone through once a row.
    """
    rows = []
    for number in steps:
        rng = torch.Generator().manual_seed(seed)
        prior = path_prior(model, number, grid=grid, calibration=calibration, rng=rng)
        log_ws = [
            _log_weights(model, x, prior.log_weight, max(k), own).cpu()
            for x, own in with_generators(batches, seed)
        ]
        log_w = torch.cat(log_ws, 1)
        rows += [ConvergenceRow(number, n, Estimate.of(iw_of_groups(log_w, n))) for n in k]
    return tuple(rows)
