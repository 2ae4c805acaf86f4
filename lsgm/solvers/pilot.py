r"""A solver's few steps fitted to a model by a few pilot trajectories.

How fast the noise prediction changes, and when, depends on the model, so no fixed grid is best. A
pilot batch (some ten to a hundred starting points) is solved accurately once; then the settings of
a deterministic fixed-step solver are chosen to end nearest to that solution:

1. *Scan*: every candidate (for the Normal-reference integrator its order, corrector, extrapolation
   variable and ``alpha``, among them the ``alpha`` of each channel that fits the pilots) on a few
   named grids, and keep the best.
2. *Refine*: the interior times, and ``alpha`` by a common shift of its logit, by non-linear least
   squares (trust region) on the pilots' end points. The steps in ``sqrt(t)`` are ``exp(theta_i)``
   times those of the grid it starts from, up to a common factor, so every ``theta`` gives an
   ordered grid with exact ends.

The outcome is a solver and a plain tensor of times: values, which can be saved and used with any
other noise. A pilot of ``P`` points determines the few numbers from ``P`` times as many equations
as the state has components. The optimum of few-step grids by minimising the distance to accurate
trajectories is also in arXiv 2402.17376 and 2405.11326, for other solvers and searches.

>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers import make_solver
>>> from lsgm.solvers.pilot import Pilot, fit_pilot
>>> sde = VPSDE()
>>> def eps(x, t):  # of data from N(0, 0.01 I)
...     var = sde.var(t)[:, None]
...     return var.sqrt() / (0.01 * sde.mean_coef(t)[:, None] ** 2 + var) * x
>>> start = sde.prior_sample((8, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
>>> pilot = Pilot(sde, eps, start, t_end=1e-3)
>>> fit = fit_pilot(pilot, make_solver("ddim"), nfe=4, iterations=2)
>>> bool(fit.error < fit.start_error), len(fit.times)
(True, 5)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from lsgm.errors import NonFiniteError
from lsgm.sde import LinearSDE
from lsgm.solvers.base import EpsFn, Solver
from lsgm.solvers.grids import make_grid
from lsgm.solvers.normal_reference import NormalReference
from lsgm.solvers.ode import AdaptiveODE

__all__ = ["Pilot", "PilotFit", "choose_pilot", "fit_pilot"]

SCAN_GRIDS = ("sqrt_time", "phi", "time")
"""Grids that the scan tries besides the solver's own."""
SCAN_ALPHAS = (0.02, 0.3)
"""Values of alpha that the scan tries besides the solver's own and the fitted ones."""
SCAN_STRUCTURES = (
    (2, False, False),
    (3, False, False),
    (3, True, True),
    (3, True, False),
    (4, True, True),
)
"""Orders, whether corrected, whether of lower order at the end, that the scan tries."""
MAX_NODES = 9
"""Steps that are free in the refinement; of more steps the logs are interpolated between them."""
MAX_CALLS = 1000
"""Network calls of a refinement, about."""
CLOSE = 2.0
"""A second kind of solver is refined too if its error is below this factor of the best one's."""
ALPHA_LIMITS = (1e-4, 1 - 1e-4)


class Pilot:
    """Pilot starting points, their accurate solution, and the count of network calls spent.

    Args:
        sde: The forward SDE.
        eps_fn: The noise prediction.
        start: States at time 1, ``(P, *shape)``, best of the noise that generation starts from.
        t_end: Last time.
        tolerance: Of the adaptive solver of the reference; None: 1e-7 for float64 starts, else
            1e-5, below which a float32 network gives mere noise.

    Attributes:
        reference: The solution at ``t_end``, float64.
        nfe: Network calls on the pilot batch so far.
        alpha: ``(C,)``: one less the least-squares coefficient of ``eps`` on ``sigma z / V`` along
            the trajectories, channel by channel, clipped to [0, 1].
    """

    def __init__(
        self,
        sde: LinearSDE,
        eps_fn: EpsFn,
        start: Tensor,
        t_end: float,
        tolerance: float | None = None,
    ) -> None:
        if not len(start):
            raise ValueError("a pilot needs at least one starting point")
        self.sde, self.start, self.t_end, self.nfe = sde, start, t_end, 0
        self._eps_fn = eps_fn
        if tolerance is None:
            tolerance = 1e-7 if start.dtype == torch.float64 else 1e-5
        self._sums: Tensor | None = torch.zeros(2, start.shape[1], dtype=torch.float64)
        times = torch.tensor([1.0, t_end], dtype=torch.float64)
        self.reference = self.solve(AdaptiveODE(rtol=tolerance, atol=tolerance), times)
        product, square = self._sums
        self._sums = None
        self.alpha = (1 - product / square.clamp_min(1e-300)).clamp(0, 1)

    def solve(self, solver: Solver, times: Tensor) -> Tensor:
        """The pilots at ``times[-1]``, float64 on the CPU."""
        return solver.solve(self.sde, self._eps, self.start, times).x.double().cpu()

    def residual(self, solver: Solver, times: Tensor) -> Tensor:
        """Distance vectors to the reference, ``(P, *shape)``; NaN if the solver diverges."""
        try:
            return self.solve(solver, times) - self.reference
        except NonFiniteError:
            return torch.full_like(self.reference, math.nan)

    def error(self, solver: Solver, times: Tensor) -> float:
        """Root of the mean squared distance of a pilot to its reference (sum over components);
        infinite if the solver diverges.
        """
        error = self.residual(solver, times).flatten(1).square().sum(1).mean().sqrt().item()
        return error if math.isfinite(error) else math.inf

    def _eps(self, x: Tensor, t: Tensor) -> Tensor:
        self.nfe += 1
        eps = self._eps_fn(x, t)
        if self._sums is not None:
            normal = self.sde.normal_component(x, t).double()
            pair = torch.stack([eps.double() * normal, normal.square()])
            dims = [d for d in range(pair.ndim) if d not in (0, 2)]
            self._sums += pair.sum(dims).cpu()
        return eps


@dataclass(frozen=True)
class PilotFit:
    """What the pilots chose.

    Attributes:
        solver: The solver with its fitted options.
        times: Its grid, ``(n + 1,)`` float64, from 1 to ``t_end``.
        error: RMS distance of the pilots to their reference.
        start_error: That of the solver as given, on its default grid.
        nfe: Network calls on the pilot batch that the choice took.
    """

    solver: Solver
    times: Tensor
    error: float
    start_error: float
    nfe: int


def fit_pilot(
    pilot: Pilot,
    solver: Solver,
    nfe: int,
    *,
    fit_options: bool = True,
    refine: bool = True,
    iterations: int | None = None,
) -> PilotFit:
    """Choose options and times of ``solver`` for ``nfe`` network calls.

    A closing ``denoise`` is kept; what is fitted is the way to the last time. A solve of the pilots
    takes ``nfe`` calls; the scan takes some 25 solves (3 or 4 without ``fit_options``), each
    iteration as many as there are free steps, at most ``MAX_NODES + 2``.

    Args:
        pilot: The pilot trajectories.
        solver: A deterministic fixed-step solver.
        nfe: Network calls of a solve at most.
        fit_options: Choose the options of a Normal-reference integrator too; other solvers have
            none to choose.
        refine: Refine the times (and alpha) after the scan.
        iterations: Of the refinement at most; None: 8, fewer from 12 steps on, whose error is small
            and whose solves are long.

    Raises:
        ValueError: The solver is stochastic or adaptive, or ``nfe`` does not pay for one step.
    """
    if solver.stochastic:
        raise ValueError(f"{type(solver).__name__} is stochastic: pilots fit deterministic solvers")
    if closing := solver.denoise:
        solver, nfe = replace(solver, denoise=False), nfe - 1
    if iterations is None:
        iterations = max(2, min(8, MAX_CALLS // (nfe * (MAX_NODES + 2))))
    before, grids = pilot.nfe, dict.fromkeys((solver.default_grid, *SCAN_GRIDS))
    solver.steps_for(nfe)
    found: list[_Try] = []

    def scan(candidates: Sequence[Solver], names: Sequence[str]) -> None:
        for candidate in candidates:
            for name in names:
                times = make_grid(name, pilot.sde, candidate.steps_for(nfe), pilot.t_end)
                found.append(_Try(pilot.error(candidate, times), candidate, times, name))

    scan([solver, *(_structures(solver, nfe) if fit_options else ())], list(grids))
    start_error = found[0].error
    if fit_options and isinstance(solver, NormalReference):
        for one in sorted(found, key=lambda one: one.error)[:3]:
            assert isinstance(one.solver, NormalReference)  # as all of its structures are
            scan(_with_alphas(pilot, one.solver), [one.grid])
    found.sort(key=lambda one: one.error)
    best = found[0]
    if refine and math.isfinite(best.error):
        kinds: list[_Try] = []
        for one in found:  # of each kind the best: which wins may change
            if all(_kind(one.solver) != _kind(other.solver) for other in kinds):
                kinds.append(one)
        close = [one for one in kinds[:2] if one.error < CLOSE * best.error]
        fits = [_refined(pilot, one, fit_options, iterations) for one in close or kinds[:1]]
        best = min([best, *fits], key=lambda one: one.error)
    chosen = replace(best.solver, denoise=True) if closing else best.solver
    return PilotFit(chosen, best.times, best.error, start_error, pilot.nfe - before)


def choose_pilot(
    sde: LinearSDE, eps_fn: EpsFn, start: Tensor, nfe: int, t_end: float, solver: Solver
) -> tuple[Solver, Tensor]:
    """The solver with its options and the times that pilots from ``start (P, *shape)`` choose for
    ``nfe`` network calls, as :func:`fit_pilot`.
    """
    fit = fit_pilot(Pilot(sde, eps_fn, start, t_end), solver, nfe)
    return fit.solver, fit.times


@dataclass(frozen=True)
class _Try:
    """A solver on a grid (``grid``: where it came from) and the pilots' error."""

    error: float
    solver: Solver
    times: Tensor
    grid: str


def _structures(solver: Solver, nfe: int) -> list[Solver]:
    """The solver with other orders and correctors; of solvers but the Normal-reference none."""
    if not isinstance(solver, NormalReference):
        return []
    candidates = [
        replace(solver, order=order, corrector=corrector, lower_order_final=lower, corrector_from=1)
        for order, corrector, lower in SCAN_STRUCTURES
    ]
    return [candidate for candidate in candidates if candidate != solver]


def _with_alphas(pilot: Pilot, solver: NormalReference) -> list[Solver]:
    """The solver with other values of alpha."""
    fitted = tuple(pilot.alpha.tolist())
    return [replace(solver, alpha=a) for a in (*SCAN_ALPHAS, fitted) if a != solver.alpha]


def _kind(solver: Solver) -> tuple[object, ...]:
    """What the refinement does not change."""
    if not isinstance(solver, NormalReference):
        return (type(solver),)
    return (solver.order, solver.corrector, solver.lower_order_final, solver.variable)


def _refined(pilot: Pilot, start: _Try, fit_alpha: bool, iterations: int) -> _Try:
    """``start`` with its times and alpha's logit moved by least squares."""
    solver, times = start.solver, start.times
    roots = times.sqrt().numpy()
    steps = -np.diff(roots)
    shifts_alpha = fit_alpha and isinstance(solver, NormalReference)
    # The first of the free steps stays as it is: only their ratios count.
    nodes = np.unique(np.linspace(0, len(steps) - 1, MAX_NODES + 1).round())
    num = len(nodes) - 1

    def settings(theta: np.ndarray) -> tuple[Solver, Tensor]:
        logs = np.interp(np.arange(len(steps)), nodes, np.concatenate([[0.0], theta[:num]]))
        scaled = steps * np.exp(logs)
        inner = roots[0] - np.cumsum(scaled)[:-1] * (roots[0] - roots[-1]) / scaled.sum()
        moved = torch.cat([times[:1], torch.from_numpy(inner) ** 2, times[-1:]])
        if not (shifts_alpha and isinstance(solver, NormalReference)):
            return solver, moved
        alpha = torch.as_tensor(solver.alpha, dtype=torch.float64).clamp(*ALPHA_LIMITS)
        return replace(solver, alpha=torch.sigmoid(torch.logit(alpha) + theta[-1])), moved

    def residuals(theta: np.ndarray) -> np.ndarray:
        distances = pilot.residual(*settings(theta)).flatten().numpy()
        return np.nan_to_num(distances, posinf=1e3, neginf=-1e3, nan=1e3) / root_size

    root_size = math.sqrt(len(pilot.start))
    theta = np.zeros(num + shifts_alpha)
    if not len(theta):
        return start
    result = least_squares(
        residuals,
        theta,
        diff_step=1e-3,  # relative to max(1, |theta|): above a float32 network's noise
        bounds=(-6.0, 6.0),
        max_nfev=iterations,
        xtol=1e-3,
        ftol=1e-3,
    )
    return _Try(math.sqrt(2 * result.cost), *settings(result.x), start.grid)
