r"""The diffusion prior as a deep hierarchical model: importance weights that bound its density.

The generative process on times ``1 = t_N > ... > t_1 = time_eps`` is a chain of Gaussians that ends
in the data ``z_0`` (arXiv 2006.11239 section 3; arXiv 2107.00630 eq. 11),

    p(z_N) = N(0, prior_var I),    p(z_s | z_t) = N( (z_t - b^2 eps(z_t, t) / sigma_t) / a, c I ) ,

where ``z_t = a z_s + b e`` is the forward transition between neighbouring times (``a^2`` and
``b^2`` are ``alpha_t`` and ``beta_t`` of arXiv 2006.11239, whose ``t`` counts steps, and ``a`` and
``b^2`` are ``alpha_(t|s)`` and ``sigma^2_(t|s)`` of arXiv 2107.00630); of the last step
``z_s`` is ``z_0`` (``a = m_t``, ``b = sigma_t``). With the optimal ``eps`` the mean is exactly
``E[z_s | z_t]``, whatever the data. For a path drawn from ``q(z_N, ..., z_1 | z_0)``

    log w = log p(z_N) + sum log p(z_s | z_t) - log q(z_N, ..., z_1 | z_0)

has ``E[w] = p(z_0)`` exactly, for every N and every ``c > 0``, so that ``log w`` may be put into an
importance-weighted bound (arXiv 1509.00519): nothing noisy is exponentiated, the path belongs to
the latents. The number of steps and the variances decide only how tight the bound is.

Paths are drawn backwards, ``z_N`` first and then ``q(z_s | z_t, z_0)``: the same joint law as the
forward Markov chain, but only one state is held at a time and each ratio is one of nearby
Gaussians.

Under a prior N(0, I) every path of any number of steps has the weight ``p(z_0)``:

>>> from lsgm.path_bound import PathPrior
>>> from lsgm.sde import VPSDE
>>> sde, z0 = VPSDE(), torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=torch.float64)
>>> chain = PathPrior.of(sde, sde.normal_component, steps=3)
>>> log_w = chain.log_weight(z0, torch.Generator().manual_seed(0))
>>> torch.allclose(log_w, sde.prior_log_prob(z0))
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lsgm.sde import LinearSDE
from lsgm.solvers.base import EpsFn
from lsgm.solvers.grids import make_grid
from lsgm.tensors import sum_except_batch
from vae.random import Rng, randn

__all__ = ["PathPrior", "PathStep", "Variances", "path_steps"]

Variances = tuple[Tensor, ...]
"""Of each step's ``p(z_s | z_t)``, broadcastable to ``(B, *shape)``: a scalar or one a channel."""

LEAST_ERROR = 1e-3
"""Smallest mean squared error of the noise prediction that a calibration believes, in units of the
Normal component's for data from N(0, I), ``m^2 / total_var``.
"""


@dataclass(frozen=True)
class PathStep:
    """Coefficients of one generative step from time ``t`` to ``s < t``, or to the data.

    Attributes:
        t: Where the network is called.
        m: Mean coefficient of the kernel at ``t``.
        var: Its variance.
        m_next: Mean coefficient at ``s``; 1 for the data.
        var_next: Variance at ``s``; 0 for the data.
        total: Variance of ``z_t`` if the smoothed data were N(0, I).
        total_next: The same of ``z_s``.
    """

    t: float
    m: float
    var: float
    m_next: float
    var_next: float
    total: float
    total_next: float

    @property
    def last(self) -> bool:
        """Whether the step ends in the data."""
        return self.var_next == 0

    @property
    def a(self) -> float:
        """Factor of the forward transition ``z_t = a z_s + b e``."""
        return self.m / self.m_next

    @property
    def b2(self) -> float:
        """Variance of the forward transition."""
        return self.var - self.a**2 * self.var_next

    @property
    def posterior_var(self) -> float:
        """Variance of ``q(z_s | z_t, z_0)``: the least that ``p(z_s | z_t)`` can need."""
        return self.b2 * self.var_next / self.var

    @property
    def normal_var(self) -> float:
        """Variance of ``z_s`` given ``z_t`` for smoothed data from N(0, I); ``b2`` for a VP SDE."""
        return self.total_next * self.b2 / self.total

    @property
    def normal_slope(self) -> float:
        """The Normal component of the noise prediction is this times ``z_t``."""
        return math.sqrt(self.var) / self.total

    def normal_error(self, second_moment: Tensor) -> Tensor:
        """Its mean squared error for data of this second moment."""
        offset = self.normal_slope * math.sqrt(self.var) - 1
        return (self.normal_slope * self.m) ** 2 * second_moment + offset**2

    def posterior_mean(self, z_t: Tensor, z0: Tensor) -> Tensor:
        """Mean of ``q(z_s | z_t, z_0)``."""
        return self.a * self.var_next / self.var * z_t + self.m_next * self.b2 / self.var * z0

    def mean(self, z_t: Tensor, eps: Tensor) -> Tensor:
        """Mean of ``p(z_s | z_t)``: the posterior's at the predicted data."""
        return (z_t - self.b2 / math.sqrt(self.var) * eps) / self.a

    def optimal_var(self, error: Tensor) -> Tensor:
        """Best variance for a mean squared error ``E (eps_hat - eps)^2`` of the noise prediction:
        ``E (z_s - mean)^2`` (arXiv 2201.06503 theorem 1, for any predictor).
        """
        return self.posterior_var + self.b2**2 / (self.a**2 * self.var) * error


def path_steps(sde: LinearSDE, steps: int, grid: str, t_end: float) -> tuple[PathStep, ...]:
    """Steps from 1 down to ``t_end`` on the grid of that name, and one from there to the data.

    Raises:
        ValueError: No such grid, too few steps, or a kernel without variance at ``t_end``.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    one = torch.ones(1, dtype=torch.float64)
    times = one if steps == 1 else make_grid(grid, sde, steps - 1, t_end)
    variances = sde.var(times)
    if not (variances > 0).all():
        raise ValueError(f"the kernel has no variance at t_end={t_end}: choose a larger time")
    zero = 0 * one
    columns = (times, sde.mean_coef(times), variances, sde.total_var(times))
    t, m, var, total = (column.tolist() for column in columns)
    m_next, var_next = [*m[1:], 1.0], [*var[1:], 0.0]
    total_next = [*total[1:], (sde.total_var(zero) - sde.var(zero)).item()]
    return tuple(map(PathStep, t, m, var, m_next, var_next, total, total_next))


@dataclass(frozen=True)
class PathPrior:
    """A score model as a chain of Gaussians, with a density that importance weights can bound.

    Build it with :meth:`of`. ``eps_fn`` is called ``len(steps)`` times a path.
    """

    sde: LinearSDE
    eps_fn: EpsFn
    steps: tuple[PathStep, ...]
    variances: Variances
    shrinkage: tuple[float, ...]
    """Of each step, the factor in [0, 1] on the network's correction to the Normal component."""

    @classmethod
    def of(
        cls,
        sde: LinearSDE,
        eps_fn: EpsFn,
        steps: int,
        *,
        grid: str = "phi",
        t_end: float | None = None,
    ) -> PathPrior:
        """A chain of ``steps`` network calls, with the variances that are exact for a prior
        N(0, I); :meth:`calibrated` fits them.

        Args:
            sde: The forward SDE.
            eps_fn: The noise prediction; must act on each image by itself.
            steps: ``N``.
            grid: Time grid by name (:data:`lsgm.solvers.GRIDS`).
            t_end: The last time at which the network is called; default the SDE's cutoff.

        Raises:
            ValueError: An unknown grid, too few steps, or no variance at ``t_end``.
        """
        chain = path_steps(sde, steps, grid, sde.time_eps if t_end is None else t_end)
        variances = tuple(torch.tensor(step.normal_var, dtype=torch.float64) for step in chain)
        return cls(sde, eps_fn, chain, variances, (1.0,) * len(chain))

    def _network(self, z: Tensor, step: PathStep, dtype: torch.dtype) -> Tensor:
        t = torch.full((len(z),), step.t, dtype=dtype, device=z.device)
        return self.eps_fn(z.to(dtype), t).to(z.dtype)

    def _mean(self, z: Tensor, i: int, dtype: torch.dtype) -> Tensor:
        """Mean of the i-th step from ``z``; one network call."""
        step, normal = self.steps[i], self.steps[i].normal_slope * z
        return step.mean(z, normal + self.shrinkage[i] * (self._network(z, step, dtype) - normal))

    @torch.no_grad()
    def log_weight(self, z0: Tensor, rng: Rng = None) -> Tensor:
        """``log p(z_0, path) - log q(path | z_0)`` of one path for each ``z0 (B, *shape)``.

        ``(B,)`` nats, float64; the expectation of its exponential is ``p(z_0)``. The network is
        called in the dtype of ``z0``.
        """
        # float64: log w is a sum over steps and elements of differences of nearly equal terms
        z_data, first = z0.double(), self.steps[0]
        noise = randn(z0.shape, rng, device=z0.device).double()
        z = first.m * z_data + math.sqrt(first.var) * noise
        log_w = _log_ratio(z.square() / self.sde.prior_var, noise, self.sde.prior_var / first.var)
        for i, step in enumerate(self.steps):
            mean, variance = self._mean(z, i, z0.dtype), self.variances[i].to(z)
            if step.last:  # q ends at z_1, so the decoder's density stands alone
                error = (z_data - mean).square() / variance
                return log_w - 0.5 * sum_except_batch(error + (2 * math.pi * variance).log())
            noise = randn(z0.shape, rng, device=z0.device).double()
            z = step.posterior_mean(z, z_data) + math.sqrt(step.posterior_var) * noise
            error = (z - mean).square() / variance
            log_w = log_w + _log_ratio(error, noise, variance / step.posterior_var)
        raise AssertionError("a chain ends in the data")

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        rng: Rng = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Data from the chain, ``shape`` with the batch first: ancestral sampling."""
        z = self.sde.prior_sample(shape, rng, device=device, dtype=dtype).double()
        for i, variance in enumerate(self.variances):
            noise = randn(shape, rng, device=device, dtype=dtype).double()
            z = self._mean(z, i, dtype) + variance.to(z).sqrt() * noise
        return z.to(dtype)

    @torch.no_grad()
    def calibrated(self, z0: Tensor, rng: Rng = None, *, chunk: int = 64) -> PathPrior:
        """The same chain, fitted to latents like ``z0 (B, *shape)``; costs one path of each.

        Fitted are the variances, one per step and channel (the first axis after the batch), and by
        least squares the shrinkage of the network's correction, one per step: close to ``t = 1`` a
        step multiplies the network's error by ``1 / a``, and what it learned there may be worth
        less than that.

        Any values give a valid bound as long as they do not depend on what is evaluated: take
        ``z0`` from :meth:`sample`, or encodings of training images. The error of the Normal
        component, whose expectation is known, is a control variate: for a prior close to N(0, I)
        the variances are nearly noise-free.
        """
        variances, shrinkage = [], []
        second_moment = _channel_mean(z0.double().square())
        for step in self.steps:
            normal, residuals, corrections, known = step.normal_slope, [], [], []
            for z in z0.split(chunk):
                eps = randn(z.shape, rng, device=z.device).double()
                z_t = step.m * z.double() + math.sqrt(step.var) * eps
                residuals.append(eps - normal * z_t)
                corrections.append(self._network(z_t, step, z.dtype) - normal * z_t)
                known.append(step.normal_error(z.double().square()))
            residual, correction = torch.cat(residuals), torch.cat(corrections)
            size = correction.square().sum()
            fit = ((residual * correction).sum() / size).clamp(0, 1).item() if size > 0 else 1.0
            # The control variate's coefficient of least variance, per channel; the error is known
            # where there is no correction.
            control = residual.square() - torch.cat(known)
            excess = (residual - fit * correction).square() - torch.cat(known)
            centred = control - _channel_mean(control)
            slope = _channel_mean(excess * centred) / _channel_mean(centred.square())
            error = step.normal_error(second_moment) + _channel_mean(excess - slope * control)
            least = LEAST_ERROR * step.m**2 / step.total
            variances.append(step.optimal_var(error.clamp(min=least)))
            shrinkage.append(fit)
        return replace(self, variances=tuple(variances), shrinkage=tuple(shrinkage))


def _log_ratio(error: Tensor, noise: Tensor, var_ratio: Tensor | float) -> Tensor:
    """``log N(z; mean_p, var_p) - log N(z; mean_q, var_q)`` summed over an image, from the squared
    error in units of ``var_p``, the noise that made ``z`` from ``q``, and ``var_p / var_q``.
    """
    # ln(2 pi) cancels, and the error of q is its own noise: exact, and small where p is close to q
    log_var = torch.as_tensor(var_ratio, dtype=noise.dtype, device=noise.device).log()
    return -0.5 * sum_except_batch(error - noise.square() + log_var)


def _channel_mean(x: Tensor) -> Tensor:
    """Mean of ``x (B, C, ...)`` over all but the channels, shaped to broadcast: ``(C, 1, ...)``."""
    return x.mean([0, *range(2, x.ndim)]).reshape(-1, *(1,) * (x.ndim - 2))
