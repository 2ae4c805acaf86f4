r"""Time proposals: how training times are drawn, for any SDE and any weighting.

An integral over ``[time_eps, 1]`` of ``w(t) l(t)`` is estimated by ``w(t) l(t) / p(t)`` with ``t ~
p``, unbiased for every density ``p > 0``; a :class:`TimeSample` therefore carries ``1 / p(t)``. For
data distributed as N(0, I) and the optimal score, the error is ``l(t) = 1 - var / total_var`` a
variable, so ``p`` proportional to ``w(t) (1 - var(t) / total_var(t))`` has no variance at all, and
LSGM's prior is close to that case (arXiv 2106.05931 section 3.3 and appendix B).

Five names: ``"uniform"``; ``"importance"``, the paper's choice with its closed-form inverse where
there is one and the density above, inverted numerically, elsewhere; ``"optimal"``, always the
density above; ``"mixture"``, that with a share of ``w(t)``, which bounds the weights. The second
and third differ for the sub-VP SDE alone, to which the paper's code gives the times of the VP SDE.
Networks that predict the noise without a Normal component are better served by ``"weighted"``,
``w(t)`` alone.

For N(0, I) data and the likelihood's weighting the estimate is the same at every time drawn:

>>> from lsgm.sde import VPSDE
>>> from lsgm.times import make_proposal
>>> from lsgm.weighting import make_weighting
>>> sde, likelihood = VPSDE(), make_weighting("likelihood")
>>> proposal = make_proposal("importance", sde, likelihood)
>>> times = proposal.sample(100, torch.Generator().manual_seed(0), stratified=True)
>>> error = 1 - sde.var(times.t)  # expectation of || eps_hat - eps ||^2, a variable
>>> estimates = likelihood(sde, times.t) * error * times.inverse_density
>>> bool(estimates.std() < 1e-9 * estimates.mean())
True
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm.registry import PROPOSALS
from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, LinearSDE, SubVPSDE
from lsgm.weighting import Weighting
from vae.random import Rng, RowGenerators, ShardedGenerator, rand

__all__ = [
    "CLOCKS",
    "DEFENSIVE_SHARE",
    "PROPOSALS",
    "Clock",
    "ClockTimes",
    "TabulatedTimes",
    "TimeProposal",
    "TimeSample",
    "UniformTimes",
    "importance_times",
    "make_proposal",
    "mixture_times",
    "normal_data_density",
    "optimal_times",
    "uniform_times",
    "weighted_times",
]

GOLDEN = (math.sqrt(5) - 1) / 2
"""Step of the sequence ``i GOLDEN mod 1``, of which every run of terms is evenly spread."""


@dataclass(frozen=True)
class TimeSample:
    """Times and the weights that make their average an integral.

    Attributes:
        t: ``(B,)`` float64 in ``[time_eps, 1]``.
        inverse_density: ``(B,)`` float64, ``1 / p(t)``.
    """

    t: Tensor
    inverse_density: Tensor


class TimeProposal(ABC):
    """A distribution of times, given by its inverse distribution function. All maths is float64."""

    @abstractmethod
    def from_uniform(self, rho: Tensor) -> TimeSample:
        """Map uniforms ``rho (B,)`` in ``[0, 1)`` to times, increasing in ``rho``."""

    def sample(
        self,
        n: int,
        rng: Rng = None,
        *,
        stratified: bool = False,
        device: torch.device | str = "cpu",
    ) -> TimeSample:
        """Draw ``n`` times.

        Args:
            n: images of this process.
            rng: generator; a sharded one spreads the strata over the batch of all processes.
            stratified: draw one uniform ``rho_0`` and use the lattice ``rho_0 + i / N mod 1`` over
                the global batch of ``N``, which leaves each time's distribution as it is and lowers
                the variance of the batch mean (arXiv 2107.00630 appendix I.1). Neighbouring images
                get distant points of the lattice, so that parts of a batch are spread evenly as
                well. With one generator an image the points are ``rho_0 + i (sqrt(5) - 1) / 2 mod
                1`` of the images' indices ``i``, as evenly spread over consecutive images and the
                same in every batch.
            device: where the result lives; must know float64.
        """
        rho = (
            _lattice(n, rng, device)
            if stratified
            else rand((n,), rng, device=device, dtype=torch.float64)
        )
        return self.from_uniform(rho)


def _lattice(n: int, rng: Rng, device: torch.device | str) -> Tensor:
    """This process's rows of a randomly shifted lattice over the global batch: ``(n,)``.

    One point lies in each ``1/N`` of ``[0, 1)``. With one generator an image the points belong to
    the images' indices: the golden-section sequence itself.
    """
    if isinstance(rng, RowGenerators):
        shift = rand((1,), rng.common, device=device, dtype=torch.float64)
        index = torch.tensor(rng.rows, device=device, dtype=torch.float64)
        return (shift + index * GOLDEN) % 1
    generator, rank, processes = rng, 0, 1
    if isinstance(rng, ShardedGenerator):
        # the shift is one number for all, so it comes from the common generator
        generator, rank, processes = rng.generator, rng.rank, rng.world_size
    total = n * processes
    shift = rand((1,), generator, device=device, dtype=torch.float64)
    # strata in the order of the golden-section sequence, of which every run of consecutive terms is
    # evenly spread
    golden = torch.arange(total, device=device, dtype=torch.float64) * GOLDEN % 1
    stratum = golden.argsort().argsort()[rank * n : (rank + 1) * n]
    return (shift + stratum / total) % 1


@dataclass(frozen=True)
class UniformTimes(TimeProposal):
    """Uniform on ``[time_eps, 1]``.

    The inverse density is the interval's length, so that the estimate is an integral.
    """

    time_eps: float

    def from_uniform(self, rho: Tensor) -> TimeSample:
        rho = rho.double()
        length = 1 - self.time_eps
        return TimeSample(self.time_eps + length * rho, torch.full_like(rho, length))


@dataclass(frozen=True)
class Clock:
    """An increasing function ``psi(t)``; uniform in ``psi`` means a density like ``psi'``.

    Attributes:
        value: ``psi``, of float64 ``t (B,)``.
        inverse: ``psi^-1``.
        rate: ``psi'``.
    """

    value: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    rate: Callable[[Tensor], Tensor]


class ClockTimes(TimeProposal):
    """Times uniform in a clock on ``[time_eps, 1]``.

    Raises:
        ValueError: the clock is not finite at an end of the interval.
    """

    def __init__(self, clock: Clock, time_eps: float) -> None:
        self.clock, self.time_eps = clock, time_eps
        start, end = clock.value(torch.tensor([time_eps, 1.0], dtype=torch.float64)).tolist()
        if not math.isfinite(start) or not math.isfinite(end):
            raise ValueError(
                f"this proposal's density has no finite integral from t = {time_eps}; "
                "use time_eps > 0 or sigma2_0 > 0"
            )
        self.start, self.length = start, end - start

    def from_uniform(self, rho: Tensor) -> TimeSample:
        # rounding in the inverse may leave the interval at its ends
        t = self.clock.inverse(self.start + self.length * rho.double()).clamp(self.time_eps, 1.0)
        return TimeSample(t, self.length / self.clock.rate(t))


class TabulatedTimes(TimeProposal):
    """Times of a tabulated density, for densities without a closed-form inverse.

    The proposal *is* the piecewise linear interpolant of the density, normalised. Its distribution
    function is piecewise quadratic and inverted exactly, and its own density is returned, so
    estimates stay unbiased whatever the table's resolution.

    Args:
        density: of float64 ``t (N,)``, positive, up to a factor; it may vanish at ``time_eps``.
        time_eps: lower end.
        size: nodes, half of them evenly spaced in ``t`` and half in ``ln t``.
        end_size: further nodes, evenly spaced in ``ln(1 - t)``, for a density that is steep there.

    Attributes:
        mass: integral of the density as it was given.

    Raises:
        ValueError: the density is not finite and positive everywhere on ``[time_eps, 1]``.
    """

    def __init__(
        self,
        density: Callable[[Tensor], Tensor],
        time_eps: float,
        size: int = 4096,
        end_size: int = 0,
    ) -> None:
        first = max(time_eps, 1e-8)
        even = torch.linspace(time_eps, 1, size // 2, dtype=torch.float64)
        geometric = torch.logspace(math.log10(first), 0, size // 2, dtype=torch.float64).clamp(
            time_eps, 1
        )
        steep = 1 - torch.logspace(-8, 0, end_size, dtype=torch.float64) * (1 - time_eps)
        nodes = torch.unique(torch.cat([even, geometric, steep]))
        heights = density(nodes)
        if heights[0] == 0:
            # e.g. the likelihood's where g2(0) = 0: a weight 0 / 0 must not be drawn
            heights[0] = 0.5 * heights[1]
        if not bool(((heights > 0) & heights.isfinite()).all()):
            raise ValueError(
                f"the density must be finite and positive on [{time_eps}, 1]; "
                "use time_eps > 0 or sigma2_0 > 0"
            )
        areas = 0.5 * (heights[1:] + heights[:-1]) * nodes.diff()
        self.nodes = nodes
        self.mass = areas.sum().item()
        self.heights = heights / areas.sum()
        self.cdf = torch.cat([areas.new_zeros(1), areas.cumsum(0)]) / areas.sum()

    def from_uniform(self, rho: Tensor) -> TimeSample:
        rho = rho.double()
        nodes, heights, cdf = (
            table.to(rho.device) for table in (self.nodes, self.heights, self.cdf)
        )
        cell = torch.searchsorted(cdf, rho, right=True).clamp(1, len(nodes) - 1) - 1
        width = nodes[cell + 1] - nodes[cell]
        left = heights[cell]
        slope = (heights[cell + 1] - left) / width
        area = (rho - cdf[cell]).clamp(min=0)
        # root of left s + slope s^2 / 2 = area, in the form without cancellation
        root = (left.square() + 2 * slope * area).clamp(min=0).sqrt()
        step = torch.minimum(2 * area / (left + root), width)
        return TimeSample(nodes[cell] + step, 1 / (left + slope * step))


def _log_var_clock(sde: LinearSDE) -> Clock:
    """Uniform in ``ln var``: density proportional to ``g2 (1 - var) / var`` for a VP SDE."""
    return Clock(
        value=lambda t: sde.var(t).log(),
        inverse=lambda u: sde.inverse_var(u.exp()),
        rate=lambda t: sde.g2(t) * sde.one_minus_var(t) / sde.var(t),
    )


def _var_clock(sde: LinearSDE) -> Clock:
    """Uniform in ``var``: density proportional to ``g2 (1 - var)`` for a VP SDE."""
    return Clock(
        value=sde.var, inverse=sde.inverse_var, rate=lambda t: sde.g2(t) * sde.one_minus_var(t)
    )


def _truncated_normal_clock(sde: VPSDE) -> Clock | None:
    """Density proportional to ``exp(-B(t))``, a piece of a Gaussian.

    The Gaussian is centred at ``-beta_start / slope``.

    None where ``beta`` is so close to constant that the piece lies far in the Gaussian's tail.
    """
    # Completing the square, B(t) = slope (t + centre)^2 / 2 - beta_start centre / 2. The condition
    # keeps the constant, whose exponential is in the factor, below 16.
    slope = sde.beta_end - sde.beta_start
    if slope <= 0 or sde.beta_start > 4 * math.sqrt(2 * slope):
        return None
    scale, centre = math.sqrt(slope / 2), sde.beta_start / slope
    factor = math.exp(sde.beta_start * centre / 2) * math.sqrt(math.pi / (2 * slope))
    return Clock(
        value=lambda t: factor * torch.erf(scale * (t + centre)),
        inverse=lambda u: torch.erfinv(u / factor) / scale - centre,
        rate=lambda t: torch.exp(-sde.beta_integral(t)),
    )


def _ve_log_ratio_clock(sde: VESDE) -> Clock:
    """Uniform in ``ln(var / total_var)``: density proportional to ``1 / total_var``.

    (``g2 / var`` is constant.)
    """
    data_var = 1 - sde.sigma2_0
    return Clock(
        value=lambda t: -torch.log1p(data_var / sde.var(t)),
        inverse=lambda u: sde.inverse_var(data_var / torch.expm1(-u)),
        rate=lambda t: sde.log_ratio * data_var / sde.total_var(t),
    )


def _ve_log_total_clock(sde: VESDE) -> Clock:
    """Uniform in ``ln total_var``: density proportional to ``g2 / total_var``."""
    data_var = 1 - sde.sigma2_0
    return Clock(
        value=lambda t: sde.total_var(t).log(),
        inverse=lambda u: sde.inverse_var(u.exp() - data_var),
        rate=lambda t: sde.g2(t) / sde.total_var(t),
    )


CLOCKS: dict[tuple[type[LinearSDE], str], Callable[..., Clock | None]] = {
    (VPSDE, "likelihood"): _log_var_clock,
    (VPSDE, "unweighted"): _truncated_normal_clock,
    (VPSDE, "reweighted"): _var_clock,
    (GeometricVPSDE, "likelihood"): _log_var_clock,
    (GeometricVPSDE, "reweighted"): _var_clock,
    (SubVPSDE, "likelihood"): lambda sde: _log_var_clock(sde.vpsde),
    (SubVPSDE, "unweighted"): lambda sde: _truncated_normal_clock(sde.vpsde),
    (SubVPSDE, "reweighted"): lambda sde: _var_clock(sde.vpsde),
    (VESDE, "likelihood"): _ve_log_ratio_clock,
    (VESDE, "unweighted"): _ve_log_ratio_clock,
    (VESDE, "reweighted"): _ve_log_total_clock,
}
"""The paper's closed-form proposals by (SDE, weighting)."""


def normal_data_density(sde: LinearSDE, weighting: Weighting, t: Tensor) -> Tensor:
    """``w(t) (1 - var / total_var)``, the variance-free density for N(0, I) data.

    Up to a factor; ``t (B,)`` to ``(B,)``.
    """
    data_var = (1 - sde.sigma2_0) * sde.mean_coef(t).square()
    return weighting(sde, t) * data_var / sde.total_var(t)


def uniform_times(sde: LinearSDE, weighting: Weighting) -> TimeProposal:
    """Uniform on ``[time_eps, 1]``, whatever the weighting."""
    return UniformTimes(sde.time_eps)


def optimal_times(sde: LinearSDE, weighting: Weighting) -> TimeProposal:
    """The variance-free density for N(0, I) data, inverted numerically.

    Raises:
        ValueError: that density is infinite at ``time_eps``.
    """
    return TabulatedTimes(lambda t: normal_data_density(sde, weighting, t), sde.time_eps)


def importance_times(sde: LinearSDE, weighting: Weighting) -> TimeProposal:
    """The paper's importance sampling where it has a closed form, :func:`optimal_times` elsewhere.

    Raises:
        ValueError: the density has no finite integral from ``time_eps``.
    """
    make_clock = CLOCKS.get((type(sde), weighting.name))
    clock = make_clock(sde) if make_clock is not None else None
    return optimal_times(sde, weighting) if clock is None else ClockTimes(clock, sde.time_eps)


def weighted_times(sde: LinearSDE, weighting: Weighting) -> TimeProposal:
    """Density proportional to the weight: the squared error of every time counts alike.

    The choice for networks that are not close to the Normal score where ``var`` is close to one
    (arXiv 2101.09258 section 5.1, with the likelihood's weighting).

    Raises:
        ValueError: the weight is infinite at ``time_eps``.
    """
    return TabulatedTimes(lambda t: weighting(sde, t), sde.time_eps)


DEFENSIVE_SHARE = 0.1
"""Share of the weight's density in :func:`mixture_times`: no weight exceeds ten times the mean."""


def mixture_times(
    sde: LinearSDE, weighting: Weighting, share: float = DEFENSIVE_SHARE
) -> TimeProposal:
    """:func:`optimal_times` and, for ``share`` of the draws, :func:`weighted_times`.

    A defensive mixture (Hesterberg 1995): ``w / p`` is at most ``int w dt / share`` everywhere,
    where the optimum's alone grows like ``1 / (1 - var)`` near ``t = 1`` and, for a network whose
    error does not vanish there as that of the Normal score does, gives estimates of infinite
    variance but for the cut at ``t = 1``. Data that are N(0, I) cost ``1 / (1 - share)`` more.

    Raises:
        ValueError: a density is infinite at ``time_eps``.
    """

    def table(density: Callable[[Tensor], Tensor]) -> TabulatedTimes:
        return TabulatedTimes(density, sde.time_eps, end_size=1024)

    optimum = table(lambda t: normal_data_density(sde, weighting, t)).mass
    defence = table(lambda t: weighting(sde, t)).mass
    return table(
        lambda t: (
            (1 - share) / optimum * normal_data_density(sde, weighting, t)
            + share / defence * weighting(sde, t)
        )
    )


def make_proposal(name: str, sde: LinearSDE, weighting: Weighting) -> TimeProposal:
    """Build a proposal by its name in :data:`lsgm.registry.PROPOSALS`.

    It is for an SDE and the weighting whose estimate it serves.

    Raises:
        ValueError: unknown name, or a density that cannot be normalised on ``[time_eps, 1]``.
    """
    proposal: TimeProposal = PROPOSALS[name](sde, weighting)
    return proposal
