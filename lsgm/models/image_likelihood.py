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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsgm.data.pixels import DEQUANTISATION, Pixels
from lsgm.divergence import Divergence, ExactDivergence
from lsgm.likelihood import ode_log_density
from lsgm.sde import LinearSDE
from lsgm.solvers import EpsFn
from vae.random import Rng

__all__ = ["DataLikelihood", "ode_data_likelihood"]


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
