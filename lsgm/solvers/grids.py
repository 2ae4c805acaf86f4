r"""Time grids: where a solver places its steps matters as much as the solver.

Each grid is a function ``(sde, n, t_end) -> times``, a strictly decreasing float64 vector of ``n +
1`` times from 1 to ``t_end``. Most are uniform in some monotone function of time; those without a
closed inverse are inverted by bisection in float64, for any linear SDE.

>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers.grids import make_grid
>>> [round(t, 4) for t in make_grid("sqrt_time", VPSDE(), 4, 0.01).tolist()]
[1.0, 0.6006, 0.3025, 0.1056, 0.01]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lsgm.bisection import invert
from lsgm.sde import LinearSDE

__all__ = [
    "GRIDS",
    "Grid",
    "karras",
    "make_grid",
    "noise_level",
    "times_of_noise_levels",
    "uniform_log_snr",
    "uniform_log_var",
    "uniform_phi",
    "uniform_sqrt_time",
    "uniform_time",
]

Grid = Callable[[LinearSDE, int, float], Tensor]


def noise_level(sde: LinearSDE, t: Tensor) -> Tensor:
    """``sigma / m`` at ``t (n,)``: the standard deviation of the noise in ``z / m``, increasing in
    time for every SDE.
    """
    return sde.var(t).sqrt() / sde.mean_coef(t)


def times_of_noise_levels(sde: LinearSDE, levels: Sequence[float] | Tensor) -> Tensor:
    """The times of given noise levels ``sigma / m (n,)``, e.g. the geometric list of arXiv
    1907.05600.

    Raises:
        ValueError: A level lies outside what the SDE reaches in ``[0, 1]``.
    """
    levels = torch.as_tensor(levels, dtype=torch.float64)
    low, high = noise_level(sde, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    slack = 1e-12 * high
    if levels.min() < low - slack or levels.max() > high + slack:
        raise ValueError(f"noise levels must lie in [{low:g}, {high:g}] for {sde}")
    return invert(lambda t: noise_level(sde, t), levels, 0.0, 1.0)


def uniform_time(sde: LinearSDE, n: int, t_end: float) -> Tensor:
    """Equal steps in ``t``."""
    return _power_of_time(n, t_end, 1)


def uniform_sqrt_time(sde: LinearSDE, n: int, t_end: float) -> Tensor:
    """Equal steps in ``sqrt(t)``."""
    return _power_of_time(n, t_end, 2)


def uniform_log_snr(sde: LinearSDE, n: int, t_end: float) -> Tensor:
    """Equal steps in ``ln(m / sigma)``, half the log signal-to-noise ratio (arXiv 2206.00927)."""
    return _uniform_in(lambda t: noise_level(sde, t).log(), n, t_end)


def uniform_log_var(sde: LinearSDE, n: int, t_end: float) -> Tensor:
    """Equal steps in ``ln var``."""
    return _uniform_in(lambda t: sde.var(t).log(), n, t_end)


def uniform_phi(sde: LinearSDE, n: int, t_end: float) -> Tensor:
    """Equal steps in the angle ``phi = arctan(sigma / m)``; for VP ``m = cos(phi)``, ``sigma =
    sin(phi)``.
    """
    return _uniform_in(lambda t: noise_level(sde, t).atan(), n, t_end)


def karras(sde: LinearSDE, n: int, t_end: float, rho: float = 7.0) -> Tensor:
    """Equal steps in ``(sigma / m)^(1 / rho)`` (arXiv 2206.00364 eq. 5)."""
    return _uniform_in(lambda t: noise_level(sde, t) ** (1 / rho), n, t_end)


def _check(n: int, t_end: float) -> None:
    if n < 1:
        raise ValueError(f"a grid needs at least one step, got {n}")
    if not 0 <= t_end < 1:
        raise ValueError(f"t_end must lie in [0, 1), got {t_end}")


def _power_of_time(n: int, t_end: float, power: int) -> Tensor:
    _check(n, t_end)
    times = torch.linspace(1, t_end ** (1 / power), n + 1, dtype=torch.float64) ** power
    return _with_exact_ends(times, t_end)


def _uniform_in(function: Callable[[Tensor], Tensor], n: int, t_end: float) -> Tensor:
    _check(n, t_end)
    first, last = function(torch.tensor([1.0, t_end], dtype=torch.float64)).tolist()
    if last in (float("inf"), -float("inf")):
        raise ValueError(
            f"this grid needs noise at its end: var({t_end}) is zero, choose a larger t_end"
        )
    values = torch.linspace(first, last, n + 1, dtype=torch.float64)
    return _with_exact_ends(invert(function, values, t_end, 1.0), t_end)


def _with_exact_ends(times: Tensor, t_end: float) -> Tensor:
    times[0], times[-1] = 1.0, t_end
    if not (times.diff() < 0).all():
        raise ValueError(
            f"{len(times) - 1} steps to t = {t_end} are too many to tell apart on this grid"
        )
    return times


GRIDS: dict[str, Grid] = {
    "time": uniform_time,
    "sqrt_time": uniform_sqrt_time,
    "log_snr": uniform_log_snr,
    "log_var": uniform_log_var,
    "phi": uniform_phi,
    "karras": karras,
}


def make_grid(name: str, sde: LinearSDE, n: int, t_end: float) -> Tensor:
    """``n + 1`` decreasing times from 1 to ``t_end`` on the grid of that name.

    Raises:
        ValueError: The name is unknown, or ``n`` or ``t_end`` out of range.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown time grid {name!r}: choose from {', '.join(GRIDS)}")
    return GRIDS[name](sde, n, t_end)
