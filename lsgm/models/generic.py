"""Score models of data of any shape by any network, and priors over any autoencoder.

These are the models of Python code: what :func:`lsgm.fit` trains and :func:`lsgm.load` opens again
when it is given the modules that are not the library's own. (The models of configurations are
:class:`lsgm.models.images.DataSGM`, :class:`lsgm.models.latent.VAEModel` and
:class:`lsgm.models.latent.LSGM`.)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lsgm.divergence import Divergence
from lsgm.likelihood import ode_log_density
from lsgm.models.autoencoder import Autoencoder
from lsgm.models.base import DiffusionModel, Model
from lsgm.models.release import given_class
from lsgm.models.results import Batch, Bound, SamplerDefaults
from lsgm.objectives import latent_cross_entropy
from lsgm.registry import SDES
from lsgm.score import NetworkScore
from lsgm.sde import LinearSDE, make_sde
from lsgm.solvers import Callback
from lsgm.solvers.sampler import DEFAULT_T_END, Sampler
from lsgm.times import make_proposal
from lsgm.weighting import make_weighting
from vae.random import Rng, RowGenerators, randn

__all__ = ["AutoencoderModel", "LatentScoreModel", "ScoreModel", "generic_of"]

SOLVER, NFE, GRID = "normal_reference", 40, "phi"
FIRST_STD = 1e-6
"""Least standard deviation of a latent channel that is divided by."""


class _GenericModel(Model):
    """What the models of this file share: items ``(B, *shape)`` as they are given, and how a model
    of modules that are not the library's is described.
    """

    unit = "nats per item"

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self._shape = tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def preprocess(self, images: Tensor, rng: Rng = None) -> Tensor:
        """The items themselves, on the model's device."""
        return images.to(self.device)

    def unpad(self, images: Tensor) -> Tensor:
        """The items themselves."""
        return images

    @abstractmethod
    def modules_given(self) -> dict[str, object]:
        """The modules that are not the library's, by the name of :func:`lsgm.load`'s argument."""

    def describe(self) -> dict[str, Any]:
        """What :func:`lsgm.load` needs: plain values, and the names of what it has to be given."""
        given = {name: given_class(module) for name, module in self.modules_given().items()}
        return {"shape": list(self.shape), "given": given}


def _sde_given(sde: LinearSDE) -> dict[str, object]:
    return {} if SDES.name_of(type(sde)) else {"sde": sde}


def _describe_sde(sde: LinearSDE) -> dict[str, Any] | None:
    name = SDES.name_of(type(sde))
    return None if name is None else {"kind": name, **(asdict(sde) if is_dataclass(sde) else {})}


class ScoreModel(DiffusionModel, _GenericModel):
    """A score model of data ``(B, *shape)``, vectors or images, by any network.

    Args:
        network: maps ``x (B, *shape)``, ``t (B,)`` in [0, 1] to ``(B, *shape)``.
        sde: the diffusion, ``VPSDE()`` for example. Data of about unit variance suit all of them.
        shape: of one item.
        normal: see :class:`lsgm.score.NetworkScore`.
    """

    kind = "score"
    bound_name = "negative log-density by the probability-flow ODE"
    estimator = "exact divergence, dopri5"

    def __init__(
        self, network: nn.Module, sde: LinearSDE, shape: Sequence[int], *, normal: bool = False
    ) -> None:
        super().__init__(shape)
        self.score: nn.Module = NetworkScore(network, sde, normal)
        self.sde = sde
        self.normal = normal

    @property
    def network(self) -> nn.Module:
        """The network of the score."""
        return cast(NetworkScore, self.score).network

    def modules_given(self) -> dict[str, object]:
        return {"network": self.network, **_sde_given(self.sde)}

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"sde": _describe_sde(self.sde), "normal": self.normal}

    def with_trained(self, score: nn.Module) -> ScoreModel:
        """The same model with another score (the running average, say)."""
        twin = ScoreModel(self.network, self.sde, self.shape, normal=self.normal)
        twin.score = score
        return twin

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of what diffuses."""
        return self.shape

    def encode(self, x: Tensor, rng: Rng = None, *, mean: bool = False) -> list[Tensor]:
        """What diffuses, ``[(B, *state_shape)]``: here ``x (B, *shape)`` itself."""
        return [x]

    def decode(self, latents: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """The inverse of :meth:`encode`: ``(B, *shape)``."""
        return latents[0]

    @property
    def defaults(self) -> SamplerDefaults:
        """40 evaluations of the normal-reference solver."""
        return SamplerDefaults(SOLVER, NFE, GRID, max(DEFAULT_T_END, self.sde.time_eps))

    def bound_values(self, x: Tensor, rng: Rng = None, *, samples: int = 1) -> Tensor:
        """See :meth:`bound`."""
        return self._negative_log_prob(x, rng)

    def _negative_log_prob(
        self,
        x: Tensor,
        rng: Rng,
        divergence: Divergence | None = None,
        tolerance: float = 1e-5,
    ) -> Tensor:
        return -ode_log_density(
            self.sde,
            self.score,
            x,
            divergence=divergence,
            rtol=tolerance,
            atol=tolerance,
            rng=rng,
        ).log_prob

    def bound(
        self,
        x: Tensor,
        *,
        samples: int = 1,
        seed: int = 0,
        divergence: Divergence | None = None,
        tolerance: float = 1e-5,
    ) -> Bound:
        """``-ln p(x)`` of ``x (B, *shape)`` in nats an item, by the probability-flow ODE (arXiv
        2011.13456 section 4.3): exact up to ``tolerance`` with the exact ``divergence``, which
        costs a backward pass a dimension, and unbiased with another. ``samples`` means nothing.
        """
        rng = RowGenerators.of(seed, range(len(x)))
        values = self._negative_log_prob(x.to(self.device), rng, divergence, tolerance)
        return Bound(self.bound_name, self.unit, values.double().cpu())


class LatentScoreModel(ScoreModel):
    """A score-based prior over the latents of any autoencoder, which stays as it is (arXiv
    2106.05931 section 3, its VAE frozen).

    What diffuses are the latents scaled to zero mean and unit variance a channel (the first axis);
    :func:`lsgm.fit` measures both on the training data.

    Args:
        autoencoder: trained; its weights belong to the model.
        network: maps ``z (B, *latent_shape)``, ``t (B,)`` to ``(B, *latent_shape)``.
        sde: the diffusion of the latents.
        normal: whether the network corrects the score of N(0, I).

    The buffers ``shift`` and ``scale`` ``(C, 1, ...)`` are saved with the weights.
    """

    kind = "latent_score"
    has_latents = True
    bound_name = "negative evidence lower bound, score-based prior"
    estimator = "importance-sampled variational cross-entropy"
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        autoencoder: Autoencoder,
        network: nn.Module,
        sde: LinearSDE,
        *,
        normal: bool = True,
    ) -> None:
        super().__init__(network, sde, autoencoder.shape, normal=normal)
        self.autoencoder = autoencoder
        channel = (autoencoder.latent_shape[0], *[1] * (len(autoencoder.latent_shape) - 1))
        self.register_buffer("shift", torch.zeros(channel))
        self.register_buffer("scale", torch.ones(channel))

    def modules_given(self) -> dict[str, object]:
        return super().modules_given() | {"autoencoder": self.autoencoder}

    def with_trained(self, score: nn.Module) -> LatentScoreModel:
        twin = LatentScoreModel(self.autoencoder, self.network, self.sde, normal=self.normal)
        twin.score, twin.shift, twin.scale = score, self.shift, self.scale
        return twin

    @property
    def state_shape(self) -> tuple[int, ...]:
        return tuple(self.autoencoder.latent_shape)

    @torch.no_grad()
    def fit_scale(self, batches: Sequence[Tensor]) -> None:
        """Measure mean and standard deviation of the latents of ``batches (b, *shape)``, a channel
        at a time.
        """
        self.autoencoder.eval()
        rng = torch.Generator(self.device).manual_seed(0)
        drawn = [self.autoencoder.encode(x.to(self.device)).sample(rng) for x in batches]
        flat = torch.cat(drawn).double().transpose(0, 1).flatten(1)
        self.shift.copy_(flat.mean(1).view_as(self.shift))
        self.scale.copy_(flat.std(1).clamp(min=FIRST_STD).view_as(self.scale))

    def encode(self, x: Tensor, rng: Rng = None, *, mean: bool = False) -> list[Tensor]:
        """The scaled latents ``[(B, *latent_shape)]`` of ``x``: a posterior draw, or with ``mean``
        the posterior's mean.
        """
        posterior = self.autoencoder.encode(x).scaled(self.shift, self.scale)
        return [posterior.mean if mean else posterior.sample(rng)]

    def decode(self, latents: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """The autoencoder's decoding of scaled latents."""
        return self.autoencoder.decode(latents[0].to(self.shift) * self.scale + self.shift)

    def bound(  # type: ignore[override]
        self, x: Tensor, *, samples: int = 1, seed: int = 0
    ) -> Bound:
        """Negative evidence lower bound of ``x (B, *shape)`` in nats an item: an unbiased estimate
        of an upper bound on ``-ln p(x)`` from ``samples`` draws (arXiv 2106.05931 equation 8).
        """
        return Model.bound(self, x, samples=samples, seed=seed)

    def bound_values(self, x: Tensor, rng: Rng = None, *, samples: int = 1) -> Tensor:
        """See :meth:`bound`."""
        likelihood = make_weighting("likelihood")
        proposal = make_proposal("mixture", self.sde, likelihood)
        total = torch.zeros(len(x), dtype=torch.float64, device=self.device)
        posterior = self.autoencoder.encode(x)
        scaled = posterior.scaled(self.shift, self.scale)
        for _ in range(samples):
            z = scaled.sample(rng)
            times = proposal.sample(len(x), rng, stratified=True, device=self.device)
            prior = latent_cross_entropy(self.sde, self.score, z, times, likelihood, rng)
            distortion = -self.autoencoder.log_likelihood(x, z * self.scale + self.shift)
            total += distortion + scaled.log_prob(z) + prior.bound
        return total / samples


class AutoencoderModel(_GenericModel):
    """Any autoencoder as a VAE: under N(0, I) on its latents.

    Args:
        autoencoder: what :func:`lsgm.fit` trains.
    """

    kind = "autoencoder"
    has_latents = True
    bound_name = "negative evidence lower bound, N(0, I) prior"
    estimator = "analytic KL divergence"

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__(autoencoder.shape)
        self.autoencoder = autoencoder

    def modules_given(self) -> dict[str, object]:
        return {"autoencoder": self.autoencoder}

    def with_trained(self, autoencoder: Autoencoder) -> AutoencoderModel:
        """The same model of other weights (the running average, say)."""
        return AutoencoderModel(autoencoder)

    def encode(self, x: Tensor, rng: Rng = None, *, mean: bool = False) -> list[Tensor]:
        """Latents ``[(B, *latent_shape)]`` of ``x (B, *shape)``."""
        posterior = self.autoencoder.encode(x)
        return [posterior.mean if mean else posterior.sample(rng)]

    def decode(self, latents: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """The autoencoder's decoding."""
        return self.autoencoder.decode(latents[0])

    def draw(
        self,
        num: int,
        rng: Rng,
        sampler: Sampler | None = None,
        *,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        temperature: float = 1.0,
        callback: Callback | None = None,
    ) -> Batch:
        if sampler is not None or labels is not None:
            raise ValueError("an autoencoder under N(0, I) takes no sampler and no labels")
        shape = (num, *self.autoencoder.latent_shape)
        z = temperature * randn(shape, rng, device=self.device)
        with torch.no_grad():
            return Batch(self.decode([z]), (z,), 0)

    def bound_values(self, x: Tensor, rng: Rng = None, *, samples: int = 1) -> Tensor:
        """Negative evidence lower bound from ``samples`` draws: ``x (B, *shape)`` to ``(B,)`` nats,
        with gradients.
        """
        posterior = self.autoencoder.encode(x)
        draws = [self.autoencoder.log_likelihood(x, posterior.sample(rng)) for _ in range(samples)]
        return posterior.kl() - torch.stack(draws).mean(0)


def generic_of(description: Mapping[str, Any], modules: Mapping[str, Any]) -> nn.Module:
    """The model of a run's description, of the ``modules`` that are not the library's.

    Raises:
        TypeError, KeyError, ValueError: the description does not fit.
    """
    kind = description["kind"]
    if kind == AutoencoderModel.kind:
        return AutoencoderModel(modules["autoencoder"])
    sde = modules["sde"] if "sde" in description["given"] else make_sde(**description["sde"])
    normal, network = description["normal"], modules["network"]
    if kind == LatentScoreModel.kind:
        return LatentScoreModel(modules["autoencoder"], network, sde, normal=normal)
    return ScoreModel(network, sde, description["shape"], normal=normal)
