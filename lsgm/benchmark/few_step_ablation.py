"""What the gain of the few-step default is made of, and other methods on our grids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lsgm.benchmark.few_step_runner import Bench, Measurement, PilotFits, run_theirs
from lsgm.benchmark.reference_samplers import METHODS, ReferenceSampler
from lsgm.solvers import Solver, make_grid, make_solver

__all__ = ["ablation_rows"]

DEFAULT = "normal_reference_pc"
ABLATION = "ablation"


def ablation_rows(bench: Bench, pilots: PilotFits, nfe: int) -> Iterator[Measurement]:
    """What the gain is made of, one change a line, and other methods on our grids."""
    case = bench.case

    def row(label: str, grid: str, solver: Solver, times: Tensor) -> Measurement:
        x, calls = bench.ours(solver, times)
        return Measurement(ABLATION, label, grid, calls, bench.rms(x, case.t_end))

    def on(grid: str, solver: Solver) -> Tensor:
        return make_grid(grid, case.sde, solver.steps_for(nfe), case.t_end)

    def ab(**options: Any) -> Solver:
        return make_solver("normal_reference", **options)

    pc = {"corrector": True, "order": 3}
    lines: list[tuple[str, Solver]] = [
        ("DDIM", make_solver("ddim")),
        ("order 2 (eps extrapolated in phi)", ab(alpha=1.0, order=2)),
        ("order 3", ab(alpha=1.0, order=3)),
        *(
            (f"order 3, extrapolated in {v}", ab(alpha=1.0, order=3, variable=v))
            for v in ("log_snr", "sqrt_time", "time", "sigma")
        ),
        ("order 3, Normal reference (alpha 0.02)", ab(order=3)),
        ("order 2, Normal reference", ab(order=2)),
        ("order 3, Normal reference of the pilots' alpha", ab(order=3, alpha=pilots.pilot.alpha)),
        ("order 3, corrector, no Normal reference", ab(alpha=1.0, **pc)),
        ("order 3, corrector, Normal reference", ab(**pc)),
        ("the same, lower order at the end", ab(lower_order_final=True, **pc)),
        ("the same without Normal reference", ab(alpha=1.0, lower_order_final=True, **pc)),
        ("default (corrector from 4 steps on)", make_solver(DEFAULT)),
        ("default, alpha 0.3", make_solver(DEFAULT, alpha=0.3)),
        ("default, the pilots' alpha", make_solver(DEFAULT, alpha=pilots.pilot.alpha)),
        ("default, state in float32", make_solver(DEFAULT, state_dtype=torch.float32)),
    ]
    if case.alpha is not None:
        lines.append(("default, the model's alpha", make_solver(DEFAULT, alpha=case.alpha)))
    yield row("DDIM", "time", lines[0][1], on("time", lines[0][1]))
    for label, solver in lines:
        yield row(label, "sqrt_time", solver, on("sqrt_time", solver))
    default = make_solver(DEFAULT)
    fits = {
        "default": pilots.fit(DEFAULT, default, nfe),
        "default, no Normal reference": pilots.fit("alpha 1", make_solver(DEFAULT, alpha=1.0), nfe),
        "options fitted": pilots.fit(DEFAULT, default, nfe, options=True),
    }
    for label, fit in fits.items():
        yield row(label, "pilot grid of its own", fit.solver, fit.times)

    ours = fits["default"].times
    for name in METHODS:
        solver = make_solver(name)
        own = pilots.fit(name, solver, nfe).times
        grids = {"sqrt_time": on("sqrt_time", solver), "our pilot grid": ours}
        grids["pilot grid of its own"] = own
        for grid, times in grids.items():
            if len(times) - 1 == solver.steps_for(nfe):
                yield row(f"{name} (own implementation)", grid, solver, times)
            sampler = ReferenceSampler(name, "karras" if name == "ddim" else "linspace")
            x, end = run_theirs(bench, sampler, nfe, times) if len(times) == nfe + 1 else (None, 0)
            if x is not None:
                yield Measurement(ABLATION, f"{name} (diffusers)", grid, nfe, bench.rms(x, end))
