"""Pictures: image grids and learning curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsgm.data.torchvision import import_torchvision
from lsgm.files import atomic_write

__all__ = ["image_grid", "learning_curves", "read_metrics", "reconstruction_grid", "save_grid"]


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    metric: str = "nelbo",
    ylabel: str = "NELBO, nats an image",
) -> None:
    """Plot a metric (the NELBO) in training and test of ``runs`` (label -> metrics lines) against
    training minutes, one after the other.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    offset = 0.0
    values: list[float] = []
    for index, (label, lines) in enumerate(runs.items()):
        minutes = 0.0
        for phase, style, what in (("train", "-", "training"), ("eval", "o--", "test")):
            points = [
                (line["train_seconds"] / 60, line[metric])
                for line in lines
                if line["phase"] == phase and line.get(metric) is not None
            ]
            if not points:
                continue
            minutes = max(minutes, points[-1][0])
            x, y = zip(*points, strict=True)
            values += y[len(y) // 4 :]
            axes.plot(
                [offset + v for v in x],
                y,
                style,
                color=f"C{index}",
                label=f"{label}, {what}",
                markersize=3,
                lw=1,
            )
        offset += minutes
    if values:
        low, high = min(values), max(values)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.15 * (high - low) + 1e-3)
    axes.set_xlabel("training time, minutes")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
