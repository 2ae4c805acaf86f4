"""Images from a trained model: which solver, how many evaluations, which seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lsgm.errors import UserError
from lsgm.evaluation.figures import image_grid, save_grid
from lsgm.files import atomic_write
from lsgm.models import LSGM, VAEModel, load
from lsgm.options import SampleOptions, SolverOptions, require_run
from lsgm.solvers import Solver, make_grid, make_solver
from lsgm.training.precision import choose_device

__all__ = ["Samples", "choose_solver", "draw_samples", "sample_to_file"]


@dataclass(frozen=True)
class Samples:
    """``images`` ``(N, C, H, W)`` in [0, 1], the decoder's means; ``nfe``: network evaluations per
    batch (mean over batches).
    """

    images: Tensor
    nfe: float


def choose_solver(model: LSGM, options: SolverOptions) -> tuple[Solver, Tensor]:
    """The solver of ``options`` and its time grid.

    Raises:
        UserError: The solver or the grid is unknown, or cannot use so few evaluations.
    """
    try:
        solver = make_solver(options.solver)
        if solver.evaluations(1) is None:
            solver = make_solver(options.solver, rtol=options.tolerance, atol=options.tolerance)
            return solver, torch.tensor([1.0, options.t_end], dtype=torch.float64)
        grid = options.grid or solver.default_grid
        return solver, make_grid(grid, model.sde, solver.steps_for(options.nfe), options.t_end)
    except ValueError as error:
        raise UserError(f"--solver {options.solver}: {error}") from error


@torch.no_grad()
def draw_samples(
    model: VAEModel,
    num_images: int,
    options: SolverOptions,
    callback: Callable[[int], None] | None = None,
) -> Samples:
    """Draw ``num_images`` images; ``callback`` receives the number of images of each finished
    batch.

    Raises:
        UserError: The solver or the grid is unknown, or cannot use so few evaluations.
    """
    rng = torch.Generator().manual_seed(options.seed)
    images, evaluations = [], []
    if isinstance(model, LSGM):
        solver, times = choose_solver(model, options)
    for start in range(0, num_images, options.batch_size):
        num = min(options.batch_size, num_images - start)
        if isinstance(model, LSGM):
            solution = model.sample_prior(num, rng, solver, times, options.temperature)
            latents = model.complete_latents(solution.x, rng, options.temperature)
            evaluations.append(solution.nfe)
        else:
            latents = model.sample_latents(num, rng, options.temperature)
            evaluations.append(0)
        images.append(model.decode(latents).cpu())
        if callback:
            callback(num)
    return Samples(torch.cat(images), sum(evaluations) / max(len(evaluations), 1))


def sample_to_file(options: SampleOptions) -> None:
    """Draw images from a run and write them; print the number of evaluations and the time."""
    model = load(require_run(options.run), choose_device(options.device))
    out = Path(options.out)
    start = time.perf_counter()
    with tqdm(total=options.n, unit="img", disable=None) as bar:
        samples = draw_samples(model, options.n, options, bar.update)
    seconds = time.perf_counter() - start
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        with atomic_write(out) as file:
            np.savez_compressed(file, images=samples.images.numpy())
    else:
        save_grid(image_grid(samples.images), out)
    solver = options.solver if isinstance(model, LSGM) else "decoder only"
    print(
        f"{options.n} images, {solver}, NFE {samples.nfe:g} a batch of "
        f"{min(options.n, options.batch_size)}, "
        f"{seconds:.2f} s ({seconds / options.n:.4f} s an image) -> {out}"
    )
