"""The few-step schedulers of the `diffusers` package on our SDEs, to compare with.

A scheduler of theirs works on ``x = z / sqrt(m^2 + sigma^2)`` and knows the SDE by its noise levels
``sigma / m`` alone, so any linear SDE can be put to it: a table of ``steps`` discrete times gives
the levels (``trained_betas`` hold their ``alpha-bar``), the scheduler chooses among or between
them, and the network is called at the continuous time of each level it chose. So nothing is lost to
rounded times, which favours them. ``times`` in place of their grid runs their method on ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsgm.bisection import invert
from lsgm.errors import UserError
from lsgm.sde import LinearSDE
from lsgm.solvers.base import EpsFn
from lsgm.solvers.grids import noise_level

__all__ = ["METHODS", "ReferenceSampler", "ReferenceSolution", "reference_samplers"]

SPACINGS = ("linspace", "leading", "trailing")
SIGMA_GRIDS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
"""Grid -> the switch that chooses it; the other grids are spacings of the discrete times."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
}
"""Method -> its scheduler in diffusers and fixed options."""


@dataclass(frozen=True)
class ReferenceSolution:
    """The end of a solve by diffusers.

    Attributes:
        x: The state, ``(B, *shape)``.
        nfe: Network calls on a batch.
        t_end: The time of ``x``.
    """

    x: Tensor
    nfe: int
    t_end: float


def _diffusers() -> ModuleType:
    try:
        import diffusers  # noqa: PLC0415  # an optional dependency
    except ImportError as error:
        raise UserError(
            "the comparison needs the package diffusers: pip install 'lsgm[benchmark]'"
        ) from error
    return diffusers


@dataclass(frozen=True)
class ReferenceSampler:
    """One scheduler of diffusers with its options.

    Attributes:
        method: Name in ``METHODS``.
        grid: ``linspace``, ``leading``, ``trailing`` or a name in ``SIGMA_GRIDS``.
        steps: Number of discrete times.
        final: ``sigma_min`` ends at the first discrete time, ``zero`` at no noise.
        options: Further options of the scheduler.
    """

    method: str
    grid: str = "linspace"
    steps: int = 1000
    final: str = "sigma_min"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        extra = [f"{key}={value}" for key, value in self.options.items()]
        return " ".join([self.method, self.grid, f"N={self.steps}", self.final, *extra])

    def solve(
        self,
        sde: LinearSDE,
        eps_fn: EpsFn,
        x: Tensor,
        nfe: int,
        t_end: float,
        times: Tensor | None = None,
    ) -> ReferenceSolution:
        """Take ``nfe`` steps, one network call each, from ``x (B, *shape)`` at time 1.

        Args:
            sde: The forward SDE.
            eps_fn: The noise prediction; called in the dtype of ``x``.
            x: The start.
            nfe: Number of steps.
            t_end: The first discrete time.
            times: Decreasing, ``(nfe + 1,)``: replaces the scheduler's own grid.

        Raises:
            UserError: diffusers is not installed.
            ValueError: ``times`` for DDIMScheduler, which knows its discrete times alone.
        """
        table = torch.linspace(t_end, 1, self.steps, dtype=torch.float64)
        scheduler = self._scheduler(noise_level(sde, table))
        scheduler.set_timesteps(nfe)
        if hasattr(scheduler, "sigmas"):
            if times is not None:
                scheduler.sigmas = noise_level(sde, times.double()).float()
                scheduler.timesteps = torch.arange(nfe, 0, -1)
            levels = scheduler.sigmas.double()
            if times is None:
                times = _times_of(sde, levels)
            scheduler.set_begin_index(0)
        else:
            if times is not None:
                raise ValueError("DDIMScheduler takes no times of ours: use dpmpp of order 1")
            index = scheduler.timesteps
            last = index[-1] - self.steps // nfe
            end = table[last] if last >= 0 else _end_of_ddim(self, table)
            times = torch.cat([table[index], torch.as_tensor(end).double().reshape(1)])
        m, sigma = sde.mean_coef(times), sde.var(times).sqrt()
        scale = (m.square() + sigma.square()).sqrt().tolist()

        x = x / scale[0]
        for i, step in enumerate(scheduler.timesteps):
            t = torch.full((len(x),), times[i].item(), dtype=x.dtype, device=x.device)
            eps = eps_fn(scale[i] * x, t)
            x = scheduler.step(eps, step, x).prev_sample
        return ReferenceSolution(scale[-1] * x, nfe, times[-1].item())

    def _scheduler(self, levels: Tensor) -> Any:
        """The scheduler that knows the SDE by ``levels (steps,)``."""
        alpha_bar = 1 / (1 + levels.square())
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        options: dict[str, Any] = {
            "num_train_timesteps": self.steps,
            "trained_betas": (1 - alpha_bar / previous).numpy().astype(np.float64),
        }
        cls, fixed = METHODS[self.method]
        if self.method == "ddim" and self.grid in SIGMA_GRIDS:
            # the same step, in the one scheduler of theirs that offers these grids for it
            cls, fixed = "DPMSolverMultistepScheduler", {"solver_order": 1}
        if self.grid in SIGMA_GRIDS:
            options[SIGMA_GRIDS[self.grid]] = True
        else:
            options["timestep_spacing"] = self.grid
        if cls == "DDIMScheduler":
            options["set_alpha_to_one"] = self.final == "zero"
        elif cls != "DEISMultistepScheduler":  # which always ends at its smallest level
            options["final_sigmas_type"] = self.final
        scheduler = getattr(_diffusers(), cls)(**options, **fixed, **self.options)
        # their cumulative product is float32
        scheduler.alphas_cumprod = alpha_bar
        if hasattr(scheduler, "final_alpha_cumprod") and self.final != "zero":
            scheduler.final_alpha_cumprod = alpha_bar[0]
        return scheduler


def _end_of_ddim(sampler: ReferenceSampler, table: Tensor) -> Tensor:
    return table.new_zeros(()) if sampler.final == "zero" else table[0]


def _times_of(sde: LinearSDE, levels: Tensor) -> Tensor:
    """The times of noise levels ``(n,)`` that float32 may have put slightly outside."""
    ends = noise_level(sde, torch.tensor([0.0, 1.0], dtype=torch.float64))
    return invert(
        lambda t: noise_level(sde, t), levels.clamp(ends[0].item(), ends[1].item()), 0.0, 1.0
    )


def reference_samplers(method: str, *, thorough: bool = True) -> Iterator[ReferenceSampler]:
    """Every sampler that diffusers offers for a method.

    Args:
        method: Name in ``METHODS``.
        thorough: Also both ends, a table of 10,000 times and all options of the method; if not,
            its usual options on every grid.
    """
    orders: list[dict[str, Any]]
    match method:
        case "unipc":
            orders = [{"solver_order": o, "solver_type": b} for o in (2, 3) for b in ("bh2", "bh1")]
        case "deis":
            orders = [{"solver_order": o} for o in (2, 3)]
        case "dpmpp_2m":
            orders = [{"solver_type": kind} for kind in ("midpoint", "heun")]
        case _:
            orders = [{}]
    finals = ("sigma_min",) if method == "deis" else ("sigma_min", "zero")
    lower: list[dict[str, Any]] = [{}]
    if method != "ddim":
        lower.append({"lower_order_final": False})
    if not thorough:
        orders, lower, finals = orders[:1] if method != "deis" else orders[:2], [{}], finals[:1]
    grids = [*SPACINGS, *SIGMA_GRIDS]
    if method in ("unipc", "deis"):
        grids.remove("lu")
    for grid in grids:
        # the sigma grids depend on the ends of the table alone
        sizes = (1000, 10000) if thorough and grid in SPACINGS else (1000,)
        for steps in sizes:
            for final in finals:
                for order in orders:
                    for extra in lower:
                        options = {**order, **extra}
                        yield ReferenceSampler(method, grid, steps, final, options)
