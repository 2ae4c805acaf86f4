"""Score models in data space: NCSN (arXiv 1907.05600) and score-SDE models (arXiv 2011.13456).

``DataSGM`` diffuses the images themselves where :class:`lsgm.models.latent.LSGM` diffuses latents,
with the same SDEs, objectives, solvers and run folders. Both kinds of it are a noise prediction
under a linear SDE: NCSN's geometric noise levels lie evenly in the time of a variance-exploding SDE
(:mod:`lsgm.noise_ladder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.conditioning import classifier_free
from lsgm.config.architecture import SamplerConfig, ScoreModelConfig
from lsgm.data.pixels import Pixels
from lsgm.data.spec import DataSpec
from lsgm.discrete_noise import BetaTable
from lsgm.errors import UserError
from lsgm.models.release import section
from lsgm.networks.data_score import DataScore
from lsgm.networks.ncsn import NCSN
from lsgm.noise_ladder import NoiseLadder, select_step
from lsgm.registry import NETWORKS
from lsgm.sde import VESDE, VPSDE, LinearSDE, make_sde
from lsgm.solvers import (
    AnnealedLangevin,
    EpsFn,
    Hook,
    Solution,
    Solver,
    make_grid,
    make_solver,
    solver_parameters,
)
from lsgm.system.memory import build_within_memory
from vae.random import Rng, rand

__all__ = [
    "DATA_KINDS",
    "DataSGM",
    "SamplerDefaults",
    "build_data_model",
    "build_sde",
    "data_model_of",
]

DATA_KINDS = ("ncsn", "score_sde")


OWN_OPTIONS = frozenset({"predictor", "corrector_steps"})


@dataclass(frozen=True)
class SamplerDefaults:
    """The sampler that a model recommends: names and numbers as the command line takes them.

    ``grid`` ``ladder`` is the model's own noise levels. ``options`` are arguments of solvers, of
    which each solver, the recommended one and any other, takes those that it has
    (:meth:`options_of`).
    """

    solver: str
    nfe: int
    grid: str
    t_end: float
    options: dict[str, Any]

    def options_of(self, solver: str) -> dict[str, Any]:
        """The recommended arguments that the solver of that name has; what makes one predictor-
        corrector another (:data:`OWN_OPTIONS`) is the recommended solver's alone.
        """
        own = set(solver_parameters(solver))
        if solver != self.solver:
            own -= OWN_OPTIONS
        return {name: value for name, value in self.options.items() if name in own}


class DataSGM(nn.Module):
    """A score model of images.

    Args:
        kind: ``"ncsn"`` or ``"score_sde"``.
        score: the noise prediction, ``(x_t, t)`` or ``(x_t, t, labels)`` to ``eps``.
        sde: the diffusion; ``ladder``: the noise levels of NCSN, None for a score-SDE model.
        pixels: the map between images and what is diffused.
        config: the architecture; ``sampler``: the recommended sampler.
    """

    def __init__(
        self,
        kind: str,
        score: nn.Module,
        sde: LinearSDE,
        ladder: NoiseLadder | None,
        pixels: Pixels,
        config: ScoreModelConfig,
        sampler: SamplerConfig,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.score = score
        self.sde = sde
        self.ladder = ladder
        self.pixels = pixels
        self.config = config
        self.sampler = sampler

    def describe(self) -> dict[str, Any]:
        """What :func:`lsgm.load` needs to rebuild the architecture."""
        return {
            "score": asdict(self.config),
            "sampler": asdict(self.sampler),
            "spec": asdict(self.spec),
        }

    def with_score(self, score: nn.Module) -> DataSGM:
        """The same model with another score network (the running average, say)."""
        return DataSGM(
            self.kind, score, self.sde, self.ladder, self.pixels, self.config, self.sampler
        )

    @property
    def spec(self) -> DataSpec:
        return self.pixels.spec

    @property
    def num_classes(self) -> int | None:
        """Classes that the network can be told; None if it takes none."""
        return self.spec.num_classes if self.config.class_conditional else None

    @property
    def levels(self) -> NoiseLadder | BetaTable | None:
        """The noise levels at which the model is trained; None: in continuous time."""
        number = self.config.discrete_levels
        if self.ladder is not None or number is None:
            return self.ladder
        if isinstance(self.sde, VESDE):
            return NoiseLadder.of(self.sde, number)
        assert isinstance(self.sde, VPSDE)
        return BetaTable.of(self.sde, number)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # The state of the diffusion, in the words that LSGM uses for its latents

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of what is diffused: the images without padding."""
        return self.pixels.shape

    def encode_state(
        self, x: Tensor, rng: Rng = None, *, mean: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """From ``x (B, C, R, R)`` in [-1, 1], padded or not, to the state ``(B, *state_shape)``;
        with ``mean`` without dequantisation noise. The list, finer latents, is empty.
        """
        return self.pixels.to_network((x + 1) / 2, rng, noise=not mean), []

    def sample_finer(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """Nothing: there are no finer latents."""
        return []

    def decode_state(self, state: Tensor, finer: Sequence[Tensor] = (), rng: Rng = None) -> Tensor:
        """Images in [0, 1] from the state; nothing is drawn."""
        return self.to_images(state).clamp(0, 1)

    def to_images(self, y: Tensor) -> Tensor:
        """From the state ``(B, C, H, W)`` to images, in [0, 1] up to the model's own error."""
        return self.pixels.to_images(y.float())

    def prior_start(
        self, num: int, rng: Rng, temperature: float = 1.0, solver: Solver | None = None
    ) -> Tensor:
        """Where generation by ``solver`` starts, at ``t = 1``: ``(num, *state_shape)``.

        A sample of the SDE's prior, but for Langevin dynamics uniform noise over the data's range
        if the run says so (arXiv 1907.05600 appendix B, 2006.09011 appendix B): they reach the
        largest level's law from anywhere, other solvers do not.
        """
        shape = (num, *self.state_shape)
        if self.sampler.start == "uniform" and isinstance(solver, AnnealedLangevin):
            low, high = self.pixels.limits
            return temperature * (low + (high - low) * rand(shape, rng, device=self.device))
        return temperature * self.sde.prior_sample(shape, rng, device=self.device)

    def eps_fn(self, labels: Tensor | None = None, guidance: float = 1.0) -> EpsFn:
        """The noise prediction as solvers take it.

        ``labels``: ``(B,)``, int64, the class of each image; None: no class. ``guidance``: the
        scale of :func:`lsgm.conditioning.classifier_free`; 1 is the conditional model.

        Raises:
            UserError: The model takes no class, or has no such class.
        """
        if labels is None:
            return self.score
        classes = self.num_classes
        if classes is None:
            raise UserError("this model was trained without classes (score.class_conditional)")
        labels = labels.to(self.device)
        if labels.numel() and not (labels.min() >= 0 and labels.max() < classes):
            raise UserError(f"this model has the classes 0 to {classes - 1}")
        return classifier_free(self.score, labels, guidance)

    # Sampling

    @property
    def defaults(self) -> SamplerDefaults:
        """The recommended sampler."""
        given, is_ncsn = self.sampler, self.ladder is not None
        solver = given.solver or ("langevin" if is_ncsn else "predictor_corrector")
        nfe = given.nfe or 200
        names = ("snr", "norm", "denoise", "clip", "variance")
        options: dict[str, Any] = {name: getattr(given, name) for name in names}
        if given.predictor is not None:
            options["predictor"] = None if given.predictor == "none" else given.predictor
        if given.corrector_steps is not None:
            options["corrector_steps"] = given.corrector_steps
        if self.levels is not None:
            options["levels"] = self.levels.num_levels
        if solver == "langevin":
            options |= self._langevin_options()
            levels = self.ladder.num_levels if self.ladder else 1
            nfe = levels * options["steps_per_level"] + given.denoise
        grid = given.grid or ("ladder" if is_ncsn else make_solver(solver).default_grid)
        t_end = given.t_end
        if t_end is None:
            t_end = 0.0 if is_ncsn else max(1e-3, self.sde.time_eps)
        return SamplerDefaults(solver, nfe, grid, t_end, options)

    def _langevin_options(self) -> dict[str, Any]:
        if self.ladder is None:
            raise UserError("sampler.solver: langevin needs the noise levels of kind ncsn")
        levels, given = self.ladder.num_levels, self.sampler
        steps = max(1, (given.nfe or 100 * levels) // levels)
        ratio = given.step_ratio or select_step(self.ladder, steps).step_ratio
        return {"steps_per_level": steps, "step_ratio": ratio}

    def default_solver(self) -> tuple[Solver, Tensor]:
        """The recommended sampler as a solver and its times.

        Raises:
            UserError: The run's sampler section does not fit.
        """
        try:
            chosen = self.defaults
            solver = make_solver(chosen.solver, **chosen.options_of(chosen.solver))
        except ValueError as error:
            raise UserError(f"sampler: {error}") from error
        return solver, self.times_of(solver)

    def times_of(self, solver: Solver) -> Tensor:
        """The recommended times for ``solver``: the evaluations, the grid (if the run leaves it
        open, the solver's own) and the last time of the run's sampler.

        Raises:
            UserError: The run's sampler section does not fit.
        """
        try:
            chosen = self.defaults
            grid = self.sampler.grid or (solver.default_grid if self.ladder is None else "ladder")
            if solver.evaluations(1) is None:
                times = torch.tensor([1.0, chosen.t_end], dtype=torch.float64)
            elif grid != "ladder":
                times = make_grid(grid, self.sde, solver.steps_for(chosen.nfe), chosen.t_end)
            elif self.ladder is not None:
                times = self.ladder.times
            else:
                raise ValueError("only kind ncsn has a ladder")
            return solver.check(self.sde, times)
        except ValueError as error:
            raise UserError(f"sampler: {error}") from error

    @torch.no_grad()
    def sample(
        self,
        num: int,
        rng: Rng = None,
        *,
        solver: Solver | None = None,
        times: Tensor | None = None,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        hooks: Sequence[Hook] = (),
        temperature: float = 1.0,
        callback: Any = None,
    ) -> Solution:
        """Draw ``num`` states; :meth:`decode_state` makes images of them.

        ``solver`` replaces the recommended one and ``times`` its times; a solver without times
        takes those of :meth:`times_of`. ``labels`` and ``guidance`` are those of :meth:`eps_fn`.
        """
        if solver is None:
            solver = self.default_solver()[0]
        if times is None:
            times = self.times_of(solver)
        start = self.prior_start(num, rng, temperature, solver)
        eps = self.eps_fn(labels, guidance)
        return solver.solve(self.sde, eps, start, times, rng=rng, hooks=hooks, callback=callback)


def build_sde(kind: str, config: ScoreModelConfig) -> tuple[LinearSDE, NoiseLadder | None]:
    """The diffusion of a model of that kind, and its noise levels if it has some.

    Raises:
        UserError: Values of the data that are still to be filled in
            (:func:`lsgm.training.runs.images.fit_noise`), or out of range.
    """
    if kind != "ncsn":
        return make_sde(**asdict(config.sde)), None
    ladder = config.ladder
    if ladder.sigma_max is None or ladder.levels is None:
        raise UserError("score.ladder: sigma_max and levels have to be known to build the model")
    built = NoiseLadder(ladder.sigma_max, ladder.sigma_min, ladder.levels)
    return built.sde(), built


def build_data_model(
    kind: str, config: ScoreModelConfig, sampler: SamplerConfig, spec: DataSpec
) -> DataSGM:
    """The score model of ``config`` for the images of ``spec``.

    Raises:
        UserError: It does not fit the images, or classes are asked for and the data have none.
    """
    pixels = Pixels.of(spec, config.data_range, config.dequantise)
    if config.class_conditional and not spec.num_classes:
        raise UserError(f"score.class_conditional: {spec.name} has no classes")
    sde, ladder = build_sde(kind, config)
    if kind == "ncsn" and (config.discrete_levels or config.condition == "index"):
        raise UserError("score.discrete_levels: kind ncsn has the levels of score.ladder")
    channels, size, _ = pixels.shape
    try:
        network_class = NETWORKS[config.network]
        section_of = getattr(config, config.network, None)
        options = {} if section_of is None else asdict(section_of)
        if network_class is NCSN:
            if ladder is None:
                raise ValueError(f"{config.network} needs the noise levels of kind ncsn")
            levels, centred = ladder, config.centre_input
            score: nn.Module = build_within_memory(
                lambda: NCSN(channels, size, levels, centre_input=centred, **options),
                f"score.{config.network}",
            )
        else:
            num_classes = (spec.num_classes or 0) if config.class_conditional else 0
            network = build_within_memory(
                lambda: network_class(channels, size, num_classes=num_classes, **options),
                f"score.{config.network}",
            )
            score = DataScore(
                network,
                sde,
                config.condition,
                config.data_std,
                config.discrete_levels,
                config.centre_input,
            )
    except ValueError as error:
        raise UserError(f"score.{config.network}: {error}") from error
    model = DataSGM(kind, score, sde, ladder, pixels, config, sampler)
    try:
        _ = model.levels
    except ValueError as error:
        raise UserError(f"score.discrete_levels: {error}") from error
    return model


def data_model_of(description: dict[str, Any], spec: DataSpec) -> DataSGM:
    """The model of a run's description.

    Raises:
        TypeError, KeyError, ValueError: It does not fit.
    """
    config = section(ScoreModelConfig, description["score"])
    sampler = section(SamplerConfig, description["sampler"])
    return build_data_model(description["kind"], config, sampler, spec)
