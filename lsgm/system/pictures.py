"""Grids of images and picture files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lsgm.system.files import atomic_write
from lsgm.system.torchvision import import_torchvision

__all__ = [
    "image_grid",
    "neighbours_grid",
    "reconstruction_grid",
    "save_grid",
]


def image_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Tile ``images`` ``(B, C, H, W)`` in [0, 1] into one ``(3, H', W')``, nearly square unless
    ``columns`` is given.
    """
    columns = columns or max(1, round(len(images) ** 0.5))
    utils = import_torchvision().utils
    return utils.make_grid(images.float().cpu().clamp(0, 1), nrow=columns, padding=1, pad_value=0.5)


def reconstruction_grid(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Originals in odd columns, each with its reconstruction to the right; both ``(B, C, H, W)`` in
    [0, 1].
    """
    pairs = torch.stack([originals.cpu(), reconstructions.cpu()], dim=1).flatten(0, 1)
    return image_grid(pairs, columns=2 * max(1, round((len(originals) / 2) ** 0.5)))


def save_grid(grid: Tensor, path: Path, scale: int = 2) -> None:
    """Write a grid ``(3, H, W)`` in [0, 1] as PNG, each pixel ``scale`` wide."""
    enlarged = grid.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    with atomic_write(path) as file:
        import_torchvision().utils.save_image(enlarged, file, format="png")


def neighbours_grid(samples: Tensor, neighbours: Tensor) -> Tensor:
    """One row a sample: the sample, a gap, and its nearest training images, nearest first.

    ``samples`` ``(N, C, H, W)``, ``neighbours`` ``(N, k, C, H, W)``, in [0, 1]; the grid is
    ``(3, H', W')``.
    """
    gap = torch.full_like(samples, 0.5).unsqueeze(1)
    rows = torch.cat([samples.unsqueeze(1), gap, neighbours.to(samples)], dim=1)
    return image_grid(rows.flatten(0, 1), columns=rows.shape[1])
