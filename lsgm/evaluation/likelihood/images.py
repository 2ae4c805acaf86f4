"""The bound on the likelihood of 8-bit images under a score model in data space, over a dataset."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lsgm.divergence import make_divergence
from lsgm.evaluation.likelihood.bounds import LikelihoodReport, Values, with_generators
from lsgm.models.image_likelihood import ode_data_likelihood
from lsgm.models.images import DataSGM

__all__ = ["data_ode_bound"]


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
        model.bound_name,
        words[0],
        start,
        convention=words[1],
        nfe=sum(calls) / max(len(calls), 1),
        seed=seed,
        **settings,
    )
