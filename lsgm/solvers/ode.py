r"""Runge-Kutta methods on the probability-flow ODE.

In the variable ``t`` the ODE is ``dz/dt = f z + g^2 eps / (2 sigma)`` (arXiv 2011.13456 eq. 13). In
the variable ``sigma_hat = sigma / m``, with ``y = z / m``, the same ODE is ``dy / dsigma_hat =
eps`` (arXiv 2206.00364 eq. 4; arXiv 2010.02502 eq. 14): the linear part is gone, Euler is DDIM and
Heun is EDM's deterministic sampler.

>>> from lsgm.sde import VESDE
>>> from lsgm.solvers.grids import make_grid
>>> from lsgm.solvers.ode import AdaptiveODE, Heun
>>> sde, x = VESDE(), torch.full((1, 2), 30.0, dtype=torch.float64)
>>> times = make_grid("karras", sde, 50, 0.01)
>>> heun = Heun(variable="sigma").solve(sde, sde.normal_component, x, times)
>>> exact = AdaptiveODE(rtol=1e-8, atol=1e-8).solve(sde, sde.normal_component, x, times)
>>> heun.nfe, torch.allclose(heun.x, exact.x, rtol=1e-2)
(100, True)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torchdiffeq import odeint

from lsgm.errors import UserError
from lsgm.solvers.base import (
    Problem,
    Solver,
    StepSolver,
    probability_flow_velocity,
    require_finite,
)
from lsgm.solvers.grids import times_of_noise_levels

__all__ = ["AdaptiveODE", "Euler", "Heun", "RungeKutta4", "integrate_adaptive"]


@dataclass(frozen=True, kw_only=True)
class _FixedStepODE(StepSolver):
    """One explicit Runge-Kutta step for each pair of times.

    Args:
        variable: What the steps are taken in: ``"time"``, or ``"sigma"`` for ``sigma / m``.
    """

    variable: Literal["time", "sigma"] = "time"

    def __post_init__(self) -> None:
        if self.variable not in ("time", "sigma"):
            raise ValueError(f"variable must be 'time' or 'sigma', got {self.variable!r}")

    def _system(
        self, problem: Problem, i: int
    ) -> tuple[float, float, Callable[[Tensor, float], Tensor], float, float]:
        """Start and end ``u``, the right-hand side ``(y, u) -> dy/du``, and the scales ``z / y`` at
        both ends.
        """
        schedule = problem.schedule
        if self.variable == "time":

            def velocity(x: Tensor, t: float) -> Tensor:
                time = torch.tensor(t, dtype=torch.float64)
                return probability_flow_velocity(problem.sde, problem.eps(x, t), x, time)

            return schedule.t[i], schedule.t[i + 1], velocity, 1.0, 1.0

        # The ends of the step have their exact times; only a stage within it (RK4) is inverted.
        known = {schedule.sigma_hat[j]: schedule.t[j] for j in (i, i + 1)}

        def eps(y: Tensor, level: float) -> Tensor:
            t = (
                known[level]
                if level in known
                else times_of_noise_levels(problem.sde, [level]).item()
            )
            m = problem.sde.mean_coef(torch.tensor(t, dtype=torch.float64)).item()
            return problem.eps(m * y, t)

        return (
            schedule.sigma_hat[i],
            schedule.sigma_hat[i + 1],
            eps,
            schedule.m[i],
            schedule.m[i + 1],
        )


@dataclass(frozen=True, kw_only=True)
class Euler(_FixedStepODE):
    """Explicit Euler; in the variable ``sigma`` it is DDIM."""

    order: ClassVar[int] = 1

    @property
    def needs_noise_at_end(self) -> bool:
        return False

    def _calls(self, num_steps: int) -> int:
        return num_steps

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        u, u_next, slope, scale, scale_next = self._system(problem, i)
        y = x / scale
        return scale_next * (y + (u_next - u) * slope(y, u))


@dataclass(frozen=True, kw_only=True)
class Heun(_FixedStepODE):
    """Heun's second-order method (arXiv 2206.00364 algorithm 1).

    A step to a time without noise, where the slope is not defined, is an Euler step.
    """

    order: ClassVar[int] = 2

    @property
    def needs_noise_at_end(self) -> bool:
        return False

    def _calls(self, num_steps: int) -> int:
        return 2 * num_steps

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        u, u_next, slope, scale, scale_next = self._system(problem, i)
        y, h = x / scale, u_next - u
        first = slope(y, u)
        # EDM's rule: eps of a state without noise means nothing, and in the variable time its
        # factor g^2 / (2 sigma) is infinite
        if problem.schedule.sigma[i + 1] == 0:
            return scale_next * (y + h * first)
        second = slope(y + h * first, u_next)
        return scale_next * (y + 0.5 * h * (first + second))


@dataclass(frozen=True, kw_only=True)
class RungeKutta4(_FixedStepODE):
    """The classical fourth-order Runge-Kutta method, four network calls a step."""

    order: ClassVar[int] = 4

    def _calls(self, num_steps: int) -> int:
        return 4 * num_steps

    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        u, u_next, slope, scale, scale_next = self._system(problem, i)
        y, h = x / scale, u_next - u
        k1 = slope(y, u)
        k2 = slope(y + 0.5 * h * k1, u + 0.5 * h)
        k3 = slope(y + 0.5 * h * k2, u + 0.5 * h)
        k4 = slope(y + h * k3, u_next)
        return scale_next * (y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))


MAX_NFE = 10_000
"""Most network calls of an adaptive solve: some hundred are usual, and more than some thousand mean
that the error control follows the rounding of the network."""

Backend = Literal["torchdiffeq", "scipy"]
Dynamics = Callable[[Tensor, Tensor], Tensor]


def integrate_adaptive(
    function: Dynamics,
    y: Tensor,
    start: float,
    end: float,
    *,
    rtol: float,
    atol: float,
    backend: Backend = "torchdiffeq",
    max_nfe: int = MAX_NFE,
) -> Tensor:
    """Integrate ``dy/dt = function(t, y)`` with the Dormand-Prince 5(4) pair.

    The whole of ``y`` is one system: its error norm is the root mean square over all entries, so
    the steps depend on the batch.

    Args:
        function: Takes a 0-d float64 time and the state.
        y: The state at ``start``.
        start: The first time.
        end: The last time, before or after the first.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.
        backend: ``"torchdiffeq"`` (dopri5, on the device of ``y``) or ``"scipy"`` (RK45, float64 on
            the CPU, the published one).
        max_nfe: Most calls of ``function``.

    Raises:
        ValueError: The backend is unknown or a tolerance not positive.
        UserError: The steps became too small, or more calls would be needed.
    """
    if backend not in ("torchdiffeq", "scipy"):
        raise ValueError(f"backend must be 'torchdiffeq' or 'scipy', got {backend!r}")
    if rtol <= 0 or atol <= 0:
        raise ValueError(f"tolerances must be positive, got rtol={rtol}, atol={atol}")
    calls = 0

    def counted(t: Tensor, state: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > max_nfe:
            raise UserError(
                f"the adaptive solver is at t = {t.item():.3g} after {max_nfe} evaluations: the "
                f"tolerance {max(rtol, atol):g} is too small for this network; raise it, or the "
                "bound max_nfe"
            )
        return function(t, state)

    if backend == "torchdiffeq":
        # The times follow the state's precision, for devices without float64.
        limits = torch.tensor([start, end], dtype=y.dtype, device=y.device)
        low, high = limits.min(), limits.max()

        def within(t: Tensor, state: Tensor) -> Tensor:
            # The trial evaluation that sets the first step may lie far outside: the flow of a
            # nearly Normal prior hardly moves.
            return counted(t.clamp(low, high), state)

        # By default the last step overshoots and is interpolated, which would ask for eps at times
        # without noise.
        options = {"step_t": limits[1:]}
        try:
            return odeint(
                within, y, limits, method="dopri5", rtol=rtol, atol=atol, options=options
            )[-1]
        except AssertionError as error:
            raise UserError(f"dopri5 failed, its steps became too small ({error})") from error

    # scipy integrates forwards in u = direction * t
    direction = math.copysign(1.0, end - start)

    def flat(u: float, state: np.ndarray) -> np.ndarray:
        time = torch.tensor(direction * u, dtype=torch.float64)
        value = counted(time, torch.from_numpy(state).to(y).reshape(y.shape))
        return direction * value.detach().flatten().double().cpu().numpy()

    flat_state = y.detach().flatten().double().cpu().numpy()
    result = solve_ivp(
        flat, (direction * start, direction * end), flat_state, method="RK45", rtol=rtol, atol=atol
    )
    if not result.success:
        raise UserError(f"RK45 failed: {result.message}")
    return torch.from_numpy(result.y[:, -1]).to(y).reshape(y.shape)


@dataclass(frozen=True, kw_only=True)
class AdaptiveODE(Solver):
    """Embedded Runge-Kutta 5(4) with error control (arXiv 2011.13456 section 4.3; arXiv 2106.05931
    section 5).

    Only the first and last time count, unless hooks project the state or the trajectory is kept:
    then the integration stops at every time. The step is shared by the batch: report the batch size
    with the NFE.

    Args:
        rtol, atol: Relative and absolute tolerance of a step.
        backend: ``"torchdiffeq"`` or ``"scipy"``.
        velocity_dtype: Precision of the coefficients and the velocity; None is the state's. The
            published sampler uses float32 for them (and for the two limits), float64 for the state.
        max_nfe: Most network calls of a solve.
    """

    order: ClassVar[int] = 5
    rtol: float = 1e-5
    atol: float = 1e-5
    backend: Backend = "torchdiffeq"
    velocity_dtype: torch.dtype | None = None
    max_nfe: int = MAX_NFE

    def __post_init__(self) -> None:
        if self.max_nfe < 1:
            raise ValueError(f"max_nfe must be at least 1, got {self.max_nfe}")

    def _calls(self, num_steps: int) -> None:
        return None

    def _integrate(self, problem: Problem, x: Tensor) -> list[Tensor]:
        dtype = self.velocity_dtype or self.state_dtype
        times = problem.times if problem.hooks or self.keep_trajectory else problem.times[[0, -1]]
        stops = times.to(dtype).tolist()
        precision = torch.finfo(problem.network_dtype).eps
        if max(self.rtol, self.atol) < precision:
            raise UserError(
                f"the tolerance {max(self.rtol, self.atol):g} is below the network's own precision "
                f"({problem.network_dtype}: {precision:.1g})"
            )

        def velocity(t: Tensor, z: Tensor) -> Tensor:
            time, z = t.detach().to("cpu", dtype), z.to(dtype)
            value = probability_flow_velocity(problem.sde, problem.eps(z, time.item()), z, time)
            require_finite(value, type(self).__name__)  # the error control would not end
            problem.report(problem.nfe, None, time.item(), z)
            return value.to(self.state_dtype)

        states = [x]
        for start, end in zip(stops, stops[1:], strict=False):
            x = integrate_adaptive(
                velocity,
                x,
                start,
                end,
                rtol=self.rtol,
                atol=self.atol,
                backend=self.backend,
                max_nfe=self.max_nfe - problem.nfe,
            )
            x = problem.project(x, end)
            states = [*states, x] if self.keep_trajectory else [x]
        return states
