"""Configuration of networks, diffusions and samplers; :mod:`lsgm.config.training` says how such
sections are read and checked.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Literal

from lsgm.config.checks import require, require_at_most, require_non_negative, require_positive
from lsgm.config.names import NetworkName, ProposalName, ProposalOrSame, SDEName, WeightingName

__all__ = [
    "ClassifierConfig",
    "LadderConfig",
    "PriorConfig",
    "PriorNetworkConfig",
    "RefineNetConfig",
    "SDEConfig",
    "SamplerConfig",
    "ScoreModelConfig",
    "VAEConfig",
]


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
        require_positive(
            self,
            "num_channels_enc num_channels_dec num_preprocess_cells num_postprocess_cells "
            "num_latent_scales num_groups_per_scale num_latent_per_group num_cell_per_cond_enc "
            "num_cell_per_cond_dec log_sig_q_scale",
        )
        require_non_negative(self, "num_preprocess_blocks num_nf context_size context_blocks")
        require_at_most(self, 16, "num_preprocess_blocks num_latent_scales")
        require(
            self.context_size == 0
            or (
                self.context_size % 2 == 1 and self.context_size > 1 and self.decoder_dist == "bin"
            ),
            "context_size: must be 0, or an odd number from 3 on with decoder_dist bin, not "
            f"{self.context_size}",
        )
        levels = self.num_preprocess_blocks + self.num_latent_scales
        require(
            len(self.channel_mult) == levels and min(self.channel_mult) > 0,
            f"channel_mult: needs {levels} positive values (num_preprocess_blocks + "
            f"num_latent_scales), not {list(self.channel_mult)}",
        )
        require(1 <= self.num_x_bits <= 8, f"num_x_bits: must be 1 to 8, not {self.num_x_bits}")
        require(
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
    widths: tuple[int, ...] | None = None
    """Width of each resolution in channels, finest first, where it is no multiple. None: by
    channel_mult."""
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
    block: Literal["biggan", "ddpm"] = "biggan"
    """biggan: residual blocks change the resolution; ddpm: convolutions between them do
    (2006.11239)."""
    rescale: bool = True
    """Divide the sum of every block by sqrt(2). DDPM: false."""
    norm_groups: int | None = None
    """Groups of every normalisation, DDPM: 32. None: a quarter of the width, at most 32."""
    up_attention: Literal["level", "block"] = "level"
    """Self-attention of the decoder: once a level, as in score-SDE's networks; or after every block
    (2006.11239)."""
    group_rule: Literal["width", "diffusers"] = "width"
    """norm_groups None: diffusers: at levels with attention and less than 128 channels that
    package's other numbers of groups."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, more time, same result."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "num_channels num_scales num_cells_per_scale embedding_dim embedding_width "
            "embedding_scale norm_groups",
        )
        require_at_most(self, 16, "num_scales")
        require(0.0 <= self.dropout < 1.0, f"dropout: must lie in [0, 1), not {self.dropout}")
        mult = self.channel_mult
        require(
            mult is None or (len(mult) >= self.num_scales and min(mult) > 0),
            f"channel_mult: needs at least {self.num_scales} positive values (num_scales), "
            f"not {mult and list(mult)}",
        )
        widths = self.widths
        require(
            widths is None or (mult is None and len(widths) == self.num_scales and min(widths) > 0),
            f"widths: needs {self.num_scales} positive values (num_scales) and no channel_mult, "
            f"not {widths and list(widths)}",
        )


@dataclass(frozen=True)
class SDEConfig:
    """The diffusion in latent space; time runs from 0 (data) to 1 (noise)."""

    kind: SDEName = "vpsde"
    """Variance preserving (linear beta or geometric), sub-variance preserving, exploding."""
    beta_start: float = 0.1
    """vpsde, subvpsde: beta(0)."""
    beta_end: float = 20.0
    """vpsde, subvpsde: beta(1)."""
    sigma2_0: float = 0.0
    """vpsde, subvpsde, geometric: variance of the noise at t = 0 (vesde: sigma2_min)."""
    sigma2_min: float = 1e-4
    """geometric, vesde: smallest variance."""
    sigma2_max: float = 0.99
    """geometric, vesde: largest variance."""
    time_eps: float = 1e-2
    """Training times lie in [time_eps, 1]."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            finite = name == "kind" or math.isfinite(value)
            require(finite, f"{name}: must be a finite number, not {value}")
        # The SDE is what decides, by the fields that it has; not imported above, so that reading
        # a schema does not load torch.
        from lsgm.sde import make_sde

        make_sde(**asdict(self)).cross_entropy_constant()


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
    weighting_p: WeightingName = "likelihood"
    """Weighting of the prior's loss over time."""
    proposal_p: ProposalName = "importance"
    """Training times for the prior's loss: uniform; the paper's; numerically optimal; a mixture of
    that with the weight itself, whose weights are bounded; or in proportion to the weight."""
    proposal_q: ProposalOrSame = "same"
    """Times for the encoder's cross entropy (likelihood-weighted); same: the prior's draw."""
    training: Literal["joint", "disjoint", "frozen"] = "joint"
    """joint: VAE and prior in one step; disjoint: one after the other; frozen: the prior alone."""
    frozen_statistics: Literal["running", "batch"] = "running"
    """frozen only: statistics of the VAE's batch norms. running: those it was trained to; batch:
    each batch's own, which also move the running ones, as published."""
    kl_scales_prior: bool = False
    """joint with one draw, weighting likelihood: the prior's gradient carries the KL's coefficient
    and balance too, as published. false: it is that of the prior's own objective."""
    drop_inactive: bool = False
    """Keep N(0, I) for latent channels that carry no information (KL below 0.1 nats)."""
    class_conditional: bool = False
    """The network is told the class of an image, which the dataset must know."""
    label_dropout: float = 0.1
    """class_conditional: fraction of images whose class is hidden in training, so that the network
    can do without (classifier-free guidance)."""
    scan_images: int | None = None
    """drop_inactive: training images, drawn by a fixed seed, among which those channels are sought.
    None: as many as have 16,384 positions in the latents' maps, 16 at least."""
    inactive_mask: Literal["kept", "training"] = "kept"
    """drop_inactive: kept: those channels stay N(0, I) for good. training, as published: their
    mixing starts at logit -15 and is trained, and they are hidden from the network in training
    only, not in the released model."""
    update_q_ema: bool = False
    """disjoint only: the encoder's loss uses the averaged prior."""
    q_ema_dropout: bool = False
    """update_q_ema only: the averaged prior drops features as in training, as published."""
    control_variate: bool = True
    """Sample only the network's difference from N(0, I) in the encoder's loss: less variance.
    Published: false."""
    stratified_times: bool = True
    """Spread the times of a batch evenly over the proposal: less variance, same mean. Published:
    false."""
    spectral_regularization: float = 0.0
    """Weight of the largest singular values of the score network's convolutions (0: off)."""
    norm_regularization: float = 0.0
    """Weight of the largest gains of the score network's normalisation layers (0: off)."""

    def __post_init__(self) -> None:
        require_non_negative(self, "spectral_regularization norm_regularization")
        require_positive(self, "scan_images")
        require(
            0.0 <= self.label_dropout <= 1.0,
            f"label_dropout: must lie in [0, 1], not {self.label_dropout}",
        )
        require(
            self.mixed or not self.drop_inactive,
            "drop_inactive: needs mixed true (N(0, I) is the Normal part of the mix)",
        )
        require(self.mixed or self.predict == "noise", "predict: correction needs mixed true")
        require(
            not self.update_q_ema or self.training == "disjoint",
            f"update_q_ema: needs training disjoint, not {self.training}",
        )


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

    network: NetworkName = "ncsnpp"
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
            not self.class_conditional or self.network != "refinenet",
            "class_conditional: network refinenet takes no class",
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
