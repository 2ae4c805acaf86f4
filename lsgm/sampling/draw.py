"""Images from a trained model by the command line's options."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from lsgm.models.base import Model
from lsgm.models.results import NO_SOLVER, Batch, Samples
from lsgm.sampling.sampler import SolverOptions, build_any_sampler, solver_of
from lsgm.solvers import Callback
from vae.random import RowGenerators

__all__ = ["draw_samples", "iterate_samples", "row_sampler", "solver_name"]


def row_sampler(
    model: Model, options: SolverOptions, callback: Callback | None = None
) -> Callable[[Sequence[int]], Batch]:
    """A function that draws the images with the numbers that it is given, as one batch; of a model
    that takes classes, image ``k`` is of class ``k`` modulo their number.

    ``callback`` is told after every step of the solver.

    Raises:
        UserError: As :func:`lsgm.sampling.sampler.build_sampler`; the function itself:
            NonFiniteError.
    """
    sampler = build_any_sampler(model, options)
    temperature = options.temperature if sampler is None else 1.0

    def draw(rows: Sequence[int]) -> Batch:
        rng = RowGenerators.of(options.seed, rows)
        classes = model.num_classes
        labels = None if classes is None else torch.tensor(rows) % classes
        return model.draw(
            len(rows), rng, sampler, labels=labels, temperature=temperature, callback=callback
        )

    return draw


def iterate_samples(
    model: Model,
    num_images: int,
    options: SolverOptions,
    wanted: Collection[int] = (),
    callback: Callback | None = None,
) -> Iterator[Batch]:
    """:meth:`lsgm.models.base.Model.iterate` by ``options``.

    Raises:
        UserError: As :func:`lsgm.sampling.sampler.build_sampler`.
        NonFiniteError: Samples are not finite.
    """
    sampler = build_any_sampler(model, options)
    return model.iterate(
        num_images,
        sampler,
        seed=options.seed,
        temperature=options.temperature if sampler is None else 1.0,
        batch_size=options.batch_size,
        wanted=wanted,
        callback=callback,
    )


def draw_samples(model: Model, num_images: int, options: SolverOptions) -> Samples:
    """Images alone of :meth:`lsgm.models.base.Model.sample` by ``options``: latents of many images
    would take more memory than they.

    Raises:
        UserError: As :func:`lsgm.sampling.sampler.build_sampler`.
        NonFiniteError: Samples are not finite.
    """
    began = time.perf_counter()
    images, evaluations = [], []
    for batch in iterate_samples(model, num_images, options):
        images.append(batch.images)
        evaluations.append(batch.nfe)
    nfe = sum(evaluations) / max(len(evaluations), 1)
    seconds = time.perf_counter() - began
    return Samples(torch.cat(images), (), nfe, seconds, solver_name(model, options))


def solver_name(model: Model, options: SolverOptions) -> str:
    """Name of the solver that ``options`` mean for the model."""
    return NO_SOLVER if model.diffusion is None else solver_of(model.diffusion, options)
