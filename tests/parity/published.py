"""The published prior's formulas, written out term by term as the published code evaluates them.

The second opinion of the parity tests: the fixtures of our own making (:mod:`own_fixtures`) hold
what these give, and tests take from here what a recorded float32 number inherits from its order of
evaluation. Nothing of :mod:`lsgm` is used. All functions work in the dtype of their tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FLOAT32_ROUNDING", "Draw", "PublishedSDE", "discrete_chain", "draw_times"]

FLOAT32_ROUNDING = 2.0**-24
"""Largest relative error of one rounding."""


@dataclass(frozen=True)
class PublishedSDE:
    """Coefficients of one of the four SDEs, ``kind`` by its published name.

    With plain ``exp`` and subtraction: in float32 small ``t`` cancels, as in the recorded numbers.
    """

    sde_type: str
    beta_start: float
    beta_end: float
    sigma2_0: float
    sigma2_min: float
    sigma2_max: float
    time_eps: float

    @property
    def linear_beta(self) -> bool:
        return self.sde_type in ("vpsde", "sub_vpsde")

    @property
    def log_ratio(self) -> float:
        return math.log(self.sigma2_max / self.sigma2_min)

    @property
    def prior_var(self) -> float:
        return self.sigma2_max if self.sde_type == "vesde" else 1.0

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_start + (self.beta_end - self.beta_start) * t

    def decay(self, t: Tensor) -> Tensor:
        """``exp(-B(t))``."""
        slope = self.beta_end - self.beta_start
        return torch.exp(-self.beta_start * t - 0.5 * slope * t * t)

    def growth(self, t: Tensor) -> Tensor:
        """``sigma2_min r^t``."""
        return self.sigma2_min * (self.sigma2_max / self.sigma2_min) ** t

    def f(self, t: Tensor) -> Tensor:
        if self.linear_beta:
            return -0.5 * self.beta(t)
        return torch.zeros_like(t) if self.sde_type == "vesde" else -0.5 * self.g2(t)

    def g2(self, t: Tensor) -> Tensor:
        if self.sde_type == "vpsde":
            return self.beta(t)
        if self.sde_type == "sub_vpsde":
            return self.beta(t) * (1 - self.decay(t) ** 2)
        growth = self.growth(t) * self.log_ratio
        if self.sde_type == "vesde":
            return growth
        return growth / (1 - self.sigma2_0 + self.sigma2_min - self.growth(t))

    def mean(self, t: Tensor) -> Tensor:
        if self.linear_beta:
            return self.decay(t).sqrt()
        if self.sde_type == "vesde":
            return torch.ones_like(t)
        return (1 + (self.sigma2_min - self.growth(t)) / (1 - self.sigma2_0)).sqrt()

    def var(self, t: Tensor) -> Tensor:
        if self.sde_type == "vpsde":
            return self.vp_var(t)
        if self.sde_type == "sub_vpsde":
            return (1 - self.decay(t)) ** 2 + self.sigma2_0 * self.decay(t)
        return self.growth(t) - self.sigma2_min + self.sigma2_0

    def vp_var(self, t: Tensor) -> Tensor:
        """Variance of the VP SDE with the same ``beta``, which sub-VP's proposals use."""
        return 1 - (1 - self.sigma2_0) * self.decay(t)

    def total(self, t: Tensor) -> Tensor:
        """Denominator of the Normal component."""
        if self.sde_type == "sub_vpsde":
            return (1 - self.decay(t)) ** 2 + self.decay(t)
        return self.ve_total(t) if self.sde_type == "vesde" else torch.ones_like(t)

    def ve_total(self, t: Tensor) -> Tensor:
        return self.growth(t) - self.sigma2_min + 1

    def vp_time(self, var: Tensor) -> Tensor:
        """The time at which :meth:`vp_var` is ``var``."""
        slope = self.beta_end - self.beta_start
        log = torch.log((1 - var) / (1 - self.sigma2_0))
        return (-self.beta_start + (self.beta_start**2 - 2 * slope * log).sqrt()) / slope

    def time(self, var: Tensor) -> Tensor:
        """The time at which the variance is ``var``; not for sub-VP."""
        if self.sde_type == "vpsde":
            return self.vp_time(var)
        return torch.log((var + self.sigma2_min - self.sigma2_0) / self.sigma2_min) / self.log_ratio

    def ve_total_time(self, total: Tensor) -> Tensor:
        return torch.log((total + self.sigma2_min - 1) / self.sigma2_min) / self.log_ratio

    def constant(self, cutoff: float) -> float:
        """The cross-entropy's constant, whose variance is float32."""
        var = self.var(torch.tensor(cutoff, dtype=torch.float32))
        return 0.5 * (1 + torch.log(2 * math.pi * var)).item()

    def rounding(self, t: Tensor) -> Tensor:
        """How far float32 may put the variance from its value, relative to it; ``t`` float64.

        A few roundings of the largest term, over what the subtraction leaves.
        """
        var = self.var(t)
        if self.sde_type == "sub_vpsde":
            # (1 - e)^2: the rounding of e, twice, times 1 - e
            terms = 2 * (1 - self.decay(t)) + self.sigma2_0 * self.decay(t)
        else:
            terms = torch.ones_like(t) if self.linear_beta else self.growth(t)
        return 4 * FLOAT32_ROUNDING * (1 + terms / var)

    def end_rounding(self, t: Tensor) -> Tensor:
        """How far float32 may put what the importance-sampled times and their weights divide by.

        Relative to it; ``t`` float64. It is one minus the variance (sub-VP's times: that of VP),
        which cancels near ``t = 1``, and for VE one minus the variance's share of the total.
        """
        if self.sde_type == "vesde":
            return 8 * FLOAT32_ROUNDING * self.ve_total(t)
        var = self.vp_var(t) if self.sde_type == "sub_vpsde" else self.var(t)
        return 8 * FLOAT32_ROUNDING / (1 - var)

    def time_rounding(self, t: Tensor) -> Tensor:
        """What :meth:`end_rounding` makes of the times themselves."""
        if self.sde_type == "vesde":
            # the inverse of V takes V - (1 - sigma2_min), the variance, which cancels where small
            start = 8 * FLOAT32_ROUNDING * self.ve_total(t) / self.var(t)
            return (self.end_rounding(t) + start) / self.log_ratio
        return self.end_rounding(t) / (-2 * self.f(t))


@dataclass(frozen=True)
class Draw:
    """Times of a published sampling mode, with the weights of both objectives; all ``(B,)``."""

    t: Tensor
    var: Tensor
    mean: Tensor
    wp: Tensor
    wq: Tensor
    g2: Tensor


def draw_times(mode: str, sde: PublishedSDE, rho: Tensor) -> Draw:
    """Map uniforms to times and weights as the published ``mode`` does, its defects included."""
    if mode.endswith("_uniform") or mode == "rescale_iw":
        t = sde.time_eps + (1 - sde.time_eps) * rho
        var, g2 = sde.var(t), sde.g2(t)
        wq = 0.5 * g2 / var
        wp = {
            "ll_uniform": lambda: wq,
            "drop_all_uniform": lambda: torch.ones_like(t),
            "drop_sigma2t_uniform": lambda: 0.5 * g2,
            "rescale_iw": lambda: 0.5 / (1 - var),
        }[mode]()
        return Draw(t, var, sde.mean(t), wp, wq, g2)
    draws: dict[str, Callable[[str, PublishedSDE, Tensor], Draw]] = {
        "vpsde": _vp_draw,
        "geometric_sde": _vp_draw,
        "sub_vpsde": _sub_vp_draw,
        "vesde": _ve_draw,
    }
    return draws[sde.sde_type](mode, sde, rho)


def _ends(sde: PublishedSDE, var: Callable[[Tensor], Tensor], rho: Tensor) -> tuple[Tensor, Tensor]:
    return var(rho.new_tensor(sde.time_eps)), var(rho.new_tensor(1.0))


def _truncated_normal(sde: PublishedSDE, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Times like a piece of a Gaussian, and ``Z``, which lacks ``beta_start`` in its exponent."""
    slope = sde.beta_end - sde.beta_start
    a, q = math.sqrt(slope / 2), sde.beta_start / slope
    low, high = torch.erf(a * (torch.tensor([sde.time_eps, 1.0]) + q))  # float32, always
    t = torch.erfinv(rho * (high - low) + low) / a - q
    normaliser = (1 - sde.sigma2_0) * math.exp(q / 2) * math.sqrt(math.pi / (2 * slope))
    return t, normaliser * (high - low)


def _vp_draw(mode: str, sde: PublishedSDE, rho: Tensor) -> Draw:
    if mode == "drop_all_iw":
        t, z = _truncated_normal(sde, rho)
        var, g2 = sde.var(t), sde.g2(t)
        wp = z / (1 - var)
        return Draw(t, var, sde.mean(t), wp, wp * 0.5 * g2 / var, g2)
    low, high = _ends(sde, sde.var, rho)
    if mode == "ll_iw":
        var = torch.exp(rho * torch.log(high) + (1 - rho) * torch.log(low))
        wp = wq = 0.5 * (torch.log(high) - torch.log(low)) / (1 - var)
    else:
        var = rho * high + (1 - rho) * low
        wp = 0.5 * (high - low) / (1 - var)
        wq = wp / var
    t = sde.time(var)
    return Draw(t, var, sde.mean(t), wp, wq, sde.g2(t))


def _sub_vp_draw(mode: str, sde: PublishedSDE, rho: Tensor) -> Draw:
    """``iw_subvp_like_vp_sde``: times of the VP SDE, the rest of sub-VP."""
    if mode == "drop_all_iw":
        t, z = _truncated_normal(sde, rho)
        var, g2 = sde.var(t), sde.g2(t)
        wp = z / (1 - sde.vp_var(t))
        return Draw(t, var, sde.mean(t), wp, wp * 0.5 * g2 / var, g2)
    low, high = _ends(sde, sde.vp_var, rho)
    if mode == "ll_iw":
        u = torch.exp(rho * torch.log(high) + (1 - rho) * torch.log(low))
    else:
        u = rho * high + (1 - rho) * low
    t = sde.vp_time(u)
    var, g2 = sde.var(t), sde.g2(t)
    if mode == "ll_iw":
        span = torch.log(high) - torch.log(low)
        wp = wq = 0.5 * g2 / var * span * u / (1 - u) / sde.beta(t)
    else:
        wp = 0.5 * g2 / sde.beta(t) * (high - low) / (1 - u)
        wq = wp / var
    return Draw(t, var, sde.mean(t), wp, wq, g2)


def _ve_draw(mode: str, sde: PublishedSDE, rho: Tensor) -> Draw:
    low, high = _ends(sde, sde.ve_total, rho)
    if mode == "drop_sigma2t_iw":
        total = torch.exp(rho * torch.log(high) + (1 - rho) * torch.log(low))
    else:
        start = torch.log(low / sde.var(rho.new_tensor(sde.time_eps)))
        span = torch.log(sde.sigma2_max / high) + start
        total = (1 - sde.sigma2_min) / (1 - torch.exp(rho * span - start))
    t = sde.ve_total_time(total)
    var, g2, total = sde.var(t), sde.g2(t), sde.ve_total(t)
    if mode == "drop_sigma2t_iw":
        wp = 0.5 * torch.log(high / low) * total
        wq = wp / var
    else:
        wq = 0.5 * span * total / (1 - sde.sigma2_min)
        wp = wq if mode == "ll_iw" else 2 * wq / sde.log_ratio
    return Draw(t, var, sde.mean(t), wp, wq, g2)


def discrete_chain(sde: PublishedSDE, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """``beta_k``, ``abar_k`` and the posterior's ``beta_k`` for ``k = 1 .. steps``, float32."""
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    abar = 1 - sde.var(k / steps)
    betas = 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
    abar = torch.cumprod(1 - betas, 0)
    post = betas[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    return betas.float(), abar.float(), torch.cat([post[:1], post]).float()
