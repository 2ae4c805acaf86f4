"""The bottom-up tower: image to one feature per latent group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from vae.cells import NormConv, Resample, ResidualCell
from vae.layers import WeightNormConv2d

__all__ = ["Encoder", "EncoderScale"]

CellFactory = Callable[[int, int, Resample], ResidualCell]


class EncoderScale(nn.Module):
    """The cells of one resolution, in one list per latent group, and the step to the next coarser.

    Args:
        width: Channels at this resolution.
        next_width: Channels at the next coarser one; None at the coarsest scale.
        groups: Latent groups of this scale.
        cells_per_group: Residual cells before each tap.
        make_cell: ``(in_channels, out_channels, resample) -> cell``.
        pyramid: Whether a pyramid of the input is added after the down-sampling cell.
    """

    def __init__(
        self,
        width: int,
        next_width: int | None,
        groups: int,
        cells_per_group: int,
        make_cell: CellFactory,
        pyramid: bool,
    ) -> None:
        super().__init__()
        self.groups = nn.ModuleList(
            nn.Sequential(*[make_cell(width, width, "none") for _ in range(cells_per_group)])
            for _ in range(groups)
        )
        self.down: ResidualCell | None = None
        self.pyramid: NormConv | None = None
        if next_width is not None:
            self.down = make_cell(width, next_width, "down")
            self.pyramid = NormConv(width, next_width, "down") if pyramid else None

    def forward(self, x: Tensor, pyramid: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """From feature and pyramid feature: the taps, and both features for the next scale."""
        taps = []
        for group in self.groups:
            x = group(x)
            taps.append(x)
        if self.down is not None:
            x = self.down(x)
        if self.pyramid is not None:
            pyramid = self.pyramid(pyramid)
            x = x + pyramid
        return taps, x, pyramid


class Encoder(nn.Module):
    """Stem, pre-processing blocks that halve the resolution, and the latent scales, fine to coarse.

    Args:
        image_channels: ``C`` of the images (B, C, R, R).
        stem_width: Channels after the stem.
        widths: Channels at each level of resolution, finest first.
        num_preprocess_blocks: Levels above the finest latent scale.
        preprocess_cells: Cells per pre-processing block, the last of which halves the resolution.
        groups_per_scale: Latent groups at each scale, fine to coarse.
        cells_per_group: Residual cells before each tap.
        make_cell: ``(in_channels, out_channels, resample) -> cell``.
        input_skip: Carry a pyramid of the input past the cells.
    """

    def __init__(
        self,
        *,
        image_channels: int,
        stem_width: int,
        widths: Sequence[int],
        num_preprocess_blocks: int,
        preprocess_cells: int,
        groups_per_scale: Sequence[int],
        cells_per_group: int,
        make_cell: CellFactory,
        input_skip: bool,
    ) -> None:
        super().__init__()
        self.stem = WeightNormConv2d(image_channels, stem_width, 3)
        cells: list[ResidualCell] = []
        width = stem_width
        for level in range(num_preprocess_blocks):
            cells += [make_cell(width, width, "none") for _ in range(preprocess_cells - 1)]
            cells.append(make_cell(width, widths[level + 1], "down"))
            width = widths[level + 1]
        self.preprocess = nn.Sequential(*cells)
        scale_widths = [width, *widths[num_preprocess_blocks + 1 :]]
        self.scales = nn.ModuleList(
            EncoderScale(here, after, groups, cells_per_group, make_cell, input_skip)
            for here, after, groups in zip(
                scale_widths, [*scale_widths[1:], None], groups_per_scale, strict=True
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """From (B, C, R, R) in [-1, 1] to the taps of all latent groups, finest scale first."""
        x = pyramid = self.preprocess(self.stem(x))
        taps: list[Tensor] = []
        for scale in self.scales:
            found, x, pyramid = scale(x, pyramid)
            taps += found
        return taps
