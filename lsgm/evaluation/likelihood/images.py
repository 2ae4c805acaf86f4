r"""Likelihood of 8-bit images under a score model in data space.

The probability-flow ODE gives the log-density of what is diffused (:mod:`lsgm.likelihood`); the map
from grey levels to it (:class:`lsgm.data.pixels.Pixels`) gives a volume. With ``v = k + u``, ``u``
uniform in ``[0, 1)``, Jensen's inequality bounds the probability of the levels ``k`` (arXiv
1511.01844 section 3.1),

    log P(k) = log int p_v(k + u) du  >=  E_u log p_v(k + u),

with which bits/dim are comparable between models of 8-bit images (arXiv 2011.13456 section 4.3).
The mean over K draws of u estimates that bound; the logarithm of the mean of p_v over them is in
expectation a tighter one (arXiv 1509.00519), reported apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsgm.data.pixels import DEQUANTISATION, Pixels
from lsgm.divergence import Divergence, ExactDivergence, make_divergence
from lsgm.evaluation.likelihood.bounds import LikelihoodReport, Values, with_generators
from lsgm.likelihood import ode_log_density
from lsgm.models.images import DataSGM
from lsgm.sde import LinearSDE
from lsgm.solvers import EpsFn
from vae.random import Rng

__all__ = [
    "DataLikelihood",
    "data_ode_bound",
    "ode_data_likelihood",
]


@dataclass(frozen=True)
class DataLikelihood:
    """Bounds on the negative log-likelihood of images.

    Attributes:
        nats: ``(B,)`` float64; ``-log p_v`` of an image, its mean over the draws of the
            dequantisation noise: in expectation an upper bound on ``-log P(k)``.
        importance_weighted: ``(B,)`` nats; the tighter bound of the same draws, or None for a
            single draw and where the divergence is random, whose noise would bias it downward.
        num_dims: Values of an image, for bits/dim.
        nfe: Network calls on a batch, over all draws (each with the divergence's backward passes).
        estimator: In words, the ODE, its time and tolerance and how the divergence is taken.
        convention: In words, how grey levels became a density.
    """

    nats: Tensor
    importance_weighted: Tensor | None
    num_dims: int
    nfe: int
    estimator: str
    convention: str

    @property
    def bits_per_dim(self) -> Tensor:
        """:attr:`nats` as bits a value, ``(B,)``."""
        return self.nats / (self.num_dims * math.log(2))


def ode_data_likelihood(
    sde: LinearSDE,
    eps_fn: EpsFn,
    pixels: Pixels,
    images: Tensor,
    *,
    draws: int = 1,
    divergence: Divergence | None = None,
    t_end: float | None = None,
    tolerance: float = 1e-5,
    rng: Rng = None,
) -> DataLikelihood:
    """Negative log-likelihood of ``images`` by the probability-flow ODE.

    Args:
        sde: The diffusion.
        eps_fn: Its noise prediction, of each image by itself.
        pixels: The map from grey levels to what is diffused. It is dequantised here even if the
            model was trained without: a density has no other meaning for 8-bit images
            (arXiv 2011.13456 section 4.3 does the same).
        images: ``(B, C, R, R)``, multiples of 1/255 in [0, 1], padded or not.
        draws: K, draws of the dequantisation noise.
        divergence: Exact by default; Hutchinson's serves large images.
        t_end: Time at which the data are taken to lie; default the SDE's cutoff.
        tolerance: Relative and absolute tolerance of the ODE.
        rng: Draws the dequantisation noise and the probes.

    Raises:
        ValueError: Images are not 8-bit, or there is no draw.
    """
    convention = DEQUANTISATION
    if not pixels.dequantise:
        pixels = replace(pixels, dequantise=True)
        convention += "; the model was trained without it, as published score-SDE models are"
    if draws < 1:
        raise ValueError(f"need at least one draw, got {draws}")
    levels = 255 * images.double()
    if not torch.allclose(levels, levels.round(), rtol=0.0, atol=1e-3):
        raise ValueError("images must be multiples of 1/255: they are not 8-bit")
    divergence = ExactDivergence() if divergence is None else divergence
    t_end = sde.time_eps if t_end is None else t_end
    log_probs, nfe = [], 0
    for _ in range(draws):
        result = ode_log_density(
            sde,
            eps_fn,
            pixels.to_network(images, rng, noise=True),
            divergence=divergence,
            t_end=t_end,
            rtol=tolerance,
            atol=tolerance,
            rng=rng,
        )
        log_probs.append(result.log_prob.double() + pixels.log_det_v)
        nfe += result.nfe
    log_prob = torch.stack(log_probs)
    weighted = None
    if draws > 1 and not divergence.random:
        weighted = math.log(draws) - log_prob.logsumexp(0)
    return DataLikelihood(
        nats=-log_prob.mean(0),
        importance_weighted=weighted,
        num_dims=pixels.spec.num_dims,
        nfe=nfe,
        estimator=(
            f"probability-flow ODE from t = {t_end:g}, tolerance {tolerance:g}, "
            f"{type(divergence).__name__}, {draws} draw(s) of the dequantisation noise"
        ),
        convention=convention,
    )


@torch.no_grad()
def data_ode_bound(
    model: DataSGM,
    batches: Iterable[Tensor],
    *,
    tolerance: float = 1e-5,
    divergence: str = "hutchinson",
    draws: int = 1,
    seed: int = 0,
    callback: Callable[[int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """Bound on ``-log P`` of 8-bit images by the probability-flow ODE with uniform dequantisation
    (2011.13456, Sec. 4.3), one solve a draw of the dequantisation noise.

    Args:
        model: A score model of images.
        batches: ``(b, C, R, R)`` in [-1, 1], padded or not.
        tolerance: Of the ODE.
        divergence: By name; ``exact`` costs one backward pass a pixel.
        draws: Of the dequantisation noise.
        seed: Of noise and probes.
        callback: Receives the number of images of each batch.
        **settings: Noted in the report.
    """
    start = time.perf_counter()
    values, calls, words = Values(), [], ("", "")
    for x, rng in with_generators(batches, seed):
        found = ode_data_likelihood(
            model.sde,
            model.score,
            model.pixels,
            (x + 1) / 2,
            draws=draws,
            divergence=make_divergence(divergence),
            tolerance=tolerance,
            rng=rng,
        )
        values.total.append(found.nats.cpu())
        calls.append(found.nfe)
        words = found.estimator, found.convention
        if callback:
            callback(len(x))
    return values.report(
        model,
        "bound on -log P of 8-bit images by the ODE",
        words[0],
        start,
        convention=words[1],
        nfe=sum(calls) / max(len(calls), 1),
        seed=seed,
        **settings,
    )
