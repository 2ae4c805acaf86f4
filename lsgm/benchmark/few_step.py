"""Few-step sampling, measured: ours on every grid, the schedulers of diffusers on every grid of
theirs, and what the difference is made of.

All samplers start from the same noise with the same number of network calls. The error is the root
of the mean squared distance (sum over components) to a solution of the probability-flow ODE with
tight tolerances; a sampler that ends at another time than ours is compared with the solution at its
own end or at ours, whichever is nearer to it. Stochastic samplers have sample quality alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from lsgm.benchmark.few_step_ablation import ablation_rows
from lsgm.benchmark.few_step_cases import Case, mixture_case, run_case
from lsgm.benchmark.few_step_report import write_report
from lsgm.benchmark.few_step_runner import Bench, FewStepResult, Measurement, PilotFits, run_theirs
from lsgm.benchmark.overhead import measure_overhead
from lsgm.benchmark.reference_samplers import METHODS, reference_samplers
from lsgm.config.command_line import parse_command_line
from lsgm.solvers import GRIDS, SOLVERS, Solver, make_grid, make_solver
from lsgm.system.device import choose_device
from lsgm.system.files import check_output
from lsgm.system.progress import progress_bar

__all__ = ["FewStepOptions", "few_step_command", "measure"]

DEFAULT = "normal_reference_pc"
OURS, BASELINE, THEIRS, STOCHASTIC = "ours", "own", "diffusers", "stochastic"
PILOT = "pilot"
ABLATED = (3, 5, 8, 10, 20)


@dataclass(frozen=True)
class FewStepOptions:
    """Few-step samplers against tight-tolerance solutions of the same ODE."""

    run: str | None = None
    """Folder of a trained LSGM. None: an 8-component mixture in closed form."""
    nfe: tuple[int, ...] = (1, 2, 3, 5, 8, 10, 20, 50)
    """Numbers of network evaluations."""
    samples: int = 256
    """Starting points that the errors are measured from."""
    pilots: int = 64
    """Other starting points, from which grids and alpha are fitted."""
    t_end: float = 1e-3
    """Last time."""
    out: str = "few_step"
    """Folder for report.md, report.json and plots."""
    tolerance: float = 1e-8
    """Of the reference solution; for a float32 network not below 1e-6 makes sense."""
    thorough: bool | None = None
    """Every option of diffusers' schedulers, not only the usual ones on every grid, and pilot grids
    for every solver of ours, not only for those of their methods. None: without --run."""
    extractor: str = "classifier"
    """Features of the quality figure with --run (lsgm.evaluation.quality.features), or none."""
    data_root: str | None = None
    """Where the data lie, if elsewhere than in training."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        if not self.nfe or min(self.nfe) < 1:
            raise ValueError("nfe: must be positive numbers")
        for name in ("samples", "pilots"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: must be at least 2, not {getattr(self, name)}")
        if not 0 < self.t_end < 1:
            raise ValueError(f"t_end: must lie in (0, 1), not {self.t_end}")
        if self.tolerance <= 0:
            raise ValueError(f"tolerance: must be positive, not {self.tolerance}")


def _fixed_step_solvers(stochastic: bool) -> Iterator[tuple[str, Solver]]:
    """Every sampler of ours with a fixed number of calls and a claim to an order, once."""
    for name in SOLVERS:
        try:
            solver = make_solver(name)
        except (TypeError, ValueError):
            continue  # one that has no default options
        if solver.evaluations(1) is None or solver.stochastic is not stochastic:
            continue
        yield name, solver


def _own(
    bench: Bench, pilots: PilotFits, nfe: int, thorough: bool
) -> list[tuple[Measurement, Tensor]]:
    """Every deterministic fixed-step solver of ours on every grid, fitted ones among them."""
    found = []
    for name, solver in _fixed_step_solvers(stochastic=False):
        if nfe < (solver.evaluations(1) or 1):
            continue
        family = OURS if name.startswith("normal_reference") else BASELINE
        steps = solver.steps_for(nfe)
        grids: dict[str, tuple[Solver, Tensor, int]] = {
            grid: (solver, make_grid(grid, bench.case.sde, steps, bench.case.t_end), 0)
            for grid in GRIDS
        }
        if thorough or name == DEFAULT or name in METHODS:
            fit = pilots.fit(name, solver, nfe)
            grids[PILOT] = (solver, fit.times, fit.nfe + pilots.reference_nfe)
        if name == DEFAULT:
            full = pilots.fit(name, solver, nfe, options=True)
            cost = full.nfe + pilots.reference_nfe
            grids["pilot, options fitted"] = (full.solver, full.times, cost)
        for grid, (used, times, cost) in grids.items():
            x, calls = bench.ours(used, times)
            rms = bench.rms(x, bench.case.t_end)
            found.append((Measurement(family, name, grid, calls, rms, pilot_nfe=cost), x))
    return found


def _theirs(
    bench: Bench, method: str, nfe: int, thorough: bool
) -> list[tuple[Measurement, Tensor]]:
    """Every sampler of diffusers for a method."""
    found = []
    for sampler in reference_samplers(method, thorough=thorough):
        x, end = run_theirs(bench, sampler, nfe)
        if x is not None:
            rms = bench.rms(x, end)
            grid = sampler.name.removeprefix(method).strip()
            found.append((Measurement(THEIRS, method, grid, nfe, rms), x))
    return found


def _stochastic(bench: Bench, nfe: int) -> Iterator[Measurement]:
    for name, solver in _fixed_step_solvers(stochastic=True):
        if nfe < (solver.evaluations(1) or 1):
            continue
        times = make_grid(
            solver.default_grid, bench.case.sde, solver.steps_for(nfe), bench.case.t_end
        )
        x, calls = bench.ours(solver, times)
        if quality := bench.quality(x):
            yield Measurement(STOCHASTIC, name, solver.default_grid, calls, None, quality=quality)


def _finish(bench: Bench, found: Sequence[tuple[Measurement, Tensor]]) -> list[Measurement]:
    """The measurements; those of the nearest variant of each solver, the default and the fitted one
    with pixels and quality.
    """
    nearest: dict[str, int] = {}
    for i, (one, _) in enumerate(found):
        best = nearest.setdefault(one.solver, i)
        if _distance(one) < _distance(found[best][0]):
            nearest[one.solver] = i
    finished = []
    for i, (one, x) in enumerate(found):
        named = one.solver == DEFAULT and one.grid in ("sqrt_time", "pilot, options fitted")
        if named or i == nearest[one.solver]:
            one = replace(one, pixel_rms=bench.pixel_rms(x), quality=bench.quality(x))
        finished.append(one)
    return finished


def _distance(one: Measurement) -> float:
    return math.inf if one.rms is None else one.rms


def measure(
    case: Case,
    options: FewStepOptions,
    callback: Callable[[int], None] | None = None,
) -> FewStepResult:
    """Measure everything on a case; ``callback`` receives each number of network calls done."""
    bench, pilots = Bench(case, options.tolerance), PilotFits(case)
    thorough = options.run is None if options.thorough is None else options.thorough
    rows: list[Measurement] = []
    ablation: list[Measurement] = []
    settings = {}
    for nfe in options.nfe:
        rows += _finish(bench, _own(bench, pilots, nfe, thorough))
        for method in METHODS:
            rows += _finish(bench, _theirs(bench, method, nfe, thorough))
        rows += _stochastic(bench, nfe)
        if nfe in ABLATED:
            ablation += ablation_rows(bench, pilots, nfe)
        fit = pilots.fit(DEFAULT, make_solver(DEFAULT), nfe, options=True)
        times = ", ".join(f"{t:.4g}" for t in fit.times.tolist())
        settings[str(nfe)] = f"{fit.solver} at {times}"
        if callback:
            callback(nfe)
    reference = bench.reference(case.t_end)
    return FewStepResult(
        case.name,
        asdict(options),
        tuple(case.start.shape[1:]),
        bench.reference_nfe,
        pilots.reference_nfe,
        case.quality(reference),
        tuple(rows),
        tuple(ablation),
        settings,
    )


def few_step_command(argv: Sequence[str], prog: str = "few-step") -> None:
    """``benchmark few-step [--run RUN] [--nfe N ...] [--samples S] [--out FOLDER] ...``."""
    line = parse_command_line(FewStepOptions, argv, extra=(), prog=prog, description=__doc__)
    options = line.config
    check_output(Path(options.out) / "report.json", "--out")
    if options.run is None:
        case = mixture_case(options.samples, options.pilots, options.t_end)
    else:
        folder = Path(options.run)
        options = replace(options, tolerance=max(options.tolerance, 1e-6))
        case = run_case(
            folder,
            options.samples,
            options.pilots,
            options.t_end,
            options.extractor,
            choose_device(options.device),
            options.data_root,
        )
    with progress_bar(total=len(options.nfe), unit="NFE") as bar:
        result = measure(case, options, lambda _: bar.update(1))
    result = replace(result, overhead=measure_overhead(case))
    print(write_report(result, Path(options.out)))
