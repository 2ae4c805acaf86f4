"""The two models with latents.

``VAEModel`` is the hierarchical VAE under its N(0, I) prior; ``LSGM`` adds the score-based prior on
the coarsest latent scale (2106.05931, Sec. 3). Beside the contract of :mod:`lsgm.models.base` both
give :meth:`nelbo` of images, in nats, part by part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lsgm.config.architecture import PriorConfig, VAEConfig
from lsgm.config.training import RETIRED_KEYS
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models.base import DiffusionModel, Model
from lsgm.models.release import given_class, section
from lsgm.models.results import Batch
from lsgm.networks import NCSNpp
from lsgm.networks.layers import resolution
from lsgm.objectives import CrossEntropy, NormalControlVariate, latent_cross_entropy
from lsgm.score import MixedNormalScore
from lsgm.sde import make_sde
from lsgm.solvers import Callback
from lsgm.solvers.base import require_finite
from lsgm.solvers.sampler import Sampler
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
    factor = 2**levels
    for side in spec.network_shape:
        if side % factor:
            down, up = side // factor * factor, -(-side // factor) * factor
            near = " or ".join(str(value) for value in (down, up) if value)
            raise UserError(
                f"vae.num_preprocess_blocks: images of side {side} cannot be halved {levels} "
                f"times; give fewer blocks or scales, or a side of {near}"
            )
    return build_within_memory(
        lambda: HierarchicalVAE(
            image_channels=spec.channels,
            image_size=spec.network_shape,
            crop=spec.padding,
            **asdict(config),
        ),
        "vae",
    )


def build_prior(
    config: PriorConfig,
    vae: HierarchicalVAE,
    network: nn.Module | None = None,
    *,
    num_classes: int | None = None,
) -> MixedNormalScore:
    """The mixed-Normal score of ``config`` for the coarsest latent scale of ``vae``; of its network
    too, unless one ``(z (B, C, H, W), t (B,))``, or ``(z, t, labels (B,))``, is given.

    ``num_classes``: of the data, which a class-conditional prior has to know.
    """
    channels, *sides = vae.top_shape
    if config.class_conditional and not num_classes:
        raise UserError("prior.class_conditional: the data have no classes")
    classes = (num_classes or 0) if config.class_conditional else 0
    for size in sides:
        if network is None and size % 2 ** (config.network.num_scales - 1):
            raise UserError(
                f"prior.network.num_scales: {config.network.num_scales} is too many for latents of "
                f"side {size}"
            )
    sde = make_sde(**asdict(config.sde))
    if network is None:
        network = build_within_memory(
            lambda: NCSNpp(
                channels, resolution(sides), num_classes=classes, **asdict(config.network)
            ),
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


class VAEModel(Model):
    """The hierarchical VAE under the prior N(0, I) on all its latents."""

    kind = "vae"
    has_latents = True
    bound_name = "NELBO, N(0, I) prior"
    estimator = "analytic prior"

    def __init__(self, vae: HierarchicalVAE, spec: DataSpec, vae_config: VAEConfig) -> None:
        super().__init__()
        self.vae = vae
        self.spec = spec
        self.vae_config = vae_config
        self._draws_pixels = False

    def describe(self) -> dict[str, Any]:
        return {"vae": asdict(self.vae_config), "spec": asdict(self.spec)}

    def in_words(self) -> str:
        """Size, latents and decoder."""
        shapes = [" x ".join(map(str, shape)) for shape in self.vae.latent_shapes]
        groups = ", ".join(f"{shapes.count(shape)} of {shape}" for shape in dict.fromkeys(shapes))
        context = self.vae.context
        pixels = (
            "pixels independent given the latents"
            if context is None
            else "autoregressive: a pixel sees the latents and the pixels before it, up to "
            f"{context.reach} rows above and columns aside"
        )
        decoder = f"decoder {self.vae.decoder_dist}, {pixels}"
        return f"{super().in_words()}; latent groups: {groups}; {decoder}"

    @property
    def num_bits(self) -> int:
        return self.vae_config.num_x_bits

    @property
    def diffusion(self) -> LSGM | None:
        return None

    def to_images(self, x: Tensor) -> Tensor:
        """From network range and size ``(B, C, R, R)`` in [-1, 1] to images in [0, 1] without
        padding.
        """
        return self.unpad((x + 1) / 2)

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

    def bound_values(self, x: Tensor, rng: Rng = None, *, samples: int = 1) -> Tensor:
        """:meth:`nelbo`, the mean of ``samples`` draws."""
        return torch.stack([self.nelbo(x, rng).total for _ in range(samples)]).mean(0)

    def under_normal(self) -> VAEModel:
        """The same VAE under N(0, I)."""
        return self

    def with_weights(self, sides: Mapping[str, nn.Module]) -> VAEModel:
        """The model in eval mode with other weights (their running average) for the trained
        ``sides``, ``vae`` or ``prior``.
        """
        vae = cast(HierarchicalVAE, sides.get("vae", self.vae))
        return VAEModel(vae, self.spec, self.vae_config).eval()

    def as_released(self) -> VAEModel:
        """The model without what is for training only."""
        return self

    def sample_latents(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """Latents of all groups from N(0, temperature^2 I), coarsest first."""
        return self._sample_groups(self.vae.latent_shapes, num, rng, temperature)

    def _sample_groups(
        self, shapes: Sequence[tuple[int, int, int]], num: int, rng: Rng, temperature: float
    ) -> list[Tensor]:
        return [temperature * randn((num, *shape), rng, device=self.device) for shape in shapes]

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
        if sampler is not None:
            raise ValueError("sampler: the latents of a VAE are N(0, I)")
        if labels is not None:
            raise UserError("this model was trained without classes")
        with torch.no_grad():
            latents = self.sample_latents(num, rng, temperature)
            images = self.decode(latents, rng)
        require_finite(images, "the decoder")
        return Batch(images, tuple(latents), 0)

    def encode(self, x: Tensor, rng: Rng = None, *, mean: bool = False) -> list[Tensor]:
        """Latents of all groups; see :meth:`lsgm.models.base.Model.encode`."""
        return list(self._encode_groups(x, rng, mean))

    def _encode_groups(self, x: Tensor, rng: Rng, mean: bool) -> Sequence[Tensor]:
        shapes = self.vae.latent_shapes
        zeros = [torch.zeros(len(x), *s, device=x.device) for s in shapes] if mean else None
        return self.vae.encode(x, rng, zeros).eps

    def decode(self, latents: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """Images in [0, 1] from latents of all groups: the decoder's means, which only a decoder
        with a context draws ``rng`` for (:meth:`vae.distributions.Distribution.mean_estimate`).
        """
        likelihood = self.vae.decode(latents)
        x = likelihood.sample(rng) if self._draws_pixels else likelihood.mean_estimate(rng)
        return self.to_images(x).clamp(0, 1)

    @contextmanager
    def drawn_pixels(self) -> Iterator[None]:
        """Inside, an autoregressive decoder draws its pixels instead of showing its means. Of
        independent pixels the means say as much; those of an autoregressive decoder belong to one
        draw, and pixels drawn from them anew would not fit each other.
        """
        self._draws_pixels = self.vae.context is not None
        try:
            yield
        finally:
            self._draws_pixels = False


class LSGM(DiffusionModel, VAEModel):
    """The hierarchical VAE with a score-based prior on its coarsest latent scale; N(0, I) on the
    others.

    Its latents are the state of the prior, all groups of the coarsest scale side by side, and then
    the groups of the finer scales.
    """

    kind = "lsgm"
    bound_name = "NELBO, score-based prior"
    estimator = "importance-sampled variational cross-entropy"
    score: MixedNormalScore

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
        self.sde = score.sde
        self.prior_config = prior_config
        self.control_variate = NormalControlVariate.of(score.sde)

    def describe(self) -> dict[str, Any]:
        network = self.score.network
        own = {} if isinstance(network, NCSNpp) else {"given": {"network": given_class(network)}}
        return super().describe() | {"prior": asdict(self.prior_config)} | own

    @property
    def diffusion(self) -> LSGM:
        return self

    @property
    def num_classes(self) -> int | None:
        """Classes that the prior can be told; None if it takes none. Bounds are on ``-log p(x)``:
        the prior is told no class there.
        """
        return self.spec.num_classes if self.prior_config.class_conditional else None

    @property
    def mixing(self) -> Tensor:
        return self.score.non_normal

    def nelbo(self, x: Tensor, rng: Rng = None, *, proposal: TimeProposal | None = None) -> NELBO:
        """One-sample NELBO of ``x`` ``(B, C, R, R)`` in [-1, 1] under the score-based prior, whose
        cross-entropy is that of :meth:`prior_cross_entropy`.
        """
        output = self.vae(x, rng=rng)
        eps = output.posterior.eps
        prior = self.prior_cross_entropy(self.vae.concat_top(eps).float(), rng, proposal)
        rest = [standard_normal_log_prob(e) for e in eps[self.vae.num_groups_per_scale :]]
        return NELBO(
            reconstruction=self.vae.reconstruction(output, x).double(),
            negative_entropy=_total(output.posterior.log_q),
            cross_entropy=prior.bound - (_total(rest) if rest else 0.0),
            sampled=prior.sampled,
        )

    def prior_cross_entropy(
        self, top: Tensor, rng: Rng, proposal: TimeProposal | None = None
    ) -> CrossEntropy:
        """Cross-entropy of latents ``top (B, *state_shape)`` under the score-based prior.

        The variational bound of 2106.05931, eq. 8, at one time per image drawn from ``proposal``
        (:meth:`evaluation_times` unless given), with both ends of the integral accounted for
        (:func:`lsgm.objectives.endpoint_cross_entropy`): an unbiased estimate of an upper bound on
        the negative log-likelihood.
        """
        proposal = proposal or self.evaluation_times()
        times = proposal.sample(len(top), rng, stratified=True, device=top.device)
        likelihood = make_weighting("likelihood")
        return latent_cross_entropy(
            self.sde, self.score, top, times, likelihood, rng, control_variate=self.control_variate
        )

    def evaluation_times(self) -> TimeProposal:
        """Times at which bounds are estimated: no draw has more than ten times the mean weight, so
        that a prior far from N(0, I) gives no bound that is too low in most samples.
        """
        return make_proposal("mixture", self.sde, make_weighting("likelihood"))

    def with_weights(self, sides: Mapping[str, nn.Module]) -> LSGM:
        vae = cast(HierarchicalVAE, sides.get("vae", self.vae))
        score = cast(MixedNormalScore, sides["prior"])
        return LSGM(vae, score, self.spec, self.vae_config, self.prior_config).eval()

    def as_released(self) -> LSGM:
        """The model without the mask of the inactive channels if that is for training only, as in
        published checkpoints, which do not hold it.
        """
        if self.prior_config.inactive_mask == "kept":
            return self
        score = copy.deepcopy(self.score)
        score.channel_mask.fill_(1.0)
        return LSGM(self.vae, score, self.spec, self.vae_config, self.prior_config)

    def under_normal(self) -> VAEModel:
        """The VAE alone, under N(0, I)."""
        return VAEModel(self.vae, self.spec, self.vae_config)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of what the score-based prior generates: the coarsest scale's latents."""
        return self.vae.top_shape

    @property
    def state_groups(self) -> int:
        return self.vae.num_groups_per_scale

    def sample_finer(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """The groups of the finer scales from N(0, temperature^2 I)."""
        finer = self.vae.latent_shapes[self.vae.num_groups_per_scale :]
        return self._sample_groups(finer, num, rng, temperature)

    def encode(self, x: Tensor, rng: Rng = None, *, mean: bool = False) -> list[Tensor]:
        """The state and the groups of the finer scales; see
        :meth:`lsgm.models.base.Model.encode`.
        """
        eps = self._encode_groups(x, rng, mean)
        return [self.vae.concat_top(eps), *eps[self.vae.num_groups_per_scale :]]

    def decode(self, latents: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """Images in [0, 1] from the state ``(B, *state_shape)`` and the groups of the finer scales;
        see :meth:`VAEModel.decode`.
        """
        state, *finer = latents
        return super().decode([*self.vae.split_top(state.float()), *finer], rng)


def _total(parts: Sequence[Tensor]) -> Tensor:
    """Sum of all parts over everything but the batch, in float64: ``(B,)``."""
    return torch.stack([sum_except_batch(part.double()) for part in parts]).sum(0)


def prior_config_from(values: dict[str, Any]) -> PriorConfig:
    """The prior's section of a ``run.json``; raises as :func:`lsgm.models.release.section`."""
    if isinstance(values, dict):
        values = {k: v for k, v in values.items() if f"prior.{k}" not in RETIRED_KEYS}
    built: PriorConfig = section(PriorConfig, values)
    return built
