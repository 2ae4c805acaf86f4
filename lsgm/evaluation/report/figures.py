"""Pictures: image grids, learning curves, and the plots of a report."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsgm.system.files import atomic_write

__all__ = [
    "Series",
    "bound_plot",
    "decomposition_plot",
    "quality_plot",
]


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
