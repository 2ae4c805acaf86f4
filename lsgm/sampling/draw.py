"""Images from a trained model: which solver, how many evaluations, which seed.

Every image has its own generator (:class:`vae.random.RowGenerators`), seeded by the seed and the
image's index, so that with fixed-step solvers it is the same whatever batches the images are made
in. Adaptive solvers share their steps over a batch, and so does ``norm="batch"`` of the corrector.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm.models.base import DiffusionModel, has_diffusion
from lsgm.models.latent import VAEModel
from lsgm.sampling.sampler import SolverOptions, choose_solver, resolve
from lsgm.solvers import Callback, EpsFn, Hook, Solver
from lsgm.solvers.base import require_finite
from vae.random import Rng, RowGenerators

__all__ = [
    "Batch",
    "Samples",
    "draw_batch",
    "draw_samples",
    "iterate_samples",
    "row_sampler",
    "solver_name",
]

NO_SOLVER = "decoder only"
"""What takes the place of the solver's name for a VAE under N(0, I)."""


@dataclass(frozen=True)
class Samples:
    """``images`` ``(N, C, H, W)`` in [0, 1], the decoder's means; ``nfe``: network evaluations per
    batch (mean over batches); ``solver``: its name.
    """

    images: Tensor
    nfe: float
    solver: str = NO_SOLVER


@dataclass(frozen=True)
class Batch:
    """One batch of samples: ``images (B, C, H, W)`` in [0, 1], the ``latents`` that they were
    decoded from, coarsest first (a data-space model has none), the network evaluations, and which
    images of the seed they are.
    """

    images: Tensor
    latents: tuple[Tensor, ...]
    nfe: int
    index: Sequence[int] = ()


@torch.no_grad()
def draw_batch(
    model: DiffusionModel,
    num: int,
    rng: Rng,
    solver: Solver,
    times: Tensor,
    temperature: float = 1.0,
    hooks: Sequence[Hook] = (),
    score: EpsFn | None = None,
    callback: Callback | None = None,
) -> Batch:
    """Draw ``num`` images; ``score`` replaces the model's own noise prediction (guidance).

    Raises:
        NonFiniteError: States or images are not finite.
    """
    start = model.prior_start(num, rng, temperature, solver)
    solution = solver.solve(model.sde, score or model.score, start, times, rng, hooks, callback)
    finer = model.sample_finer(num, rng, temperature)
    images = model.decode_state(solution.x, finer, rng)
    require_finite(images, "the decoder")
    latents = (solution.x, *finer) if isinstance(model, VAEModel) else ()
    return Batch(images, latents, solution.nfe)


def row_sampler(
    model: VAEModel | DiffusionModel, options: SolverOptions, callback: Callback | None = None
) -> Callable[[Sequence[int]], Batch]:
    """A function that draws the images with the numbers that it is given, as one batch.

    ``callback`` is told after every step of the solver.

    Raises:
        UserError: As :func:`choose_solver`; the function itself: NonFiniteError.
    """
    if has_diffusion(model):
        solver, times = choose_solver(model, options)

    def draw(rows: Sequence[int]) -> Batch:
        rng = RowGenerators.of(options.seed, rows)
        if has_diffusion(model):
            return draw_batch(
                model, len(rows), rng, solver, times, options.temperature, callback=callback
            )
        assert isinstance(model, VAEModel)
        latents = model.sample_latents(len(rows), rng, options.temperature)
        images = model.decode(latents, rng)
        require_finite(images, "the decoder")
        return Batch(images, tuple(latents), 0)

    return draw


@torch.no_grad()
def iterate_samples(
    model: VAEModel | DiffusionModel,
    num_images: int,
    options: SolverOptions,
    wanted: Collection[int] = (),
    callback: Callback | None = None,
) -> Iterator[Batch]:
    """Draw ``num_images`` images, batch by batch; tensors are on the CPU.

    Args:
        model: The model.
        num_images: Number N of images; they have the indices 0 to N - 1.
        options: The sampler.
        wanted: Give only the images of these indices: batches without one are left out, the others
            computed as a whole, so that an image does not depend on what else is wanted.
        callback: Told after every step of the solver.

    Raises:
        UserError: As :func:`choose_solver`.
        NonFiniteError: Samples are not finite.
    """
    draw = row_sampler(model, options, callback)
    for start in range(0, num_images, options.batch_size):
        rows = range(start, min(start + options.batch_size, num_images))
        keep = [i for i, k in enumerate(rows) if not wanted or k in wanted]
        if not keep:
            continue
        batch = draw(rows)
        latents = tuple(z[keep].cpu() for z in batch.latents)
        yield Batch(batch.images[keep].cpu(), latents, batch.nfe, [rows[i] for i in keep])


def draw_samples(
    model: VAEModel | DiffusionModel,
    num_images: int,
    options: SolverOptions,
    callback: Callable[[int], None] | None = None,
) -> Samples:
    """Draw ``num_images`` images, all held in memory; ``callback`` receives the number of images
    of each finished batch.

    Raises:
        UserError: As :func:`choose_solver`.
    """
    images, evaluations = [], []
    for batch in iterate_samples(model, num_images, options):
        images.append(batch.images)
        evaluations.append(batch.nfe)
        if callback:
            callback(len(batch.images))
    nfe = sum(evaluations) / max(len(evaluations), 1)
    return Samples(torch.cat(images), nfe, solver_name(model, options))


def solver_name(model: object, options: SolverOptions) -> str:
    """Name of the solver that ``options`` mean for the model."""
    return resolve(model, options)[0].solver or "" if has_diffusion(model) else NO_SOLVER
