"""What a solver costs beside the network."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm.benchmark.few_step_cases import Case
from lsgm.sde import VPSDE
from lsgm.solvers import make_grid, make_solver

__all__ = ["Overhead", "measure_overhead"]

SOLVERS = ("ddim", "dpmpp_2m", "unipc", "normal_reference_pc")
LATENTS = (64, 24, 8, 8)
"""A batch of latents of the OMNIGLOT-small configuration."""
STEPS, REPEATS = 10, 15


@dataclass(frozen=True)
class Overhead:
    """Smallest of several solves of ``STEPS`` steps: what other processes do not add to.

    Attributes:
        solver: Its name.
        batch: Shape of the state.
        solver_ms: Everything but the network, milliseconds per step.
        network_ms: The network, milliseconds per call; 0 where there is none.
    """

    solver: str
    batch: tuple[int, ...]
    solver_ms: float
    network_ms: float

    @property
    def share(self) -> float:
        """Share of a step that is not the network."""
        return self.solver_ms / (self.solver_ms + self.network_ms)


class _Timed:
    """A noise prediction that adds up its own time."""

    def __init__(self, case: Case | None) -> None:
        self.case, self.seconds, self.calls = case, 0.0, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        _wait(x)
        start = time.perf_counter()
        eps = 0.5 * x if self.case is None else self.case.eps_fn(x, t)
        _wait(x)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return eps


def _wait(x: Tensor) -> None:
    if x.device.type != "cpu":
        torch.accelerator.synchronize(x.device)


def _measure(name: str, case: Case | None, start: Tensor) -> Overhead:
    sde = VPSDE() if case is None else case.sde
    solver = make_solver(name)
    times = make_grid(solver.default_grid, sde, STEPS, 1e-3)
    beside, inside = [], []
    for _ in range(REPEATS + 2 if case is None else 5):
        timed = _Timed(case)
        _wait(start)
        began = time.perf_counter()
        solver.solve(sde, timed, start, times)
        _wait(start)
        beside.append((time.perf_counter() - began - timed.seconds) / STEPS)
        inside.append(timed.seconds / timed.calls)
    solver_ms, network_ms = 1e3 * min(beside), 1e3 * min(inside)
    return Overhead(name, tuple(start.shape), solver_ms, 0.0 if case is None else network_ms)


def measure_overhead(case: Case) -> tuple[Overhead, ...]:
    """Solvers on latents of the OMNIGLOT-small size, whose network is left out, and on ``case``
    itself if its states are latents.
    """
    latents = torch.randn(LATENTS, generator=torch.Generator().manual_seed(0))
    found = [_measure(name, None, latents) for name in SOLVERS]
    if case.pixels is not None:
        found += [_measure(name, case, case.start[: LATENTS[0]]) for name in SOLVERS]
    return tuple(found)
