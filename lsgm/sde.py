r"""Linear diffusions with scalar coefficients, the forward processes of the prior.

``dz = f(t) z dt + sqrt(g2(t)) dw`` for ``t`` in ``[0, 1]`` has the Gaussian kernel ``z_t = m(t) z_0
+ sqrt(var(t)) e``, ``e ~ N(0, I)``, whose moments solve ``m' = f m`` with ``m(0) = 1`` and ``var' =
2 f var + g2`` with ``var(0) = sigma2_0`` (arXiv 2011.13456 eq. 29; arXiv 2106.05931 appendix B).
Every coefficient maps ``t (B,)`` to ``(B,)`` in the dtype of ``t``; they are written with
``expm1``/``log1p`` so that small ``t`` and ``1 - var`` near ``t = 1`` lose no digits. Pass float64
times where that matters and cast the result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor

from lsgm.bisection import invert
from lsgm.errors import require
from lsgm.registry import SDES
from lsgm.tensors import expand_like, sum_except_batch
from vae.random import Rng, randn

__all__ = [
    "SDES",
    "GeometricVPSDE",
    "LinearSDE",
    "SubVPSDE",
    "VESDE",
    "VPSDE",
    "largest_squared_distance",
    "make_sde",
]


class LinearSDE(ABC):
    r"""A scalar linear SDE. Data sit at ``t = 0``; training uses ``t`` in ``[time_eps, 1]``.

    An SDE of your own gives the kernel, :meth:`mean_coef` and an increasing :meth:`var`; all else
    has a default that follows from them, which a closed form may override::

        class CosineSDE(LinearSDE):  # arXiv 2102.09672 eq. 17
            def mean_coef(self, t):
                return torch.cos(0.49 * math.pi * t)

            def var(self, t):
                return torch.sin(0.49 * math.pi * t) ** 2

    Both are functions of torch operations, each time by itself. Give it fields by
    ``@dataclass(frozen=True)``.
    """

    @abstractmethod
    def mean_coef(self, t: Tensor) -> Tensor:
        """Coefficient ``m`` of the data in the kernel's mean; ``m(0) = 1``."""

    @abstractmethod
    def var(self, t: Tensor) -> Tensor:
        """Variance of the kernel."""

    @property
    def time_eps(self) -> float:
        """Lower end of the training interval, where the kernel needs variance; 1e-3 by default."""
        return 1e-3

    @property
    def sigma2_0(self) -> float:
        """Variance of the kernel at ``t = 0``, the paper's ``sigma_0^2``."""
        return self.var(torch.zeros((), dtype=torch.float64)).item()

    @property
    def prior_var(self) -> float:
        """Variance of the Gaussian from which generation starts at ``t = 1``; by default that of
        ``z_1`` for data of unit variance (:meth:`total_var`).
        """
        return self.total_var(torch.ones((), dtype=torch.float64)).item()

    def f(self, t: Tensor) -> Tensor:
        """Drift coefficient ``m' / m``."""
        mean, rate = _with_rate(self.mean_coef, t)
        return (rate / mean).to(t.dtype)

    def g2(self, t: Tensor) -> Tensor:
        """Squared diffusion coefficient ``var' - 2 f var``."""
        mean, mean_rate = _with_rate(self.mean_coef, t)
        var, var_rate = _with_rate(self.var, t)
        # a kernel that gains no noise somewhere must not lose any there by rounding
        return (var_rate - 2 * mean_rate / mean * var).clamp(min=0).to(t.dtype)

    def inverse_var(self, v: Tensor) -> Tensor:
        """The time at which the kernel has variance ``v``; the last one where there are more. By
        bisection, of a ``var`` that increases.
        """
        return invert(self.var, v.double(), 0.0, 1.0).to(v.dtype)

    def one_minus_var(self, t: Tensor) -> Tensor:
        """``1 - var(t)`` without cancellation where ``var`` is close to one."""
        return 1 - self.var(t)

    def total_var(self, t: Tensor) -> Tensor:
        """Variance of ``z_t`` for data that, smoothed by ``sigma2_0``, are N(0, 1)."""
        return (1 - self.sigma2_0) * self.mean_coef(t).square() + self.var(t)

    def perturb(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Sample the kernel, ``m(t) x0 + sqrt(var(t)) eps``: ``x0, eps (B, *d)``, ``t (B,)``."""
        return expand_like(self.mean_coef(t), x0) * x0 + expand_like(self.var(t).sqrt(), x0) * eps

    def normal_component(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Optimal noise prediction if the smoothed data were N(0, I).

        ``sqrt(var) x_t / total_var`` for

        ``x_t (B, *shape)``, ``t (B,)`` or a scalar (arXiv 2106.05931 section 3.2, "mixing normal
        and neural score").
        """
        return expand_like(self.var(t).sqrt() / self.total_var(t), x_t) * x_t

    def prior_sample(
        self,
        shape: Sequence[int],
        rng: Rng = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Starting points of generation, N(0, prior_var I): ``shape`` is batch first."""
        noise = randn(tuple(shape), rng, device=torch.device(device), dtype=dtype)
        return noise * math.sqrt(self.prior_var)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of ``x (B, *shape)`` under N(0, prior_var I): ``(B,)`` nats."""
        norm = 0.5 * math.log(2 * math.pi * self.prior_var)
        return -sum_except_batch(0.5 * x.square() / self.prior_var + norm)

    def cross_entropy_constant(self, time_eps: float | None = None) -> float:
        """Entropy of the kernel at the cutoff: ``(1 + ln(2 pi var(time_eps))) / 2`` nats a value.

        The term of the cross entropy that holds no score (arXiv 2106.05931 theorem 1). ``time_eps``
        defaults to the SDE's.

        Raises:
            ValueError: the variance at the cutoff is zero, so the entropy is minus infinity.
        """
        cutoff = self.time_eps if time_eps is None else time_eps
        variance = self.var(torch.tensor(cutoff, dtype=torch.float64)).item()
        if variance <= 0:
            raise ValueError(
                f"time_eps: the kernel has no variance at the cutoff t = {cutoff}; "
                "use time_eps > 0 or sigma2_0 > 0"
            )
        return 0.5 * (1 + math.log(2 * math.pi * variance))


MAX_BETA = 1000.0
"""Largest beta(0) + beta(1): the mean coefficient at t = 1, ``exp(-MAX_BETA / 4)``, and its square
are still numbers of float64.
"""


def _with_rate(fn: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """``fn(t)`` and its derivative by forward-mode autograd, in float64: ``(B,)`` each."""
    t = t.detach().double()
    # func.jvp works whatever gradient mode or transform the caller is in
    value, rate = torch.func.jvp(fn, (t,), (torch.ones_like(t),))[:2]
    return value, rate


def _check_range(name: str, value: float, low: float, high: float) -> None:
    require(low <= value < high, f"{name}: must lie in [{low:g}, {high:g}), not {value}")


@dataclass(frozen=True)
class _LinearBetaSDE(LinearSDE):
    """What VP and sub-VP share: ``f = -beta/2`` with ``beta(t)`` linear in ``t``."""

    beta_start: float = 0.1
    beta_end: float = 20.0
    sigma2_0: float = 0.0
    time_eps: float = 1e-2

    def __post_init__(self) -> None:
        _check_range("beta_end", self.beta_end, 0, math.inf)
        require(self.beta_end > 0, "beta_end: must be positive, not 0")
        require(
            0 <= self.beta_start <= self.beta_end,
            f"beta_start: must lie in [0, beta_end = {self.beta_end:g}], not {self.beta_start}",
        )
        require(
            self.beta_start + self.beta_end <= MAX_BETA,
            f"beta_end: beta_start + beta_end must be at most {MAX_BETA:g}, or nothing of the data "
            f"is left at t = 1, not {self.beta_start + self.beta_end:g}",
        )
        _check_range("sigma2_0", self.sigma2_0, 0, 1)
        _check_range("time_eps", self.time_eps, 0, 1)

    @property
    def prior_var(self) -> float:
        return 1.0

    def beta(self, t: Tensor) -> Tensor:
        """``beta_start + (beta_end - beta_start) t``."""
        return self.beta_start + (self.beta_end - self.beta_start) * t

    def beta_integral(self, t: Tensor) -> Tensor:
        """``B(t)``, the integral of ``beta`` from 0 to ``t``."""
        return t * (self.beta_start + 0.5 * (self.beta_end - self.beta_start) * t)

    def inverse_beta_integral(self, value: Tensor) -> Tensor:
        """The time at which ``B(t) = value``, in a form that serves constant ``beta`` too."""
        slope = self.beta_end - self.beta_start
        root = (self.beta_start**2 + 2 * slope * value).sqrt()
        # beta_start = 0 and value = 0 would be 0/0; B vanishes only at t = 0
        return torch.where(value > 0, 2 * value / (self.beta_start + root), 0.0)

    def f(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def mean_coef(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.beta_integral(t))


@dataclass(frozen=True)
class VPSDE(_LinearBetaSDE):
    """Variance-preserving SDE with linear ``beta``.

    arXiv 2011.13456 eq. 32; arXiv 2106.05931 appendix B.1.
    """

    def g2(self, t: Tensor) -> Tensor:
        return self.beta(t)

    def var(self, t: Tensor) -> Tensor:
        return self.sigma2_0 - (1 - self.sigma2_0) * torch.expm1(-self.beta_integral(t))

    def one_minus_var(self, t: Tensor) -> Tensor:
        return (1 - self.sigma2_0) * torch.exp(-self.beta_integral(t))

    def total_var(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def inverse_var(self, v: Tensor) -> Tensor:
        return self.inverse_beta_integral(math.log1p(-self.sigma2_0) - torch.log1p(-v))


@dataclass(frozen=True)
class SubVPSDE(_LinearBetaSDE):
    """sub-VP SDE: the VP drift with less noise.

    ``g2 = beta (1 - exp(-2 B))`` (arXiv 2011.13456 eq. 29).
    """

    @property
    def vpsde(self) -> VPSDE:
        """The VP SDE with the same parameters, which gives closed-form time proposals."""
        return VPSDE(self.beta_start, self.beta_end, self.sigma2_0, self.time_eps)

    def g2(self, t: Tensor) -> Tensor:
        return -self.beta(t) * torch.expm1(-2 * self.beta_integral(t))

    def var(self, t: Tensor) -> Tensor:
        minus_b = -self.beta_integral(t)
        return torch.expm1(minus_b).square() + self.sigma2_0 * torch.exp(minus_b)

    def one_minus_var(self, t: Tensor) -> Tensor:
        decay = torch.exp(-self.beta_integral(t))
        return decay * (2 - self.sigma2_0 - decay)

    def inverse_var(self, v: Tensor) -> Tensor:
        """Inverse of ``var``, with ``sigma2_0 > 0`` on its rising branch.

        That is ``1 - exp(-B) >= sigma2_0 / 2``; before, ``var`` falls, so that it is no clock.
        """
        risen = 0.5 * (
            self.sigma2_0 + (self.sigma2_0**2 + 4 * (v - self.sigma2_0)).clamp(min=0).sqrt()
        )
        return self.inverse_beta_integral(-torch.log1p(-risen))


@dataclass(frozen=True)
class GeometricVPSDE(LinearSDE):
    """Variance-preserving SDE whose variance grows geometrically (arXiv 2106.05931 appendix B.2).

    ``var = sigma2_min r^t - sigma2_min + sigma2_0`` with ``r = sigma2_max / sigma2_min``. With
    ``sigma2_0 = sigma2_min`` and ``time_eps = 0``, ``ln var`` is linear in ``t``, so uniform times
    are already the likelihood's importance sampling.
    """

    sigma2_min: float = 3e-5
    sigma2_max: float = 0.999
    sigma2_0: float = 3e-5
    time_eps: float = 0.0

    def __post_init__(self) -> None:
        _check_range("sigma2_0", self.sigma2_0, 0, 1)
        require(
            0 < self.sigma2_min < self.sigma2_max,
            f"sigma2_min: must lie between 0 and sigma2_max = {self.sigma2_max:g}, not "
            f"{self.sigma2_min}",
        )
        require(
            self.sigma2_max - self.sigma2_min + self.sigma2_0 < 1,
            "sigma2_max: the variance must stay below one, sigma2_max - sigma2_min + sigma2_0 < 1, "
            f"not {self.sigma2_max} - {self.sigma2_min} + {self.sigma2_0}",
        )
        _check_range("time_eps", self.time_eps, 0, 1)

    @property
    def prior_var(self) -> float:
        return 1.0

    @property
    def log_ratio(self) -> float:
        """``ln(sigma2_max / sigma2_min)``."""
        return math.log(self.sigma2_max / self.sigma2_min)

    def g2(self, t: Tensor) -> Tensor:
        growth = self.sigma2_min * torch.exp(self.log_ratio * t) * self.log_ratio
        return growth / self.one_minus_var(t)

    def f(self, t: Tensor) -> Tensor:
        return -0.5 * self.g2(t)

    def mean_coef(self, t: Tensor) -> Tensor:
        return (self.one_minus_var(t) / (1 - self.sigma2_0)).sqrt()

    def var(self, t: Tensor) -> Tensor:
        return self.sigma2_0 + self.sigma2_min * torch.expm1(self.log_ratio * t)

    def one_minus_var(self, t: Tensor) -> Tensor:
        # expanded about t = 1, where 1 - var is small
        end = 1 - self.sigma2_max + self.sigma2_min - self.sigma2_0
        return end - self.sigma2_max * torch.expm1(self.log_ratio * (t - 1))

    def total_var(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def inverse_var(self, v: Tensor) -> Tensor:
        return torch.log1p((v - self.sigma2_0) / self.sigma2_min) / self.log_ratio


@dataclass(frozen=True)
class VESDE(LinearSDE):
    """Variance-exploding SDE, ``var = sigma2_min r^t`` and ``m = 1``.

    arXiv 2011.13456 eq. 31; arXiv 2106.05931 appendix B.3.

    The kernel starts from ``sigma2_min``, so there is no separate ``sigma2_0``. ``sigma2_max``
    should be the largest squared distance between two encodings (:func:`largest_squared_distance`).
    """

    sigma2_min: float = 1e-2
    sigma2_max: float = 900.0
    time_eps: float = 1e-2

    def __post_init__(self) -> None:
        _check_range("sigma2_max", self.sigma2_max, 0, math.inf)
        require(
            0 < self.sigma2_min < min(1.0, self.sigma2_max),
            f"sigma2_min: must lie between 0 and 1 and below sigma2_max = {self.sigma2_max:g}, "
            f"not {self.sigma2_min}",
        )
        _check_range("time_eps", self.time_eps, 0, 1)

    @property
    def sigma2_0(self) -> float:
        return self.sigma2_min

    @property
    def prior_var(self) -> float:
        return self.sigma2_max

    @property
    def log_ratio(self) -> float:
        """``ln(sigma2_max / sigma2_min)``."""
        return math.log(self.sigma2_max / self.sigma2_min)

    def f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def g2(self, t: Tensor) -> Tensor:
        return self.log_ratio * self.var(t)

    def mean_coef(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def var(self, t: Tensor) -> Tensor:
        return self.sigma2_min * torch.exp(self.log_ratio * t)

    def inverse_var(self, v: Tensor) -> Tensor:
        return torch.log(v / self.sigma2_min) / self.log_ratio


def _options(sde: type[LinearSDE]) -> set[str]:
    return {field.name for field in fields(sde)} if is_dataclass(sde) else set()


def make_sde(kind: str, **options: float) -> LinearSDE:
    """Build an SDE by its name in :data:`lsgm.registry.SDES`.

    It takes from ``options`` the ones that it has; those of other kinds, which a configuration
    holds too, are passed over.

    Raises:
        ValueError: unknown ``kind``, an option that no SDE has, or a value out of range.
    """
    chosen: type[LinearSDE] = SDES[kind]
    known = {name for sde in SDES.values() for name in _options(sde)}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"no SDE has the options {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    own = _options(chosen)
    return chosen(**{name: value for name, value in options.items() if name in own})


@torch.no_grad()
def largest_squared_distance(encodings: Iterable[Tensor], block: int = 2048) -> float:
    """Largest squared Euclidean distance between two encodings, a VESDE's ``sigma2_max``.

    Args:
        encodings: batches ``(B, *shape)``; at least two encodings together.
        block: rows of the distance matrix computed at once (memory ``block^2``).

    Raises:
        ValueError: fewer than two encodings.
    """
    points = torch.cat([batch.flatten(1).float().cpu() for batch in encodings])
    if len(points) < 2:
        raise ValueError(f"need at least two encodings, got {len(points)}")
    # the origin is immaterial; centring keeps the expanded square accurate
    blocks = (points - points.mean(0)).split(block)
    largest = max(
        torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").max()
        for i, a in enumerate(blocks)
        for b in blocks[i:]
    )
    return float(largest) ** 2
