r"""Annealed Langevin dynamics (arXiv 1907.05600 algorithm 1).

At each noise level ``sigma_i`` of a decreasing list, ``y <- y + (a_i / 2) score(y) + sqrt(a_i) e``
with ``a_i`` proportional to ``sigma_i^2``. For any linear SDE ``y = z / m`` has exactly that law
with noise ``sigma / m``, so one algorithm serves all. Within a level ``m`` cancels and the step is
written for ``z``; between levels ``z`` is rescaled so that ``y`` stays.

>>> import torch
>>> from lsgm.noise_ladder import NoiseLadder
>>> from lsgm.solvers.langevin import AnnealedLangevin
>>> ladder, rng = NoiseLadder(sigma_max=10.0, sigma_min=0.1, num_levels=10), torch.Generator()
>>> sde = ladder.sde()
>>> start = sde.prior_sample((500, 2), rng.manual_seed(0))
>>> solver = AnnealedLangevin(steps_per_level=100)
>>> x = solver.solve(sde, sde.normal_component, start, ladder.times, rng).x
>>> abs(x.std().item() - 1) < 0.1  # samples of N(0, I)
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lsgm.solvers.base import Problem, Solver

__all__ = ["AnnealedLangevin", "langevin_step"]


def langevin_step(problem: Problem, x: Tensor, eps: Tensor, sigma: float, ratio: float) -> Tensor:
    """One Langevin step of size ``a = ratio sigma^2`` in z-space: ``z - (ratio / 2) sigma eps +
    sqrt(ratio) sigma e``.
    """
    return x - 0.5 * ratio * sigma * eps + math.sqrt(ratio) * sigma * problem.noise(x)


@dataclass(frozen=True, kw_only=True)
class AnnealedLangevin(Solver):
    """Annealed Langevin dynamics over the noise levels of all given times, the first included.

    Args:
        steps_per_level: Langevin steps at each level (the paper's T).
        step_ratio: ``a_i / sigma_i^2``, the same at every level; the paper's ``epsilon /
            sigma_L^2``, whose ``epsilon = 2e-5`` with ``sigma_L = 0.01`` is 0.2.
    """

    order: ClassVar[int] = 0
    stochastic: ClassVar[bool] = True
    default_grid: ClassVar[str] = "log_snr"
    steps_per_level: int = 100
    step_ratio: float = 0.2

    def __post_init__(self) -> None:
        if self.steps_per_level < 1:
            raise ValueError(f"steps_per_level must be at least 1, got {self.steps_per_level}")
        if not 0 < self.step_ratio < 4:
            raise ValueError(f"step_ratio must lie in (0, 4) to be stable, got {self.step_ratio}")

    def _calls(self, num_steps: int) -> int:
        return (num_steps + 1) * self.steps_per_level

    def _integrate(self, problem: Problem, x: Tensor) -> list[Tensor]:
        schedule, total = problem.schedule, problem.num_steps + 1
        states: list[Tensor] = []
        for i, (t, sigma) in enumerate(zip(schedule.t, schedule.sigma, strict=True)):
            if i > 0:
                x = schedule.m[i] / schedule.m[i - 1] * x
            for _ in range(self.steps_per_level):
                x = langevin_step(problem, x, problem.eps(x, t), sigma, self.step_ratio)
                x = problem.project(x, t)
            problem.report(i + 1, total, t, x)
            states = [*states, x] if self.keep_trajectory else [x]
        return states
