"""The report of the few-step benchmark: tables, JSON and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lsgm.benchmark.few_step_runner import FewStepResult, Measurement
from lsgm.system.files import atomic_write, atomic_write_json, atomic_write_text
from lsgm.system.markdown import markdown_table

__all__ = ["best", "comparison", "markdown", "write_report"]

DEFAULT = "normal_reference_pc"


def _value(one: Measurement) -> float:
    return math.inf if one.rms is None else one.rms


def best(
    rows: Iterable[Measurement], nfe: int, keep: Callable[[Measurement], bool]
) -> Measurement | None:
    """The nearest sampler among those kept that spent at most ``nfe`` calls."""
    found = [one for one in rows if one.nfe <= nfe and one.rms is not None and keep(one)]
    found = [one for one in found if one.nfe > 0.5 * nfe]
    return min(found, key=_value, default=None)


def _default(one: Measurement) -> bool:
    return one.solver == DEFAULT and one.grid == "sqrt_time"


def _fitted(one: Measurement) -> bool:
    return one.solver == DEFAULT and one.grid == "pilot, options fitted"


def _theirs(one: Measurement) -> bool:
    return one.family == "diffusers"


def comparison(result: FewStepResult) -> list[dict[str, Any]]:
    """For each number of calls: the default, the pilots' choice, and the best of diffusers; the
    factors are its error over ours.
    """
    lines = []
    for nfe in result.options["nfe"]:
        default, fitted, theirs = (
            best(result.rows, nfe, keep) for keep in (_default, _fitted, _theirs)
        )
        if default is None or fitted is None or theirs is None:
            continue
        lines.append(
            {
                "nfe": nfe,
                "default": default.rms,
                "pilot": fitted.rms,
                "pilot_nfe": fitted.pilot_nfe,
                "diffusers": theirs.rms,
                "diffusers_best": f"{theirs.solver} {theirs.grid}",
                "factor_default": _value(theirs) / _value(default),
                "factor_pilot": _value(theirs) / _value(fitted),
            }
        )
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _comparison_table(result: FewStepResult) -> str:
    header = (
        "NFE",
        "ours, default",
        "ours, pilot-chosen",
        "calls on the pilots",
        "best of diffusers",
        "which",
        "default: factor",
        "pilot: factor",
    )
    rows = [
        (
            str(line["nfe"]),
            _number(line["default"]),
            _number(line["pilot"]),
            str(line["pilot_nfe"]),
            _number(line["diffusers"]),
            line["diffusers_best"],
            f"{line['factor_default']:.1f}",
            f"{line['factor_pilot']:.1f}",
        )
        for line in comparison(result)
    ]
    return markdown_table(header, rows)


def _solver_table(result: FewStepResult, family: str) -> str:
    """Best grid of each solver of a family for each number of calls."""
    solvers = sorted({one.solver for one in result.rows if one.family == family})
    rows = []
    for solver in solvers:
        own = [m for m in result.rows if (m.family, m.solver) == (family, solver)]
        cells = []
        for nfe in result.options["nfe"]:
            one = best(own, nfe, lambda m: True)
            cells.append("" if one is None else f"{_number(one.rms)} [{one.grid}]")
        rows.append([solver, *cells])
    return markdown_table(["solver", *map(str, result.options["nfe"])], rows)


def _full_table(result: FewStepResult) -> str:
    """Every solver of ours on every grid."""
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for one in result.rows:
        if one.family in ("ours", "own"):
            rows.setdefault((one.solver, one.grid), {})[one.nfe] = _number(one.rms)
    columns = result.options["nfe"]
    return markdown_table(
        ["solver", "grid", *map(str, columns)],
        ([*key, *(cells.get(n, "") for n in columns)] for key, cells in sorted(rows.items())),
    )


def _ablation_table(result: FewStepResult) -> str:
    columns = sorted({one.nfe for one in result.ablation})
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for one in result.ablation:
        rows.setdefault((one.solver, one.grid), {})[one.nfe] = _number(one.rms)
    return markdown_table(
        ["method", "grid", *map(str, columns)],
        ([*key, *(cells.get(n, "") for n in columns)] for key, cells in rows.items()),
    )


def _quality_table(result: FewStepResult) -> str:
    names = list(result.reference_quality)
    rows = [
        ["exact flow", "", "", "", *(f"{result.reference_quality[name]:.4g}" for name in names)]
    ]
    for one in sorted(
        (one for one in result.rows if one.quality), key=lambda m: (m.nfe, m.family, m.solver)
    ):
        pixel = "" if one.pixel_rms is None else f"{one.pixel_rms:.4f}"
        figures = [f"{one.quality[name]:.4g}" for name in names]
        rows.append([f"{one.solver} ({one.family})", one.grid, str(one.nfe), pixel, *figures])
    return markdown_table(["sampler", "grid", "NFE", "pixel RMS", *names], rows)


def _overhead_table(result: FewStepResult) -> str:
    rows = []
    for one in result.overhead:
        network, share = "left out", ""
        if one.network_ms > 0:
            network, share = f"{one.network_ms:.2f}", f"{one.share:.2%}"
        rows.append(
            [one.solver, "x".join(map(str, one.batch)), f"{one.solver_ms:.3f}", network, share]
        )
    return markdown_table(
        ["solver", "batch", "ms a step beside the network", "ms a call", "share"], rows
    )


def markdown(result: FewStepResult) -> str:
    """The whole report."""
    options = result.options
    settings = [f"- {nfe}: `{text}`" for nfe, text in result.settings.items()]
    sections = [
        f"# Few-step sampling: {result.case}",
        f"RMS distance to the exact flow (dopri5, tolerance {options['tolerance']:g}, "
        f"{result.reference_nfe} network calls, float64 state) from the same "
        f"{options['samples']} starting points to t = {options['t_end']:g}. Pilots: "
        f"{options['pilots']} other starting points; their reference took "
        f"{result.pilot_reference_nfe} calls, which are counted.",
        "## Against diffusers",
        _comparison_table(result),
        "## Best grid of each Normal-reference solver",
        _solver_table(result, "ours"),
        "## Best grid of each other solver, our implementation",
        _solver_table(result, "own"),
        "## Best grid and options of each scheduler of diffusers",
        _solver_table(result, "diffusers"),
        "## What the gain is made of",
        _ablation_table(result),
        "## Sample quality",
        _quality_table(result),
        "## Cost beside the network",
        _overhead_table(result),
        "## Every solver on every grid",
        _full_table(result),
        "## What the pilots chose",
        "\n".join(settings),
    ]
    return "\n\n".join(sections) + "\n"


def _plots(result: FewStepResult, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = result.options["nfe"]
    styles = {"ours": "-", "own": ":", "diffusers": "--"}
    figure, axes = plt.subplots(figsize=(8, 6))
    for family, style in styles.items():
        for solver in sorted({one.solver for one in result.rows if one.family == family}):
            own = [one for one in result.rows if (one.family, one.solver) == (family, solver)]
            points = [(n, one.rms) for n in columns if (one := best(own, n, lambda _: True))]
            axes.loglog(*zip(*points, strict=True), style, marker=".", label=f"{solver} ({family})")
    for label, keep in {"default": _default, "pilot, options fitted": _fitted}.items():
        points = [(n, one.rms) for n in columns if (one := best(result.rows, n, keep))]
        axes.loglog(*zip(*points, strict=True), "k-", marker="os"[label != "default"], label=label)
    axes.set(xlabel="network calls", ylabel="RMS distance to the exact flow", title=result.case)
    axes.legend(fontsize=6, ncol=2)
    axes.grid(alpha=0.3, which="both")
    _save(figure, out / "error.png")
    plt.close(figure)

    names = list(result.reference_quality)
    figure, panels = plt.subplots(1, len(names), figsize=(7 * len(names), 5), squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for one in result.rows:
            if not one.quality:
                continue
            label = f"{one.solver} ({one.family})"
            if _default(one):
                label = "default"
            elif _fitted(one):
                label = "pilot, options fitted"
            lines.setdefault(label, {})[one.nfe] = one.quality[name]
        for label, values in sorted(lines.items()):
            axes.plot(*zip(*sorted(values.items()), strict=True), marker=".", label=label)
        axes.axhline(result.reference_quality[name], color="k", label="exact flow")
        axes.set(xlabel="network calls", ylabel=name, xscale="log", yscale="symlog")
        axes.legend(fontsize=6)
    _save(figure, out / "quality.png")
    plt.close(figure)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)


def write_report(result: FewStepResult, out: Path) -> str:
    """Write report.md, report.json, error.png and quality.png into ``out``; return the part of the
    report to print.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    atomic_write_text(out / "report.md", text)
    atomic_write_json(out / "report.json", {"comparison": comparison(result), **result.as_dict()})
    _plots(result, out)
    shown = text.split("## Best grid of each other solver")[0]
    return f"{shown}-> {out / 'report.md'}, report.json, error.png, quality.png"
