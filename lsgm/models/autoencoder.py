"""What an autoencoder has to be able to do for a prior to be trained over it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from lsgm.tensors import sum_except_batch
from vae.random import Rng, randn

__all__ = ["Autoencoder", "Posterior"]


@dataclass(frozen=True)
class Posterior:
    """``q(z | x)``, a Normal distribution with independent coordinates.

    Attributes:
        mean: ``(B, *latent_shape)``; ``std`` the standard deviations, alike.
    """

    mean: Tensor
    std: Tensor

    def sample(self, rng: Rng = None) -> Tensor:
        """A draw ``(B, *latent_shape)``, differentiable in mean and std."""
        noise = randn(self.mean.shape, rng, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """``ln q(z | x)``: ``(B,)`` nats."""
        noise = (z - self.mean) / self.std
        return -sum_except_batch(
            0.5 * noise.square() + self.std.log() + 0.5 * math.log(2 * math.pi)
        )

    def kl(self) -> Tensor:
        """KL divergence to N(0, I): ``(B,)`` nats."""
        variance = self.std.square()
        return 0.5 * sum_except_batch(self.mean.square() + variance - 1 - variance.log())

    def scaled(self, shift: Tensor, scale: Tensor) -> Posterior:
        """The distribution of ``(z - shift) / scale``."""
        return Posterior((self.mean - shift) / scale, self.std / scale)


class Autoencoder(nn.Module, ABC):
    """An encoder and a decoder, of any architecture.

    :func:`lsgm.fit` trains one as a VAE, and :class:`lsgm.models.own.LatentScoreModel` puts a
    score-based prior over one that is trained. Somebody else's module needs an adapter of some
    lines, for example over a ``diffusers`` ``AutoencoderKL``::

        class Adapter(Autoencoder):
            shape, latent_shape = (3, 32, 32), (4, 16, 16)

            def __init__(self, vae):
                super().__init__()
                self.vae = vae

            def encode(self, x):
                q = self.vae.encode(x).latent_dist
                return Posterior(q.mean, q.std)

            def decode(self, z):
                return self.vae.decode(z).sample

    Attributes:
        shape: of one ``x``; ``latent_shape`` of one ``z``.
        decoder_std: standard deviation of ``p(x | z) = N(decode(z), decoder_std^2 I)``, unless
            :meth:`log_likelihood` says otherwise.
    """

    shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    decoder_std: float = 1.0

    @abstractmethod
    def encode(self, x: Tensor) -> Posterior:
        """``q(z | x)`` of data ``x (B, *shape)``, as they are given to :func:`lsgm.fit`."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """The mean of ``p(x | z)``: ``z (B, *latent_shape)`` to ``(B, *shape)``."""

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """``ln p(x | z)``: ``(B,)`` nats."""
        norm = math.log(self.decoder_std) + 0.5 * math.log(2 * math.pi)
        error = (x - self.decode(z)) / self.decoder_std
        return -sum_except_batch(0.5 * error.square() + norm)
