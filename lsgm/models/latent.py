"""The two trained models, and their release form: a run folder that :func:`load` opens anywhere.

``VAEModel`` is the hierarchical VAE under its N(0, I) prior; ``LSGM`` adds the score-based prior on
the coarsest latent scale (2106.05931, Sec. 3). Both answer the same two questions: :meth:`sample`
images, and :meth:`nelbo` of images, in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.config.architecture import PriorConfig, VAEConfig
from lsgm.config.training import RETIRED_KEYS
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models.release import (
    given_class,
    section,
)
from lsgm.networks import NCSNpp
from lsgm.objectives import NormalControlVariate, latent_cross_entropy
from lsgm.score import MixedNormalScore
from lsgm.sde import LinearSDE, make_sde
from lsgm.solvers import Solution, Solver
from lsgm.system.memory import build_within_memory
from lsgm.tensors import sum_except_batch
from lsgm.times import TimeProposal, make_proposal
from lsgm.weighting import make_weighting
from vae import HierarchicalVAE
from vae.objective import standard_normal_log_prob
from vae.random import Rng, randn

__all__ = [
    "LSGM",
    "NELBO",
    "VAEModel",
    "build_prior",
    "build_vae",
]


@dataclass(frozen=True)
class NELBO:
    """Negative evidence lower bound of a batch, in nats an image; every field ``(B,)``.

    ``reconstruction``: ``-log p(x | z)``; ``negative_entropy``: ``log q(z | x)``;
    ``cross_entropy``: ``-log p(z)`` or an unbiased estimate of an upper bound of it; ``sampled``:
    the part of the estimate that its drawn time decides (None: there is none). ``total`` is the sum
    of the first three.
    """

    reconstruction: Tensor
    negative_entropy: Tensor
    cross_entropy: Tensor
    sampled: Tensor | None = None

    @property
    def kl(self) -> Tensor:
        return self.negative_entropy + self.cross_entropy

    @property
    def total(self) -> Tensor:
        return self.reconstruction + self.kl


def build_vae(config: VAEConfig, spec: DataSpec) -> HierarchicalVAE:
    """The VAE of ``config`` for the images of ``spec``."""
    if spec.binary != (config.decoder_dist == "bin"):
        kind = "binary" if spec.binary else "grey or colour"
        right = "bin" if spec.binary else "dml, dl or normal"
        raise UserError(
            f"vae.decoder_dist: {config.decoder_dist} does not fit {spec.name}, which is {kind}; "
            f"use {right}"
        )
    levels = config.num_preprocess_blocks + config.num_latent_scales - 1
    if spec.network_size % 2**levels:
        raise UserError(
            f"vae.num_preprocess_blocks: images of side {spec.network_size} cannot be halved "
            f"{levels} times"
        )
    return build_within_memory(
        lambda: HierarchicalVAE(
            image_channels=spec.channels,
            image_size=spec.network_size,
            crop=spec.padding,
            **asdict(config),
        ),
        "vae",
    )


def build_prior(
    config: PriorConfig, vae: HierarchicalVAE, network: nn.Module | None = None
) -> MixedNormalScore:
    """The mixed-Normal score of ``config`` for the coarsest latent scale of ``vae``; of its network
    too, unless one ``(z (B, C, H, W), t (B,))`` is given.
    """
    channels, size, _ = vae.top_shape
    if network is None and size % 2 ** (config.network.num_scales - 1):
        raise UserError(
            f"prior.network.num_scales: {config.network.num_scales} is too many for latents of "
            f"side {size}"
        )
    sde = make_sde(**asdict(config.sde))
    if network is None:
        network = build_within_memory(
            lambda: NCSNpp(channels=channels, resolution=size, **asdict(config.network)),
            "prior.network",
        )
    return MixedNormalScore(
        network,
        sde,
        channels,
        mixing_init=config.mixing_init,
        mixed=config.mixed,
        predict=config.predict,
        mask_mixing=config.inactive_mask == "kept",
    )


class VAEModel(nn.Module):
    """The hierarchical VAE under the prior N(0, I) on all its latents."""

    kind = "vae"

    def __init__(self, vae: HierarchicalVAE, spec: DataSpec, vae_config: VAEConfig) -> None:
        super().__init__()
        self.vae = vae
        self.spec = spec
        self.vae_config = vae_config
        self._draws_pixels = False

    def describe(self) -> dict[str, Any]:
        """What :func:`load` needs to rebuild the architecture."""
        return {"vae": asdict(self.vae_config), "spec": asdict(self.spec)}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def to_images(self, x: Tensor) -> Tensor:
        """From network range and size ``(B, C, R, R)`` in [-1, 1] to images in [0, 1] without
        padding.
        """
        p = self.spec.padding
        return ((x + 1) / 2)[..., p : x.shape[-2] - p, p : x.shape[-1] - p]

    def reconstruct(self, x: Tensor, rng: Rng = None) -> Tensor:
        """Decoder means of one posterior draw for ``x`` ``(B, C, R, R)`` in [-1, 1]; images in [0,
        1] without padding.
        """
        return self.to_images(self.vae(x, rng=rng).likelihood.mean_estimate(rng))

    def nelbo(self, x: Tensor, rng: Rng = None) -> NELBO:
        """One-sample NELBO of ``x`` ``(B, C, R, R)`` in [-1, 1] under the prior N(0, I)."""
        output = self.vae(x, rng=rng)
        posterior = output.posterior
        return NELBO(
            reconstruction=self.vae.reconstruction(output, x).double(),
            negative_entropy=_total(posterior.log_q),
            cross_entropy=-_total([standard_normal_log_prob(e) for e in posterior.eps]),
        )

    def sample_latents(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """Latents of all groups from N(0, temperature^2 I), coarsest first."""
        return [
            temperature * randn((num, *shape), rng, device=self.device)
            for shape in self.vae.latent_shapes
        ]

    def decode(self, eps: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """Images in [0, 1] from latents of all groups: the decoder's means, which only a decoder
        with a context draws ``rng`` for (:meth:`vae.distributions.Distribution.mean_estimate`).
        """
        likelihood = self.vae.decode(eps)
        x = likelihood.sample(rng) if self._draws_pixels else likelihood.mean_estimate(rng)
        return self.to_images(x).clamp(0, 1)

    @contextmanager
    def drawn_pixels(self) -> Iterator[None]:
        """Inside, decoding draws from the decoder instead of showing its means. Of independent
        pixels the means say as much; those of an autoregressive decoder belong to one draw, and
        pixels drawn from them anew would not fit each other.
        """
        self._draws_pixels = True
        try:
            yield
        finally:
            self._draws_pixels = False


class LSGM(VAEModel):
    """The hierarchical VAE with a score-based prior on its coarsest latent scale; N(0, I) on the
    others.
    """

    kind = "lsgm"

    def __init__(
        self,
        vae: HierarchicalVAE,
        score: MixedNormalScore,
        spec: DataSpec,
        vae_config: VAEConfig,
        prior_config: PriorConfig,
    ) -> None:
        super().__init__(vae, spec, vae_config)
        self.score = score
        self.prior_config = prior_config
        self.control_variate = NormalControlVariate.of(score.sde)

    @property
    def sde(self) -> LinearSDE:
        return self.score.sde

    def describe(self) -> dict[str, Any]:
        network = self.score.network
        own = {} if isinstance(network, NCSNpp) else {"given": {"network": given_class(network)}}
        return super().describe() | {"prior": asdict(self.prior_config)} | own

    def nelbo(self, x: Tensor, rng: Rng = None, *, proposal: TimeProposal | None = None) -> NELBO:
        """One-sample NELBO of ``x`` ``(B, C, R, R)`` in [-1, 1] under the score-based prior.

        The prior's cross-entropy is the variational bound of 2106.05931, eq. 8, at one time per
        image drawn from ``proposal`` (:meth:`evaluation_times` unless given), with both ends of the
        integral accounted for (:func:`lsgm.objectives.endpoint_cross_entropy`): an unbiased
        estimate of an upper bound on the negative log-likelihood.
        """
        output = self.vae(x, rng=rng)
        likelihood = make_weighting("likelihood")
        proposal = proposal or self.evaluation_times()
        eps = output.posterior.eps
        top = self.vae.concat_top(eps).float()
        times = proposal.sample(len(x), rng, stratified=True, device=x.device)
        prior = latent_cross_entropy(
            self.sde, self.score, top, times, likelihood, rng, control_variate=self.control_variate
        )
        rest = [standard_normal_log_prob(e) for e in eps[self.vae.num_groups_per_scale :]]
        return NELBO(
            reconstruction=self.vae.reconstruction(output, x).double(),
            negative_entropy=_total(output.posterior.log_q),
            cross_entropy=prior.bound - (_total(rest) if rest else 0.0),
            sampled=prior.sampled,
        )

    def evaluation_times(self) -> TimeProposal:
        """Times at which bounds are estimated: no draw has more than ten times the mean weight, so
        that a prior far from N(0, I) gives no bound that is too low in most samples.
        """
        return make_proposal("mixture", self.sde, make_weighting("likelihood"))

    def sample_prior(
        self,
        num: int,
        rng: Rng,
        solver: Solver,
        times: Tensor,
        temperature: float = 1.0,
        callback: Any = None,
    ) -> Solution:
        """Draw latents of the coarsest scale ``(num, C, H, W)`` by solving the generative SDE or
        ODE on ``times``.
        """
        start = self.prior_start(num, rng, temperature)
        return solver.solve(self.sde, self.score, start, times, rng=rng, callback=callback)

    def prior_start(
        self, num: int, rng: Rng, temperature: float = 1.0, solver: Solver | None = None
    ) -> Tensor:
        """Where generation starts, at ``t = 1``, with any solver: ``(num, *state_shape)``."""
        shape = (num, *self.state_shape)
        return temperature * self.sde.prior_sample(shape, rng, device=self.device)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of what the score-based prior generates: the coarsest scale's latents."""
        return self.vae.top_shape

    @property
    def state_groups(self) -> int:
        """Number of latent groups in a state."""
        return self.vae.num_groups_per_scale

    def encode_state(
        self, x: Tensor, rng: Rng = None, *, mean: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """A posterior draw for ``x`` ``(B, C, R, R)`` in [-1, 1], or with ``mean`` the posterior's
        means: the coarsest scale ``(B, *state_shape)`` and the groups of the finer ones.
        """
        shapes = self.vae.latent_shapes
        zeros = [torch.zeros(len(x), *s, device=x.device) for s in shapes] if mean else None
        eps = self.vae.encode(x, rng, zeros).eps
        return self.vae.concat_top(eps), list(eps[self.vae.num_groups_per_scale :])

    def sample_finer(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """The groups of the finer scales from N(0, temperature^2 I)."""
        finer = self.vae.latent_shapes[self.vae.num_groups_per_scale :]
        return [temperature * randn((num, *shape), rng, device=self.device) for shape in finer]

    def decode_state(self, state: Tensor, finer: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """Images in [0, 1] from the coarsest scale's latents and the groups of the finer ones."""
        return self.decode([*self.vae.split_top(state.float()), *finer], rng)

    def complete_latents(self, top: Tensor, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """Split ``top`` into its groups and draw the finer scales from N(0, temperature^2 I)."""
        drawn = self.sample_finer(len(top), rng, temperature)
        return [*self.vae.split_top(top.float()), *drawn]


def _total(parts: Sequence[Tensor]) -> Tensor:
    """Sum over everything but the batch, in float64: ``(B,)``."""
    return torch.stack([sum_except_batch(part.double()) for part in parts]).sum(0)


def prior_config_from(values: dict[str, Any]) -> PriorConfig:
    """The prior's section of a ``run.json``; raises as :func:`lsgm.models.release.section`."""
    if isinstance(values, dict):
        values = {k: v for k, v in values.items() if f"prior.{k}" not in RETIRED_KEYS}
    built: PriorConfig = section(PriorConfig, values)
    return built
