"""The top-down tower: latent groups, coarse to fine, to the logits of the image.

The tower runs in two ways. With latents given it generates. With the encoder's features it infers:
each group's posterior sees the tower's state, that is all latents of the groups before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.cells import ResidualCell
from vae.distributions import Normal
from vae.encoder import CellFactory
from vae.flows import FlowCell
from vae.layers import WeightNormConv2d, soft_clamp

__all__ = ["Decoder", "DecoderScale", "GroupPosterior", "LatentCombiner", "LatentGroup"]

MEAN_CLAMP = 5.0


@dataclass(frozen=True)
class GroupPosterior:
    """One draw of a group's posterior; all (B, L, h, w), float32.

    Attributes:
        eps: The latent, after the flow.
        log_q: Its log density, elementwise, in nats.
        mu: Mean before the flow.
        log_sigma: Log standard deviation before the flow.
    """

    eps: Tensor
    log_q: Tensor
    mu: Tensor
    log_sigma: Tensor


class LatentCombiner(WeightNormConv2d):
    """1x1 convolution of the tower's state and a latent side by side, (B, C, h, w) and (B, L, h,
    w).

    Computed as the sum of two convolutions, one per half of the kernel, without the concatenated
    copy.
    """

    def __init__(self, width: int, latent_channels: int) -> None:
        super().__init__(width + latent_channels, width, 1)
        self.width = width

    def forward(self, state: Tensor, latent: Tensor) -> Tensor:  # type: ignore[override]
        of_state, of_latent = self.kernel().split(
            [self.width, self.weight.shape[1] - self.width], 1
        )
        return F.conv2d(state, of_state, self.bias) + F.conv2d(latent, of_latent)


class LatentGroup(nn.Module):
    """One group of latents: its posterior and how the tower takes it in.

    Args:
        encoder_width: Channels of the encoder's tap.
        width: Channels of the tower's state.
        latent_channels: ``L``.
        first: The first group sees only the encoder's feature, as the tower has nothing to tell
            yet.
        num_flows: Flow cells of the posterior.
        cells: Residual cells after the latent has been taken in.
        log_sigma_clamp: Range of the posterior's log sigma.
    """

    def __init__(
        self,
        encoder_width: int,
        width: int,
        latent_channels: int,
        *,
        first: bool,
        num_flows: int,
        cells: Sequence[ResidualCell],
        log_sigma_clamp: float,
    ) -> None:
        super().__init__()
        self.log_sigma_clamp = log_sigma_clamp
        self.encoder_combiner = None if first else WeightNormConv2d(width, encoder_width, 1)
        self.posterior = WeightNormConv2d(encoder_width, 2 * latent_channels, 3)
        self.flows = nn.Sequential(*[FlowCell(latent_channels) for _ in range(num_flows)])
        self.latent_conv = WeightNormConv2d(latent_channels, latent_channels, 3)
        self.combiner = LatentCombiner(width, latent_channels)
        self.cells = nn.Sequential(*cells)

    def infer(self, tap: Tensor, state: Tensor, noise: Tensor) -> GroupPosterior:
        """Draw from q(eps_k | x, eps_<k) with standard normal ``noise`` (B, L, h, w)."""
        feature = tap if self.encoder_combiner is None else tap + self.encoder_combiner(state)
        mu, log_sigma = self.posterior(F.elu(feature)).chunk(2, dim=1)
        mu, log_sigma = soft_clamp(mu, MEAN_CLAMP), soft_clamp(log_sigma, self.log_sigma_clamp)
        eps = mu + torch.exp(log_sigma) * noise
        log_q = Normal(mu, log_sigma).log_prob(eps)
        if len(self.flows):
            # Half-precision shifts would spoil the density by rounding; the flows are tiny.
            with torch.autocast(eps.device.type, enabled=False):
                eps = self.flows(eps)  # volume-preserving: log_q stays
        return GroupPosterior(eps, log_q, mu, log_sigma)

    def generate(self, state: Tensor, eps: Tensor) -> Tensor:
        """The tower's state (B, C, h, w) after the latent ``eps`` (B, L, h, w) has come in."""
        return self.cells(self.combiner(state, self.latent_conv(eps)))


class DecoderScale(nn.Module):
    """The latent groups of one resolution and the step to the next finer (None at the finest)."""

    def __init__(self, groups: Sequence[LatentGroup], up: ResidualCell | None) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self.up = up

    def latent_groups(self) -> list[LatentGroup]:
        """The groups of this scale, in order."""
        return [group for group in self.groups if isinstance(group, LatentGroup)]


class Decoder(nn.Module):
    """Learned constant, latent scales coarse to fine, post-processing blocks, image head.

    Args:
        widths: Channels at each level of resolution, finest first.
        encoder_widths: Those of the encoder.
        top_size: Height and width of the coarsest level.
        num_postprocess_blocks: Levels above the finest latent scale.
        postprocess_cells: Cells per post-processing block, the first of which doubles the
            resolution.
        groups_per_scale: Latent groups at each scale, coarse to fine.
        cells_per_group: Residual cells after each latent.
        latent_channels: ``L``.
        num_flows: Flow cells per group.
        log_sigma_clamp: Range of the posterior's log sigma.
        out_channels: Channels of the logits.
        make_cell: Makes the cells of the tower.
        make_post_cell: Makes the cells of the post-processing blocks.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        encoder_widths: Sequence[int],
        top_size: tuple[int, int],
        num_postprocess_blocks: int,
        postprocess_cells: int,
        groups_per_scale: Sequence[int],
        cells_per_group: int,
        latent_channels: int,
        num_flows: int,
        log_sigma_clamp: float,
        out_channels: int,
        make_cell: CellFactory,
        make_post_cell: CellFactory,
    ) -> None:
        super().__init__()
        self.top_feature = nn.Parameter(torch.rand(widths[-1], *top_size))
        scales = []
        level = len(widths) - 1
        for s, num_groups in enumerate(groups_per_scale):
            width = widths[level]
            groups = [
                LatentGroup(
                    encoder_widths[level],
                    width,
                    latent_channels,
                    first=s == 0 and g == 0,
                    num_flows=num_flows,
                    cells=[make_cell(width, width, "none") for _ in range(cells_per_group)],
                    log_sigma_clamp=log_sigma_clamp,
                )
                for g in range(num_groups)
            ]
            last = s == len(groups_per_scale) - 1
            up = None if last else make_cell(width, widths[level - 1], "up")
            scales.append(DecoderScale(groups, up))
            level -= 0 if last else 1
        self.scales = nn.ModuleList(scales)
        cells: list[ResidualCell] = []
        for block in range(num_postprocess_blocks):
            here = level - block
            cells.append(make_post_cell(widths[here], widths[here - 1], "up"))
            cells += [
                make_post_cell(widths[here - 1], widths[here - 1], "none")
                for _ in range(postprocess_cells - 1)
            ]
        self.postprocess = nn.Sequential(*cells)
        self.head = WeightNormConv2d(widths[0], out_channels, 3)

    def latent_scales(self) -> list[DecoderScale]:
        """The scales, coarse to fine."""
        return [scale for scale in self.scales if isinstance(scale, DecoderScale)]

    def initial_state(self, batch: int) -> Tensor:
        """The learned constant for ``batch`` images, (B, C, h, w)."""
        return self.top_feature.expand(batch, -1, -1, -1)

    def image_logits(self, state: Tensor) -> Tensor:
        """From the tower's last state to the logits (B, C_out, R, R)."""
        return self.head(F.elu(self.postprocess(state)))
