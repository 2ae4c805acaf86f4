r"""Score-SDE's predictor-corrector samplers to the letter: arXiv 2011.13456, algorithms 1-5, with
the conventions of its published checkpoints.

``N`` times lie evenly between 1 and a last one, ``eps``. At each, the corrector runs first and then
the predictor, whose last mean is the result. Where :mod:`lsgm.solvers.predictor_corrector` takes
the exact transition between neighbouring times, these take a step of ``1/N`` of the continuous SDE
(Euler-Maruyama), or the step that leads to noise level ``i = floor(t (N - 1))`` of a table of ``N``
levels: ``sigma_i`` geometric (VE), ``beta_i`` linear (VP); ``floor`` acts on float32. All that
matters little to the samples and much to whoever wants to see the published ones again.

>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers.discrete import DiscretePredictorCorrector
>>> sde, rng = VPSDE(), torch.Generator().manual_seed(0)
>>> solver = DiscretePredictorCorrector(predictor="ancestral", levels=100, denoise=True)
>>> times = torch.linspace(1, 1e-3, 100, dtype=torch.float64)
>>> solution = solver.solve(sde, sde.normal_component, sde.prior_sample((500, 2), rng), times, rng)
>>> solution.nfe, abs(solution.x.std().item() - 1) < 0.1  # samples of N(0, I)
(100, True)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lsgm.sde import VESDE, VPSDE, LinearSDE, SubVPSDE
from lsgm.solvers.base import Problem
from lsgm.solvers.predictor_corrector import GaussianStep, PredictorCorrector
from lsgm.tensors import norm_except_batch

__all__ = ["DiscretePredictorCorrector", "Table"]


@dataclass(frozen=True)
class Table:
    """What the published samplers know of each of their ``N`` times, Python floats.

    Attributes:
        n: Number of times of the whole way.
        t: The times.
        index: Noise level in the table at each time.
        sigma: Of each level, VE, least noise first.
        beta: Of each level, VP.
        score_std: Standard deviation that turns a noise prediction into a score, at each time.
    """

    n: int
    t: list[float]
    index: list[int]
    sigma: list[float]
    beta: list[float]
    score_std: list[float]


@lru_cache(maxsize=8)
def even_table(sde: LinearSDE, n: int, first: float, last: float, discrete: bool) -> Table:
    """:func:`table_at` all ``n`` times between two."""
    return table_at(sde, torch.linspace(first, last, n), n, discrete)


def table_at(sde: LinearSDE, times: Tensor, n: int, discrete: bool) -> Table:
    """The table at some float32 ``times`` of a way of ``n``; ``discrete``: of a model trained at
    the table's levels, whose scores are those of the table too.
    """
    index = (times * (n - 1)).long()
    sigma, beta = torch.empty(0), torch.empty(0)
    std = sde.var(times.double()).sqrt()
    if isinstance(sde, VESDE):
        low, high = 0.5 * math.log(sde.sigma2_min), 0.5 * math.log(sde.sigma2_max)
        sigma = torch.linspace(low, high, n, dtype=torch.float64).exp()
        if discrete:
            std = sigma.flip(0)[((1 - times) * (n - 1)).round().long()]
    elif isinstance(sde, VPSDE):
        beta = torch.linspace(sde.beta_start / n, sde.beta_end / n, n, dtype=torch.float64)
        if discrete:
            std = (1 - (1 - beta).cumprod(0)).sqrt()[index]
    return Table(n, times.tolist(), index.tolist(), sigma.tolist(), beta.tolist(), std.tolist())


def _euler_maruyama(
    problem: Problem, table: Table, i: int, x: Tensor, score: Tensor
) -> GaussianStep:
    t, n = torch.tensor([table.t[i]], dtype=torch.float64), table.n
    f, g2 = problem.sde.f(t).item(), problem.sde.g2(t).item()
    return GaussianStep(x - (f * x - g2 * score) / n, math.sqrt(g2 / n))


def _reverse_diffusion(
    problem: Problem, table: Table, i: int, x: Tensor, score: Tensor
) -> GaussianStep:
    if isinstance(problem.sde, VESDE):
        gap, _ = _levels(table, i)
        return GaussianStep(x + gap * score, math.sqrt(gap))
    if isinstance(problem.sde, SubVPSDE):
        return _euler_maruyama(problem, table, i, x, score)
    beta = table.beta[table.index[i]]
    return GaussianStep((2 - math.sqrt(1 - beta)) * x + beta * score, math.sqrt(beta))


def _ancestral(problem: Problem, table: Table, i: int, x: Tensor, score: Tensor) -> GaussianStep:
    if isinstance(problem.sde, VESDE):
        gap, share = _levels(table, i)
        return GaussianStep(x + gap * score, math.sqrt(gap) * share)
    beta = table.beta[table.index[i]]
    return GaussianStep((x + beta * score) / math.sqrt(1 - beta), math.sqrt(beta))


def _levels(table: Table, i: int) -> tuple[float, float]:
    """``sigma_i^2 - sigma_(i-1)^2`` and ``sigma_(i-1) / sigma_i``; below the last is no noise."""
    index = table.index[i]
    sigma, lower = table.sigma[index], table.sigma[index - 1] if index else 0.0
    return sigma**2 - lower**2, lower / sigma


DISCRETE_PREDICTORS: dict[str, Callable[[Problem, Table, int, Tensor, Tensor], GaussianStep]] = {
    "reverse_diffusion": _reverse_diffusion,
    "euler_maruyama": _euler_maruyama,
    "ancestral": _ancestral,
}


@dataclass(frozen=True, kw_only=True)
class DiscretePredictorCorrector(PredictorCorrector):
    """The published samplers on even times; the last predictor's mean is ``denoise``.

    Args:
        predictor: ``"reverse_diffusion"``, ``"euler_maruyama"``, ``"ancestral"``, or None for the
            corrector alone. Ancestral sampling of a VP SDE has the chain's variance ``beta_i``.
        norm: As in :class:`PredictorCorrector`; ``"expected"`` is the published ``ald`` corrector.
        levels: Noise levels at which the model was trained, which are then those of the sampler;
            None: in continuous time.
        probability_flow: Half of the score and no noise.
    """

    default_grid: ClassVar[str] = "time"
    predictor: str | None = "euler_maruyama"
    norm: Literal["image", "batch", "expected"] = "batch"
    levels: int | None = None
    probability_flow: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predictor not in (None, *DISCRETE_PREDICTORS):
            known = ", ".join(DISCRETE_PREDICTORS)
            raise ValueError(f"unknown predictor {self.predictor!r}: choose from {known}")

    @property
    def order(self) -> int:
        """None is claimed: a step of ``1/N`` and the table agree in the limit only."""
        return 0

    @property
    def needs_noise_at_end(self) -> bool:
        return True

    def evaluations(self, num_steps: int) -> int | None:
        calls = self._calls(num_steps)
        closing = self.denoise and self.predictor is not None
        return None if calls is None else calls + closing

    def steps_for(self, nfe: int) -> int:
        steps = super().steps_for(nfe)
        if self.levels is not None and steps + 1 != self.levels:
            own = self.evaluations(self.levels - 1)
            raise ValueError(
                f"the model knows {self.levels} noise levels, which take {own} evaluations, not "
                f"{nfe}: leave --nfe out, or choose another --solver"
            )
        return steps

    def check(self, sde: LinearSDE, times: Tensor) -> Tensor:
        times = super().check(sde, times)
        if not isinstance(sde, VESDE | VPSDE | SubVPSDE):
            raise ValueError(f"there is no published sampler of a {type(sde).__name__}")
        if isinstance(sde, SubVPSDE) and (self.corrector_steps or self.predictor == "ancestral"):
            raise ValueError(
                "the sub-VP SDE has no table of levels: predictor euler_maruyama or "
                "reverse_diffusion, without corrector steps"
            )
        if len(times) == 2:
            return times  # the ends alone, which are no grid yet
        even = torch.linspace(float(times[0]), float(times[-1]), len(times), dtype=times.dtype)
        if (times - even).abs().max() > 1e-6:
            raise ValueError("the published samplers go in equal steps: grid time")
        self._check_table(sde, len(times))
        return times

    def _integrate(self, problem: Problem, x: Tensor) -> list[Tensor]:
        self._check_table(problem.sde, len(problem.times))
        return super()._integrate(problem, x)

    def _check_table(self, sde: LinearSDE, n: int) -> None:
        tabled = self.predictor in ("reverse_diffusion", "ancestral") or self.corrector_steps
        if isinstance(sde, VPSDE) and tabled and n <= sde.beta_end:
            raise ValueError(
                f"needs more than beta_end = {sde.beta_end:g} times of a VP SDE, not {n}"
            )

    def _table(self, problem: Problem) -> Table:
        times = problem.schedule.t
        return even_table(problem.sde, len(times), times[0], times[-1], self.levels is not None)

    def _score(self, problem: Problem, i: int, x: Tensor) -> Tensor:
        table = self._table(problem)
        return problem.eps(x, table.t[i]) / -table.score_std[i]

    def _predicted(self, problem: Problem, i: int, x: Tensor) -> GaussianStep:
        """The predictor's step from ``times[i]``."""
        assert self.predictor is not None
        score = self._score(problem, i, x)
        share = 0.5 if self.probability_flow else 1.0
        step = DISCRETE_PREDICTORS[self.predictor](
            problem, self._table(problem), i, x, share * score
        )
        return GaussianStep(step.mean, 0.0 if self.probability_flow else step.std)

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        x = self._corrected(problem, i, x)
        if self.predictor is None:
            return x
        step = self._predicted(problem, i, x)
        if self.probability_flow:
            return step.mean
        return step.mean + self.noise_scale * step.std * problem.noise(x)

    def _denoised(self, problem: Problem, x: Tensor) -> Tensor:
        if self.predictor is None:
            return x
        return problem.project(self._predicted(problem, problem.num_steps, x).mean, 0.0)

    def _correct(self, problem: Problem, i: int, x: Tensor) -> Tensor:
        table = self._table(problem)
        score = self._score(problem, i, x)
        alpha = 1 - table.beta[table.index[i]] if table.beta else 1.0
        noise = problem.noise(x)
        if self.norm == "expected":
            ratio = torch.full((len(x),), problem.schedule.sigma[i], device=x.device, dtype=x.dtype)
        else:
            sizes = norm_except_batch(noise), norm_except_batch(score)
            if self.norm == "batch":
                sizes = sizes[0].mean().expand(len(x)), sizes[1].mean().expand(len(x))
            ratio = sizes[0] / sizes[1]
        half = 2 * alpha * (self.snr * ratio.reshape(-1, *(1,) * (x.ndim - 1))) ** 2
        return x + half * score + (2 * half).sqrt() * noise
