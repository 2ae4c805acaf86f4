r"""DDPM's sampler to the letter: arXiv 2006.11239 algorithm 2 on the chain's own levels.

An even grid of ``n`` times stands for the levels ``k floor(N / n)``, ``k = n - 1 ... 0``, as
diffusers' ``DDPMScheduler`` takes them of ``N``; of another grid it is the nearest ones. From one
level to the next one down the state is drawn from ``q(x_s | x_t, x_0)`` (ibid. eq. 7) with the
network's ``x_0``, which may be clipped to the data's range; the last step gives ``x_0`` itself,
which is the solver's ``denoise``.

>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers.ddpm import DDPM
>>> sde, rng = VPSDE(), torch.Generator().manual_seed(0)
>>> solver = DDPM(levels=100, clip=False, denoise=True)
>>> times = torch.linspace(1, 0, 100, dtype=torch.float64)
>>> solution = solver.solve(sde, sde.normal_component, sde.prior_sample((500, 2), rng), times, rng)
>>> solution.nfe, abs(solution.x.std().item() - 1) < 0.1  # samples of N(0, I)
(100, True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lsgm.discrete_noise import BetaTable
from lsgm.sde import VPSDE, LinearSDE
from lsgm.solvers.base import Problem, StepSolver

__all__ = ["DDPM"]

LATEST_END = 0.01


@dataclass(frozen=True, kw_only=True)
class DDPM(StepSolver):
    """Ancestral sampling of a discrete variance-preserving diffusion.

    Given times have to go down to the data.

    Args:
        levels: ``N`` of the chain.
        variance: Of a step: ``"small"``, that of ``q(x_s | x_t, x_0)``; ``"large"``, the chain's
            ``beta`` (ibid. section 3.2).
        clip: Clip ``x_0`` to [-1, 1].
    """

    stochastic: ClassVar[bool] = True
    default_grid: ClassVar[str] = "time"
    levels: int = 1000
    variance: Literal["small", "large"] = "small"
    clip: bool = True

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise ValueError(f"variance must be small or large, got {self.variance!r}")

    @property
    def order(self) -> int:
        """None is claimed: the clipping has no limit, and ``"large"`` another one."""
        return 0

    @property
    def needs_noise_at_end(self) -> bool:
        return False

    def _calls(self, num_steps: int) -> int:
        return num_steps

    def check(self, sde: LinearSDE, times: Tensor) -> Tensor:
        times = super().check(sde, times)
        if not isinstance(sde, VPSDE):
            raise ValueError(f"is for variance-preserving diffusions, not a {type(sde).__name__}")
        if times[-1] > LATEST_END:
            raise ValueError(f"the chain ends at its first level: t_end 0 to {LATEST_END:g}")
        n = len(times)
        if n > self.levels:
            raise ValueError(f"the chain has {self.levels} levels, which are not enough for {n}")
        levels = (times * (self.levels - 1)).round()
        even = torch.linspace(1, float(times[-1]), n, dtype=torch.float64)
        if (times - even).abs().max() < 1e-6:
            levels = torch.arange(n - 1, -1, -1, dtype=torch.float64) * (self.levels // n)
        if not (levels.diff() < 0).all():
            raise ValueError(
                f"two times of the grid fall on one of the chain's {self.levels} levels: fewer "
                "evaluations, or grid time"
            )
        return levels / (self.levels - 1)

    def _alphas_cumprod(self, problem: Problem) -> Tensor:
        assert isinstance(problem.sde, VPSDE)
        return BetaTable.of(problem.sde, self.levels).alphas_cumprod

    def _start(self, problem: Problem, x: Tensor, i: int, abar: float) -> Tensor:
        """The network's ``x_0`` at ``times[i]``."""
        eps = problem.eps(x, problem.schedule.t[i])
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        return x0.clamp(-1, 1) if self.clip else x0

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        table = self._alphas_cumprod(problem)
        level, lower = (round(t * (self.levels - 1)) for t in problem.schedule.t[i : i + 2])
        abar, abar_lower = table[level].item(), table[lower].item()
        x0 = self._start(problem, x, i, abar)
        alpha = abar / abar_lower
        beta = 1 - alpha
        mean = (math.sqrt(abar_lower) * beta * x0 + math.sqrt(alpha) * (1 - abar_lower) * x) / (
            1 - abar
        )
        variance = beta if self.variance == "large" else beta * (1 - abar_lower) / (1 - abar)
        return mean + math.sqrt(variance) * problem.noise(x)

    def _denoised(self, problem: Problem, x: Tensor) -> Tensor:
        abar = self._alphas_cumprod(problem)[0].item()
        return problem.project(self._start(problem, x, problem.num_steps, abar), 0.0)
