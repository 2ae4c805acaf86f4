"""One sampler: a solver, the times that it goes through, and how the noise starts.

Five lines draw from a mixture of two Gaussians in the plane, whose noise prediction is known:

>>> import torch
>>> from lsgm.sde import VPSDE
>>> sde, means = VPSDE(), torch.tensor([[-2.0, 0.0], [2.0, 0.0]])
>>> def eps(x, t):
...     m, var = sde.mean_coef(t)[:, None], sde.var(t)[:, None]
...     to_means, spread = x[:, None] - m[..., None] * means, 0.04 * m**2 + var
...     share = (-to_means.square().sum(-1) / (2 * spread)).softmax(1)[..., None]
...     return var.sqrt() / spread * (share * to_means).sum(1)
>>> x = Sampler("heun", nfe=40)(sde, eps, (200, 2), seed=0).x
>>> x.shape, round(x[:, 0].abs().mean().item(), 1)
(torch.Size([200, 2]), 2.0)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsgm.score import EpsFn
from lsgm.sde import VESDE, LinearSDE
from lsgm.solvers import make_solver
from lsgm.solvers.base import Callback, Hook, Solution, Solver
from lsgm.solvers.grids import Grid, make_grid
from lsgm.solvers.pilot import choose_pilot
from vae.random import Rng, RowGenerators

__all__ = [
    "DEFAULT_NFE",
    "DEFAULT_SOLVER",
    "DEFAULT_T_END",
    "PILOT_GRID",
    "OptionError",
    "Sampler",
    "few_step_grid",
]

DEFAULT_SOLVER = "normal_reference_pc"
DEFAULT_NFE = 10
DEFAULT_T_END = 1e-3

PILOT_GRID = "pilot"
PILOT_STATES = 16

FINE_NFE = 20
"""Up to so many evaluations a variance-exploding model's time is best spent where the noise is as
large as the data (docs/few_step/images.md); from then on evenly in ln(sigma)."""


class OptionError(ValueError):
    """An option of a sampler that does not fit: ``option`` is its name, ``reason`` why."""

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option}: {reason}")
        self.option = option
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Sampler:
    """How samples are drawn: ``sampler(sde, eps, shape, seed=...)``, or ``model.sample(n,
    sampler=sampler)``.

    Args:
        solver: A solver, or the name of one (``lsgm.solvers.SOLVERS``) with its own options.
        nfe: Network calls on a batch, at most; 10 unless given. Adaptive solvers take none.
        grid: Where the steps lie: a name in ``GRIDS``, a function ``(sde, n, t_end) -> times``, or
            ``pilot`` (chosen on a few trajectories). None: what suits the solver.
        t_end: Last time; time runs from 1 down to it.
        times: The times themselves, decreasing, ``(n + 1,)``, in place of ``nfe`` and ``grid``;
            ``t_end`` then says nothing.
        temperature: Standard deviation of the starting noise, in units of the prior's.
        hooks: Conditioning (:mod:`lsgm.conditioning`).
        name: What reports call it; the solver's name unless given.

    Raises:
        ValueError: The solver is unknown, ``times`` stand beside ``nfe`` or ``grid``, or numbers
            are not positive.
    """

    solver: Solver | str = DEFAULT_SOLVER
    nfe: int | None = None
    grid: str | Grid | None = None
    t_end: float = DEFAULT_T_END
    times: Tensor | None = None
    temperature: float = 1.0
    hooks: Sequence[Hook] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            named = isinstance(self.solver, str)
            object.__setattr__(self, "name", self.solver if named else type(self.solver).__name__)
        object.__setattr__(self, "solver", _built(self.solver))
        if self.times is not None and (self.nfe is not None or self.grid is not None):
            raise ValueError("times: they are the steps themselves; give no nfe and no grid")
        if self.temperature <= 0:
            raise OptionError("temperature", f"must be positive, not {self.temperature:g}")

    @property
    def method(self) -> Solver:
        """The solver, built."""
        return _built(self.solver)

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.method.evaluations(1) is None

    def times_for(self, sde: LinearSDE) -> Tensor:
        """The times, decreasing, float64; of an adaptive solver the two ends.

        Raises:
            ValueError: They do not suit the solver or the SDE, or a pilot is needed (:meth:`on`).
            OptionError: The evaluations are too few, or mean nothing to the solver.
        """
        solver = self.method
        if self.times is not None:
            return solver.check(sde, self.times)
        ends = self.ends_for(sde)
        if self.adaptive:
            return ends
        steps = solver.steps_for(self._enough())
        if callable(self.grid):
            return self.grid(sde, steps, self.t_end)
        return make_grid(self.grid or solver.default_grid, sde, steps, self.t_end)

    def ends_for(self, sde: LinearSDE) -> Tensor:
        """The first and the last time; a last time without noise suits few solvers.

        Raises:
            ValueError: It does not suit this one.
            OptionError: The solver is adaptive, and ``nfe`` or ``grid`` mean nothing to it.
        """
        if self.adaptive and (self.grid, self.nfe) != (None, None):
            raise OptionError(
                "nfe" if self.grid is None else "grid",
                f"{self.name} is adaptive and chooses its own steps; set its tolerance",
            )
        return self.method.check(sde, torch.tensor([1.0, self.t_end], dtype=torch.float64))

    def on(
        self, sde: LinearSDE, eps: EpsFn, start: Callable[[int, Rng], Tensor], seed: int = 0
    ) -> Sampler:
        """The same sampler with its times fixed: those of a pilot are chosen on states that
        ``start(num, rng)`` gives at ``t = 1``, from noise of their own.
        """
        if self.grid != PILOT_GRID:
            return replace(self, times=self.times_for(sde), nfe=None, grid=None)
        self.ends_for(sde)
        nfe, rng = self._enough(), torch.Generator().manual_seed(seed)
        states = start(PILOT_STATES, rng)
        solver, times = choose_pilot(sde, eps, states, nfe, self.t_end, self.method)
        return replace(self, solver=solver, times=times, nfe=None, grid=None)

    def _enough(self) -> int:
        nfe = DEFAULT_NFE if self.nfe is None else self.nfe
        if nfe < (least := self.method.evaluations(1) or 1):
            raise OptionError("nfe", f"{self.name} needs at least {least}, got {nfe}")
        return nfe

    def solve(
        self,
        sde: LinearSDE,
        eps: EpsFn,
        x: Tensor,
        rng: Rng = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Go on from the state ``x (B, *shape)`` at the first of the times; raises as
        :meth:`lsgm.solvers.base.Solver.solve`.
        """
        times = self.times_for(sde) if self.times is None else self.times
        return self.method.solve(sde, eps, x, times, rng, self.hooks, callback)

    def __call__(
        self,
        sde: LinearSDE,
        eps: EpsFn,
        shape: Sequence[int],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        callback: Callback | None = None,
    ) -> Solution:
        """Draw ``shape = (B, *shape)`` states of the generative process.

        Every state has noise of its own, by ``seed`` and its place, so that with fixed steps the
        first states are the same in a larger batch.

        Args:
            sde: The forward SDE.
            eps: The noise prediction, ``x_t (B, *shape), t (B,) -> (B, *shape)``.
            shape: Of the states, batch first.
            seed: Of all noise.
            device: Where the states are.
            callback: Told after every step.

        Raises:
            ValueError: As :meth:`times_for`.
            NonFiniteError: The states are not finite.
        """

        def start(num: int, rng: Rng) -> Tensor:
            return self.temperature * sde.prior_sample((num, *shape[1:]), rng, device=device)

        rng = RowGenerators.of(seed, range(shape[0]))
        return self.on(sde, eps, start, seed).solve(sde, eps, start(shape[0], rng), rng, callback)


def few_step_grid(sde: LinearSDE, nfe: int) -> str | None:
    """Grid of :data:`DEFAULT_SOLVER` on the diffusion of images; None: its own."""
    if not isinstance(sde, VESDE):
        return None
    return "phi" if nfe <= FINE_NFE else "log_snr"


def _built(solver: Solver | str) -> Solver:
    return make_solver(solver) if isinstance(solver, str) else solver
