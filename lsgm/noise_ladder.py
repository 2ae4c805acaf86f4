r"""Noise ladders of NCSN, and how NCSNv2 chooses them (arXiv 1907.05600; arXiv 2006.09011).

A ladder is a decreasing geometric sequence ``sigma_1 > ... > sigma_L``. Seen from a variance-
exploding SDE with ``m = 1`` and ``var = sigma_L^2 (sigma_1 / sigma_L)^(2 t)`` its levels lie evenly
in time, ``t_i = 1 - (i - 1) / (L - 1)``, so solvers and objectives that know only SDEs serve it.
Indices here start at 0, the largest level. ``sigma`` is in the units of the data that the network
sees: images in [-1, 1] need twice the ``sigma`` of the papers, whose images lie in [0, 1].

>>> from lsgm.noise_ladder import NoiseLadder, select_step
>>> ladder = NoiseLadder.for_data(sigma_max=50.0, sigma_min=0.01, dimension=3 * 32 * 32)
>>> ladder.num_levels, round(ladder.ratio, 3)
(219, 1.04)
>>> round(select_step(ladder, steps_per_level=5).variance, 2)  # of a level's noise, ideally 1
1.06
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr
from torch import Tensor

from lsgm.sde import VESDE
from lsgm.times import TimeProposal, TimeSample

__all__ = [
    "LadderTimes",
    "LangevinStep",
    "Levels",
    "NoiseLadder",
    "langevin_variance",
    "level_overlap",
    "ratio_for_overlap",
    "select_step",
]


@dataclass(frozen=True)
class NoiseLadder:
    """A geometric sequence of noise levels.

    Attributes:
        sigma_max: ``sigma_1``; NCSNv2's technique 1 is the largest distance between two training
            images, the root of :func:`lsgm.sde.largest_squared_distance`.
        sigma_min: ``sigma_L``; below one.
        num_levels: ``L``, at least 2.

    Raises:
        ValueError: the levels do not decrease or are too few.
    """

    sigma_max: float
    sigma_min: float
    num_levels: int

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max or not math.isfinite(self.sigma_max):
            raise ValueError(
                f"need 0 < sigma_min < sigma_max; got {self.sigma_min}, {self.sigma_max}"
            )
        if self.num_levels < 2:
            raise ValueError(f"a noise ladder needs at least 2 levels, got {self.num_levels}")

    @classmethod
    def of(cls, sde: VESDE, num_levels: int) -> NoiseLadder:
        """The ladder from the end of ``sde`` down to its start."""
        return cls(math.sqrt(sde.sigma2_max), math.sqrt(sde.sigma2_min), num_levels)

    @classmethod
    def for_data(
        cls, sigma_max: float, sigma_min: float, dimension: int, overlap: float = 0.5
    ) -> NoiseLadder:
        """NCSNv2's technique 2: as many levels as make neighbours overlap by ``overlap``.

        ``dimension`` is the number ``D`` of values of an image.
        """
        ratio = ratio_for_overlap(dimension, overlap)
        num_levels = 1 + round(math.log(sigma_max / sigma_min) / math.log(ratio))
        return cls(sigma_max, sigma_min, max(2, num_levels))

    @property
    def ratio(self) -> float:
        """``gamma = sigma_i / sigma_(i+1)``, above one."""
        return (self.sigma_max / self.sigma_min) ** (1 / (self.num_levels - 1))

    @property
    def times(self) -> Tensor:
        """The levels' times under :meth:`sde`, ``(L,)`` float64 from 1 down to 0."""
        return torch.linspace(1, 0, self.num_levels, dtype=torch.float64)

    @property
    def sigmas(self) -> Tensor:
        """The levels, ``(L,)`` float64, largest first."""
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        return self.sigma_min * torch.exp(log_ratio * self.times)

    def sde(self, time_eps: float = 0.0) -> VESDE:
        """The variance-exploding SDE through all levels."""
        return VESDE(self.sigma_min**2, self.sigma_max**2, time_eps)

    def index(self, t: Tensor) -> Tensor:
        """Level nearest in ``ln sigma`` to ``t (B,)`` or a scalar: int64 of the same shape."""
        position = (1 - t.double()) * (self.num_levels - 1)
        return position.round().long().clamp(0, self.num_levels - 1)


class Levels(Protocol):
    """A list of noise levels: their times, ``(L,)`` float64 from 1 down to 0."""

    @property
    def num_levels(self) -> int: ...
    @property
    def times(self) -> Tensor: ...


@dataclass(frozen=True)
class LadderTimes(TimeProposal):
    """Times drawn evenly from a list of noise levels.

    The "inverse density" is one, so that estimates are means over the levels, as NCSN's objective
    is (arXiv 1907.05600 eq. 6), where a continuous proposal gives an integral over time.
    """

    ladder: Levels

    def from_uniform(self, rho: Tensor) -> TimeSample:
        levels = self.ladder.num_levels
        # increasing in rho, as the contract asks: the last index is the smallest time
        index = levels - 1 - (rho.double() * levels).long().clamp(max=levels - 1)
        return TimeSample(
            self.ladder.times.to(rho.device)[index], torch.ones_like(rho, dtype=torch.float64)
        )


def level_overlap(ratio: float, dimension: int) -> float:
    r"""Mass that one level's shell of noise gives to its larger neighbour's.

    The norm of ``N(0, sigma^2 I)`` in ``D`` dimensions is about ``N(sqrt(D) sigma, sigma^2 / 2)``;
    this is the probability, at the smaller of two levels, of a norm within three standard
    deviations of the larger's, ``Phi(sqrt(2D)(gamma - 1) + 3 gamma) - Phi(sqrt(2D)(gamma - 1) -
    3 gamma)`` (arXiv 2006.09011 technique 2). The published ladders have 0.567.
    """
    shift = math.sqrt(2 * dimension) * (ratio - 1)
    return float(ndtr(shift + 3 * ratio) - ndtr(shift - 3 * ratio))


def ratio_for_overlap(dimension: int, overlap: float = 0.5) -> float:
    """The ``gamma`` above one at which :func:`level_overlap` is ``overlap`` (technique 2).

    Raises:
        ValueError: fewer than 5 dimensions, where neighbours overlap at any ratio, or an overlap
            outside (0, 0.99].
    """
    # for 2 D <= 9 the lower end of the interval moves left faster than the shell moves right
    if dimension < 5:
        raise ValueError(f"technique 2 needs at least 5 dimensions, got {dimension}")
    if not 0 < overlap <= 0.99:
        raise ValueError(f"overlap must lie in (0, 0.99], got {overlap}")
    upper = 2.0
    while level_overlap(upper, dimension) > overlap:
        upper *= 2
        if upper > 1e6:
            raise ValueError(f"no ratio gives an overlap of {overlap} in {dimension} dimensions")
    return float(brentq(lambda ratio: level_overlap(ratio, dimension) - overlap, 1.0, upper))


def langevin_variance(step: float, steps_per_level: int, ratio: float) -> float:
    r"""Variance after the Langevin steps of one level over its stationary ``sigma_i^2``.

    For data at a single point (arXiv 2006.09011 proposition 3): the variance starts at
    ``(gamma sigma_i)^2`` and each step ``x + step sigma_i^2 score + sqrt(2 step) sigma_i z``
    maps ``s^2`` to ``(1 - step)^2 s^2 + 2 step sigma_i^2``; ``step`` is the paper's ``epsilon /
    sigma_L^2``.
    """
    if not 0 < step < 2:
        raise ValueError(f"step must lie in (0, 2) to be stable, got {step}")
    decay = (1 - step) ** (2 * steps_per_level)
    stationary = 2 / (2 - step)  # = 2 step / (1 - (1 - step)^2)
    return decay * (ratio**2 - stationary) + stationary


@dataclass(frozen=True)
class LangevinStep:
    """Step size of annealed Langevin dynamics.

    Attributes:
        epsilon: NCSNv2's ``epsilon``, in the ladder's units squared.
        step_ratio: the same for :class:`lsgm.solvers.langevin.AnnealedLangevin`, whose step is
            written ``x + (a / 2) score + sqrt(a) z`` with ``a = step_ratio sigma_i^2``, so
            ``2 epsilon / sigma_L^2``.
        variance: what :func:`langevin_variance` gives; one would be perfect.
    """

    epsilon: float
    step_ratio: float
    variance: float


def select_step(ladder: NoiseLadder, steps_per_level: int) -> LangevinStep:
    """NCSNv2's technique 4: the step whose variance ratio is closest to one.

    The ratio exceeds one for every step below ``sigma_L^2``, so the closest is the smallest.
    """
    result = minimize_scalar(
        lambda log_step: langevin_variance(math.exp(log_step), steps_per_level, ladder.ratio),
        bounds=(math.log(1e-6), 0.0),
        method="bounded",
        options={"xatol": 1e-6},
    )
    step = math.exp(result.x)
    return LangevinStep(step * ladder.sigma_min**2, 2 * step, float(result.fun))
