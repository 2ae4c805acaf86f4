"""Typed configuration of a training run: the schema only.

Each section is a frozen dataclass whose fields carry their own help text: the text below a field is
what ``--help`` shows. The same names are the keys of the YAML files and of the command line
(``--optim_vae.lr 1e-3``). Reading and writing lives in :mod:`lsgm.config.command_line`.

Sections check their values when they are built and raise ``ValueError("field: what is wrong")``;
the loader adds the section and the file. Values that depend on other sections (image size against
the number of latent scales, say) are checked where they are used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lsgm.config.architecture import (
    ClassifierConfig,
    PriorConfig,
    SamplerConfig,
    ScoreModelConfig,
    VAEConfig,
)
from lsgm.config.checks import (
    require,
    require_at_most,
    require_fraction,
    require_non_negative,
    require_positive,
)
from lsgm.config.names import DatasetName, ProposalName, WeightingName

__all__ = [
    "DataConfig",
    "FitConfig",
    "LSGMTrainConfig",
    "NCSNTrainConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "RETIRED_KEYS",
    "ScoreObjectiveConfig",
    "TrainConfig",
    "VAETrainConfig",
]

RETIRED_KEYS = frozenset({"prior.weighting_q"})
"""Keys that older runs wrote and that never had an effect: they are read and forgotten."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what is done to them before the model sees them."""

    name: DatasetName = "digits"
    """Dataset. digits (16x16, needs no download), mnist and omniglot are binarised."""
    root: str | None = None
    """Folder of the data (folder: the images). None: environment LSGM_DATA, else ~/.cache/lsgm."""
    image_size: int | None = None
    """folder only: side in pixels after resizing the shorter side and cropping the centre; the
    height, where image_width is given."""
    image_width: int | None = None
    """folder only: width in pixels of images that are not square."""
    channels: int | None = None
    """folder only: 1 (grey) or 3 (colour). None: grey if all files are."""
    flip: bool | None = None
    """Random horizontal flips in training. None: yes for cifar10 and folder."""
    augment: Literal["auto", "none", "affine"] = "auto"
    """Augmentation in training. affine: small random shifts, rotations, scalings and shears. auto:
    affine for digits, none for all others."""
    cache: Literal["auto", "off"] = "auto"
    """folder only: auto packs the images into ~/.cache/lsgm (or LSGM_CACHE) on first use, where
    half of the free disk is enough; off decodes them in each epoch."""
    num_workers: int = 0
    """folder only, without a cache: threads that decode images (0: where the batch is needed)."""
    test_fraction: float = 0.1
    """folder only: fraction kept for testing where there are no train/ and test/ subfolders."""
    eval_binarisation_seed: int = 0
    """Binary data: seed of the one Bernoulli draw per test image that evaluation uses."""

    def __post_init__(self) -> None:
        require_positive(self, "image_size image_width")
        require(self.channels in (None, 1, 3), f"channels: must be 1 or 3, not {self.channels}")
        require_non_negative(self, "num_workers eval_binarisation_seed")
        require_at_most(self, 1024, "num_workers")
        require(
            0.0 < self.test_fraction < 1.0,
            f"test_fraction: must lie strictly between 0 and 1, not {self.test_fraction}",
        )


@dataclass(frozen=True)
class ObjectiveConfig:
    """The evidence lower bound and its regularisers."""

    kl_anneal_portion: float = 1.0
    """Fraction of all steps over which the KL coefficient rises."""
    kl_const_portion: float = 1e-4
    """Fraction of all steps that the KL coefficient waits before it rises."""
    kl_const_coeff: float = 1e-4
    """KL coefficient at the start."""
    kl_max_coeff: float = 1.0
    """KL coefficient at the end."""
    kl_balance: bool = True
    """Balance the KL terms of the latent groups while the coefficient is below 1."""
    kl_balance_sync: bool = True
    """Balance by the KL of the whole batch; false: each process by that of its own images, as
    published."""
    spectral_regularization: float = 1e-2
    """Weight of the VAE's spectral and norm-layer regularisers (0: off)."""
    free_bits: float = 0.0
    """KL per latent group that costs the encoder nothing, in nats per image (0: off); of the
    coarsest scale's groups in the second stage that under the score-based prior."""

    def __post_init__(self) -> None:
        require_fraction(self, "kl_anneal_portion kl_const_portion kl_const_coeff kl_max_coeff")
        require_non_negative(self, "spectral_regularization free_bits")
        require(
            self.kl_const_coeff <= self.kl_max_coeff, "kl_const_coeff: must not exceed kl_max_coeff"
        )


@dataclass(frozen=True)
class OptimConfig:
    """One optimizer with its learning rate schedule, clipping and weight average."""

    optimizer: Literal["adamax", "adam", "adamw"] = "adamax"
    """Update rule. adam adds weight decay to the gradient, adamw decouples it."""
    impl: Literal["torch", "apex"] = "torch"
    """Implementation. apex: NVIDIA apex's FusedAdam, which has to be installed from source."""
    lr: float = 1e-2
    """Learning rate after the warm-up."""
    lr_min: float = 1e-4
    """Learning rate at the end of the cosine."""
    schedule: Literal["cosine", "published", "constant"] = "cosine"
    """After the warm-up: cosine; published: the paper's runs', once an epoch; constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments, per step."""
    eps: float = 1e-3
    """Added to the denominator of the update."""
    weight_decay: float = 3e-4
    """Weight decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    clip_norm: float = 0.0
    """Largest 2-norm of the whole gradient (0: no clipping)."""
    ema_decay: float = 0.0
    """Decay per step of the running average of the weights (0: no average)."""
    ema_warmup: bool = True
    """Average over fewer steps in the beginning, so that short runs forget their first weights.
    Published: false in LSGM and NCSNv2, true in score-SDE."""

    def __post_init__(self) -> None:
        require_positive(self, "lr eps")
        require_non_negative(self, "lr_min weight_decay warmup_steps clip_norm")
        require(self.lr_min <= self.lr, f"lr_min: {self.lr_min} must not exceed lr {self.lr}")
        require(
            all(0.0 <= b < 1.0 for b in self.betas),
            f"betas: must lie in [0, 1), not {list(self.betas)}",
        )
        require(0.0 <= self.ema_decay < 1.0, f"ema_decay: must lie in [0, 1), not {self.ema_decay}")
        require(
            self.impl != "apex" or self.optimizer != "adamax",
            "impl: apex has adam and adamw, not adamax",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop: length, batch, precision, what is written when."""

    seed: int = 0
    """Seed of the weights, the order of the data and all noise."""
    epochs: int = 100
    """Passes over the training images."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, if that is earlier."""
    batch_size: int = 128
    """Images per optimizer step, over all processes."""
    accumulate: int = 1
    """Backward passes per optimizer step; the batch is split into as many parts."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Precision of the networks; losses and optimizer state stay float32."""
    device: str = "auto"
    """auto (an accelerator with 64-bit floats if there is one), cpu, cuda, cuda:1, ..."""
    channels_last: bool = True
    """Channels-last memory layout: faster, same result."""
    compile: bool = False
    """torch.compile the networks."""
    cuda_graphs: bool = False
    """CUDA, one process: start the networks' kernels as CUDA graphs. Small models, whose steps wait
    for the CPU, train faster; same result."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    eval_every: int = 10
    """Epochs between two evaluations on test images."""
    eval_images: int = 1000
    """Test images used by these evaluations, at most: drawn at random, the same in all runs."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept on disk."""
    release: Literal["last", "best"] = "last"
    """Which weights the run ends with: the last ones, or those of the best evaluation on test
    images, as published (the choice makes the test images' bound a little too good)."""
    shared_noise: bool = True
    """Same noise however many processes share the batch (each draws all of it)."""
    num_threads: int | None = None
    """CPU threads per process. None: PyTorch's choice."""
    timeout_minutes: float = 30.0
    """Minutes that a process waits for the others in a training step before the run fails."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "epochs max_steps batch_size accumulate log_every eval_every eval_images "
            "checkpoint_every keep_checkpoints num_threads timeout_minutes",
        )
        require_non_negative(self, "seed")
        require_at_most(self, 4096, "num_threads")
        require(
            self.batch_size % self.accumulate == 0,
            f"batch_size: {self.batch_size} is not a multiple of accumulate {self.accumulate}",
        )
        require(
            not self.cuda_graphs or self.accumulate == 1,
            f"cuda_graphs: needs accumulate 1, not {self.accumulate}",
        )
        require(not (self.cuda_graphs and self.compile), "cuda_graphs: needs compile false")


@dataclass(frozen=True)
class VAETrainConfig:
    """Train the hierarchical VAE, the first stage of LSGM."""

    name: str = "vae"
    """Name of the run; its folder is runs/NAME unless --out says otherwise."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    vae: VAEConfig = field(default_factory=VAEConfig)
    """The hierarchical VAE."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The training objective."""
    optim_vae: OptimConfig = field(default_factory=OptimConfig)
    """The VAE's optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""


def _second_stage_objective() -> ObjectiveConfig:
    return ObjectiveConfig(kl_const_portion=0.0, kl_const_coeff=0.7, kl_max_coeff=1.0)


def _second_stage_vae_optimizer() -> OptimConfig:
    return OptimConfig(optimizer="adamw", lr=1e-4, lr_min=1e-5)


def _prior_optimizer() -> OptimConfig:
    return OptimConfig(optimizer="adamw", lr=3e-4, lr_min=3e-4, eps=1e-4, ema_decay=0.9999)


@dataclass(frozen=True)
class LSGMTrainConfig:
    """Train the score-based prior in latent space, with the VAE, the second stage of LSGM."""

    name: str = "lsgm"
    """Name of the run; its folder is runs/NAME unless --out says otherwise."""
    vae_run: str | None = None
    """Folder of the finished VAE run (the same as --vae)."""
    lsgm_run: str | None = None
    """Folder of a finished LSGM run to go on from, instead of vae_run (the same as --lsgm): its
    averaged weights, VAE and prior, under a schedule of its own."""
    add_context_blocks: int = 0
    """With lsgm_run: residual blocks added to the decoder's context; they start as identities."""
    data: DataConfig | None = None
    """Images. None: those of the VAE run."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """The score-based prior."""
    objective: ObjectiveConfig = field(default_factory=_second_stage_objective)
    """The VAE's training objective."""
    optim_vae: OptimConfig = field(default_factory=_second_stage_vae_optimizer)
    """The VAE's optimizer."""
    optim_prior: OptimConfig = field(default_factory=_prior_optimizer)
    """The prior's optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""

    def __post_init__(self) -> None:
        require(
            not self.prior.update_q_ema or self.optim_prior.ema_decay > 0,
            "prior.update_q_ema: needs optim_prior.ema_decay above 0",
        )
        require_non_negative(self, "add_context_blocks")


@dataclass(frozen=True)
class ScoreObjectiveConfig:
    """How the score model is trained."""

    estimator: Literal["dsm", "ssm", "ssm_vr"] = "dsm"
    """Denoising score matching; sliced score matching, plain or with its variance reduced."""
    projections: int = 1
    """ssm, ssm_vr: random projections per image."""
    weighting: WeightingName = "unweighted"
    """score_sde: weight of the squared error of the noise over time. (ncsn: sigma^2 of the score,
    which is unweighted.)"""
    proposal: ProposalName = "uniform"
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
            self.kind != "score_sde" or self.score.network != "refinenet",
            "score.network: refinenet has discrete noise levels; kind score_sde needs ncsnpp",
        )


@dataclass(frozen=True)
class FitConfig:
    """The settings of :func:`lsgm.fit`, which its run folder keeps."""

    name: str = "fit"
    """Name of the run."""
    objective: ScoreObjectiveConfig = field(default_factory=ScoreObjectiveConfig)
    """Score models: the training objective."""
    elbo: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """VAE and LSGM: the evidence lower bound and its regularisers."""
    optim: OptimConfig = field(default_factory=_score_optimizer)
    """The optimizer (LSGM: the prior's)."""
    optim_vae: OptimConfig = field(default_factory=_second_stage_vae_optimizer)
    """LSGM: the VAE's optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
