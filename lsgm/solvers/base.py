r"""What every solver shares: the contract, the bookkeeping of one solve and the coefficients along
a time grid.

A solver takes a linear SDE, a noise prediction ``eps(x_t, t)`` (score ``= -eps / sigma_t``) and a
strictly monotone list of times, and moves ``x`` along it. It knows neither networks nor what ``x``
is: ``(B, D)`` and ``(B, C, H, W)`` are alike.

The state is kept in ``state_dtype`` (float64 unless asked otherwise); the network is called in the
dtype in which ``x`` came. The one place that converts is :meth:`Problem.eps`.

A solver of your own says its order, its network calls and how it takes a step:

>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers.base import StepSolver
>>> from lsgm.solvers.grids import uniform_time
>>> class Euler(StepSolver):
...     order = 1
...
...     def _calls(self, num_steps):
...         return num_steps
...
...     def _step(self, problem, i, x, history):
...         t, t_next = problem.times[i], problem.times[i + 1]
...         eps = problem.eps(x, t.item())
...         return x + (t_next - t) * probability_flow_velocity(problem.sde, eps, x, t)
>>> sde, x = VPSDE(), torch.ones(1, 2)
>>> solution = Euler().solve(sde, sde.normal_component, x, uniform_time(sde, 10, 0.01))
>>> solution.x, solution.nfe  # the flow of N(0, I) is the identity
(tensor([[1., 1.]]), 10)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lsgm.errors import NonFiniteError
from lsgm.score import EpsFn
from lsgm.sde import LinearSDE
from lsgm.tensors import expand_like
from vae.random import Rng, randn

__all__ = [
    "Callback",
    "EpsFn",
    "Hook",
    "Problem",
    "Progress",
    "NoiseSchedule",
    "Solution",
    "Solver",
    "StepSolver",
    "probability_flow_velocity",
    "require_finite",
]


class Hook:
    """Conditioning that any solver accepts; override what is needed.

    ``adjust_eps`` changes the noise prediction (guidance); ``project`` changes the state after each
    step (known pixels, with the noise of that time); ``finish`` changes the result. Gradients are
    off during a solve: a hook that needs them uses ``torch.enable_grad()``.
    """

    def adjust_eps(self, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise prediction to use instead of ``eps (B, *shape)`` at ``x_t (B, *shape)``, ``t
        (B,)``.
        """
        return eps

    def project(self, x_t: Tensor, t: Tensor, rng: Rng) -> Tensor:
        """The state to go on from instead of ``x_t (B, *shape)`` at ``t (B,)``."""
        return x_t

    def finish(self, x: Tensor) -> Tensor:
        """The result instead of ``x (B, *shape)``."""
        return x


@dataclass(frozen=True)
class Progress:
    """Where a solve stands, given to the callback after each step.

    Attributes:
        step: Steps done.
        total: Number of steps; adaptive solvers, which report after each network call, do not know
            it (None).
        t: The time of ``x``.
        nfe: Network calls so far.
        x: The state, ``(B, *shape)``.
    """

    step: int
    total: int | None
    t: float
    nfe: int
    x: Tensor


Callback = Callable[[Progress], None]


@dataclass(frozen=True)
class Solution:
    """The end of a solve.

    Attributes:
        x: The state at the last time, or with ``denoise`` at time zero, ``(B, *shape)``, in the
            dtype of the start.
        nfe: Number of network calls on a batch.
        trajectory: The states at all times, ``(len(times), B, *shape)``, in the state's dtype, if
            asked for; the last is ``x``.
    """

    x: Tensor
    nfe: int
    trajectory: Tensor | None = None


@dataclass(frozen=True)
class NoiseSchedule:
    """Coefficients of the SDE at given times, one Python float a time, computed in float64.

    ``sigma_hat = sigma / m`` is the noise level of ``z / m``; ``log_snr = ln(m / sigma)`` is half
    the log signal-to-noise ratio (``lambda`` in arXiv 2211.01095), infinite where the kernel has no
    variance.
    """

    t: list[float]
    m: list[float]
    sigma: list[float]
    sigma_hat: list[float]
    log_snr: list[float]

    @classmethod
    def of(cls, sde: LinearSDE, times: Tensor) -> NoiseSchedule:
        """The coefficients at ``times (n,)``."""
        times = times.double()
        m, sigma = sde.mean_coef(times), sde.var(times).sqrt()
        values = (times, m, sigma, sigma / m, m.log() - sigma.log())
        return cls(*(value.tolist() for value in values))

    def transition(self, i: int) -> tuple[float, float]:
        """``(a, b2)`` of the forward kernel ``z_t = a z_s + sqrt(b2) e`` with ``t = times[i]`` and
        ``s = times[i + 1] < t``.
        """
        a = self.m[i] / self.m[i + 1]
        return a, max(self.sigma[i] ** 2 - (a * self.sigma[i + 1]) ** 2, 0.0)


@dataclass
class Problem:
    """One solve: its inputs and the count of network calls."""

    sde: LinearSDE
    eps_fn: EpsFn
    times: Tensor
    rng: Rng
    hooks: Sequence[Hook]
    callback: Callback | None
    network_dtype: torch.dtype
    schedule: NoiseSchedule = field(init=False)
    nfe: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.schedule = NoiseSchedule.of(self.sde, self.times)

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    def eps(self, x: Tensor, t: float) -> Tensor:
        """The noise prediction at state ``x (B, *shape)`` and time ``t``, in the state's dtype;
        counts one network call.
        """
        x_t = x.to(self.network_dtype)
        batch_t = torch.full((len(x),), t, dtype=self.network_dtype, device=x.device)
        eps = self.eps_fn(x_t, batch_t)
        for hook in self.hooks:
            eps = hook.adjust_eps(eps, x_t, batch_t)
        self.nfe += 1
        return eps.to(x.dtype)

    def project(self, x: Tensor, t: float) -> Tensor:
        """Let the hooks replace the state that a step reached."""
        for hook in self.hooks:
            batch_t = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
            x = hook.project(x, batch_t, self.rng).to(x.dtype)
        return x

    def denoised(self, x: Tensor) -> Tensor:
        """The posterior mean of the data given ``x (B, *shape)`` at the last time."""
        t, sigma, m = (c[-1] for c in (self.schedule.t, self.schedule.sigma, self.schedule.m))
        if sigma == 0 or t > self.schedule.t[0]:
            return x
        return self.project((x - sigma * self.eps(x, t)) / m, 0.0)

    def noise(self, x: Tensor) -> Tensor:
        """Standard normal noise like ``x``, drawn in the network's dtype so that the state's dtype
        does not change it.
        """
        return randn(x.shape, self.rng, device=x.device, dtype=self.network_dtype).to(x.dtype)

    def report(self, step: int, total: int | None, t: float, x: Tensor) -> None:
        """Tell the callback, if there is one."""
        if self.callback is not None:
            self.callback(Progress(step, total, t, self.nfe, x))


def probability_flow_velocity(sde: LinearSDE, eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """``dz/dt = f z + g^2 eps / (2 sigma)`` (arXiv 2011.13456 eq. 13).

    ``x, eps (B, *shape)``; ``t (B,)`` or a scalar, in whose dtype the coefficients are computed.
    """
    slope = sde.g2(t) / (2 * sde.var(t).sqrt())
    return expand_like(sde.f(t), x) * x + expand_like(slope, x) * eps


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A way from one time to another.

    Args:
        state_dtype: Precision of the state. Use float32 on devices without float64.
        keep_trajectory: Return the states at all times as well.
        denoise: End with the posterior mean of the data, ``(z - sigma eps) / m`` at the last time
            (Tweedie's formula; arXiv 2011.13456 appendix G, 2009.05475): one more network call. A
            state without noise is left as it is, and so is one that is encoded (increasing times).
    """

    state_dtype: torch.dtype = torch.float64
    keep_trajectory: bool = False
    denoise: bool = False

    stochastic: ClassVar[bool] = False
    """Whether the solver draws noise; if not, ``times`` may also increase (encoding)."""
    default_grid: ClassVar[str] = "sqrt_time"
    """Name (in ``GRIDS``) of a time grid that suits the solver."""

    @property
    @abstractmethod
    def order(self) -> int:
        """The power of the step with which the error at the last time falls; 0 where none is
        claimed.

        For stochastic solvers it is that of the error of expectations (weak order).
        """

    @property
    def needs_noise_at_end(self) -> bool:
        """Whether the last time must have noise: the network is called there, or the logarithm of
        its noise level taken.
        """
        return True

    @abstractmethod
    def _calls(self, num_steps: int) -> int | None:
        """Network calls on the way through that many steps; None for adaptive solvers."""

    def evaluations(self, num_steps: int) -> int | None:
        """Network calls of a solve with that many steps; None for adaptive solvers."""
        calls = self._calls(num_steps)
        return None if calls is None else calls + self.denoise

    @abstractmethod
    def _integrate(self, problem: Problem, x: Tensor) -> list[Tensor]:
        """States to return: the last one last, all of them if the trajectory is kept."""

    def _denoised(self, problem: Problem, x: Tensor) -> Tensor:
        """The state that ``denoise`` ends with, from ``x (B, *shape)`` at the last time."""
        return problem.denoised(x)

    def steps_for(self, nfe: int) -> int:
        """The largest number of steps that takes at most ``nfe`` network calls.

        Raises:
            ValueError: The solver is adaptive, or ``nfe`` does not pay for one step.
        """
        first = self.evaluations(1)
        if first is None:
            raise ValueError(
                f"{type(self).__name__} is adaptive: set its tolerances instead of the NFE"
            )
        if nfe < first:
            raise ValueError(
                f"{type(self).__name__} needs at least {first} network calls, got {nfe}"
            )
        steps = 1
        while (cost := self.evaluations(steps + 1)) is not None and cost <= nfe:
            steps += 1
        return steps

    def check(self, sde: LinearSDE, times: Tensor) -> Tensor:
        """The times as a float64 vector on the CPU, where all coefficients are computed.

        Raises:
            ValueError: The solver cannot go through them.
        """
        times = _checked(times, self.stochastic)
        var = sde.var(times[[0, -1]]).tolist()
        if var[0] <= 0 or (self.needs_noise_at_end and var[1] <= 0):
            raise ValueError(
                f"{type(self).__name__} needs var > 0 at all times, and t = "
                f"{times[[0, -1]].min().item():g} has no noise: choose a larger t_end"
            )
        return times

    @torch.no_grad()
    def solve(
        self,
        sde: LinearSDE,
        eps_fn: EpsFn,
        x: Tensor,
        times: Tensor,
        rng: Rng = None,
        hooks: Sequence[Hook] = (),
        callback: Callback | None = None,
    ) -> Solution:
        """Move ``x (B, *shape)`` from ``times[0]`` to ``times[-1]``.

        Args:
            sde: The forward SDE.
            eps_fn: The noise prediction; called in the dtype of ``x``.
            x: The state at ``times[0]``, for generation a sample of the SDE's prior.
            times: Strictly decreasing times, ``(n + 1,)``, from 1 to a small positive time;
                deterministic solvers also take increasing ones.
            rng: Source of all noise.
            hooks: Conditioning.
            callback: Told after every step.

        Raises:
            ValueError: ``times`` are not as described, or the solver needs noise where they have
                none.
            NonFiniteError: The result is not finite.
        """
        problem = Problem(sde, eps_fn, self.check(sde, times), rng, hooks, callback, x.dtype)
        states = self._integrate(problem, x.to(self.state_dtype))
        if self.denoise:
            states[-1] = self._denoised(problem, states[-1])
        for hook in hooks:
            states[-1] = hook.finish(states[-1]).to(self.state_dtype)
        require_finite(states[-1], type(self).__name__)
        trajectory = torch.stack(states) if self.keep_trajectory else None
        return Solution(states[-1].to(x.dtype), problem.nfe, trajectory)


@dataclass(frozen=True, kw_only=True)
class StepSolver(Solver):
    """A solver that takes one step for each pair of neighbouring times."""

    @abstractmethod
    def _step(self, problem: Problem, i: int, x: Tensor, history: list[Tensor]) -> Tensor:
        """The state at ``times[i + 1]`` from ``x`` at ``times[i]``; ``history`` belongs to
        multistep methods, newest last.
        """

    def _integrate(self, problem: Problem, x: Tensor) -> list[Tensor]:
        history: list[Tensor] = []
        states = [x]
        for i, t_next in enumerate(problem.schedule.t[1:]):
            x = problem.project(self._step(problem, i, x, history), t_next)
            problem.report(i + 1, problem.num_steps, t_next, x)
            states = [*states, x] if self.keep_trajectory else [x]
        return states


def require_finite(x: Tensor, source: str) -> None:
    """Do nothing if all of ``x (B, *shape)`` is finite; ``source`` is what gave it.

    Raises:
        NonFiniteError: It is not; says how many of the samples are not.
    """
    finite = x.flatten(1).isfinite().all(1)
    if finite.all():
        return
    bad = len(x) - int(finite.sum())
    raise NonFiniteError(
        f"{source}: {bad} of {len(x)} samples ({bad / len(x):.0%}) are not finite (NaN or "
        "infinite): the weights are, or the solver's steps are too long"
    )


def _checked(times: Tensor, decreasing: bool) -> Tensor:
    times = torch.as_tensor(times).detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(
            f"times must be a vector of at least two times, got shape {tuple(times.shape)}"
        )
    steps = times.diff()
    if not ((steps < 0).all() or (not decreasing and (steps > 0).all())):
        raise ValueError(f"times must be strictly decreasing, got {times.tolist()}")
    if times.min() < 0:
        raise ValueError(f"times must not be negative, got {times.min().item()}")
    return times
