"""Images from a trained model: which solver, how many evaluations, which seed.

Every image has its own generator (:class:`vae.random.RowGenerators`), seeded by the seed and the
image's index, so that with fixed-step solvers it is the same whatever batches the images are made
in. Adaptive solvers share their steps over a batch, and so does ``norm="batch"`` of the corrector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lsgm.errors import UserError
from lsgm.evaluation.figures import image_grid, save_grid
from lsgm.files import atomic_write
from lsgm.models import VAEModel, load
from lsgm.npz import ArrayStream, write_npz
from lsgm.options import SampleOptions, SolverOptions, require_run
from lsgm.progress import progress_bar
from lsgm.protocols import DiffusionModel, has_diffusion
from lsgm.solver_choice import choose_solver, resolve
from lsgm.solvers import EpsFn, Hook, Solver
from lsgm.training.precision import choose_device
from vae.random import Rng, RowGenerators

__all__ = [
    "Batch",
    "DiffusionModel",
    "Samples",
    "choose_solver",
    "draw_batch",
    "draw_samples",
    "has_diffusion",
    "iterate_samples",
    "sample_to_file",
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
    decoded from, coarsest first (a data-space model has none), and the network evaluations.
    """

    images: Tensor
    latents: tuple[Tensor, ...]
    nfe: int


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
) -> Batch:
    """Draw ``num`` images; ``score`` replaces the model's own noise prediction (guidance)."""
    start = temperature * model.sde.prior_sample(
        (num, *model.state_shape), rng, device=model.device
    )
    solution = solver.solve(model.sde, score or model.score, start, times, rng, hooks)
    finer = model.sample_finer(num, rng, temperature)
    images = model.decode_state(solution.x, finer, rng)
    latents = (solution.x, *finer) if isinstance(model, VAEModel) else ()
    return Batch(images, latents, solution.nfe)


@torch.no_grad()
def iterate_samples(
    model: VAEModel | DiffusionModel, num_images: int, options: SolverOptions
) -> Iterator[Batch]:
    """Draw ``num_images`` images, batch by batch; tensors are on the CPU.

    Raises:
        UserError: As :func:`choose_solver`.
    """
    diffusion = model if has_diffusion(model) else None
    if diffusion is not None:
        solver, times = choose_solver(diffusion, options)
    for start in range(0, num_images, options.batch_size):
        rows = range(start, min(start + options.batch_size, num_images))
        rng = RowGenerators.of(options.seed, rows)
        if diffusion is not None:
            batch = draw_batch(diffusion, len(rows), rng, solver, times, options.temperature)
        else:
            assert isinstance(model, VAEModel)
            latents = model.sample_latents(len(rows), rng, options.temperature)
            batch = Batch(model.decode(latents, rng), tuple(latents), 0)
        yield Batch(batch.images.cpu(), tuple(z.cpu() for z in batch.latents), batch.nfe)


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


def sample_to_file(options: SampleOptions) -> None:
    """Draw images from a run and write them; print the number of evaluations and the time."""
    model = load(require_run(options.run), choose_device(options.device))
    if options.latents and not isinstance(model, VAEModel):
        raise UserError("--latents: this run is a model of images and has no latents")
    out = Path(options.out)
    start = time.perf_counter()
    evaluations: list[int] = []
    with progress_bar(total=options.n, unit="img") as bar:

        def batches() -> Iterator[Batch]:
            for batch in iterate_samples(model, options.n, options):
                evaluations.append(batch.nfe)
                yield batch
                bar.update(len(batch.images))

        if out.suffix == ".npz":
            _write_npz(out, batches(), options)
        else:
            images = torch.cat([batch.images for batch in batches()])
            out.parent.mkdir(parents=True, exist_ok=True)
            save_grid(image_grid(images), out)
    seconds = time.perf_counter() - start
    nfe = sum(evaluations) / len(evaluations)
    print(
        f"{options.n} images, {solver_name(model, options)}, "
        f"NFE {nfe:g} a batch of {min(options.n, options.batch_size)}, "
        f"{seconds:.2f} s ({seconds / options.n:.4f} s an image) -> {out}"
    )


def _write_npz(out: Path, batches: Iterator[Batch], options: SampleOptions) -> None:
    """Write images, and latents if asked for, as they come."""
    first = next(batches)
    out.parent.mkdir(parents=True, exist_ok=True)
    names = ["images", *(f"latents_{i}" for i in range(len(first.latents) * options.latents))]
    with atomic_write(out) as file, write_npz(file, names, out.parent) as streams:

        def write(batch: Batch) -> None:
            _append(streams, names, batch, options.dtype)

        write(first)
        for batch in batches:
            write(batch)


def _append(
    streams: dict[str, ArrayStream], names: Sequence[str], batch: Batch, dtype: str
) -> None:
    images = batch.images
    converted = (
        images.mul(255).round().to(torch.uint8)
        if dtype == "uint8"
        else images.to(getattr(torch, dtype))
    )
    for name, value in zip(names, (converted, *batch.latents), strict=False):
        streams[name].append(value.numpy())
