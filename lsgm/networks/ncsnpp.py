"""NCSN++ as the prior of LSGM (arXiv 2011.13456 appendix H; arXiv 2106.05931 appendix G).

A U-net of residual blocks that predicts the noise. Unlike the image-space original its output is
not divided by ``sigma`` and it is conditioned on ``t``, not on ``ln sigma``.

>>> from lsgm.networks.ncsnpp import NCSNpp
>>> network = NCSNpp(channels=3, resolution=8, num_channels=8, num_cells_per_scale=1)
>>> tuple(network(torch.zeros(2, 3, 8, 8), torch.tensor([0.1, 0.9])).shape)
(2, 3, 8, 8)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lsgm.networks.embeddings import TimeEmbedding
from lsgm.networks.layers import (
    TINY_SCALE,
    AttentionBlock,
    BlockStyle,
    ResidualBlock,
    Resolution,
    check_halvings,
    conv,
    require_scales,
)
from lsgm.networks.levels import (
    ConvStep,
    DownLevel,
    Features,
    InputResidual,
    InputSkip,
    NormConv,
    OutputResidual,
    OutputResidualStart,
    OutputSkip,
    UpLevel,
    run_block,
)
from lsgm.networks.resample import make_resampler

__all__ = [
    "BLOCKS",
    "GROUP_RULES",
    "PROGRESSIVE",
    "PROGRESSIVE_COMBINE",
    "PROGRESSIVE_INPUT",
    "UP_ATTENTION",
    "NCSNpp",
]

PROGRESSIVE = ("none", "output_skip", "residual")
PROGRESSIVE_INPUT = ("none", "input_skip", "residual")
PROGRESSIVE_COMBINE = ("sum", "cat")
BLOCKS = ("biggan", "ddpm")
UP_ATTENTION = ("level", "block")
GROUP_RULES = ("width", "diffusers")


class NCSNpp(nn.Module):
    """Noise prediction network.

    Args:
        channels: ``C`` of the input and the output.
        resolution: ``S``, the side of the input in pixels, or height and width; multiples of
            ``2^(num_scales - 1)``.
        num_channels: width of the first level.
        num_scales: number of resolutions.
        channel_mult: width of each level over ``num_channels``; ``None`` is one everywhere; a
            longer tuple is cut.
        widths: width of each level itself, in place of ``channel_mult``.
        num_cells_per_scale: residual blocks a level (the decoder has one more).
        embedding_dim: size of the time features.
        embedding_width: size of the time embedding; ``None`` is ``4 embedding_dim``. Score-SDE
            models have ``4 num_channels``, with twice ``num_channels`` Fourier features.
        embedding_type: ``"positional"`` or ``"fourier"``.
        embedding_scale: factor on ``t`` before the sinusoids, or standard deviation of the Fourier
            frequencies.
        dropout: probability in every residual block.
        fir: resample with a FIR filter instead of nearest neighbour and mean.
        progressive: output pyramid, ``"none"``, ``"output_skip"`` or ``"residual"``.
        progressive_input: input pyramid, ``"none"``, ``"input_skip"`` or ``"residual"``.
        progressive_combine: how ``"input_skip"`` joins the features, ``"sum"`` or ``"cat"``.
        attention_resolutions: sides (the shorter ones) at which every level has attention.
        middle_attention: attention between the two middle blocks.
        num_classes: classes that the network can be told (0: none).
        block: ``"biggan"``: residual blocks resample; ``"ddpm"``: convolutions between them do, and
            shortcuts start small (arXiv 2006.11239 appendix B).
        rescale: divide the sum of every block by ``sqrt(2)``; DDPM does not.
        norm_groups: of every normalisation, 32 in DDPM; ``None``: by its width.
        up_attention: attention of the decoder, ``"level"``: once, after a level's blocks;
            ``"block"``: after each of them, as in the first DDPM.
        group_rule: ``"diffusers"``: the groups of that package, which at levels with attention and
            less than 128 channels are others (32 before attention).
        activation_checkpointing: recompute blocks in the backward pass: less memory, more time,
            same result.

    Raises:
        ValueError: an unknown option or sizes that do not fit.
    """

    def __init__(
        self,
        channels: int,
        resolution: Resolution,
        *,
        num_channels: int = 64,
        num_scales: int = 2,
        channel_mult: Sequence[int] | None = None,
        num_cells_per_scale: int = 2,
        embedding_dim: int = 128,
        embedding_type: str = "positional",
        embedding_scale: float = 1000.0,
        dropout: float = 0.0,
        fir: bool = False,
        progressive: str = "none",
        progressive_input: str = "none",
        progressive_combine: str = "sum",
        attention_resolutions: Sequence[int] = (16,),
        middle_attention: bool = True,
        num_classes: int = 0,
        embedding_width: int | None = None,
        block: str = "biggan",
        rescale: bool = True,
        norm_groups: int | None = None,
        up_attention: str = "level",
        group_rule: str = "width",
        widths: Sequence[int] | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        mult = (1,) * num_scales if channel_mult is None else tuple(channel_mult)[:num_scales]
        _check_options(
            resolution,
            num_scales,
            mult,
            ("progressive", progressive, PROGRESSIVE),
            ("progressive_input", progressive_input, PROGRESSIVE_INPUT),
            ("progressive_combine", progressive_combine, PROGRESSIVE_COMBINE),
            ("block", block, BLOCKS),
            ("up_attention", up_attention, UP_ATTENTION),
            ("group_rule", group_rule, GROUP_RULES),
        )
        self.channels, self.resolution = channels, resolution
        self.checkpointing = activation_checkpointing
        widths = [num_channels * m for m in mult] if widths is None else list(widths)
        shorter = check_halvings(resolution, num_scales - 1)
        sides = [shorter >> i for i in range(num_scales)]
        self.embedding = TimeEmbedding(
            embedding_dim, embedding_type, embedding_scale, embedding_width
        )
        time_width = self.embedding.width
        self.num_classes = num_classes
        # one more: no class. It starts without any effect
        self.classes = nn.Embedding(num_classes + 1, time_width) if num_classes else None
        if self.classes is not None:
            nn.init.zeros_(self.classes.weight)

        learned = block == "ddpm"
        style = BlockStyle(norm_groups, rescale, shortcut_scale=0.1 if learned else 1.0)
        _check_groups(norm_groups, widths)
        others = group_rule == "diffusers" and norm_groups is None
        level_style = replace(style, groups=32) if others else style
        if others:
            _check_groups(
                32, [w for w, s in zip(widths, sides, strict=True) if s in attention_resolutions]
            )

        def unit(
            in_channels: int,
            out_channels: int,
            resample: nn.Module | None = None,
            groups_in: int | None = None,
        ) -> ResidualBlock:
            return ResidualBlock(
                in_channels, out_channels, time_width, dropout, resample, style, groups_in
            )

        def step(width: int, direction: str) -> nn.Module:
            if learned:
                return ConvStep(width, direction, fir)
            return unit(width, width, make_resampler(direction, fir))

        self.conv_in = conv(channels, num_channels)
        width, pyramid_width = num_channels, channels
        skip_widths = [width]
        self.down = nn.ModuleList()
        for level, (level_width, side) in enumerate(zip(widths, sides, strict=True)):
            blocks = []
            for _ in range(num_cells_per_scale):
                blocks.append(unit(width, level_width))
                width = level_width
                skip_widths.append(width)
            attends = side in attention_resolutions
            attentions = [AttentionBlock(width, level_style) for _ in blocks if attends]
            downsample: nn.Module | None = None
            pyramid: nn.Module | None = None
            if level < num_scales - 1:
                downsample = step(width, "down")
                if progressive_input == "input_skip":
                    pyramid = InputSkip(channels, width, fir, progressive_combine)
                    width *= 2 if progressive_combine == "cat" else 1
                elif progressive_input == "residual":
                    pyramid = InputResidual(pyramid_width, width, fir)
                    pyramid_width = width
                skip_widths.append(width)
            self.down.append(DownLevel(blocks, attentions, downsample, pyramid, self.checkpointing))

        self.middle_in = unit(width, width)
        self.middle_attention = AttentionBlock(width, style) if middle_attention else None
        self.middle_out = unit(width, width)

        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            blocks, attends = [], sides[level] in attention_resolutions
            for _ in range(num_cells_per_scale + 1):
                skip = skip_widths.pop()
                # the package's own count of an attention level's groups
                groups_in = min(width + skip // 4, 32) if others and attends else None
                blocks.append(unit(width + skip, level_width, groups_in=groups_in))
                width = level_width
            once = attends and up_attention == "level"
            attention = AttentionBlock(width, level_style) if once else None
            each = [AttentionBlock(width, level_style) for _ in blocks if attends and not once]
            lowest = level == num_scales - 1
            pyramid = None
            if progressive == "output_skip":
                pyramid = OutputSkip(width, channels, fir, lowest, norm_groups)
            elif progressive == "residual" and lowest:
                pyramid = OutputResidualStart(width, norm_groups)
            elif progressive == "residual":
                pyramid = OutputResidual(pyramid_width, width, fir)
            pyramid_width = width
            upsample = step(width, "up") if level else None
            self.up.append(UpLevel(blocks, attention, pyramid, upsample, each, self.checkpointing))
        self.head = (
            None
            if progressive == "output_skip"
            else NormConv(width, channels, TINY_SCALE, norm_groups)
        )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicted noise ``(B, C, S, S)`` for ``x (B, C, S, S)`` at ``t (B,)`` or a scalar.

        ``labels (B,)``, int64: the classes; ``num_classes``, or no labels, is no class.
        """
        time = self.embedding(t)
        if self.classes is not None:
            if labels is None:
                labels = torch.full((len(x),), self.num_classes, device=x.device)
            time = time + self.classes(labels)
        state = Features(self.conv_in(x), time, pyramid=x)
        state.skips.append(state.h)
        for level in self.down:
            level(state)
        state.h = run_block(self.checkpointing, self._middle, state.h, state.time)
        for level in self.up:
            level(state)
        return state.pyramid if self.head is None else self.head(state.h)

    def _middle(self, h: Tensor, time: Tensor) -> Tensor:
        h = self.middle_in(h, time)
        if self.middle_attention is not None:
            h = self.middle_attention(h)
        return self.middle_out(h, time)


def _check_groups(groups: int | None, widths: Sequence[int]) -> None:
    if groups and (bad := [width for width in widths if width % groups]):
        raise ValueError(
            f"norm_groups {groups} does not divide the width {bad[0]}; num_channels has to be a "
            "multiple of it"
        )


def _check_options(
    resolution: Resolution,
    num_scales: int,
    mult: tuple[int, ...],
    *options: tuple[str, str, tuple[str, ...]],
) -> None:
    check_halvings(resolution, require_scales(num_scales) - 1, ", once a scale")
    if len(mult) != num_scales:
        raise ValueError(
            f"channel_mult {mult} must have at least num_scales = {num_scales} entries"
        )
    for name, value, known in options:
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
