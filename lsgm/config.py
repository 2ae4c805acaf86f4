"""Typed configuration of a training run: the schema only.

Each section is a frozen dataclass whose fields carry their own help text: the text below a field is
what ``--help`` shows. The same names are the keys of the YAML files and of the command line
(``--optim_vae.lr 1e-3``). Reading and writing lives in :mod:`lsgm.configio`.

Sections check their values when they are built and raise ``ValueError("field: what is wrong")``;
the loader adds the section and the file. Values that depend on other sections (image size against
the number of latent scales, say) are checked where they are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "RETIRED_KEYS",
    "DataConfig",
    "LSGMTrainConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PriorConfig",
    "PriorNetworkConfig",
    "SDEConfig",
    "TrainConfig",
    "VAEConfig",
    "VAETrainConfig",
]


RETIRED_KEYS = frozenset({"prior.weighting_q"})
"""Keys that older runs wrote and that never had an effect: they are read and forgotten."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(section: object, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        _require(value is None or value > 0, f"{name}: must be positive, not {value}")


def _require_non_negative(section: object, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        _require(value >= 0 and math.isfinite(value), f"{name}: must be at least 0, not {value}")


def _require_fraction(section: object, names: str) -> None:
    for name in names.split():
        value = getattr(section, name)
        _require(0.0 <= value <= 1.0, f"{name}: must lie in [0, 1], not {value}")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what is done to them before the model sees them."""

    name: Literal["digits", "mnist", "omniglot", "cifar10", "folder"] = "digits"
    """Dataset. digits (16x16, needs no download), mnist and omniglot are binarised."""
    root: str | None = None
    """Folder of the data (folder: the images). None: environment LSGM_DATA, else ~/.cache/lsgm."""
    image_size: int | None = None
    """folder only: side in pixels after resizing the shorter side and cropping the centre."""
    channels: int | None = None
    """folder only: 1 (grey) or 3 (colour). None: as the first image."""
    flip: bool | None = None
    """Random horizontal flips in training. None: yes for cifar10 and folder."""
    augment: Literal["none", "affine"] = "none"
    """Augmentation in training. affine: small random shifts, rotations, scalings and shears."""
    num_workers: int = 0
    """folder only: threads that decode images (0: decode where the batch is needed)."""
    test_fraction: float = 0.1
    """folder only: fraction kept for testing where there are no train/ and test/ subfolders."""
    eval_binarisation_seed: int = 0
    """Binary data: seed of the one Bernoulli draw per test image that evaluation uses."""

    def __post_init__(self) -> None:
        _require_positive(self, "image_size")
        _require(self.channels in (None, 1, 3), f"channels: must be 1 or 3, not {self.channels}")
        _require_non_negative(self, "num_workers eval_binarisation_seed")
        _require(
            0.0 < self.test_fraction < 1.0,
            f"test_fraction: must lie strictly between 0 and 1, not {self.test_fraction}",
        )


@dataclass(frozen=True)
class VAEConfig:
    """Architecture of the hierarchical VAE (LSGM, arXiv 2106.05931; NVAE, arXiv 2007.03898)."""

    num_channels_enc: int = 32
    """Encoder width at the finest level, in channels."""
    num_channels_dec: int = 32
    """Decoder width at the finest level, in channels."""
    channel_mult: tuple[int, ...] = (1, 2)
    """Width multipliers, finest level first; one per pre-processing block and latent scale."""
    num_preprocess_blocks: int = 1
    """Blocks that halve the resolution before the latent scales (and double it after them)."""
    num_preprocess_cells: int = 2
    """Residual cells per pre-processing block."""
    num_postprocess_cells: int = 2
    """Residual cells per post-processing block."""
    num_latent_scales: int = 1
    """Latent resolutions; the prior acts on the coarsest."""
    num_groups_per_scale: int = 2
    """Latent groups per scale."""
    num_latent_per_group: int = 20
    """Latent channels per group."""
    num_cell_per_cond_enc: int = 1
    """Encoder cells per latent group."""
    num_cell_per_cond_dec: int = 1
    """Decoder cells per latent group."""
    num_nf: int = 0
    """Autoregressive flow cells per group in the posterior (0: none)."""
    cell: Literal["res_mbconv", "res_bnswish"] = "res_mbconv"
    """Cell recipe: inverted residuals in the decoder, or plain 3x3 residual cells."""
    use_se: bool = True
    """Squeeze-and-excitation in every residual cell."""
    decoder_dist: Literal["bin", "dml", "dl", "normal"] = "bin"
    """Pixels: Bernoulli (binary data), (mixture of) discretised logistics (colour), normal."""
    num_x_bits: int = 8
    """Bits per colour value that the model sees (binary data: 8)."""
    log_sig_q_scale: float = 5.0
    """Soft clamp of the posterior's log sigma to (-scale, scale), in nats."""
    input_skip: bool = False
    """Carry the input down the encoder as a pyramid (progressive input)."""
    activation_checkpointing: bool = False
    """Recompute cells in the backward pass: less memory, more time, same result."""
    context_size: int = 0
    """Binary data: side of the window of earlier pixels that each pixel sees (0: none)."""
    context_channels: int = 32
    """Width of the network that looks at the window."""
    context_blocks: int = 2
    """Its residual blocks; each widens the window by one pixel."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "num_channels_enc num_channels_dec num_preprocess_cells num_postprocess_cells "
            "num_latent_scales num_groups_per_scale num_latent_per_group num_cell_per_cond_enc "
            "num_cell_per_cond_dec log_sig_q_scale",
        )
        _require_non_negative(self, "num_preprocess_blocks num_nf context_size context_blocks")
        _require(
            self.context_size == 0
            or (
                self.context_size % 2 == 1 and self.context_size > 1 and self.decoder_dist == "bin"
            ),
            "context_size: must be 0, or an odd number from 3 on with decoder_dist bin, not "
            f"{self.context_size}",
        )
        levels = self.num_preprocess_blocks + self.num_latent_scales
        _require(
            len(self.channel_mult) == levels and min(self.channel_mult) > 0,
            f"channel_mult: needs {levels} positive values (num_preprocess_blocks + "
            f"num_latent_scales), not {list(self.channel_mult)}",
        )
        _require(1 <= self.num_x_bits <= 8, f"num_x_bits: must be 1 to 8, not {self.num_x_bits}")
        _require(
            self.num_x_bits == 8 or self.decoder_dist in ("dml", "normal"),
            f"num_x_bits: decoder_dist {self.decoder_dist} needs 8, not {self.num_x_bits}",
        )


@dataclass(frozen=True)
class PriorNetworkConfig:
    """The score network in latent space (NCSN++, arXiv 2011.13456)."""

    num_channels: int = 64
    """Width at the finest resolution, in channels."""
    num_scales: int = 2
    """Resolutions inside the network; each halves the previous one."""
    channel_mult: tuple[int, ...] | None = None
    """Width multiplier of each resolution, finest first. None: 1 everywhere."""
    num_cells_per_scale: int = 2
    """Residual blocks per resolution."""
    embedding_dim: int = 128
    """Size of the time features."""
    embedding_width: int | None = None
    """Size of the time embedding that is computed from them. None: 4 embedding_dim."""
    embedding_type: Literal["positional", "fourier"] = "positional"
    """Time embedding: sinusoids of t, or random Fourier features of log t."""
    embedding_scale: float = 1000.0
    """positional: factor on the time; fourier: scale of the random frequencies."""
    dropout: float = 0.0
    """Probability that a feature is dropped in training."""
    fir: bool = False
    """Resample with a smoothing (1, 3, 3, 1) filter."""
    progressive: Literal["none", "output_skip", "residual"] = "none"
    """Progressive growing of the output."""
    progressive_input: Literal["none", "input_skip", "residual"] = "none"
    """Progressive growing of the input."""
    progressive_combine: Literal["sum", "cat"] = "sum"
    """How the progressive input joins the features."""
    attention_resolutions: tuple[int, ...] = (16,)
    """Feature-map sides, in pixels, that get self-attention."""
    middle_attention: bool = True
    """Self-attention in the middle of the network."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "num_channels num_scales num_cells_per_scale embedding_dim embedding_width "
            "embedding_scale",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout: must lie in [0, 1), not {self.dropout}")
        mult = self.channel_mult
        _require(
            mult is None or (len(mult) >= self.num_scales and min(mult) > 0),
            f"channel_mult: needs at least {self.num_scales} positive values (num_scales), "
            f"not {mult and list(mult)}",
        )


@dataclass(frozen=True)
class SDEConfig:
    """The diffusion in latent space; time runs from 0 (data) to 1 (noise)."""

    kind: Literal["vpsde", "geometric", "subvpsde", "vesde"] = "vpsde"
    """Variance preserving (linear beta or geometric), sub-variance preserving, exploding."""
    beta_start: float = 0.1
    """vpsde, subvpsde: beta(0)."""
    beta_end: float = 20.0
    """vpsde, subvpsde: beta(1)."""
    sigma2_0: float = 0.0
    """Variance of the noise at t = 0."""
    sigma2_min: float = 1e-4
    """geometric, vesde: smallest variance."""
    sigma2_max: float = 0.99
    """geometric, vesde: largest variance."""
    time_eps: float = 1e-2
    """Training times lie in [time_eps, 1]."""

    def __post_init__(self) -> None:
        _require_positive(self, "beta_start beta_end sigma2_min sigma2_max")
        _require_non_negative(self, "sigma2_0")
        _require(0.0 <= self.time_eps < 1.0, f"time_eps: must lie in [0, 1), not {self.time_eps}")
        _require(self.beta_start <= self.beta_end, "beta_start: must not exceed beta_end")
        _require(self.sigma2_min < self.sigma2_max, "sigma2_min: must be below sigma2_max")
        _require(
            self.time_eps > 0.0 or self.sigma2_0 > 0.0,
            "time_eps: must be positive when sigma2_0 is 0 (the cross entropy diverges)",
        )


@dataclass(frozen=True)
class PriorConfig:
    """The score-based prior and how it is trained (arXiv 2106.05931, sections 3.2 to 3.4)."""

    network: PriorNetworkConfig = field(default_factory=PriorNetworkConfig)
    """The score network."""
    sde: SDEConfig = field(default_factory=SDEConfig)
    """The diffusion."""
    mixed: bool = True
    """Mixed Normal prediction: the network corrects the score of N(0, I)."""
    mixing_init: float = -6.0
    """Initial logit of the mixing coefficient (-6: start almost at N(0, I))."""
    predict: Literal["noise", "correction"] = "noise"
    """What the network predicts: the noise, as published, or its difference from the Normal
    component, which starts at N(0, I) whatever the mixing and learns as fast as the mixing is
    large."""
    weighting_p: Literal["likelihood", "unweighted", "reweighted", "rescaled"] = "likelihood"
    """Weighting of the prior's loss over time."""
    proposal_p: Literal["uniform", "importance", "optimal"] = "importance"
    """Training times for the prior's loss: uniform, the paper's, or numerically optimal."""
    proposal_q: Literal["same", "uniform", "importance", "optimal"] = "same"
    """Times for the encoder's cross entropy (likelihood-weighted); same: the prior's draw."""
    training: Literal["joint", "disjoint", "frozen"] = "joint"
    """joint: VAE and prior in one step; disjoint: one after the other; frozen: the prior alone."""
    drop_inactive: bool = False
    """Keep N(0, I) for latent channels that carry no information (KL below 0.1 nats)."""
    update_q_ema: bool = False
    """disjoint only: the encoder's loss uses the averaged prior."""
    control_variate: bool = True
    """Sample only the network's difference from N(0, I) in the encoder's loss: less variance."""
    stratified_times: bool = True
    """Spread the times of a batch evenly over the proposal: less variance, same mean."""
    spectral_regularization: float = 0.0
    """Weight of the largest singular values of the score network's convolutions (0: off)."""
    norm_regularization: float = 0.0
    """Weight of the largest gains of the score network's normalisation layers (0: off)."""

    def __post_init__(self) -> None:
        _require_non_negative(self, "spectral_regularization norm_regularization")
        _require(
            self.mixed or not self.drop_inactive,
            "drop_inactive: needs mixed true (N(0, I) is the Normal part of the mix)",
        )
        _require(self.mixed or self.predict == "noise", "predict: correction needs mixed true")
        _require(
            not self.update_q_ema or self.training == "disjoint",
            f"update_q_ema: needs training disjoint, not {self.training}",
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
    spectral_regularization: float = 1e-2
    """Weight of the VAE's spectral and norm-layer regularisers (0: off)."""
    free_bits: float = 0.0
    """KL per latent group that costs nothing, in nats per image (0: off)."""

    def __post_init__(self) -> None:
        _require_fraction(self, "kl_anneal_portion kl_const_portion kl_const_coeff kl_max_coeff")
        _require_non_negative(self, "spectral_regularization free_bits")
        _require(
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
    """Average over fewer steps in the beginning, so that short runs forget their first weights."""

    def __post_init__(self) -> None:
        _require_positive(self, "lr eps")
        _require_non_negative(self, "lr_min weight_decay warmup_steps clip_norm")
        _require(self.lr_min <= self.lr, f"lr_min: {self.lr_min} must not exceed lr {self.lr}")
        _require(
            all(0.0 <= b < 1.0 for b in self.betas),
            f"betas: must lie in [0, 1), not {list(self.betas)}",
        )
        _require(
            0.0 <= self.ema_decay < 1.0, f"ema_decay: must lie in [0, 1), not {self.ema_decay}"
        )
        _require(
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
    """auto (an accelerator if there is one), cpu, cuda, cuda:1, mps, ..."""
    channels_last: bool = True
    """Channels-last memory layout: faster, same result."""
    compile: bool = False
    """torch.compile the networks."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    eval_every: int = 10
    """Epochs between two evaluations on test images."""
    eval_images: int = 1000
    """Test images used by these evaluations, at most."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept on disk."""
    shared_noise: bool = True
    """Same noise however many processes share the batch (each draws all of it)."""
    num_threads: int | None = None
    """CPU threads per process. None: PyTorch's choice."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            "epochs max_steps batch_size accumulate log_every eval_every eval_images "
            "checkpoint_every keep_checkpoints num_threads",
        )
        _require_non_negative(self, "seed")
        _require(
            self.batch_size % self.accumulate == 0,
            f"batch_size: {self.batch_size} is not a multiple of accumulate {self.accumulate}",
        )


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
        _require(
            not self.prior.update_q_ema or self.optim_prior.ema_decay > 0,
            "prior.update_q_ema: needs optim_prior.ema_decay above 0",
        )
