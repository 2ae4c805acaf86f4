"""Images from a trained model: which solver, how many evaluations, which seed.

Every image has its own generator (:class:`vae.random.RowGenerators`), seeded by the seed and the
image's index, so that with fixed-step solvers it is the same whatever batches the images are made
in. Adaptive solvers share their steps over a batch, and so does ``norm="batch"`` of the corrector.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import Tensor
from tqdm import tqdm

from lsgm.errors import UserError
from lsgm.evaluation.figures import image_grid, save_grid
from lsgm.files import atomic_write
from lsgm.models import VAEModel, load
from lsgm.npz import ArrayStream, write_npz
from lsgm.options import SampleOptions, SolverOptions, require_run
from lsgm.sde import LinearSDE
from lsgm.solvers import SOLVERS, EpsFn, Hook, Solver, choose_pilot, make_grid, make_solver
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
    "solver_arguments",
]

DEFAULT_NFE = 10
PILOT_GRID = "pilot"
PILOT_IMAGES = 16
MODEL_ALPHA = "model"


class DiffusionModel(Protocol):
    """What a solver can sample: a state that diffuses, and images made of it.

    A data-space model's state is the image; a latent model's is the part of the latents with a
    score-based prior, and ``finer`` are the other latents.
    """

    @property
    def sde(self) -> LinearSDE: ...

    @property
    def score(self) -> EpsFn:
        """The noise prediction."""

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of one state."""

    @property
    def device(self) -> torch.device: ...

    def encode_state(
        self, x: Tensor, rng: Rng = None, *, mean: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """State ``(B, *state_shape)`` and finer latents of ``x (B, C, R, R)`` in [-1, 1]."""

    def sample_finer(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """Draw the finer latents from their prior."""

    def decode_state(self, state: Tensor, finer: Sequence[Tensor]) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1]."""


def has_diffusion(model: object) -> TypeGuard[DiffusionModel]:
    """Whether a solver samples the model; the others draw their latents from N(0, I)."""
    return hasattr(model, "state_shape")


@dataclass(frozen=True)
class Samples:
    """``images`` ``(N, C, H, W)`` in [0, 1], the decoder's means; ``nfe``: network evaluations per
    batch (mean over batches).
    """

    images: Tensor
    nfe: float


@dataclass(frozen=True)
class Batch:
    """One batch of samples: ``images (B, C, H, W)`` in [0, 1], the ``latents`` that they were
    decoded from, coarsest first (a data-space model has none), and the network evaluations.
    """

    images: Tensor
    latents: tuple[Tensor, ...]
    nfe: int


SOLVER_OPTIONS: dict[str, tuple[str, ...]] = {
    "tolerance": ("rtol", "atol"),
    "churn_noise": ("noise",),
    **{
        name: (name,)
        for name in (
            "order", "alpha", "corrector", "corrector_from", "variable", "variant",
            "lower_order_final", "eta",
            "predictor", "corrector_steps", "snr", "norm", "noise_scale", "steps_per_level",
            "step_ratio", "denoise", "churn", "churn_min", "churn_max", "state_dtype",
        )
    },
}  # fmt: skip
"""Option of the command line -> arguments of the solver."""


def _parameters(solver: str) -> set[str]:
    return set(inspect.signature(SOLVERS[solver]).parameters)


def solver_arguments(options: SolverOptions, score: EpsFn | None = None) -> dict[str, Any]:
    """The arguments of ``make_solver`` that ``options`` give.

    Raises:
        UserError: The solver is unknown or has no such option (naming those that have it), or
            ``alpha`` is neither a number nor something that the model has.
    """
    if options.solver not in SOLVERS:
        raise UserError(
            f"--solver: unknown solver {options.solver}; choose from {', '.join(SOLVERS)}"
        )
    own, arguments = _parameters(options.solver), dict[str, Any]()
    for option, names in SOLVER_OPTIONS.items():
        value = getattr(options, option)
        if value is None:
            continue
        if not own.issuperset(names):
            takers = [solver for solver in SOLVERS if _parameters(solver).issuperset(names)]
            raise UserError(
                f"--{option}: the solver {options.solver} has no such option; "
                f"it belongs to {', '.join(takers)}"
            )
        arguments |= dict.fromkeys(names, value)
    if "state_dtype" in arguments:
        arguments["state_dtype"] = getattr(torch, arguments["state_dtype"])
    if "alpha" in arguments:
        arguments["alpha"] = _alpha(arguments["alpha"], score)
    return arguments


def _alpha(text: str, score: EpsFn | None) -> float | Tensor:
    if text == MODEL_ALPHA:
        mixing = getattr(score, "mixing", None)
        if mixing is None:
            raise UserError("--alpha: this model has no mixing coefficients; give a number")
        return cast(Tensor, mixing)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--alpha: {text!r} is neither a number nor {MODEL_ALPHA}") from None


def choose_solver(model: DiffusionModel, options: SolverOptions) -> tuple[Solver, Tensor]:
    """The solver of ``options`` and its time grid, float64, from 1 down to ``t_end``.

    Raises:
        UserError: The solver, the grid or an option is unknown, or the evaluations are too few.
    """
    arguments = solver_arguments(options, model.score)
    try:
        solver = make_solver(options.solver, **arguments)
        if solver.evaluations(1) is None:
            for name in ("nfe", "grid"):
                if getattr(options, name) is not None:
                    raise UserError(
                        f"--{name}: {options.solver} is adaptive and chooses its own steps; "
                        "set --tolerance"
                    )
            return solver, torch.tensor([1.0, options.t_end], dtype=torch.float64)
        nfe = options.nfe or DEFAULT_NFE
        if nfe < (least := solver.evaluations(1) or 1):
            raise UserError(f"--nfe: {options.solver} needs at least {least}, got {nfe}")
        if options.grid == PILOT_GRID:
            return _pilot(model, solver, nfe, options)
        grid = options.grid or solver.default_grid
        return solver, make_grid(grid, model.sde, solver.steps_for(nfe), options.t_end)
    except ValueError as error:
        raise UserError(f"--solver {options.solver}: {error}") from error


def _pilot(
    model: DiffusionModel, solver: Solver, nfe: int, options: SolverOptions
) -> tuple[Solver, Tensor]:
    # Noise of its own, so that the images are those of the same times without a pilot.
    rng = torch.Generator().manual_seed(options.seed)
    shape = (PILOT_IMAGES, *model.state_shape)
    start = options.temperature * model.sde.prior_sample(shape, rng, device=model.device)
    return choose_pilot(model.sde, model.score, start, nfe, options.t_end, solver)


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
    images = model.decode_state(solution.x, finer)
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
            batch = Batch(model.decode(latents), tuple(latents), 0)
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
    return Samples(torch.cat(images), sum(evaluations) / max(len(evaluations), 1))


def sample_to_file(options: SampleOptions) -> None:
    """Draw images from a run and write them; print the number of evaluations and the time."""
    model = load(require_run(options.run), choose_device(options.device))
    diffusion = has_diffusion(model)
    if options.latents and not isinstance(model, VAEModel):
        raise UserError("--latents: this run is a model of images and has no latents")
    out = Path(options.out)
    start = time.perf_counter()
    evaluations: list[int] = []
    with tqdm(total=options.n, unit="img", disable=None) as bar:

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
        f"{options.n} images, {options.solver if diffusion else 'decoder only'}, "
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
