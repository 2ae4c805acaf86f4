"""Pictures: image grids, learning curves, and the plots of a report."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsgm.data.torchvision import import_torchvision
from lsgm.files import atomic_write, read_log_line

__all__ = [
    "Series",
    "bound_plot",
    "decomposition_plot",
    "image_grid",
    "learning_curves",
    "neighbours_grid",
    "quality_plot",
    "read_metrics",
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without damaged ones; none if it is missing."""
    lines: list[bytes] = []
    with contextlib.suppress(FileNotFoundError):
        lines = path.read_bytes().splitlines(keepends=True)
    records = map(read_log_line, lines)
    return [record for record in records if record is not None and "phase" in record]


def learning_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    metric: str = "nelbo",
    ylabel: str = "NELBO, nats an image",
    num_dims: int | None = None,
) -> None:
    """Plot a metric (the NELBO) in training and test of ``runs`` (label -> metrics lines) against
    training minutes, one after the other. ``num_dims``: values of an image, of grey or colour data
    whose nats a second axis then shows as bits/dim.
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
    if num_dims is not None:
        unit = num_dims * math.log(2)
        scale = (lambda nats: nats / unit, lambda bits: bits * unit)
        axes.secondary_yaxis("right", functions=scale).set_ylabel("bits/dim")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


@contextlib.contextmanager
def _plot(path: Path, width: float = 6.0, height: float = 3.8) -> Iterator[Any]:
    """Axes of a figure that is written to ``path`` when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    try:
        yield axes
        figure.tight_layout()
        # Without the version of matplotlib in the file, the same numbers give the same bytes.
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    finally:
        plt.close(figure)


@dataclass(frozen=True)
class Series:
    """Points of one line of a plot, with standard errors (NaN: not known)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]


def bound_plot(series: Sequence[Series], path: Path) -> None:
    """Bounds on the negative log-likelihood (nats) against the number of importance weights."""
    with _plot(path) as axes:
        for index, line in enumerate(series):
            axes.errorbar(
                line.x, line.y, yerr=line.error, fmt="o-", color=f"C{index}", capsize=3,
                markersize=4, lw=1, label=line.label,
            )  # fmt: skip
        _powers_of_two(axes, sorted({x for line in series for x in line.x}))
        axes.set_xlabel("importance weights k")
        axes.set_ylabel("bound on -log p(x), nats an image")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def quality_plot(
    series: Sequence[Series], path: Path, ylabel: str, floor: float | None = None
) -> None:
    """A score against network evaluations; ``floor``: that of real images."""
    with _plot(path) as axes:
        for index, line in enumerate(series):
            axes.errorbar(
                line.x, line.y, yerr=line.error, fmt="o-", color=f"C{index}", capsize=3,
                markersize=4, lw=1, label=line.label,
            )  # fmt: skip
        if floor is not None:
            axes.axhline(floor, color="0.4", ls="--", lw=1, label="training images as samples")
        _powers_of_two(axes, sorted({x for line in series for x in line.x}))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("network evaluations a batch (NFE)")
        axes.set_ylabel("\n".join(textwrap.wrap(ylabel, 40)))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def _powers_of_two(axes: Any, ticks: Sequence[float]) -> None:
    """A logarithmic axis with a tick at every value that occurs."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def decomposition_plot(
    names: Sequence[str], nats: Sequence[float], errors: Sequence[float], path: Path
) -> None:
    """Horizontal bars of the parts of a NELBO (nats), each with its value and standard error (NaN:
    not known).
    """
    with _plot(path, height=1.2 + 0.34 * len(names)) as axes:
        places = range(len(names))
        axes.barh(places, nats, xerr=errors, color=["C0", *["C1"] * (len(names) - 1)], capsize=2)
        span = max(max(nats), 0) - min(min(nats), 0)
        for place, value, error in zip(places, nats, errors, strict=True):
            known = math.isfinite(error)
            axes.text(
                max(value, 0) + (error if known else 0.0) + 0.015 * span, place,
                f"{value:.2f} ± {error:.2f}" if known else f"{value:.2f}",
                va="center", fontsize="small",
            )  # fmt: skip
        axes.set_yticks(list(places), names)
        axes.invert_yaxis()
        axes.set_xlim(min(min(nats), 0) - 0.02 * span, max(nats) + 0.3 * span)
        axes.set_xlabel("nats an image")
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)


def neighbours_grid(samples: Tensor, neighbours: Tensor) -> Tensor:
    """One row a sample: the sample, a gap, and its nearest training images, nearest first.

    ``samples`` ``(N, C, H, W)``, ``neighbours`` ``(N, k, C, H, W)``, in [0, 1]; the grid is
    ``(3, H', W')``.
    """
    gap = torch.full_like(samples, 0.5).unsqueeze(1)
    rows = torch.cat([samples.unsqueeze(1), gap, neighbours.to(samples)], dim=1)
    return image_grid(rows.flatten(0, 1), columns=rows.shape[1])
