"""The sampler that the command line's options stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsgm.config.checks import require_at_most
from lsgm.errors import UserError
from lsgm.models.base import BATCH_SIZE, DiffusionModel, Model
from lsgm.solvers import SOLVERS, solver_parameters
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


@dataclass(frozen=True)
class SolverOptions:
    """How a score-based prior or model is sampled.

    Options that are None are the solver's own choice; one that the solver does not have is refused.
    """

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
    tolerance: float | None = None
    """Relative and absolute tolerance of adaptive solvers."""
    max_nfe: int | None = None
    """Most network evaluations of an adaptive solver, 10000 unless given: it stops with an error
    where a tolerance would need more."""
    order: int | None = None
    """Order of multistep solvers."""
    alpha: str | None = None
    """Weight of the non-Normal part in normal_reference: a number in [0, 1], or model (the model's
    mixing coefficients, one per channel)."""
    corrector: bool | None = None
    """Whether normal_reference and deis correct each step."""
    corrector_from: int | None = None
    """Fewest steps with which they do."""
    variable: str | None = None
    """Variable of the steps (euler, heun, rk4) or of the extrapolation (normal_reference, deis)."""
    variant: str | None = None
    """UniPC's bh1 or bh2."""
    lower_order_final: bool | None = None
    """Lower the order of multistep solvers in the last steps."""
    eta: float | None = None
    """Noise of ddim: 0 deterministic, 1 ancestral."""
    predictor: str | None = None
    """Predictor of predictor_corrector, discrete_pc: reverse_diffusion, euler_maruyama, ancestral,
    ..."""
    corrector_steps: int | None = None
    """Langevin steps of predictor_corrector, discrete_pc at each time."""
    snr: float | None = None
    """Signal-to-noise ratio of those steps."""
    norm: str | None = None
    """How those steps are scaled: image, batch or expected."""
    noise_scale: float | None = None
    """Factor on the predictor's noise."""
    steps_per_level: int | None = None
    """Langevin steps at each noise level (langevin)."""
    step_ratio: float | None = None
    """Size of those steps over the squared noise level (langevin)."""
    denoise: bool | None = None
    """End with the posterior mean of the data at time zero, one evaluation more. None: what a model
    of images recommends (true unless its configuration says otherwise); false for latents."""
    churn: float | None = None
    """Total amount of noise that edm_churn adds."""
    churn_min: float | None = None
    """Lowest noise level sigma / m at which it adds noise."""
    churn_max: float | None = None
    """Highest noise level sigma / m at which it adds noise."""
    churn_noise: float | None = None
    """Standard deviation of the added noise relative to the exact one (edm_churn)."""
    state_dtype: str | None = None
    """Precision of the solver's state: float64 or float32."""
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
            "step_ratio", "denoise", "max_nfe", "churn", "churn_min", "churn_max", "state_dtype",
        )
    },
}  # fmt: skip
"""Option of the command line -> arguments of the solver."""


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
