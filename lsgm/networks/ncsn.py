"""NCSN's score network as a noise prediction (arXiv 1907.05600; arXiv 2006.09011).

>>> from lsgm.networks.ncsn import NCSN
>>> from lsgm.noise_ladder import NoiseLadder
>>> ladder = NoiseLadder(sigma_max=1.0, sigma_min=0.01, num_levels=10)
>>> network = NCSN(channels=1, resolution=8, ladder=ladder, num_channels=4)
>>> tuple(network(torch.zeros(10, 1, 8, 8), ladder.times).shape)
(10, 1, 8, 8)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsgm.networks.layers import Resolution, check_halvings
from lsgm.networks.refinenet import RefineBlock, ResidualStage, make_norm
from lsgm.noise_ladder import NoiseLadder
from lsgm.tensors import expand_like

__all__ = ["DEPTHS", "NCSN"]

DEPTHS: dict[float, tuple[tuple[int, ...], tuple[int, ...]]] = {
    64: ((1, 2, 2, 2), (1, 1, 2, 4)),
    128: ((1, 2, 2, 4, 4), (1, 1, 1, 2, 4)),
    math.inf: ((1, 2, 2, 2, 4, 4), (1, 1, 1, 1, 2, 4)),
}
"""Width multipliers and dilations of the stages for images up to so many pixels (arXiv 2006.09011
appendix B).
"""


class NCSN(nn.Module):
    r"""RefineNet score network over a noise ladder, presented as ``eps(x_t, t) = -sigma score``.

    ``conditional`` (NCSN): the network is the score ``s(x, i)`` of level ``i``, which enters
    through the normalisation everywhere, and ``eps = -sigma_i s(x, i)``; pooling takes means.
    Otherwise (NCSNv2): one network ``h(x)`` serves all levels with ``s = h(x) / sigma``, so ``eps
    = -h(x)``; the decoder does not normalise and its pooling takes maxima. A time between two
    levels takes the nearest one's ``eps``, so the score stays in proportion to ``1 / sigma(t)``.

    Images up to 64 pixels have four stages; larger ones have more, as in NCSNv2 (:data:`DEPTHS`).

    Args:
        channels: ``C`` of the images.
        resolution: side ``S`` of the images in pixels, or height and width, even after every
            halving but the last.
        ladder: noise levels; times are those of ``ladder.sde()``.
        num_channels: width of the first stage (the papers' ``ngf``: 128, for MNIST 64).
        channel_mult: width of each stage over ``num_channels``; ``None``: by the resolution.
        dilations: of each stage; every stage of dilation 1 but the first halves the resolution,
            the others keep it. ``None``: by the resolution.
        conditional: condition the normalisation on the level.
        centre_input: the network sees ``2 x - 1``, for images in [0, 1].

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        channels: int,
        resolution: Resolution,
        ladder: NoiseLadder,
        *,
        num_channels: int = 128,
        channel_mult: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        conditional: bool = True,
        centre_input: bool = False,
    ) -> None:
        super().__init__()
        self.centre_input = centre_input
        side = check_halvings(resolution, 0)
        default = next(depth for limit, depth in DEPTHS.items() if side <= limit)
        channel_mult = default[0] if channel_mult is None else channel_mult
        dilations = default[1] if dilations is None else dilations
        _check_sizes(resolution, num_channels, channel_mult, dilations)
        self.channels, self.resolution = channels, resolution
        self.ladder, self.conditional = ladder, conditional
        widths = [num_channels * m for m in channel_mult]
        levels = ladder.num_levels if conditional else 1
        self.conv_in = nn.Conv2d(channels, num_channels, 3, padding=1)
        self.stages = nn.ModuleList()
        width = num_channels
        for i, (stage_width, dilation) in enumerate(zip(widths, dilations, strict=True)):
            self.stages.append(ResidualStage(width, stage_width, levels, dilation, first=i == 0))
            width = stage_width
        # from the coarsest: every step gives the width of the next finer stage
        decoder_levels = levels if conditional else None
        self.refine = nn.ModuleList([RefineBlock([width], width, decoder_levels)])
        for i in reversed(range(len(widths) - 1)):
            finer = widths[max(i - 1, 0)]
            units = 1 if i else 3
            self.refine.append(
                RefineBlock([widths[i], width], finer, decoder_levels, output_units=units)
            )
            width = finer
        self.norm_out = make_norm(width, levels)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise ``(B, C, S, S)`` for ``x (B, C, S, S)`` at ``t (B,)`` or a scalar."""
        index = self.ladder.index(t.reshape(-1))
        level = index if self.conditional else None
        h = self.conv_in(2 * x - 1 if self.centre_input else x)
        features = []
        for stage in self.stages:
            h = stage(h, level)
            features.append(h)
        h = self.refine[0]([features.pop()], level)
        for block in self.refine[1:]:
            h = block([features.pop(), h], level)
        h = self.conv_out(F.elu(self.norm_out(h, level)))
        if not self.conditional:
            return -h
        sigma = self.ladder.sigmas.to(index.device)[index]
        dtype = torch.promote_types(h.dtype, torch.float32)
        return -expand_like(sigma, h.to(dtype)) * h.to(dtype)


def _check_sizes(
    resolution: Resolution,
    num_channels: int,
    channel_mult: Sequence[int],
    dilations: Sequence[int],
) -> None:
    if len(channel_mult) != len(dilations) or len(dilations) < 2 or dilations[0] != 1:
        raise ValueError(
            "channel_mult and dilations need one number a stage, at least two, and dilations "
            f"starts with 1; got {tuple(channel_mult)}, {tuple(dilations)}"
        )
    if min(dilations) < 1 or min(channel_mult) < 1 or channel_mult[0] != 1:
        raise ValueError(
            "channel_mult must start with 1 and, as dilations, be positive; "
            f"got {tuple(channel_mult)}, {tuple(dilations)}"
        )
    if num_channels < 2:
        raise ValueError(f"num_channels must be at least 2, got {num_channels}")
    halvings = sum(d == 1 for d in dilations[1:])
    check_halvings(resolution, halvings)
