"""Score models in data space: NCSN (arXiv 1907.05600) and score-SDE models (arXiv 2011.13456).

``DataSGM`` diffuses the images themselves where :class:`lsgm.models.latent.LSGM` diffuses latents,
with the same SDEs, objectives, solvers and run folders. Both kinds of it are a noise prediction
under a linear SDE: NCSN's geometric noise levels lie evenly in the time of a variance-exploding SDE
(:mod:`lsgm.noise_ladder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from lsgm.config.architecture import SamplerConfig, ScoreModelConfig
from lsgm.data.pixels import Pixels
from lsgm.data.spec import DataSpec
from lsgm.discrete_noise import BetaTable
from lsgm.divergence import make_divergence
from lsgm.errors import UserError
from lsgm.models.base import DiffusionModel
from lsgm.models.image_likelihood import ode_data_likelihood
from lsgm.models.release import section
from lsgm.models.results import SamplerDefaults
from lsgm.networks.data_score import DataScore
from lsgm.networks.layers import resolution
from lsgm.networks.ncsn import NCSN
from lsgm.noise_ladder import NoiseLadder, select_step
from lsgm.registry import NETWORKS
from lsgm.sde import VESDE, VPSDE, LinearSDE, make_sde
from lsgm.solvers import AnnealedLangevin, Solver, make_solver
from lsgm.solvers.sampler import Sampler
from lsgm.system.memory import build_within_memory
from vae.random import Rng, rand

__all__ = [
    "DATA_KINDS",
    "DataSGM",
    "build_data_model",
    "build_sde",
    "data_model_of",
]

DATA_KINDS = ("ncsn", "score_sde")


class DataSGM(DiffusionModel):
    """A score model of images.

    Args:
        kind: ``"ncsn"`` or ``"score_sde"``.
        score: the noise prediction, ``(x_t, t)`` or ``(x_t, t, labels)`` to ``eps``.
        sde: the diffusion; ``ladder``: the noise levels of NCSN, None for a score-SDE model.
        pixels: the map between images and what is diffused.
        config: the architecture; ``sampler_config``: the recommended sampler.
    """

    bound_name = "bound on -log P of 8-bit images by the ODE"

    def __init__(
        self,
        kind: str,
        score: nn.Module,
        sde: LinearSDE,
        ladder: NoiseLadder | None,
        pixels: Pixels,
        config: ScoreModelConfig,
        sampler_config: SamplerConfig,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.score = score
        self.sde = sde
        self.ladder = ladder
        self.pixels = pixels
        self.spec = pixels.spec
        self.config = config
        self.sampler_config = sampler_config

    def describe(self) -> dict[str, Any]:
        return {
            "score": asdict(self.config),
            "sampler": asdict(self.sampler_config),
            "spec": asdict(self.spec),
        }

    def with_score(self, score: nn.Module) -> DataSGM:
        """The same model with another score network (the running average, say)."""
        return DataSGM(
            self.kind, score, self.sde, self.ladder, self.pixels, self.config, self.sampler_config
        )

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

    # The state of the diffusion

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of what is diffused: the images without padding."""
        return self.pixels.shape

    @property
    def state_limits(self) -> tuple[float, float]:
        return self.pixels.limits

    def encode(self, x: Tensor, rng: Rng = None, *, mean: bool = False) -> list[Tensor]:
        """The state ``(B, *state_shape)`` alone, of ``x (B, C, R, R)`` in [-1, 1], padded or not;
        with ``mean`` without dequantisation noise.
        """
        return [self.pixels.to_network((x + 1) / 2, rng, noise=not mean)]

    def decode(self, latents: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """Images in [0, 1] from the state; nothing is drawn."""
        (state,) = latents
        return self.to_images(state).clamp(0, 1)

    def to_images(self, y: Tensor) -> Tensor:
        """From the state ``(B, C, H, W)`` to images, in [0, 1] up to the model's own error."""
        return self.pixels.to_images(y.float())

    def prior_start(
        self, num: int, rng: Rng, temperature: float = 1.0, solver: Solver | None = None
    ) -> Tensor:
        """A sample of the SDE's prior, but for Langevin dynamics uniform noise over the data's
        range if the run says so (arXiv 1907.05600 appendix B, 2006.09011 appendix B): they reach
        the largest level's law from anywhere, other solvers do not.
        """
        shape = (num, *self.state_shape)
        if self.sampler_config.start == "uniform" and isinstance(solver, AnnealedLangevin):
            low, high = self.pixels.limits
            return temperature * (low + (high - low) * rand(shape, rng, device=self.device))
        return super().prior_start(num, rng, temperature, solver)

    # Sampling

    @property
    def defaults(self) -> SamplerDefaults:
        """The recommended sampler."""
        given, is_ncsn = self.sampler_config, self.ladder is not None
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
        levels, given = self.ladder.num_levels, self.sampler_config
        steps = max(1, (given.nfe or 100 * levels) // levels)
        ratio = given.step_ratio or select_step(self.ladder, steps).step_ratio
        return {"steps_per_level": steps, "step_ratio": ratio}

    def default_sampler(self) -> Sampler:
        """The recommended sampler.

        Raises:
            UserError: The run's sampler section does not fit.
        """
        try:
            return self.sampler()
        except ValueError as error:
            raise UserError(f"sampler: {error}") from error

    def bound_values(
        self,
        x: Tensor,
        rng: Rng = None,
        *,
        samples: int = 1,
    ) -> Tensor:
        """:func:`lsgm.models.image_likelihood.ode_data_likelihood` with Hutchinson's divergence and
        ``samples`` draws of the dequantisation noise.
        """
        return ode_data_likelihood(
            self.sde,
            self.score,
            self.pixels,
            (x + 1) / 2,
            draws=samples,
            divergence=make_divergence("hutchinson"),
            rng=rng,
        ).nats


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
    channels, *sides = pixels.shape
    size = resolution(sides)
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
