"""Options of the scripts that use a trained run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lsgm.config.checks import require_at_most
from lsgm.errors import UserError
from lsgm.models.base import DiffusionModel
from lsgm.sde import VESDE, LinearSDE
from lsgm.solvers import (
    SOLVERS,
    AnnealedLangevin,
    EpsFn,
    PredictorCorrector,
    Solver,
    choose_pilot,
    make_grid,
    make_solver,
    solver_parameters,
)

__all__ = [
    "DEFAULT_SOLVER",
    "SOLVER_OPTIONS",
    "SolverOptions",
    "choose_solver",
    "few_step_grid",
    "given_solver_options",
    "resolve",
    "solver_arguments",
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
    batch_size: int = 64
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


DEFAULT_SOLVER = "normal_reference_pc"


DEFAULT_NFE = 10


DEFAULT_T_END = 1e-3


PILOT_GRID = "pilot"


PILOT_IMAGES = 16


LADDER_GRID = "ladder"


MODEL_ALPHA = "model"


PUBLISHED_SOLVERS = ("discrete_pc", "ddpm")


FEW_STEP_SHARE = 10
"""Our few-step solver is meant with fewer evaluations than a published sampler takes, which is made
for its own number, and with this share of what another stochastic sampler recommends."""


FINE_NFE = 20
"""Up to so many evaluations a variance-exploding model's time is best spent where the noise is as
large as the data (docs/few_step/images.md); from then on evenly in ln(sigma)."""


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


def solver_arguments(options: SolverOptions, score: EpsFn | None = None) -> dict[str, Any]:
    """The arguments of ``make_solver`` that ``options`` give.

    Raises:
        UserError: The solver is unknown or has no such option (naming those that have it), or
            ``alpha`` is neither a number nor something that the model has.
    """
    assert options.solver is not None
    own, arguments = _parameters(options.solver), dict[str, Any]()
    for option, names in SOLVER_OPTIONS.items():
        value = getattr(options, option)
        if value is None:
            continue
        if not own.issuperset(names):
            takers = [name for name in SOLVERS if _parameters(name).issuperset(names)]
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


def _parameters(solver: str) -> set[str]:
    if solver not in SOLVERS:
        raise UserError(f"--solver: unknown solver {solver}; choose from {', '.join(SOLVERS)}")
    return set(solver_parameters(solver))


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

    Without a named solver it is the one that the model recommends (its ``defaults``). Any solver
    takes the model's last time and, of its recommended arguments, those that it has; the
    recommended solver, named or not, also its evaluations and grid. Models that recommend nothing
    take :data:`DEFAULT_SOLVER` down to :data:`DEFAULT_T_END`, and so do models of images that
    recommend noise and many evaluations where few are asked for (:func:`_means_few_steps`).

    Raises:
        UserError: The solver is unknown.
    """
    defaults = getattr(model, "defaults", None)
    if defaults is None:
        t_end = DEFAULT_T_END if options.t_end is None else options.t_end
        return replace(options, solver=options.solver or DEFAULT_SOLVER, t_end=t_end), {}
    if _means_few_steps(defaults, options):
        return _few_steps(model, options)
    solver = options.solver or defaults.solver
    _parameters(solver)
    t_end = defaults.t_end if options.t_end is None else options.t_end
    filled = replace(options, solver=solver, t_end=t_end)
    if solver == defaults.solver:
        filled = replace(
            filled, nfe=options.nfe or defaults.nfe, grid=options.grid or defaults.grid
        )
    return filled, defaults.options_of(solver)


def _means_few_steps(defaults: Any, options: SolverOptions) -> bool:
    """Whether the evaluations or the grid asked for are none for the recommended sampler, which
    draws noise, and nothing else says that it is meant.
    """
    own_of_none = {"nfe", "grid", "t_end", "denoise", "state_dtype"}
    if not own_of_none.issuperset(given_solver_options(options)):
        return False
    try:
        own = make_solver(defaults.solver, **defaults.options_of(defaults.solver))
    except ValueError:
        return False  # which is said where it is used
    if not own.stochastic:
        return False
    share = 1 if defaults.solver in PUBLISHED_SOLVERS else FEW_STEP_SHARE
    few = options.nfe is not None and options.nfe < defaults.nfe / share
    return options.grid != LADDER_GRID and (few or options.grid == PILOT_GRID)


def few_step_grid(sde: LinearSDE, nfe: int) -> str | None:
    """Grid of :data:`DEFAULT_SOLVER` on the diffusion of images; None: its own."""
    if not isinstance(sde, VESDE):
        return None
    return "phi" if nfe <= FINE_NFE else "log_snr"


def _few_steps(model: Any, options: SolverOptions) -> tuple[SolverOptions, dict[str, Any]]:
    """:data:`DEFAULT_SOLVER` on the model's time."""
    defaults, nfe = model.defaults, options.nfe or DEFAULT_NFE
    last = torch.tensor([defaults.t_end], dtype=torch.float64)
    t_end = defaults.t_end if model.sde.var(last).item() > 0 else DEFAULT_T_END
    grid = options.grid or few_step_grid(model.sde, nfe)
    filled = replace(
        options,
        solver=DEFAULT_SOLVER,
        nfe=nfe,
        grid=grid,
        t_end=t_end if options.t_end is None else options.t_end,
    )
    return filled, defaults.options_of(DEFAULT_SOLVER)


def choose_solver(model: DiffusionModel, options: SolverOptions) -> tuple[Solver, Tensor]:
    """The solver of ``options`` and its time grid, float64, from 1 down to ``t_end``.

    Raises:
        UserError: The solver, the grid or an option is unknown or would have no effect, the
            evaluations are too few, or the solver cannot go down to ``t_end``.
    """
    given = [name for name in given_solver_options(options) if name != "solver"]
    options, recommended = resolve(model, options)
    arguments = recommended | solver_arguments(options, model.score)
    assert options.solver is not None and options.t_end is not None
    try:
        solver = make_solver(options.solver, **arguments)
        _refuse_idle(solver, options, given)
        # Before anything is computed: a time without noise suits few solvers.
        ends = solver.check(model.sde, torch.tensor([1.0, options.t_end], dtype=torch.float64))
        if solver.evaluations(1) is None:
            return solver, ends
        if options.grid == LADDER_GRID:
            return _on_ladder(model, solver, options, given)
        nfe = options.nfe or DEFAULT_NFE
        if nfe < (least := solver.evaluations(1) or 1):
            raise UserError(f"--nfe: {options.solver} needs at least {least}, got {nfe}")
        if options.grid == PILOT_GRID:
            return _pilot(model, solver, nfe, options)
        grid = options.grid or solver.default_grid
        return solver, make_grid(grid, model.sde, solver.steps_for(nfe), options.t_end)
    except ValueError as error:
        raise UserError(f"--solver {options.solver}: {error}") from error


def _refuse_idle(solver: Solver, options: SolverOptions, given: list[str]) -> None:
    """Refuse options of the solver that would have no effect on it.

    Raises:
        UserError: One of the ``given`` options is such.
    """
    if solver.evaluations(1) is None and (idle := {"nfe", "grid"}.intersection(given)):
        raise UserError(
            f"--{min(idle)}: {options.solver} is adaptive and chooses its own steps; set "
            "--tolerance"
        )
    if isinstance(solver, PredictorCorrector) and solver.corrector_steps == 0:
        for name in {"snr", "norm"}.intersection(given):
            raise UserError(
                f"--{name}: {options.solver} takes no corrector steps that it could scale; give "
                "--corrector_steps 1 as well"
            )


def _on_ladder(
    model: DiffusionModel, solver: Solver, options: SolverOptions, given: list[str]
) -> tuple[Solver, Tensor]:
    """The model's own noise levels; their number is fixed, and with Langevin dynamics the
    evaluations are spread over them.
    """
    ladder = getattr(model, "ladder", None)
    if ladder is None:
        raise UserError("--grid: only models trained on a list of noise levels have a ladder")
    if "t_end" in given:
        raise UserError("--t_end: the ladder ends at its last level; choose another --grid")
    levels = len(ladder.times)
    if "nfe" in given:
        if not isinstance(solver, AnnealedLangevin) or "steps_per_level" in given:
            cost = solver.evaluations(levels - 1)
            raise UserError(
                f"--nfe: on the {levels} levels of the ladder this sampler takes {cost} "
                "evaluations; leave it out, or choose another --grid"
            )
        if options.nfe is not None and options.nfe < levels:
            raise UserError(f"--nfe: {levels} noise levels need at least as many evaluations")
    if isinstance(solver, AnnealedLangevin) and options.nfe and options.steps_per_level is None:
        solver = replace(solver, steps_per_level=options.nfe // levels)
    solver.check(model.sde, ladder.times)
    return solver, ladder.times


def _pilot(
    model: DiffusionModel, solver: Solver, nfe: int, options: SolverOptions
) -> tuple[Solver, Tensor]:
    # Noise of its own, so that the images are those of the same times without a pilot.
    rng = torch.Generator().manual_seed(options.seed)
    assert options.t_end is not None
    start = model.prior_start(PILOT_IMAGES, rng, options.temperature, solver)
    return choose_pilot(model.sde, model.score, start, nfe, options.t_end, solver)
