"""Learning curves from a run's log."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsgm.system.files import atomic_write, read_log_line

__all__ = [
    "learning_curves",
    "read_metrics",
]


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
    training minutes, one after the other. ``num_dims``: values of an image, of grey or colour
    data, which are shown in bits/dim, with their nats at a second axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unit = 1.0 if num_dims is None else num_dims * math.log(2)
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
            x, nats = zip(*points, strict=True)
            y = [value / unit for value in nats]
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
    axes.set_ylabel(ylabel if num_dims is None else "bits/dim")
    if num_dims is not None:
        scale = (lambda bits: bits * unit, lambda nats: nats / unit)
        axes.secondary_yaxis("right", functions=scale).set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
