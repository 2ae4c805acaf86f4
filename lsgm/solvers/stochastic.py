r"""Stochastic exponential integrators: few-step solvers of the reverse SDE.

>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers.grids import make_grid
>>> from lsgm.solvers.stochastic import SDEDPMSolverPP
>>> sde, rng = VPSDE(), torch.Generator().manual_seed(0)
>>> times = make_grid("log_snr", sde, 50, 1e-3)
>>> start = sde.prior_sample((500, 2), rng)
>>> x = SDEDPMSolverPP().solve(sde, sde.normal_component, start, times, rng).x
>>> abs(x.std().item() - 1) < 0.1  # samples of N(0, I)
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lsgm.solvers.base import Problem, StepSolver
from lsgm.solvers.exponential import data_prediction
from lsgm.solvers.grids import noise_level, times_of_noise_levels

__all__ = ["EDMChurn", "SDEDPMSolverPP"]


@dataclass(frozen=True, kw_only=True)
class SDEDPMSolverPP(StepSolver):
    """SDE-DPM-Solver++ (arXiv 2211.01095 appendix): the reverse SDE with the data prediction linear
    in ``lambda``.

    Args:
        order: 2 is "2M"; 1 uses the newest evaluation alone (the ancestral sampler). Weak order,
            which for "2M" holds for problems with a linear score (there it is measured); otherwise
            the prediction's dependence on the noise within a step is neglected.
    """

    stochastic: ClassVar[bool] = True
    default_grid: ClassVar[str] = "log_snr"
    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"SDE-DPM-Solver++ has orders 1 and 2, got {self.order}")

    def _calls(self, num_steps: int) -> int:
        return num_steps

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        schedule = problem.schedule
        lam = schedule.log_snr
        history.append(data_prediction(problem, x, i))
        del history[: -self.order]
        h = lam[i + 1] - lam[i]
        data = history[-1]
        if len(history) == 2:
            data = data + 0.5 * h / (lam[i] - lam[i - 1]) * (history[-1] - history[-2])
        fresh = -math.expm1(-2 * h)
        x = (
            schedule.sigma[i + 1] / schedule.sigma[i] * math.exp(-h) * x
            + schedule.m[i + 1] * fresh * data
        )
        return x + schedule.sigma[i + 1] * math.sqrt(fresh) * problem.noise(x)


@dataclass(frozen=True, kw_only=True)
class EDMChurn(StepSolver):
    """EDM's stochastic sampler (arXiv 2206.00364 algorithm 2), in ``y = z / m`` with noise ``sigma
    / m``.

    Each step first adds noise, up to a slightly earlier time, then takes a Heun step of the
    probability-flow ODE. The added noise never leads beyond ``t = 1``.

    Args:
        churn: Total amount of added noise (the paper's S_churn); 0 is the deterministic sampler.
        churn_min, churn_max: Noise levels ``sigma / m`` between which noise is added (S_tmin,
            S_tmax).
        noise: Standard deviation of the added noise relative to the exact one (S_noise); not 1
            biases the samples.
    """

    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True
    default_grid: ClassVar[str] = "karras"
    churn: float = 10.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    noise: float = 1.0

    def __post_init__(self) -> None:
        if self.churn < 0:
            raise ValueError(f"churn must not be negative, got {self.churn}")

    @property
    def needs_noise_at_end(self) -> bool:
        return False

    def _calls(self, num_steps: int) -> int:
        return 2 * num_steps

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        schedule = problem.schedule
        level, next_level = schedule.sigma_hat[i], schedule.sigma_hat[i + 1]
        y, t, m, raised = x / schedule.m[i], schedule.t[i], schedule.m[i], level
        if self.churn > 0 and self.churn_min <= level <= self.churn_max:
            highest = noise_level(problem.sde, torch.ones(1, dtype=torch.float64)).item()
            factor = 1 + min(self.churn / problem.num_steps, math.sqrt(2) - 1)
            raised = max(level, min(level * factor, highest))
        if raised > level:
            y = y + self.noise * math.sqrt(raised**2 - level**2) * problem.noise(x)
            times = times_of_noise_levels(problem.sde, [raised])
            t, m = times.item(), problem.sde.mean_coef(times).item()

        first = problem.eps(m * y, t)
        end = y + (next_level - raised) * first
        if next_level > 0:
            second = problem.eps(schedule.m[i + 1] * end, schedule.t[i + 1])
            end = y + 0.5 * (next_level - raised) * (first + second)
        return schedule.m[i + 1] * end
