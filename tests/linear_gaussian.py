"""An LSGM whose likelihood is known: linear decoder, Gaussian encoder, Gaussian prior on the
latents of the coarsest scale, expressed by its exact noise prediction.

``x = W [z_top, z_fine] + b + s e`` with ``z_top ~ N(mean, covariance)``, full covariance, and
``z_fine ~ N(0, 1)``: ``x ~ N(W_top mean + b, W C W^T + s^2 I)``. The encoder is the exact posterior
with its covariance made diagonal and a little too wide, so that every bound has something to gain.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from oracles import GaussianOracle
from torch import Tensor, nn

from lsgm.data import DataSpec
from lsgm.models.latent import LSGM
from lsgm.sde import LinearSDE
from vae.hierarchical import Posterior, VAEOutput
from vae.random import randn

__all__ = ["LinearGaussian", "linear_gaussian_lsgm"]

X_DIMS, NOISE = 4, 0.7


class _Score(nn.Module):
    """Noise prediction for N(mean, R diag(variance) R^T) with a rotation R of the channels."""

    def __init__(self, sde: LinearSDE, oracle: GaussianOracle, rotation: Tensor) -> None:
        super().__init__()
        self.sde, self.oracle = sde, oracle
        self.register_buffer("rotation", rotation)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        turned = torch.einsum("cd,bchw->bdhw", self.rotation.to(z), z)
        return torch.einsum("cd,bdhw->bchw", self.rotation.to(z), self.oracle.eps(turned, t))


class LinearGaussian(nn.Module):
    """Stands in for :class:`vae.HierarchicalVAE`: two top groups and a finer one, one channel and
    pixel each.
    """

    num_groups_per_scale = 2
    latent_shapes = ((1, 1, 1),) * 3
    top_shape = (2, 1, 1)

    def __init__(self, prior_mean: Tensor, prior_covariance: Tensor) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(5)
        weight = torch.randn(X_DIMS, 3, generator=rng, dtype=torch.float64)
        self.register_buffer("weight", weight)
        bias = torch.tensor([0.3, -0.2, 0.0, 0.5], dtype=torch.float64)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.prior_mean, self.prior_covariance = prior_mean, prior_covariance
        precision = torch.linalg.inv(prior_covariance)
        self.covariance = torch.linalg.inv(precision + weight.T @ weight / NOISE**2)
        self.offset = precision @ prior_mean
        self.sigma = 1.15 * self.covariance.diag().sqrt()

    def encoder(self, x: Tensor) -> tuple[Tensor]:
        data = (x.flatten(1).double() - self.bias) @ self.weight / NOISE**2
        return ((data + self.offset) @ self.covariance,)

    def infer(self, taps: tuple[Tensor], rng: torch.Generator | None = None) -> VAEOutput:
        (mean,) = taps
        noise = randn(mean.shape, rng, device="cpu", dtype=torch.float64)
        z = mean + self.sigma * noise
        log_q = -0.5 * noise.square() - (math.sqrt(2 * math.pi) * self.sigma).log()
        groups = [t[:, i, None, None, None] for t in (z, log_q) for i in range(3)]
        return VAEOutput(Posterior(tuple(groups[:3]), tuple(groups[3:]), (), ()), None)

    def forward(self, x: Tensor, rng: torch.Generator | None = None) -> VAEOutput:
        return self.infer(self.encoder(x), rng)

    def concat_top(self, eps: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(tuple(eps[:2]), 1)

    def reconstruction(self, output: VAEOutput, x: Tensor) -> Tensor:
        z = torch.cat(output.posterior.eps, 1).flatten(1)
        error = (x.flatten(1).double() - z @ self.weight.T - self.bias) / NOISE
        return (0.5 * error.square() + math.log(math.sqrt(2 * math.pi) * NOISE)).sum(1)

    @property
    def marginal(self) -> torch.distributions.MultivariateNormal:
        covariance = self.weight @ self.prior_covariance @ self.weight.T
        return torch.distributions.MultivariateNormal(
            self.weight @ self.prior_mean + self.bias,
            covariance + NOISE**2 * torch.eye(X_DIMS, dtype=torch.float64),
        )

    def images(self, num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draws of ``x`` ``(num, 4, 1, 1)`` and their exact ``-log p(x)``."""
        noise = torch.randn(
            num, X_DIMS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        x = self.marginal.loc + noise @ self.marginal.scale_tril.T
        return x[..., None, None], -self.marginal.log_prob(x)


def linear_gaussian_lsgm(sde: LinearSDE, *, normal: bool = False) -> LSGM:
    """The model with the Gaussian prior, or with N(0, I) on all latents."""
    angle = torch.tensor(0.6, dtype=torch.float64)
    c, s = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
    variance = torch.ones(2) if normal else torch.tensor([0.3, 1.8])
    mean = torch.zeros(2) if normal else torch.tensor([0.4, -0.3])
    oracle = GaussianOracle(sde, mean[:, None, None], variance[:, None, None])
    top = rotation @ torch.diag(variance.double()) @ rotation.T
    covariance = torch.block_diag(top, torch.ones(1, 1, dtype=torch.float64))
    prior_mean = torch.cat([rotation @ mean.double(), torch.zeros(1, dtype=torch.float64)])
    vae = LinearGaussian(prior_mean, covariance)
    spec = DataSpec("linear", channels=X_DIMS, image_size=1, padding=0, binary=False)
    return LSGM(vae, _Score(sde, oracle, rotation), spec, SimpleNamespace(), SimpleNamespace())
