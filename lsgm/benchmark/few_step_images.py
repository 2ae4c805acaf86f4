"""Few-step sampling of score models of images, measured: ours beside the published sampler with all
its evaluations and beside the schedulers of diffusers.

Without a run the score is known in closed form: images of digits, each with normal noise of its
own, under the SDEs of the published models. What deterministic samplers miss is their root mean
squared distance to the exact flow from the same noise over that flow's root mean square. How good
samples are, those of the published sampler too, is their energy distance to the exact flow's from
other noise; 0 is best, and negative values are its own error. No data are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsgm.benchmark.few_step_cases import Case, energy_distance
from lsgm.benchmark.few_step_runner import Bench, PilotFits, run_theirs
from lsgm.benchmark.reference_samplers import METHODS, reference_samplers
from lsgm.config.command_line import parse_command_line
from lsgm.config.training import DataConfig
from lsgm.data import build_datasets
from lsgm.errors import UserError
from lsgm.models.images import DataSGM
from lsgm.models.loading import load
from lsgm.sde import VESDE, LinearSDE, make_sde
from lsgm.solvers import Solver, make_grid, make_solver
from lsgm.solvers.sampler import few_step_grid
from lsgm.system.files import atomic_write_text
from lsgm.system.markdown import markdown_table

__all__ = ["FewStepImagesOptions", "ImageMixture", "few_step_images_command", "measure_images"]

DEFAULT, START_SEED, OTHER_SEED, PILOT_SEED, NOISE_SEED = "normal_reference_pc", 1, 2, 3, 4
OURS = (DEFAULT, "deis", "dpmpp_2m", "unipc")
DIGITS = 600
SMALLEST_TIME = 1e-3
FEWEST_PUBLISHED_STEPS = 200
"""A run that recommends fewer recommends a sampler of ours."""


@dataclass(frozen=True)
class FewStepImagesOptions:
    """Few-step samplers of score models of images."""

    run: tuple[str, ...] = ()
    """Folders of runs, trained or imported. None: digits in closed form."""
    nfe: tuple[int, ...] = (5, 10, 20)
    """Numbers of network evaluations."""
    samples: int = 64
    """Starting points."""
    pilots: int = 16
    """Other starting points, from which grids and alpha are fitted."""
    published: bool = True
    """Run the published sampler too, which takes thousands of evaluations."""
    tolerance: float = 1e-6
    """Of the exact flow."""
    out: str = "few_step_images.md"
    """File of the tables."""

    def __post_init__(self) -> None:
        if not self.nfe or min(self.nfe) < 2:
            raise ValueError("nfe: must be at least 2")
        if min(self.samples, self.pilots) < 2:
            raise ValueError("samples, pilots: must be at least 2")


@dataclass(frozen=True)
class ImageMixture:
    """Equally likely images ``data (N, C, H, W)``, each with normal noise of standard deviation
    ``std``: the exact noise prediction of a linear SDE.
    """

    sde: LinearSDE
    data: Tensor
    std: float

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        """``-sigma_t grad log q(x_t)`` in float64: ``x (B, C, H, W)``, ``t (B,)``."""
        flat, data, t = x.double().flatten(1), self.data.flatten(1), t.double()
        m, var = self.sde.mean_coef(t)[:, None], self.sde.var(t)[:, None]
        total = (m * self.std).square() + var
        inner = m * (flat @ data.T) - 0.5 * m.square() * data.square().sum(1)
        mean = m * ((inner / total).softmax(1) @ data)
        return (var.sqrt() / total * (flat - mean)).reshape(x.shape)


@dataclass(frozen=True)
class Row:
    """One sampler in words; by number of evaluations its error (None: it has none) and its energy
    distance.
    """

    sampler: str
    grid: str
    values: dict[int, tuple[float | None, float]]


def _case(
    name: str, sde: LinearSDE, eps: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...],
    options: FewStepImagesOptions, t_end: float, like: Tensor,
) -> Case:  # fmt: skip
    def noise(num: int, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return sde.prior_sample((num, *shape), rng, device=like.device, dtype=like.dtype)

    other = Bench(
        Case(name, sde, eps, noise(options.samples, OTHER_SEED), like, t_end, None, lambda x: {}),
        options.tolerance,
    ).reference(t_end)
    return Case(
        name,
        sde,
        eps,
        noise(options.samples, START_SEED),
        noise(options.pilots, PILOT_SEED),
        t_end,
        None,
        lambda x: {"energy": energy_distance(x, other)},
    )


def _digit_cases(options: FewStepImagesOptions) -> Iterator[tuple[Case, Solver, Tensor]]:
    data = build_datasets(DataConfig(name="digits")).train
    images = data.batch(torch.arange(min(DIGITS, len(data)))).double()
    zero = torch.zeros((), dtype=torch.float64)
    for name, sigma_max in (("VE, sigma 0.01 to 50", 50.0), ("VE, sigma 0.01 to 348", 348.0)):
        sde = make_sde("vesde", sigma2_min=1e-4, sigma2_max=sigma_max**2, time_eps=1e-5)
        mixture = ImageMixture(sde, images, 0.1)
        shape = tuple(images.shape[1:])
        case = _case(f"Digits in closed form, {name}", sde, mixture.eps, shape, options, 1e-5, zero)
        yield case, *_published_sampler(sde, 1e-5)
    sde = make_sde("vpsde", time_eps=1e-5)
    mixture = ImageMixture(sde, 2 * images - 1, 0.2)
    case = _case("Digits in closed form, VP", sde, mixture.eps, shape, options, 1e-3, zero)
    yield case, *_published_sampler(sde, 1e-3)


def _published_sampler(sde: LinearSDE, t_end: float) -> tuple[Solver, Tensor]:
    """What 2011.13456 samples an SDE with: of variance-exploding ones 1,000 predictor and corrector
    steps, of others 1,000 steps of the predictor.
    """
    options: dict[str, Any] = {"predictor": "ancestral"}
    if isinstance(sde, VESDE):
        options = {"predictor": "reverse_diffusion", "corrector_steps": 1, "snr": 0.16}
    solver = make_solver("discrete_pc", denoise=True, **options)
    return solver, make_grid("time", sde, 999, t_end)


def _run_case(folder: Path, options: FewStepImagesOptions) -> tuple[Case, Solver, Tensor]:
    model = load(folder)
    if not isinstance(model, DataSGM):
        raise UserError(f"{folder}: is no score model of images")
    last = torch.tensor([model.defaults.t_end], dtype=torch.float64)
    t_end = model.defaults.t_end if model.sde.var(last).item() > 0 else SMALLEST_TIME
    sampler = model.default_sampler()
    solver, times = sampler.method, sampler.times_for(model.sde)
    if len(times) < FEWEST_PUBLISHED_STEPS:  # it recommends few of ours
        solver, times = _published_sampler(model.sde, t_end)
    zero = torch.zeros(())

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return model.score(x.to(zero), t.to(zero))  # the exact flow's state is float64

    case = _case(folder.name, model.sde, eps, model.state_shape, options, t_end, zero)
    return case, solver, times


def _own(bench: Bench, options: FewStepImagesOptions) -> Iterator[Row]:
    """Ours on named grids, and with the pilots' grid and options."""
    case, pilots = bench.case, PilotFits(bench.case)
    runs: list[tuple[str, str]] = []
    for name in OURS:
        grids = ["time", "sqrt_time", "phi", "karras"]
        runs += [(name, grid) for grid in grids]
    runs += [(DEFAULT, "default"), (DEFAULT, "pilot")]
    for name, grid in runs:
        values: dict[int, tuple[float | None, float]] = {}
        solver, label = make_solver(name), grid
        for nfe in options.nfe:
            if grid == "pilot":
                fit = pilots.fit(name, solver, nfe, options=True)
                x, _ = bench.ours(fit.solver, fit.times)
            else:
                used = grid
                if grid == "default":
                    used = few_step_grid(case.sde, nfe) or solver.default_grid
                    label = f"{grid} ({used})"
                times = make_grid(used, case.sde, solver.steps_for(nfe), case.t_end)
                x, _ = bench.ours(solver, times)
            values[nfe] = _figures(bench, x, case.t_end)
        yield Row(name, label, values)


def _figures(bench: Bench, x: Tensor, t_end: float) -> tuple[float | None, float]:
    size = bench.reference(bench.case.t_end).flatten(1).square().sum(1).mean().sqrt().item()
    return bench.rms(x, t_end) / size, bench.quality(x).get("energy", math.inf)


def _theirs(bench: Bench, options: FewStepImagesOptions) -> Iterator[Row]:
    """For each method of diffusers the scheduler that comes nearest, whatever its grid."""
    for method in METHODS:
        values: dict[int, tuple[float | None, float]] = {}
        for nfe in options.nfe:
            found = []
            for sampler in reference_samplers(method, thorough=False):
                x, end = run_theirs(bench, sampler, nfe)
                if x is not None:
                    found.append(_figures(bench, x, end))
            if found:
                values[nfe] = min(found, key=lambda figures: figures[0] or 0.0)
        yield Row(f"{method} of diffusers", "its best", values)


def _published(bench: Bench, solver: Solver, times: Tensor) -> Row:
    rng = torch.Generator().manual_seed(NOISE_SEED)
    solution = solver.solve(bench.case.sde, bench.case.eps_fn, bench.case.start, times, rng)
    energy = bench.quality(solution.x).get("energy", math.inf)
    return Row("published sampler", "its own", {solution.nfe: (None, energy)})


def measure_images(
    case: Case, published: tuple[Solver, Tensor] | None, options: FewStepImagesOptions
) -> str:
    """The table of a case, as Markdown."""
    bench = Bench(case, options.tolerance)
    exact = bench.quality(bench.reference(case.t_end))["energy"]
    rows = [*_own(bench, options), *_theirs(bench, options)]
    kind = "VE" if isinstance(case.sde, VESDE) else type(case.sde).__name__.removesuffix("SDE")
    header = ["sampler", "grid", *(f"error at {n}" for n in options.nfe)]
    header += [f"energy at {n}" for n in options.nfe]
    lines = []
    for row in rows:
        cells = [row.values.get(n, (None, math.nan)) for n in options.nfe]
        errors = ["" if error is None else f"{error:.1e}" for error, _ in cells]
        lines.append([row.sampler, row.grid, *errors, *(f"{energy:.3g}" for _, energy in cells)])
    said = f"Exact flow: {bench.reference_nfe} evaluations, energy distance {exact:.3g}."
    if published is not None:
        row = _published(bench, *published)
        ((nfe, (_, energy)),) = row.values.items()
        said += f" Published sampler: {nfe} evaluations, energy distance {energy:.3g}."
    table = markdown_table(header, lines)
    shape = " x ".join(map(str, case.start.shape[1:]))
    return f"## {case.name}\n\n{kind}, images of {shape}. {said}\n\n{table}\n"


def few_step_images_command(argv: Sequence[str], prog: str = "few-step-images") -> None:
    """``benchmark few-step-images [--run RUN ...] [--nfe N ...] [--out FILE] ...``."""
    line = parse_command_line(
        FewStepImagesOptions, argv, extra=(), prog=prog,
        description=__doc__,
    )  # fmt: skip
    options = line.config
    cases = (
        (_run_case(Path(folder), options) for folder in options.run)
        if options.run
        else _digit_cases(options)
    )
    parts = []
    for case, solver, times in cases:
        parts.append(measure_images(case, (solver, times) if options.published else None, options))
        print(parts[-1], flush=True)
    atomic_write_text(options.out, "\n".join(parts))
