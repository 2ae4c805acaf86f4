r"""Predictor-corrector samplers of the reverse SDE (arXiv 2011.13456 section 4.2, algorithms 1-5).

A predictor takes one step of a discretised reverse SDE and gives the mean and the standard
deviation of the next state; the corrector runs Langevin steps at a time. In the published order
every time, the first (t = 1) and the last included, is corrected before the predictor leaves it;
the last predictor step, which leads to time zero and whose mean is the published result, is the
solver's ``denoise``. Any pair composes and each alone is a sampler.

The discrete predictors use the exact transition ``z_t = a z_s + b e`` of the linear SDE, ``a = m_t
/ m_s``, ``b^2 = sigma_t^2 - a^2 sigma_s^2``. For the VE SDE these are the published formulas; for
the VP SDE ``b^2`` is the discrete chain's ``beta_i`` (in place of its first-order value ``beta(t)
dt``). The paper counts noise levels upwards, ``x_N`` first and ``x_0`` last; ``i`` here counts
times downwards, and ``z_i`` is the state before step ``i``.

>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers.grids import make_grid
>>> from lsgm.solvers.predictor_corrector import PredictorCorrector
>>> sde, rng = VPSDE(), torch.Generator().manual_seed(0)
>>> solver = PredictorCorrector(predictor="ancestral", corrector_steps=1, norm="expected")
>>> times = make_grid(solver.default_grid, sde, 50, 1e-3)
>>> solution = solver.solve(sde, sde.normal_component, sde.prior_sample((500, 2), rng), times, rng)
>>> solution.nfe, abs(solution.x.std().item() - 1) < 0.1  # samples of N(0, I)
(101, True)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lsgm.solvers.base import Problem, StepSolver
from lsgm.solvers.langevin import langevin_step
from lsgm.tensors import norm_except_batch

__all__ = ["PREDICTORS", "PredictorCorrector", "GaussianStep"]


@dataclass(frozen=True)
class GaussianStep:
    """The law of the next state: Gaussian with this mean ``(B, *shape)`` and this standard
    deviation.
    """

    mean: Tensor
    std: float


Predictor = Callable[[Problem, int, Tensor, Tensor], GaussianStep]


def reverse_diffusion(problem: Problem, i: int, x: Tensor, eps: Tensor) -> GaussianStep:
    """``(2 - a) z - b^2 eps / sigma_t + b e`` (ibid. appendix E)."""
    a, b2 = problem.schedule.transition(i)
    return GaussianStep((2 - a) * x - b2 / problem.schedule.sigma[i] * eps, math.sqrt(b2))


def euler_maruyama(problem: Problem, i: int, x: Tensor, eps: Tensor) -> GaussianStep:
    """``z - (f z + g^2 eps / sigma_t) (t - s) + g sqrt(t - s) e``."""
    t, h = problem.times[i : i + 1], problem.schedule.t[i] - problem.schedule.t[i + 1]
    f, g2 = problem.sde.f(t).item(), problem.sde.g2(t).item()
    return GaussianStep(
        (1 - f * h) * x - h * g2 / problem.schedule.sigma[i] * eps, math.sqrt(g2 * h)
    )


def ancestral(problem: Problem, i: int, x: Tensor, eps: Tensor) -> GaussianStep:
    """``(z - b^2 eps / sigma_t) / a`` with the variance ``b^2 sigma_s^2 / sigma_t^2`` of ``q(z_s |
    z_t, z_0)`` (ibid. eq. 4 and appendix F).
    """
    a, b2 = problem.schedule.transition(i)
    sigma, sigma_next = problem.schedule.sigma[i : i + 2]
    return GaussianStep((x - b2 / sigma * eps) / a, math.sqrt(b2) * sigma_next / sigma)


def ancestral_large(problem: Problem, i: int, x: Tensor, eps: Tensor) -> GaussianStep:
    """As ``ancestral``, with the larger variance ``b^2`` (``beta_i`` in arXiv 2006.11239 section
    3.2).
    """
    _, b2 = problem.schedule.transition(i)
    return GaussianStep(ancestral(problem, i, x, eps).mean, math.sqrt(b2))


PREDICTORS: dict[str, Predictor] = {
    "reverse_diffusion": reverse_diffusion,
    "euler_maruyama": euler_maruyama,
    "ancestral": ancestral,
    "ancestral_large": ancestral_large,
}


@dataclass(frozen=True, kw_only=True)
class PredictorCorrector(StepSolver):
    """Langevin steps at each time, then one predictor step to the next.

    Hooks replace the state after the predictor and after every corrector step (ibid. appendix I.2).
    The corrector's step is ``2 a^2 (snr |e| / |score|)^2`` (ibid. algorithms 4 and 5, whose
    ``alpha_i`` is the ``a^2`` of the step that leaves the time).

    Args:
        predictor: Name in ``PREDICTORS``, or None for the corrector alone (then ``z / m`` is kept
            from time to time).
        corrector_steps: Langevin steps at each time; 0 for the predictor alone.
        snr: Signal-to-noise ratio of the corrector's step.
        norm: How ``|e| / |score|`` is taken: ``"image"``, each image's own, so that samples do not
            depend on how the batch is split; ``"batch"``, of norms averaged over the batch, as
            published; ``"expected"``, both replaced by their expected size, which gives
            ``sigma_t``: the one to use for data of few dimensions, where single norms may nearly
            vanish.
        noise_scale: Factor on the predictor's noise (a temperature).
    """

    stochastic: ClassVar[bool] = True
    default_grid: ClassVar[str] = "time"
    predictor: str | None = "reverse_diffusion"
    corrector_steps: int = 0
    snr: float = 0.16
    norm: Literal["image", "batch", "expected"] = "image"
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.predictor is not None and self.predictor not in PREDICTORS:
            raise ValueError(
                f"unknown predictor {self.predictor!r}: choose from {', '.join(PREDICTORS)}"
            )
        if self.corrector_steps < 0 or (self.predictor is None and self.corrector_steps == 0):
            raise ValueError("need a predictor or a positive number of corrector steps")
        if self.norm not in ("image", "batch", "expected"):
            raise ValueError(f"norm must be 'image', 'batch' or 'expected', got {self.norm!r}")

    @property
    def order(self) -> int:
        """Weak order 1 of a predictor alone; the corrector's bias does not fall with the step."""
        unbiased = self.corrector_steps == 0 and self.noise_scale == 1
        return int(unbiased and self.predictor != "ancestral_large")

    @property
    def needs_noise_at_end(self) -> bool:
        return self.corrector_steps > 0

    def _calls(self, num_steps: int) -> int:
        return (num_steps + 1) * self.corrector_steps + (num_steps if self.predictor else 0)

    def _integrate(self, problem: Problem, x: Tensor) -> list[Tensor]:
        states = super()._integrate(problem, x)
        states[-1] = self._corrected(problem, problem.num_steps, states[-1])
        return states

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        schedule = problem.schedule
        x = self._corrected(problem, i, x)
        if self.predictor is None:
            return schedule.m[i + 1] / schedule.m[i] * x
        step = PREDICTORS[self.predictor](problem, i, x, problem.eps(x, schedule.t[i]))
        return step.mean + self.noise_scale * step.std * problem.noise(x)

    def _corrected(self, problem: Problem, i: int, x: Tensor) -> Tensor:
        """``x`` after all Langevin steps at ``times[i]``."""
        for _ in range(self.corrector_steps):
            x = problem.project(self._correct(problem, i, x), problem.schedule.t[i])
        return x

    def _correct(self, problem: Problem, i: int, x: Tensor) -> Tensor:
        """``x`` after one Langevin step at ``times[i]``."""
        schedule = problem.schedule
        # The paper's corrector at x_i takes alpha_i of the chain, the square of the factor between
        # this level and the next one down; the one after the last time leads to time zero, m = 1.
        sigma, a = schedule.sigma[i], schedule.m[i] / [*schedule.m, 1.0][i + 1]
        eps = problem.eps(x, schedule.t[i])
        if self.norm == "expected":
            # a step of 2 (a snr sigma)^2 along the score is a Langevin step of twice that size
            return langevin_step(problem, x, eps, sigma, (2 * a * self.snr) ** 2)
        noise = problem.noise(x)
        ratio = norm_except_batch(noise) / norm_except_batch(eps)
        if self.norm == "batch":
            ratio = (
                norm_except_batch(noise).mean()
                / norm_except_batch(eps).mean()
                * torch.ones_like(ratio)
            )
        # The paper's epsilon = 2 alpha (snr |e| / |score|)^2, where |score| is |eps| / sigma, and
        # its step x + epsilon score + sqrt(2 epsilon) e.
        half = 2 * (a * self.snr * sigma * ratio.reshape(-1, *(1,) * (x.ndim - 1))) ** 2
        return x - half / sigma * eps + (2 * half).sqrt() * noise
