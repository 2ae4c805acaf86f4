"""Typed configuration of score models in data space and of classifiers: the schema only.

NCSN (arXiv 1907.05600, 2006.09011) and score-SDE models (arXiv 2011.13456) share one tree with the
classifiers that guide or judge them; :mod:`lsgm.config` says how such a tree is read and checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lsgm.config import (
    DataConfig,
    OptimConfig,
    PriorNetworkConfig,
    SDEConfig,
    TrainConfig,
)
from lsgm.config_checks import (
    require,
    require_at_most,
    require_non_negative,
    require_positive,
)

__all__ = [
    "ClassifierConfig",
    "LadderConfig",
    "NCSNTrainConfig",
    "RefineNetConfig",
    "SamplerConfig",
    "ScoreModelConfig",
    "ScoreObjectiveConfig",
]


@dataclass(frozen=True)
class RefineNetConfig:
    """The network of NCSN: a RefineNet with dilated convolutions."""

    num_channels: int = 32
    """Width of the first stage, in channels."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    """Width multiplier of each stage."""
    dilations: tuple[int, ...] = (1, 1, 2, 4)
    """Dilation of each stage; every stage of dilation 1 but the first halves the resolution."""
    conditional: bool = True
    """Instance norm with weights of its own for each noise level (1907.05600). false: one network
    whose output is divided by sigma (2006.09011)."""

    def __post_init__(self) -> None:
        require_positive(self, "num_channels")
        require(
            len(self.channel_mult) == len(self.dilations),
            f"dilations: needs one number for each of channel_mult, not {list(self.dilations)}",
        )


@dataclass(frozen=True)
class LadderConfig:
    """ncsn only: the noise levels, a geometric sequence."""

    sigma_max: float | None = 1.0
    """Largest noise. None: the largest distance between training images (2006.09011, tech. 1)."""
    sigma_min: float = 0.01
    """Smallest noise, in units of the data range."""
    levels: int | None = 10
    """Number of noise levels. None: from the number of pixels (2006.09011, technique 2)."""

    def __post_init__(self) -> None:
        require_positive(self, "sigma_max sigma_min")
        require_at_most(self, 100_000, "levels")
        require(
            self.sigma_max is None or self.sigma_min < self.sigma_max,
            "sigma_min: must be below sigma_max",
        )
        require(
            self.levels is None or self.levels >= 2,
            f"levels: must be at least 2, not {self.levels}",
        )


def _data_network() -> PriorNetworkConfig:
    return PriorNetworkConfig(num_channels=32, num_scales=3, num_cells_per_scale=1)


def _data_sde() -> SDEConfig:
    return SDEConfig(kind="vpsde", time_eps=1e-5)


@dataclass(frozen=True)
class ScoreModelConfig:
    """The score model: what it diffuses, and the network that predicts the noise."""

    network: Literal["ncsnpp", "refinenet"] = "ncsnpp"
    """The network: a U-net (NCSN++ or DDPM++, by the options of ncsnpp), or NCSN's RefineNet."""
    ncsnpp: PriorNetworkConfig = field(default_factory=_data_network)
    """network ncsnpp: its sizes."""
    refinenet: RefineNetConfig = field(default_factory=RefineNetConfig)
    """network refinenet: its sizes."""
    sde: SDEConfig = field(default_factory=_data_sde)
    """score_sde only: the diffusion of the images."""
    fit_sigma_max: bool = False
    """score_sde with a vesde: its sigma2_max is the largest squared distance between training
    images (2006.09011, technique 1)."""
    ladder: LadderConfig = field(default_factory=LadderConfig)
    """ncsn only: the noise levels."""
    data_range: Literal["unit", "symmetric"] = "symmetric"
    """Pixels as the diffusion sees them: unit is [0, 1], symmetric is [-1, 1]."""
    dequantise: bool = True
    """Diffuse (255 x + u) / 256 with u uniform in [0, 1): 8-bit images as a density."""
    condition: Literal["time", "log_sigma", "ln_sigma", "index"] = "time"
    """network ncsnpp: conditioned on the time in [0, 1]; on ln(sigma / m) / 4; on ln(sigma), as
    published for variance-exploding models; or, with discrete_levels, on the level's number, as
    published: vpsde (N - 1) t, vesde the nearest whole number from the largest level."""
    discrete_levels: int | None = None
    """score_sde with vpsde or vesde: train at this many noise levels only, those of DDPM
    (2006.11239) or a geometric sequence. None: in continuous time."""
    centre_input: bool = False
    """The network sees 2 x - 1: for data_range unit, as published for variance-exploding models."""
    data_std: float = 0.5
    """Standard deviation of the data that the scaling of the network's input assumes (0: off)."""
    class_conditional: bool = False
    """The network is told the class of an image, which the dataset must know."""

    def __post_init__(self) -> None:
        require_non_negative(self, "data_std")
        require(
            not self.fit_sigma_max or self.sde.kind == "vesde",
            f"fit_sigma_max: needs sde.kind vesde, not {self.sde.kind}",
        )
        require(
            self.discrete_levels is None
            or (self.discrete_levels >= 2 and self.sde.kind in ("vpsde", "vesde")),
            "discrete_levels: needs at least two levels of a vpsde or vesde, not "
            f"{self.discrete_levels} of {self.sde.kind}",
        )
        require(
            self.condition != "index" or self.discrete_levels is not None,
            "condition: index needs discrete_levels",
        )
        require(
            self.condition != "ln_sigma" or self.sde.kind == "vesde",
            f"condition: ln_sigma needs sde.kind vesde, not {self.sde.kind}",
        )
        require(
            not self.centre_input
            or (self.data_range == "unit" and (self.network == "refinenet" or self.data_std == 0)),
            "centre_input: needs data_range unit, and data_std 0 with network ncsnpp",
        )
        require(
            not self.class_conditional or self.network == "ncsnpp",
            "class_conditional: network refinenet takes no class",
        )


@dataclass(frozen=True)
class ScoreObjectiveConfig:
    """How the score model is trained."""

    estimator: Literal["dsm", "ssm", "ssm_vr"] = "dsm"
    """Denoising score matching; sliced score matching, plain or with its variance reduced."""
    projections: int = 1
    """ssm, ssm_vr: random projections per image."""
    weighting: Literal["likelihood", "unweighted", "reweighted", "rescaled"] = "unweighted"
    """score_sde: weight of the squared error of the noise over time. (ncsn: sigma^2 of the score,
    which is unweighted.)"""
    proposal: Literal["uniform", "importance", "optimal", "mixture", "weighted"] = "uniform"
    """score_sde: training times: uniform; weighted: in proportion to the weight; importance and
    optimal: less where data that are N(0, I) have no error, LSGM's choice (2106.05931); mixture:
    mostly optimal, some weighted."""
    stratified_times: bool = True
    """Spread the times of a batch evenly over the proposal: less variance, same mean."""
    reduction: Literal["mean", "sum", "half_sum"] = "mean"
    """Scale of the loss, which optim.clip_norm and optim.eps are relative to: over an image's
    values the mean (score-SDE's reduce_mean), the sum, or half the sum, as published for variance-
    exploding models and NCSN. The log shows the mean always."""
    label_dropout: float = 0.1
    """score.class_conditional: fraction of images whose class is hidden in training, so that the
    network can do without (classifier-free guidance)."""

    def __post_init__(self) -> None:
        require_positive(self, "projections")
        require(
            0.0 <= self.label_dropout <= 1.0,
            f"label_dropout: must lie in [0, 1], not {self.label_dropout}",
        )


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler that a run recommends, and that draws the grids during training."""

    solver: str | None = None
    """Solver by name. None: langevin for ncsn, predictor_corrector for score_sde."""
    nfe: int | None = None
    """Network evaluations. None: 100 Langevin steps a level (ncsn), 200 (score_sde)."""
    grid: str | None = None
    """Time grid by name. None: the noise levels (ncsn), the solver's own (score_sde)."""
    t_end: float | None = None
    """Last time. None: 0 (ncsn), score.sde.time_eps but at least 1e-3 (score_sde)."""
    step_ratio: float | None = 0.2
    """langevin: step size over sigma^2 (epsilon / sigma_L^2 of 1907.05600). None: the one whose
    variance is nearest to the right one (2006.09011, technique 4)."""
    predictor: str | None = None
    """discrete_pc, predictor_corrector: reverse_diffusion, euler_maruyama, ancestral, or none for
    the corrector alone. None: the solver's own."""
    corrector_steps: int | None = None
    """discrete_pc, predictor_corrector: Langevin steps at each time. None: the solver's own."""
    snr: float = 0.16
    """predictor_corrector: signal-to-noise ratio of the corrector's step."""
    norm: Literal["image", "batch", "expected"] = "image"
    """predictor_corrector: norms that scale the corrector's step: image, each image's own, so that
    an image does not depend on its batch; batch, their means over the batch (as published);
    expected."""
    clip: bool = True
    """ddpm: clip the image that each step predicts to the range of pixels."""
    variance: Literal["small", "large"] = "small"
    """ddpm: variance of a step, that of the exact posterior or the chain's beta (2006.11239,
    section 3.2)."""
    start: Literal["prior", "uniform"] = "prior"
    """langevin: noise to start from: the largest level's, or uniform over the data range (as
    published for NCSN). Other solvers start from the prior."""
    denoise: bool = True
    """Every solver: end with the posterior mean of the image, which has no noise left."""

    def __post_init__(self) -> None:
        require_positive(self, "nfe step_ratio snr")
        known = ("reverse_diffusion", "euler_maruyama", "ancestral", "none")
        require(
            self.predictor is None or self.predictor in known,
            f"predictor: must be one of {', '.join(known)}, not {self.predictor}",
        )
        require(
            self.corrector_steps is None or self.corrector_steps >= 0,
            f"corrector_steps: must not be negative, not {self.corrector_steps}",
        )
        require(
            self.norm in ("image", "batch", "expected"),
            f"norm: must be image, batch or expected, not {self.norm}",
        )
        require(
            self.variance in ("small", "large"),
            f"variance: must be small or large, not {self.variance}",
        )
        require(
            self.start in ("prior", "uniform"),
            f"start: must be prior or uniform, not {self.start}",
        )
        require(
            self.t_end is None or 0.0 <= self.t_end < 1.0,
            f"t_end: must lie in [0, 1), not {self.t_end}",
        )
        require(
            self.step_ratio is None or self.step_ratio < 4,
            f"step_ratio: must be below 4, not {self.step_ratio}",
        )


@dataclass(frozen=True)
class ClassifierConfig:
    """A classifier: of noisy images, to guide a sampler, or of clean ones, to judge its images."""

    noise_conditional: bool = False
    """Train on images noised at uniform times under score.sde, given the time."""
    num_channels: int = 32
    """Width at the finest resolution, in channels; doubled at each halving."""
    num_scales: int = 3
    """Resolutions; each halves the previous one."""
    num_cells_per_scale: int = 1
    """Residual blocks per resolution."""
    dropout: float = 0.0
    """Probability that a feature is dropped in training."""
    label_smoothing: float = 0.0
    """Probability spread evenly over the wrong classes in the training target."""

    def __post_init__(self) -> None:
        require_positive(self, "num_channels num_scales num_cells_per_scale")
        require_at_most(self, 16, "num_scales")
        for name in ("dropout", "label_smoothing"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"{name}: must lie in [0, 1), not {value}")


def _score_optimizer() -> OptimConfig:
    return OptimConfig(
        optimizer="adam", lr=1e-3, lr_min=1e-5, eps=1e-8, weight_decay=0.0, ema_decay=0.999,
        warmup_steps=100, clip_norm=1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class NCSNTrainConfig:
    """Train a score model in data space (NCSN, score-SDE), or a classifier to guide or judge it."""

    name: str = "ncsn"
    """Name of the run; its folder is runs/NAME unless --out says otherwise."""
    kind: Literal["ncsn", "score_sde", "classifier"] = "ncsn"
    """ncsn: discrete noise levels and Langevin dynamics (1907.05600); score_sde: a diffusion in
    continuous time (2011.13456); classifier: labels of images."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images; never binarised here, and without padding."""
    score: ScoreModelConfig = field(default_factory=ScoreModelConfig)
    """The score model (classifier: its sde and data_range are those of the noise)."""
    objective: ScoreObjectiveConfig = field(default_factory=ScoreObjectiveConfig)
    """ncsn, score_sde: the training objective."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """ncsn, score_sde: the recommended sampler."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """classifier: the network."""
    optim: OptimConfig = field(default_factory=_score_optimizer)
    """The optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""

    def __post_init__(self) -> None:
        require(
            self.kind != "score_sde" or self.score.network == "ncsnpp",
            "score.network: refinenet has discrete noise levels; kind score_sde needs ncsnpp",
        )
