r"""Exponential integrators of the probability-flow ODE: one network call a step.

The linear part of the ODE is solved exactly; what is left is an integral of the network's output,
which each method extrapolates from earlier calls. With ``lambda = ln(m / sigma)``, ``h = lambda_s -
lambda_t`` and the data prediction ``x0 = (z - sigma eps) / m`` the exact solution from time t to
time s is (arXiv 2211.01095 proposition 4.1)

    z_s = (sigma_s / sigma_t) z_t + sigma_s int_{lambda_t}^{lambda_s} e^lambda x0(lambda) dlambda .

DPM-Solver++ and UniPC take the polynomial in ``lambda`` through the evaluations of ``x0``; UniPC
corrects every step.

>>> import torch
>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers.exponential import DDIM, DPMSolverPP
>>> from lsgm.solvers.grids import make_grid
>>> sde, x = VPSDE(), torch.ones(1, 2)
>>> for solver in (DDIM(), DPMSolverPP(order=3)):  # the exact flow of N(0, I) ends at 1
...     times = make_grid(solver.default_grid, sde, 20, 1e-3)
...     print(round(solver.solve(sde, sde.normal_component, x, times).x[0, 0].item(), 3))
0.926
1.003
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from lsgm.solvers.base import Problem, StepSolver
from lsgm.solvers.multistep import MultistepSolver

__all__ = ["DDIM", "DPMSolverPP", "UniPC", "data_prediction"]


def data_prediction(problem: Problem, x: Tensor, j: int) -> Tensor:
    """``x0 = (z - sigma eps) / m`` at the j-th time; one network call."""
    schedule = problem.schedule
    return (x - schedule.sigma[j] * problem.eps(x, schedule.t[j])) / schedule.m[j]


@dataclass(frozen=True, kw_only=True)
class DDIM(StepSolver):
    """DDIM (arXiv 2010.02502 eq. 12): ``z / m`` moves by ``eps`` times the change of ``sigma / m``.

    Args:
        eta: 0 is deterministic, 1 the ancestral sampler of the same times (ibid. eq. 16).
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    order: ClassVar[int] = 1

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @property
    def needs_noise_at_end(self) -> bool:
        return False

    def _calls(self, num_steps: int) -> int:
        return num_steps

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        schedule = problem.schedule
        ratio, sigma, sigma_next = (
            schedule.m[i + 1] / schedule.m[i],
            schedule.sigma[i],
            schedule.sigma[i + 1],
        )
        eps = problem.eps(x, schedule.t[i])
        # the paper's alpha_t is m^2 here, its sqrt(1 - alpha_t) is sigma
        if self.eta == 0:
            return ratio * x + (sigma_next - ratio * sigma) * eps
        _, b2 = schedule.transition(i)
        # eta^2 times the variance b^2 sigma_s^2 / sigma_t^2 of q(z_s | z_t, z_0); the predicted
        # noise keeps what is left of sigma_s^2
        fresh = self.eta**2 * b2 * (sigma_next / sigma) ** 2
        kept = math.sqrt(max(sigma_next**2 - fresh, 0.0))
        return ratio * x + (kept - ratio * sigma) * eps + math.sqrt(fresh) * problem.noise(x)


@dataclass(frozen=True, kw_only=True)
class _DataPredictionSolver(MultistepSolver):
    """Extrapolation of the data prediction in ``lambda``."""

    default_grid: ClassVar[str] = "log_snr"

    def _evaluate(self, problem: Problem, x: Tensor, j: int) -> Tensor:
        return data_prediction(problem, x, j)

    def _advance(
        self, problem: Problem, i: int, x: Tensor, first: int, values: Sequence[Tensor]
    ) -> Tensor:
        schedule = problem.schedule
        lam, here = schedule.log_snr, values[i - first]
        h = lam[i + 1] - lam[i]
        x = (
            schedule.sigma[i + 1] / schedule.sigma[i] * x
            - schedule.m[i + 1] * math.expm1(-h) * here
        )
        # The first term takes the data prediction as constant over the step: DDIM. What follows are
        # divided differences from `here` to the other nodes, in units of h: (v_j - here) / r_j.
        others = [j for j in range(len(values)) if j != i - first]
        ratios = [(lam[first + j] - lam[i]) / h for j in others]
        for j, ratio, weight in zip(others, ratios, self._weights(h, ratios), strict=True):
            x = x - schedule.m[i + 1] * weight / ratio * (values[j] - here)
        return x

    def _weights(self, h: float, ratios: Sequence[float]) -> list[float]:
        """``B(h) a_k`` for the divided differences (arXiv 2302.04867 theorem 3.1, with ``-h`` for
        data prediction).
        """
        if len(ratios) < 2:
            return [0.5 * self._scale(h)] * len(ratios)  # one unknown: 1/2 to leading order
        # The k-th condition (from 0) has (k + 1)! (-h) phi_(k+2)(-h) on its right, with
        # phi_1(x) = (e^x - 1) / x and x phi_(k+1)(x) = phi_k(x) - 1 / k!. `phi` is the product of
        # the last two factors.
        phi, factorial, right = math.expm1(-h) / -h - 1, 1, []
        for k in range(len(ratios)):
            right.append(phi * factorial)
            factorial *= k + 2
            phi = phi / -h - 1 / factorial
        # With two or more unknowns the conditions are solved exactly, and B(h) cancels.
        matrix = np.vander(np.array(ratios), increasing=True).T
        return np.linalg.solve(matrix, np.array(right)).tolist()

    def _scale(self, h: float) -> float:
        """``B(h)``, which only the single-difference formula depends on."""
        return math.expm1(-h)


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP(_DataPredictionSolver):
    """DPM-Solver++ multistep: ``order`` 2 is "2M", 3 is "3M", 1 is DDIM (arXiv 2211.01095 algorithm
    2 and appendix).

    "3M" corrects its first step (see :mod:`lsgm.solvers.multistep`), without which it would not be
    of third order.
    """

    corrects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ValueError(f"DPM-Solver++ has orders 1, 2 and 3, got {self.order}")


@dataclass(frozen=True, kw_only=True)
class UniPC(_DataPredictionSolver):
    """UniPC, multistep, data prediction (arXiv 2302.04867 algorithms 1 and 2): every step but the
    last is corrected.

    Args:
        order: Of the predictor-corrector pair, 2 to 4: the paper's UniPC-p has ``order = p + 1``.
        variant: ``B(h) = h`` (``"bh1"``) or ``exp(h) - 1`` (``"bh2"``).
    """

    corrects: ClassVar[bool] = True
    order: int = 3
    variant: Literal["bh1", "bh2"] = "bh2"

    def __post_init__(self) -> None:
        if self.order not in (2, 3, 4):
            raise ValueError(f"the UniPC pair has orders 2, 3 and 4, got {self.order}")
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"variant must be 'bh1' or 'bh2', got {self.variant!r}")

    def _scale(self, h: float) -> float:
        return -h if self.variant == "bh1" else math.expm1(-h)
