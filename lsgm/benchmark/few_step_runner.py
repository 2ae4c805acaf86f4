"""How the few-step benchmark runs a sampler and measures its distance to the exact flow."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lsgm.benchmark.few_step_cases import Case
from lsgm.benchmark.overhead import Overhead
from lsgm.benchmark.reference_samplers import ReferenceSampler
from lsgm.errors import NonFiniteError
from lsgm.solvers import Pilot, PilotFit, Solver, fit_pilot
from lsgm.solvers.ode import AdaptiveODE

__all__ = ["Bench", "FewStepResult", "Measurement", "PilotFits", "run_theirs"]

SMALLEST_TIME = 1e-6


@dataclass(frozen=True)
class Measurement:
    """One sampler at one number of network calls.

    Attributes:
        family: ``ours``, ``own`` (other methods, our implementation), ``diffusers``,
            ``stochastic`` or ``ablation``.
        solver: Name.
        grid: Name of the time grid, with a scheduler's options.
        nfe: Network calls that it took.
        rms: Distance to the exact flow; None for stochastic solvers.
        pixel_rms: The same of the decoded images (root mean square over pixels).
        quality: Figures of sample quality, lower is better.
        pilot_nfe: Network calls on the pilots that its settings took.
    """

    family: str
    solver: str
    grid: str
    nfe: int
    rms: float | None
    pixel_rms: float | None = None
    quality: dict[str, float] = field(default_factory=dict)
    pilot_nfe: int = 0


@dataclass(frozen=True)
class FewStepResult:
    """All measurements of a case.

    Attributes:
        case: Name of the case.
        options: Those of the command.
        shape: Of one state.
        reference_nfe: Network calls of the exact flow.
        pilot_reference_nfe: Those of the pilots' exact flow.
        reference_quality: Figures of sample quality of the exact flow.
        rows: Every sampler at every number of network calls.
        ablation: What the gain of the default is made of.
        settings: What the pilots chose, by number of network calls.
        overhead: Time that solvers take beside the network.
    """

    case: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    reference_nfe: int
    pilot_reference_nfe: int
    reference_quality: dict[str, float]
    rows: tuple[Measurement, ...]
    ablation: tuple[Measurement, ...]
    settings: dict[str, str]
    overhead: tuple[Overhead, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Bench:
    """Runs samplers on a case and keeps their distances."""

    def __init__(self, case: Case, tolerance: float) -> None:
        self.case, self.tolerance = case, tolerance
        self._references: dict[float, Tensor] = {}
        self.reference_nfe = 0
        self.reference(case.t_end)
        self._pixels: Tensor | None = None

    def reference(self, t_end: float) -> Tensor:
        """The exact flow from the start to ``t_end``, float64; time zero is cut at
        ``SMALLEST_TIME``.
        """
        t_end = max(t_end, SMALLEST_TIME)
        if t_end >= 1:  # a scheduler with one step may not move at all
            return self.case.start.double()
        near = [t for t in self._references if abs(t / t_end - 1) < 1e-4]
        if near:
            return self._references[near[0]]
        solver = AdaptiveODE(rtol=self.tolerance, atol=self.tolerance)
        times = torch.tensor([1.0, t_end], dtype=torch.float64)
        # A float64 start keeps the state's digits; the network has its own precision.
        solution = solver.solve(self.case.sde, self._eps64, self.case.start.double(), times)
        self.reference_nfe = self.reference_nfe or solution.nfe
        self._references[t_end] = solution.x
        return solution.x

    def _eps64(self, x: Tensor, t: Tensor) -> Tensor:
        return self.case.eps_fn(x, t).double()

    def rms(self, x: Tensor, t_end: float) -> float:
        """The distance that counts for a sampler that ended at ``t_end``."""
        found = []
        for end in {t_end, self.case.t_end}:
            distance = (x.double() - self.reference(end)).flatten(1).square().sum(1).mean().sqrt()
            found.append(distance.item() if distance.isfinite() else math.inf)
        return min(found)

    def pixel_rms(self, x: Tensor) -> float | None:
        if self.case.pixels is None or not x.isfinite().all():
            return None
        if self._pixels is None:
            self._pixels = self.case.pixels(self.reference(self.case.t_end))
        return (self.case.pixels(x) - self._pixels).double().square().mean().sqrt().item()

    def quality(self, x: Tensor) -> dict[str, float]:
        return self.case.quality(x) if bool(x.isfinite().all()) else {}

    def ours(self, solver: Solver, times: Tensor) -> tuple[Tensor, int]:
        rng = torch.Generator().manual_seed(0)
        try:
            solution = solver.solve(self.case.sde, self.case.eps_fn, self.case.start, times, rng)
        except NonFiniteError:
            nowhere = torch.full_like(self.case.start, math.nan)
            return nowhere, solver.evaluations(len(times) - 1) or 0
        return solution.x, solution.nfe


class PilotFits:
    """Pilot fits, one for each (solver, calls), made when asked for."""

    def __init__(self, case: Case) -> None:
        self.pilot = Pilot(case.sde, case.eps_fn, case.pilots, case.t_end)
        self.reference_nfe = self.pilot.nfe
        self._fits: dict[tuple[str, int, bool], PilotFit] = {}

    def fit(self, name: str, solver: Solver, nfe: int, *, options: bool = False) -> PilotFit:
        key = (name, nfe, options)
        if key not in self._fits:
            self._fits[key] = fit_pilot(self.pilot, solver, nfe, fit_options=options)
        return self._fits[key]


def run_theirs(
    bench: Bench, sampler: ReferenceSampler, nfe: int, times: Tensor | None = None
) -> tuple[Tensor | None, float]:
    """End state and time; no state where the scheduler cannot run so."""
    case = bench.case
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of divisions by zero at its last step
            solution = sampler.solve(
                case.sde, case.eps_fn, case.start, nfe, case.t_end, times=times
            )
    except (RuntimeError, IndexError, ZeroDivisionError):
        return None, 0.0
    return (solution.x if solution.x.isfinite().all() else None), solution.t_end
