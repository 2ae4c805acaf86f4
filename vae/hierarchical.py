"""The hierarchical VAE of LSGM (arXiv 2106.05931, App. G.2), a variant of NVAE (arXiv 2007.03898).

The latents are residuals: instead of a learned conditional prior for ``z_l``, group ``l`` has the
prior N(0, I) on ``eps_l``, and the affine map from ``eps_l`` to ``z_l`` is the decoder's affair
(arXiv 2106.05931, eq. 10). Groups are numbered from the coarsest scale on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vae.cells import CellKind, Resample, ResidualCell
from vae.context import AutoregressiveBernoulli, CausalContext
from vae.decoder import Decoder, GroupPosterior
from vae.distributions import Distribution, decoder_channels, decoder_distribution
from vae.encoder import Encoder
from vae.random import Rng, randn

__all__ = ["CELL_RECIPES", "HierarchicalVAE", "Posterior", "VAEOutput"]

CELL_RECIPES: dict[str, tuple[CellKind, CellKind, CellKind]] = {
    "res_mbconv": ("conv", "mbconv6", "mbconv3"),
    "res_bnswish": ("conv", "conv", "conv"),
    "res_bnswish2": ("plain_conv", "plain_conv", "plain_conv"),
}
"""Recipe -> kinds of the cells in encoder, decoder and post-processing."""


@dataclass(frozen=True)
class Posterior:
    """One draw from q(eps | x); one tensor (B, L, h, w) per group, float32, coarsest group first.

    Attributes:
        eps: Latents.
        log_q: Their log densities, elementwise, in nats.
        mu: Means (before the flows, if there are flows).
        log_sigma: Log standard deviations (before the flows).
    """

    eps: tuple[Tensor, ...]
    log_q: tuple[Tensor, ...]
    mu: tuple[Tensor, ...]
    log_sigma: tuple[Tensor, ...]


@dataclass(frozen=True)
class VAEOutput:
    """What one pass through the VAE gives.

    Attributes:
        posterior: The draw of the latents.
        likelihood: The distribution of the image given them.
    """

    posterior: Posterior
    likelihood: Distribution


class HierarchicalVAE(nn.Module):
    """Encoder and decoder with latent groups at several resolutions.

    Levels of resolution count from the finest, R x R; level i has ``R / 2^i`` pixels a side and
    ``int(num_channels * channel_mult[i])`` channels. Pre-processing takes the first levels, the
    latent scales the others.

    Args:
        image_channels: ``C`` of the images (B, C, R, R) in [-1, 1].
        image_size: ``R``, after padding: the side, or height and width.
        num_channels_enc: Base width of the encoder.
        num_channels_dec: Base width of the decoder.
        channel_mult: Width multiplier of each level: pre-processing blocks plus latent scales.
        num_preprocess_blocks: Blocks that halve the resolution before the latent scales, and as
            many that double it after them.
        num_preprocess_cells: Cells per pre-processing block.
        num_postprocess_cells: Cells per post-processing block.
        num_latent_scales: Latent resolutions.
        num_groups_per_scale: Latent groups ``G`` per resolution.
        num_latent_per_group: Latent channels ``L`` per group.
        num_cell_per_cond_enc: Encoder cells per group.
        num_cell_per_cond_dec: Decoder cells per group.
        num_nf: Flow cells per group in the posterior.
        cell: Recipe, a key of :data:`CELL_RECIPES`.
        use_se: Squeeze-and-excitation in every cell.
        decoder_dist: ``bin``, ``dml``, ``dl`` or ``normal``.
        num_x_bits: Bits per colour value.
        log_sig_q_scale: Range of the posterior's soft-clamped log sigma.
        input_skip: Carry the input down the encoder as a pyramid.
        crop: Pixels at each border that are padding and do not count in the likelihood.
        activation_checkpointing: Recompute cells in the backward pass to save memory.
        context_size: Side of the window of earlier pixels that each pixel sees beside the latents
            (:mod:`vae.context`; ``bin`` only); 0: pixels are independent given the latents.
        context_channels: Width of the network that looks at the window.
        context_blocks: Its residual blocks, each of which widens the window by one pixel.

    Raises:
        ValueError: If the arguments do not fit each other.
    """

    def __init__(
        self,
        *,
        image_channels: int,
        image_size: int | tuple[int, int],
        num_channels_enc: int,
        num_channels_dec: int,
        channel_mult: Sequence[int],
        num_preprocess_blocks: int,
        num_preprocess_cells: int,
        num_postprocess_cells: int,
        num_latent_scales: int,
        num_groups_per_scale: int,
        num_latent_per_group: int,
        num_cell_per_cond_enc: int,
        num_cell_per_cond_dec: int,
        num_nf: int = 0,
        cell: str = "res_mbconv",
        use_se: bool = True,
        decoder_dist: str = "bin",
        num_x_bits: int = 8,
        log_sig_q_scale: float = 5.0,
        input_skip: bool = False,
        crop: int = 0,
        activation_checkpointing: bool = False,
        context_size: int = 0,
        context_channels: int = 32,
        context_blocks: int = 2,
    ) -> None:
        super().__init__()
        levels = num_preprocess_blocks + num_latent_scales
        if len(channel_mult) != levels:
            raise ValueError(f"channel_mult needs {levels} values, got {tuple(channel_mult)}")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        for side in (height, width):
            if side % 2 ** (levels - 1):
                raise ValueError(f"an image of side {side} cannot be halved {levels - 1} times")
        if cell not in CELL_RECIPES:
            raise ValueError(f"cell must be one of {tuple(CELL_RECIPES)}, got {cell!r}")
        if decoder_dist in ("bin", "dl") and num_x_bits != 8:
            raise ValueError(f"decoder_dist {decoder_dist} needs num_x_bits 8, got {num_x_bits}")
        if context_size and decoder_dist != "bin":
            raise ValueError(f"context_size needs decoder_dist bin, not {decoder_dist}")
        self.image_channels, self.image_size, self.crop = image_channels, (height, width), crop
        self.decoder_dist, self.num_x_bits = decoder_dist, num_x_bits
        self.num_latent_scales = num_latent_scales
        self.num_groups_per_scale = num_groups_per_scale
        self.groups_per_scale = (num_groups_per_scale,) * num_latent_scales
        self.latent_shapes: tuple[tuple[int, int, int], ...] = tuple(
            (num_latent_per_group, height // 2**level, width // 2**level)
            for level in range(levels - 1, num_preprocess_blocks - 1, -1)
            for _ in range(num_groups_per_scale)
        )

        kinds = CELL_RECIPES[cell]
        checkpointing = activation_checkpointing
        make_enc, make_dec, make_post = (
            partial(_make_cell, kind, use_se, checkpointing) for kind in kinds
        )
        widths_enc = [int(num_channels_enc * m) for m in channel_mult]
        widths_dec = [int(num_channels_dec * m) for m in channel_mult]
        self.encoder = Encoder(
            image_channels=image_channels,
            stem_width=num_channels_enc,
            widths=widths_enc,
            num_preprocess_blocks=num_preprocess_blocks,
            preprocess_cells=num_preprocess_cells,
            groups_per_scale=self.groups_per_scale,
            cells_per_group=num_cell_per_cond_enc,
            make_cell=make_enc,
            input_skip=input_skip,
        )
        self.decoder = Decoder(
            widths=widths_dec,
            encoder_widths=widths_enc,
            top_size=(height // 2 ** (levels - 1), width // 2 ** (levels - 1)),
            num_postprocess_blocks=num_preprocess_blocks,
            postprocess_cells=num_postprocess_cells,
            groups_per_scale=self.groups_per_scale,
            cells_per_group=num_cell_per_cond_dec,
            latent_channels=num_latent_per_group,
            num_flows=num_nf,
            log_sigma_clamp=log_sig_q_scale,
            out_channels=context_channels
            if context_size
            else decoder_channels(decoder_dist, image_channels),
            make_cell=make_dec,
            make_post_cell=make_post,
        )
        self.context = (
            CausalContext(image_channels, context_channels, context_size, context_blocks)
            if context_size
            else None
        )

    @property
    def num_groups(self) -> int:
        """Number ``N`` of latent groups."""
        return len(self.latent_shapes)

    @property
    def top_shape(self) -> tuple[int, int, int]:
        """Shape (G * L, h, w) of the coarsest scale's latents, on which a learned prior acts."""
        channels, height, width = self.latent_shapes[0]
        return self.num_groups_per_scale * channels, height, width

    @property
    def data_dimensions(self) -> int:
        """Number of values per image that count in the likelihood (padding does not)."""
        height, width = (side - 2 * self.crop for side in self.image_size)
        return self.image_channels * height * width

    def forward(
        self, x: Tensor, rng: Rng = None, noise: Sequence[Tensor] | None = None
    ) -> VAEOutput:
        """Draw the latents of ``x`` (B, C, R, R) in [-1, 1] and decode them, in one pass.

        Args:
            x: Images.
            rng: Source of the posterior's noise.
            noise: The noise itself, one (B, L, h, w) per group.
        """
        return self.infer(self.encoder(x), rng, noise)

    def infer(
        self, taps: Sequence[Tensor], rng: Rng = None, noise: Sequence[Tensor] | None = None
    ) -> VAEOutput:
        """As :meth:`forward`, from the encoder's features: several draws share one encoder pass."""
        posterior, state = self._infer(taps, rng, noise)
        return VAEOutput(posterior, self._likelihood(state))

    def encode(
        self,
        x: Tensor,
        rng: Rng = None,
        noise: Sequence[Tensor] | None = None,
        *,
        top_only: bool = False,
    ) -> Posterior:
        """Draw the latents of ``x`` (B, C, R, R) in [-1, 1]; arguments as in :meth:`forward`.
        ``top_only``: those of the coarsest scale alone.
        """
        last = self.num_groups_per_scale if top_only else self.num_groups
        return self._infer(self.encoder(x), rng, noise, last)[0]

    def decode(self, eps: Sequence[Tensor]) -> Distribution:
        """Distribution of the image given the latents (B, L, h, w) of all groups.

        Raises:
            ValueError: If the number of groups is wrong.
        """
        if len(eps) != self.num_groups:
            raise ValueError(f"decode needs {self.num_groups} groups of latents, got {len(eps)}")
        remaining = iter(eps)
        state = self.decoder.initial_state(eps[0].shape[0])
        for scale in self.decoder.latent_scales():
            for group in scale.latent_groups():
                state = group.generate(state, next(remaining))
            if scale.up is not None:
                state = scale.up(state)
        return self._likelihood(state)

    def sample(
        self, num: int, rng: Rng = None, temperature: float = 1.0, eps: Sequence[Tensor] = ()
    ) -> Tensor:
        """Images (num, C, R, R) in [0, 1], the decoder's means, not cropped.

        Args:
            num: Number of images.
            rng: Source of the latents that are not given.
            temperature: Standard deviation of those.
            eps: Latents of the first groups; the others are drawn from N(0, temperature^2 I).
        """
        drawn = list(eps)
        device = self.decoder.top_feature.device
        for shape in self.latent_shapes[len(drawn) :]:
            drawn.append(temperature * randn((num, *shape), rng, device=device))
        return (self.decode(drawn).mean_estimate(rng).clamp(-1, 1) + 1) / 2

    def reconstruction(self, output: VAEOutput, x: Tensor) -> Tensor:
        """-log p(x | eps), (B,) in nats, without the padding."""
        log_prob = output.likelihood.log_prob(x)
        if self.crop:
            log_prob = log_prob[..., self.crop : -self.crop, self.crop : -self.crop]
        return -log_prob.flatten(1).sum(1)

    def concat_top(self, eps: Sequence[Tensor]) -> Tensor:
        """The latents of the coarsest scale side by side, (B, G * L, h, w)."""
        return torch.cat(tuple(eps[: self.num_groups_per_scale]), dim=1)

    def split_top(self, z: Tensor) -> tuple[Tensor, ...]:
        """The inverse of :meth:`concat_top`: ``G`` tensors (B, L, h, w)."""
        return z.chunk(self.num_groups_per_scale, dim=1)

    def _infer(
        self,
        taps: Sequence[Tensor],
        rng: Rng,
        noise: Sequence[Tensor] | None,
        last: int | None = None,
    ) -> tuple[Posterior, Tensor]:
        """The posterior and the decoder's state after all groups; with ``last``, nothing is
        computed beyond the latents of that many groups.
        """
        if noise is not None and len(noise) != self.num_groups:
            raise ValueError(f"there are {self.num_groups} groups, got noise for {len(noise)}")
        batch, device = taps[0].shape[0], taps[0].device
        state = self.decoder.initial_state(batch)
        draws: list[GroupPosterior] = []
        for scale in self.decoder.latent_scales():
            for group in scale.latent_groups():
                k = len(draws)
                shape = (batch, *self.latent_shapes[k])
                given = randn(shape, rng, device=device) if noise is None else noise[k]
                # Taps were taken on the way down; the way up meets them in reverse.
                draw = group.infer(taps[-1 - k], state, given)
                draws.append(draw)
                if len(draws) == last:
                    return _posterior(draws), state
                state = group.generate(state, draw.eps)
            if scale.up is not None:
                state = scale.up(state)
        return _posterior(draws), state

    def _likelihood(self, state: Tensor) -> Distribution:
        logits = self.decoder.image_logits(state)
        if self.context is not None:
            return AutoregressiveBernoulli(logits, self.context, self.crop)
        return decoder_distribution(self.decoder_dist, logits, self.num_x_bits)


def _posterior(draws: Sequence[GroupPosterior]) -> Posterior:
    return Posterior(
        eps=tuple(d.eps for d in draws),
        log_q=tuple(d.log_q for d in draws),
        mu=tuple(d.mu for d in draws),
        log_sigma=tuple(d.log_sigma for d in draws),
    )


def _make_cell(
    kind: CellKind,
    use_se: bool,
    checkpointing: bool,
    in_channels: int,
    out_channels: int,
    resample: Resample,
) -> ResidualCell:
    return ResidualCell(
        in_channels, out_channels, kind, resample, use_se=use_se, checkpointing=checkpointing
    )
