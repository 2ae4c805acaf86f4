"""Exact diffusion models in closed form: what every solver, likelihood and loss is tested against.

Both oracles know, for any `LinearSDE` with kernel `q(z_t | z_0) = N(m_t z_0, sigma_t^2 I)`, the
optimal noise prediction `eps(x_t, t) = -sigma_t * grad log q(x_t)`, samples of `q(z_t)` and `log
q(z_t)`; the Gaussian also knows the flow map of its probability-flow ODE. Everything is float64.
The batch is the first axis; `*d` is the rest: `(B, D)` and `(B, C, H, W)` both work.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["GaussianOracle", "MixtureOracle"]


def _expand(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.reshape(-1, *(1,) * (x.ndim - 1))


def _times(t: Tensor | float, x: Tensor) -> Tensor:
    """`t` as a float64 vector with shape (B,)."""
    return torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0])


class GaussianOracle:
    """Data `z_0 ~ N(mean, diag(variance))`.

    Args:
        sde: A linear SDE.
        mean: The mean of the data, with shape (*d).
        variance: The variance of every coordinate, with shape (*d).
    """

    def __init__(self, sde: Any, mean: Tensor, variance: Tensor) -> None:
        self.sde = sde
        self.mean = mean.double()
        self.variance = variance.double().expand_as(self.mean)

    def marginal(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of `z_t`, with shape (B, *d)."""
        t = _times(t, x)
        m, var = _expand(self.sde.mean_coef(t), x), _expand(self.sde.var(t), x)
        return m * self.mean, m**2 * self.variance + var

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Optimal noise prediction, with shape (B, *d), in the precision of `x_t`."""
        x, t = x_t.double(), _times(t, x_t)
        mean, total = self.marginal(t, x)
        return (_expand(self.sde.var(t).sqrt(), x) * (x - mean) / total).to(x_t.dtype)

    def flow(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """The exact probability-flow map from time t to time s, with shape (B, *d)."""
        mean_t, var_t = self.marginal(t, x_t)
        mean_s, var_s = self.marginal(s, x_t)
        return mean_s + (var_s / var_t).sqrt() * (x_t - mean_t)

    def log_prob(self, x_t: Tensor, t: float) -> Tensor:
        """Exact log-density of `z_t` in nats, with shape (B,)."""
        mean, var = self.marginal(t, x_t)
        return -0.5 * ((x_t - mean) ** 2 / var + (2 * math.pi * var).log()).flatten(1).sum(1)

    def ode_log_prob(self, x_t: Tensor, t: float) -> Tensor:
        """What an exact ODE solve from t to 1 with `sde.prior_log_prob` at its end gives, with
        shape (B,), in nats.

        It differs from `log_prob` by the mismatch between `q(z_1)` and the SDE's prior.
        """
        _, var_t = self.marginal(t, x_t)
        _, var_1 = self.marginal(1.0, x_t)
        log_det = 0.5 * (var_1 / var_t).log().flatten(1).sum(1)
        return self.sde.prior_log_prob(self.flow(x_t, t, 1.0)) + log_det

    def sample(self, num: int, t: float, generator: torch.Generator) -> Tensor:
        """Samples of `z_t`, with shape (num, *d)."""
        noise = torch.randn((num, *self.mean.shape), generator=generator, dtype=torch.float64)
        mean, var = self.marginal(t, noise)
        return mean + var.sqrt() * noise


class MixtureOracle:
    """Data from an equally weighted mixture of isotropic Gaussians.

    Args:
        sde: A linear SDE.
        means: The means of the components, with shape (K, *d).
        std: The standard deviation of every component.
    """

    def __init__(self, sde: Any, means: Tensor, std: float = 0.4) -> None:
        self.sde = sde
        self.means = means.double()
        self.std = std

    @classmethod
    def ring(
        cls, sde: Any, shape: tuple[int, ...] = (2,), components: int = 8, std: float = 0.4
    ) -> MixtureOracle:
        """Components on a ring, with total variance one in every coordinate.

        In two dimensions they stand evenly on a circle; more dimensions repeat the two coordinates.
        """
        angle = 2 * math.pi * torch.arange(components, dtype=torch.float64) / components
        dims = math.prod(shape)
        phase = 0.5 * math.pi * (torch.arange(dims) % 2)
        radius = math.sqrt(2 * (1 - std**2))
        return cls(sde, (radius * torch.cos(angle[:, None] - phase)).reshape(-1, *shape), std)

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Differences (B, K, D) to the means, the variance (B, 1) of a component, its log-density
        (B, K).
        """
        m, var = self.sde.mean_coef(t)[:, None], self.sde.var(t)[:, None]
        total = (m * self.std) ** 2 + var
        difference = x_t.flatten(1)[:, None] - m[..., None] * self.means.flatten(1)
        log_prob = -0.5 * (difference**2).sum(-1) / total
        log_prob = log_prob - 0.5 * difference.shape[-1] * (2 * math.pi * total).log()
        return difference, total, log_prob

    def eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Optimal noise prediction, with shape (B, *d), in the precision of `x_t`."""
        x, t = x_t.double(), _times(t, x_t)
        difference, total, log_prob = self._components(x, t)
        mean_difference = (log_prob.softmax(1)[..., None] * difference).sum(1)
        eps = self.sde.var(t).sqrt()[:, None] * mean_difference / total
        return eps.reshape(x.shape).to(x_t.dtype)

    def log_prob(self, x_t: Tensor, t: float) -> Tensor:
        """Exact log-density of `z_t` in nats, with shape (B,)."""
        _, _, log_prob = self._components(x_t.double(), _times(t, x_t))
        return log_prob.logsumexp(1) - math.log(len(self.means))

    def sample(self, num: int, t: float, generator: torch.Generator) -> Tensor:
        """Samples of `z_t`, with shape (num, *d)."""
        index = torch.randint(len(self.means), (num,), generator=generator)
        shape = (num, *self.means.shape[1:])
        x = self.means[index] + self.std * torch.randn(
            shape, generator=generator, dtype=torch.float64
        )
        time = torch.full((num,), t, dtype=torch.float64)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        m, var = self.sde.mean_coef(time), self.sde.var(time)
        return _expand(m, x) * x + _expand(var.sqrt(), x) * noise
