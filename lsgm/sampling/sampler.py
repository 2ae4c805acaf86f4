"""The sampler that the command line's options stand for."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

import torch
from torch import Tensor

from lsgm.config.checks import require_at_most
from lsgm.errors import UserError
from lsgm.models.base import BATCH_SIZE, DiffusionModel, Model
from lsgm.solvers import SOLVERS, solver_parameters
from lsgm.solvers.options import solver_options
from lsgm.solvers.sampler import OptionError, Sampler

__all__ = [
    "SOLVER_OPTIONS",
    "Sampler",
    "SolverOptions",
    "build_any_sampler",
    "build_sampler",
    "given_solver_options",
    "solver_arguments",
    "solver_of",
]

MAX_COUNT = 1_000_000
"""Most evaluations, draws or rows that an option may ask for: more is a slip of the keyboard."""

MODEL_ALPHA = "model"

NOT_ON_COMMAND_LINE = {
    "keep_trajectory",  # which no file holds
    "backend",  # another solver's name
    "velocity_dtype",
    "levels",  # the model's
    "probability_flow",
    "clip",
    "variance",
}

OTHER_NAMES = {"rtol": "tolerance", "atol": "tolerance", "noise": "churn_noise"}
"""Argument of a solver -> option, where that is another word."""

ON_COMMAND_LINE = {
    "alpha": f"Here a number, or {MODEL_ALPHA} (the model's mixing coefficients, one per channel).",
    "denoise": "None: what a model of images recommends (true unless its configuration says "
    "otherwise); false for latents.",
    "state_dtype": "float64 or float32.",
}
"""What is particular to an option here; all else is said where the solver is."""


def _arguments_of_options() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name in solver_options():
        if name not in NOT_ON_COMMAND_LINE:
            option = OTHER_NAMES.get(name, name)
            found[option] = (*found.get(option, ()), name)
    return found


SOLVER_OPTIONS = _arguments_of_options()
"""Option of the command line -> arguments of the solver."""


def _fields_of_options() -> list[tuple[str, Any, Any]]:
    """A field for each of :data:`SOLVER_OPTIONS`; None is the solver's own choice."""
    found = []
    for option, (name, *_) in SOLVER_OPTIONS.items():
        argument = solver_options()[name]
        text = f"{argument.help} {ON_COMMAND_LINE.get(option, '')}".strip()
        found.append((option, argument.type | None, field(default=None, metadata={"help": text})))
    return found


# Any: which options there are is known at run time only.
SolverArguments: Any = make_dataclass("SolverArguments", _fields_of_options(), frozen=True)


@dataclass(frozen=True)
class SamplerOptions:
    """What is asked of any sampler; None is the model's or the solver's own choice."""

    solver: str | None = None
    """Solver by name: normal_reference_pc, dopri5 (adaptive), heun, ... (lsgm.solvers.SOLVERS).
    None: what a model of images recommends, but normal_reference_pc where nfe is at most a tenth of
    its evaluations or grid is pilot; normal_reference_pc for an LSGM. Any solver takes what
    a model of images recommends for it (t_end, denoise, snr, ...) unless given here."""
    nfe: int | None = None
    """Network evaluations per batch, 10 unless the model recommends otherwise; adaptive solvers
    choose their own number."""
    grid: str | None = None
    """Time grid of solvers with fixed steps, by name (lsgm.solvers.GRIDS); pilot: chosen on a few
    pilot trajectories; ladder: the noise levels of an NCSN. None: the solver's own."""
    t_end: float | None = None
    """Last time of the generative process; time runs from 1 down to it. None: the model's, or
    0.001."""


@dataclass(frozen=True)
class SolverOptions(SolverArguments, SamplerOptions):
    """How a score-based prior or model is sampled.

    Options that are None are the solver's own choice; one that the solver does not have is refused.
    """

    temperature: float = 1.0
    """Standard deviation of the starting noise (in units of the prior's) and of latents outside the
    prior."""
    batch_size: int = BATCH_SIZE
    """Images at a time. Every image has its own noise, so the images do not depend on it, except
    with adaptive solvers and norm batch, whose steps are shared by a batch."""
    seed: int = 0
    """Seed of all noise."""

    def __post_init__(self) -> None:
        for name in ("nfe", "tolerance", "max_nfe", "temperature", "batch_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, not {value}")
        require_at_most(self, MAX_COUNT, "nfe batch_size corrector_steps steps_per_level")
        if self.t_end is not None and not 0 <= self.t_end < 1:
            raise ValueError(f"t_end: must lie in [0, 1), not {self.t_end}")
        if self.seed < 0:
            raise ValueError(f"seed: must not be negative, not {self.seed}")
        if self.state_dtype not in (None, "float32", "float64"):
            raise ValueError(f"state_dtype: must be float32 or float64, not {self.state_dtype}")


def given_solver_options(options: SolverOptions) -> list[str]:
    """The options given that only a solver can use."""
    names = ("solver", "nfe", "grid", "t_end", *SOLVER_OPTIONS)
    return [name for name in names if getattr(options, name) is not None]


def solver_arguments(solver: str, options: SolverOptions, mixing: Tensor | None) -> dict[str, Any]:
    """The arguments of the solver of that name that ``options`` give.

    Raises:
        UserError: The solver is unknown or has no such option (naming those that have it), or
            ``alpha`` is neither a number nor something that the model has (``mixing``).
    """
    own, arguments = _parameters(solver), dict[str, Any]()
    for option, names in SOLVER_OPTIONS.items():
        value = getattr(options, option)
        if value is None:
            continue
        if not own.issuperset(names):
            takers = [name for name in SOLVERS if _parameters(name).issuperset(names)]
            raise UserError(
                f"--{option}: the solver {solver} has no such option; "
                f"it belongs to {', '.join(takers)}"
            )
        arguments |= dict.fromkeys(names, value)
    if "state_dtype" in arguments:
        arguments["state_dtype"] = getattr(torch, arguments["state_dtype"])
    if "alpha" in arguments:
        arguments["alpha"] = _alpha(arguments["alpha"], mixing)
    return arguments


def _parameters(solver: str) -> set[str]:
    if solver not in SOLVERS:
        raise UserError(f"--solver: unknown solver {solver}; choose from {', '.join(SOLVERS)}")
    return set(solver_parameters(solver))


def _alpha(text: str, mixing: Tensor | None) -> float | Tensor:
    if text == MODEL_ALPHA:
        if mixing is None:
            raise UserError("--alpha: this model has no mixing coefficients; give a number")
        return mixing
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--alpha: {text!r} is neither a number nor {MODEL_ALPHA}") from None


def build_sampler(model: DiffusionModel, options: SolverOptions) -> Sampler:
    """The sampler of ``options``, its times fixed.

    Raises:
        UserError: The solver, the grid or an option is unknown or would have no effect, the
            evaluations are too few, or the solver cannot go down to ``t_end``.
    """
    solver = solver_of(model, options)
    arguments = solver_arguments(solver, options, model.mixing)
    try:
        return model.sampler(
            options.solver,
            nfe=options.nfe,
            grid=options.grid,
            t_end=options.t_end,
            temperature=options.temperature,
            seed=options.seed,
            **arguments,
        )
    except OptionError as error:
        raise UserError(f"--{error}") from error
    except ValueError as error:
        raise UserError(f"--solver {solver}: {error}") from error


def solver_of(model: DiffusionModel, options: SolverOptions) -> str:
    """Name of the solver that ``options`` mean for the model."""
    of_solver = [name for name in SOLVER_OPTIONS if getattr(options, name) is not None]
    return options.solver or model.defaults.solver_for(options.nfe, options.grid, of_solver)


def build_any_sampler(model: Model, options: SolverOptions) -> Sampler | None:
    """:func:`build_sampler` of a model that a solver samples; None for the others."""
    return None if model.diffusion is None else build_sampler(model.diffusion, options)
