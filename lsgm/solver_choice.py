"""From the options of a command line to a solver and its times."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lsgm.errors import UserError
from lsgm.options import SolverOptions
from lsgm.protocols import DiffusionModel
from lsgm.solvers import (
    SOLVERS,
    AnnealedLangevin,
    EpsFn,
    Solver,
    choose_pilot,
    make_grid,
    make_solver,
)

__all__ = [
    "DEFAULT_SOLVER",
    "SOLVER_OPTIONS",
    "choose_solver",
    "resolve",
    "solver_arguments",
]

DEFAULT_SOLVER = "normal_reference_pc"
DEFAULT_NFE = 10
DEFAULT_T_END = 1e-3
PILOT_GRID = "pilot"
PILOT_IMAGES = 16
LADDER_GRID = "ladder"
MODEL_ALPHA = "model"

SOLVER_OPTIONS: dict[str, tuple[str, ...]] = {
    "tolerance": ("rtol", "atol"),
    "churn_noise": ("noise",),
    **{
        name: (name,)
        for name in (
            "order", "alpha", "corrector", "corrector_from", "variable", "variant",
            "lower_order_final", "eta",
            "predictor", "corrector_steps", "snr", "norm", "noise_scale", "steps_per_level",
            "step_ratio", "denoise", "churn", "churn_min", "churn_max", "state_dtype",
        )
    },
}  # fmt: skip
"""Option of the command line -> arguments of the solver."""


def _parameters(solver: str) -> set[str]:
    return set(inspect.signature(SOLVERS[solver]).parameters)


def solver_arguments(options: SolverOptions, score: EpsFn | None = None) -> dict[str, Any]:
    """The arguments of ``make_solver`` that ``options`` give.

    Raises:
        UserError: The solver is unknown or has no such option (naming those that have it), or
            ``alpha`` is neither a number nor something that the model has.
    """
    if options.solver not in SOLVERS:
        raise UserError(
            f"--solver: unknown solver {options.solver}; choose from {', '.join(SOLVERS)}"
        )
    own, arguments = _parameters(options.solver), dict[str, Any]()
    for option, names in SOLVER_OPTIONS.items():
        value = getattr(options, option)
        if value is None:
            continue
        if not own.issuperset(names):
            takers = [solver for solver in SOLVERS if _parameters(solver).issuperset(names)]
            raise UserError(
                f"--{option}: the solver {options.solver} has no such option; "
                f"it belongs to {', '.join(takers)}"
            )
        arguments |= dict.fromkeys(names, value)
    if "state_dtype" in arguments:
        arguments["state_dtype"] = getattr(torch, arguments["state_dtype"])
    if "alpha" in arguments:
        arguments["alpha"] = _alpha(arguments["alpha"], score)
    return arguments


def _alpha(text: str, score: EpsFn | None) -> float | Tensor:
    if text == MODEL_ALPHA:
        mixing = getattr(score, "non_normal", None)
        if mixing is None:
            raise UserError("--alpha: this model has no mixing coefficients; give a number")
        return cast(Tensor, mixing)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--alpha: {text!r} is neither a number nor {MODEL_ALPHA}") from None


def resolve(model: object, options: SolverOptions) -> tuple[SolverOptions, dict[str, Any]]:
    """The options with what they leave open filled in, and further arguments of the solver.

    Without a named solver it is the one that the model recommends (its ``defaults``), with its
    arguments, evaluations and grid; its last time holds for every solver. Models that recommend
    nothing take :data:`DEFAULT_SOLVER` down to :data:`DEFAULT_T_END`.
    """
    defaults = getattr(model, "defaults", None)
    t_end = options.t_end
    if t_end is None:
        t_end = DEFAULT_T_END if defaults is None else defaults.t_end
    if options.solver is not None or defaults is None:
        return replace(options, solver=options.solver or DEFAULT_SOLVER, t_end=t_end), {}
    filled = replace(
        options,
        solver=defaults.solver,
        nfe=options.nfe or defaults.nfe,
        grid=options.grid or defaults.grid,
        t_end=t_end,
    )
    return filled, dict(defaults.options)


def choose_solver(model: DiffusionModel, options: SolverOptions) -> tuple[Solver, Tensor]:
    """The solver of ``options`` and its time grid, float64, from 1 down to ``t_end``.

    Raises:
        UserError: The solver, the grid or an option is unknown, or the evaluations are too few.
    """
    adaptive_given = [name for name in ("nfe", "grid") if getattr(options, name) is not None]
    options, recommended = resolve(model, options)
    arguments = recommended | solver_arguments(options, model.score)
    assert options.solver is not None and options.t_end is not None
    try:
        solver = make_solver(options.solver, **arguments)
        if solver.evaluations(1) is None:
            for name in adaptive_given:
                raise UserError(
                    f"--{name}: {options.solver} is adaptive and chooses its own steps; "
                    "set --tolerance"
                )
            return solver, torch.tensor([1.0, options.t_end], dtype=torch.float64)
        if options.grid == LADDER_GRID:
            return _on_ladder(model, solver, options)
        nfe = options.nfe or DEFAULT_NFE
        if nfe < (least := solver.evaluations(1) or 1):
            raise UserError(f"--nfe: {options.solver} needs at least {least}, got {nfe}")
        if options.grid == PILOT_GRID:
            return _pilot(model, solver, nfe, options)
        grid = options.grid or solver.default_grid
        return solver, make_grid(grid, model.sde, solver.steps_for(nfe), options.t_end)
    except ValueError as error:
        raise UserError(f"--solver {options.solver}: {error}") from error


def _on_ladder(
    model: DiffusionModel, solver: Solver, options: SolverOptions
) -> tuple[Solver, Tensor]:
    """The model's own noise levels; their number is fixed, and with Langevin dynamics the
    evaluations are spread over them.
    """
    ladder = getattr(model, "ladder", None)
    if ladder is None:
        raise UserError("--grid: only models trained on a list of noise levels have a ladder")
    steps = len(ladder.times) - 1
    if isinstance(solver, AnnealedLangevin) and options.nfe and options.steps_per_level is None:
        solver = replace(solver, steps_per_level=max(1, options.nfe // (steps + 1)))
    return solver, ladder.times


def _pilot(
    model: DiffusionModel, solver: Solver, nfe: int, options: SolverOptions
) -> tuple[Solver, Tensor]:
    # Noise of its own, so that the images are those of the same times without a pilot.
    rng = torch.Generator().manual_seed(options.seed)
    shape = (PILOT_IMAGES, *model.state_shape)
    assert options.t_end is not None
    start = options.temperature * model.sde.prior_sample(shape, rng, device=model.device)
    return choose_pilot(model.sde, model.score, start, nfe, options.t_end, solver)
