"""Score models of data of any shape by any network, and priors over any autoencoder.

These are the models of Python code: what :func:`lsgm.fit` trains and :func:`lsgm.load` opens again
when it is given the modules that are not the library's own. (The models of configurations are
:class:`lsgm.models.images.DataSGM`, :class:`lsgm.models.latent.VAEModel` and
:class:`lsgm.models.latent.LSGM`.)
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.divergence import Divergence
from lsgm.likelihood import ode_log_density
from lsgm.models.autoencoder import Autoencoder
from lsgm.models.release import given_class
from lsgm.objectives import latent_cross_entropy
from lsgm.registry import SDES
from lsgm.score import NetworkScore
from lsgm.sde import LinearSDE, make_sde
from lsgm.solvers import Solution, make_grid, make_solver
from lsgm.times import make_proposal
from lsgm.weighting import make_weighting
from vae.random import Rng, RowGenerators, randn

__all__ = ["AutoencoderModel", "Bound", "LatentScoreModel", "Samples", "ScoreModel", "generic_of"]

BATCH_SIZE = 256
SOLVER, NFE, GRID = "normal_reference", 40, "phi"
FIRST_STD = 1e-6
"""Least standard deviation of a latent channel that is divided by."""


@dataclass(frozen=True)
class Samples:
    """What a model drew: ``images (N, *shape)``, the ``latents`` that they were decoded from, the
    network evaluations of a batch and the seconds taken.
    """

    images: Tensor
    latents: tuple[Tensor, ...]
    nfe: float
    seconds: float


@dataclass(frozen=True)
class Bound:
    """A bound on the negative log-likelihood: ``values (B,)`` float64 in ``unit``."""

    name: str
    unit: str
    values: Tensor

    @property
    def mean(self) -> float:
        """Over the data."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None for a single value."""
        n = len(self.values)
        return self.values.std().item() / math.sqrt(n) if n > 1 else None


class _GenericModel(nn.Module, ABC):
    """What the models of this file share: how they are described."""

    kind: str
    shape: tuple[int, ...]

    @abstractmethod
    def modules_given(self) -> dict[str, object]:
        """The modules that are not the library's, by the name of :func:`lsgm.load`'s argument."""

    def describe(self) -> dict[str, Any]:
        """What :func:`lsgm.load` needs: plain values, and the names of what it has to be given."""
        given = {name: given_class(module) for name, module in self.modules_given().items()}
        return {"shape": list(self.shape), "given": given}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _sde_given(sde: LinearSDE) -> dict[str, object]:
    return {} if SDES.name_of(type(sde)) else {"sde": sde}


def _describe_sde(sde: LinearSDE) -> dict[str, Any] | None:
    name = SDES.name_of(type(sde))
    return None if name is None else {"kind": name, **(asdict(sde) if is_dataclass(sde) else {})}


class ScoreModel(_GenericModel):
    """A score model of data ``(B, *shape)``, vectors or images, by any network.

    Args:
        network: maps ``x (B, *shape)``, ``t (B,)`` in [0, 1] to ``(B, *shape)``.
        sde: the diffusion, ``VPSDE()`` for example. Data of about unit variance suit all of them.
        shape: of one item.
        normal: see :class:`lsgm.score.NetworkScore`.
    """

    kind = "score"
    description = "negative log-density by the probability-flow ODE"

    def __init__(
        self, network: nn.Module, sde: LinearSDE, shape: Sequence[int], *, normal: bool = False
    ) -> None:
        super().__init__()
        self.score: nn.Module = NetworkScore(network, sde, normal)
        self.sde = sde
        self.shape = tuple(shape)
        self.normal = normal

    def modules_given(self) -> dict[str, object]:
        network = self.score.network
        return {"network": network, **_sde_given(self.sde)}

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"sde": _describe_sde(self.sde), "normal": self.normal}

    def with_trained(self, score: nn.Module) -> ScoreModel:
        """The same model with another score (the running average, say)."""
        twin = ScoreModel(self.score.network, self.sde, self.shape, normal=self.normal)
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

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        sampler: Callable[..., Solution] | None = None,
        nfe: int | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        batch_size: int | None = None,
    ) -> Samples:
        """Draw ``n`` items.

        Args:
            n: how many.
            sampler: ``sampler(sde, eps, shape, seed=seed)`` to a solution, in place of 40
                evaluations of the normal-reference solver.
            nfe: network evaluations of that solver.
            seed: of all noise; an item is the same in batches of any size.
            temperature: standard deviation of the starting noise relative to the prior's.
            batch_size: items at a time; 256 unless given.
        """
        start = time.perf_counter()
        states, parts, calls = [], [], []
        for rows in torch.arange(n).split(batch_size or BATCH_SIZE):
            if sampler is None:
                solution = self._solve(rows.tolist(), nfe or NFE, seed, temperature)
            else:
                shape = (len(rows), *self.state_shape)
                solution = sampler(self.sde, self.score, shape, seed=seed + int(rows[0]))
            states.append(solution.x.cpu())
            parts.append(self.decode([solution.x]).cpu())
            calls.append(solution.nfe)
        latents = () if self.state_shape is self.shape else (torch.cat(states),)
        seconds = time.perf_counter() - start
        return Samples(torch.cat(parts), latents, sum(calls) / len(calls), seconds)

    def _solve(self, rows: list[int], nfe: int, seed: int, temperature: float) -> Solution:
        rng = RowGenerators.of(seed, rows)
        solver = make_solver(SOLVER)
        times = make_grid(GRID, self.sde, solver.steps_for(nfe), max(1e-3, self.sde.time_eps))
        shape = (len(rows), *self.state_shape)
        noise = temperature * self.sde.prior_sample(shape, rng, device=self.device)
        return solver.solve(self.sde, self.score, noise, times, rng=rng)

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
        found = ode_log_density(
            self.sde,
            self.score,
            x.to(self.device),
            divergence=divergence,
            rtol=tolerance,
            atol=tolerance,
            rng=rng,
        )
        return Bound(self.description, "nats per item", -found.log_prob.double().cpu())

    @torch.no_grad()
    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """``E[x_0 | x_t]`` by Tweedie's formula: ``x_t (B, *state_shape)``, ``t (B,)``."""
        t = t.expand(len(x_t))
        over = [1] * (x_t.ndim - 1)
        sigma, m = self.sde.var(t).sqrt().view(-1, *over), self.sde.mean_coef(t).view(-1, *over)
        return (x_t - sigma * self.score(x_t, t)) / m


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
    description = "negative evidence lower bound, score-based prior"
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
        twin = LatentScoreModel(self.autoencoder, self.score.network, self.sde, normal=self.normal)
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

    @torch.no_grad()
    def bound(  # type: ignore[override]
        self, x: Tensor, *, samples: int = 1, seed: int = 0
    ) -> Bound:
        """Negative evidence lower bound of ``x (B, *shape)`` in nats an item: an unbiased estimate
        of an upper bound on ``-ln p(x)`` from ``samples`` draws (arXiv 2106.05931 equation 8).
        """
        rng = RowGenerators.of(seed, range(len(x)))
        x = x.to(self.device)
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
        return Bound(self.description, "nats per item", (total / samples).cpu())


class AutoencoderModel(_GenericModel):
    """Any autoencoder as a VAE: under N(0, I) on its latents.

    Args:
        autoencoder: what :func:`lsgm.fit` trains.
    """

    kind = "autoencoder"

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.shape = tuple(autoencoder.shape)

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

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, temperature: float = 1.0) -> Samples:
        """Decode ``n`` draws from N(0, temperature^2 I)."""
        start = time.perf_counter()
        rng = RowGenerators.of(seed, range(n))
        z = temperature * randn((n, *self.autoencoder.latent_shape), rng, device=self.device)
        return Samples(self.decode([z]).cpu(), (z.cpu(),), 0, time.perf_counter() - start)

    def bound_values(self, x: Tensor, rng: Rng = None) -> Tensor:
        """One-sample negative evidence lower bound: ``x (B, *shape)`` to ``(B,)`` nats, with
        gradients.
        """
        posterior = self.autoencoder.encode(x)
        return posterior.kl() - self.autoencoder.log_likelihood(x, posterior.sample(rng))

    @torch.no_grad()
    def bound(self, x: Tensor, *, samples: int = 1, seed: int = 0) -> Bound:
        """Negative evidence lower bound of ``x (B, *shape)`` in nats an item."""
        rng = RowGenerators.of(seed, range(len(x)))
        x = x.to(self.device)
        total = torch.stack([self.bound_values(x, rng).double() for _ in range(samples)]).mean(0)
        return Bound("negative evidence lower bound, N(0, I) prior", "nats per item", total.cpu())


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
