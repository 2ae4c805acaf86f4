"""Folders of the diffusers package with a score model of images, as run folders.

Such a folder has ``unet`` and ``scheduler``, or their files at the top. Two types can be read: the
NCSN++ of variance-exploding models (``ScoreSdeVeScheduler``, arXiv 2011.13456) and DDPM
(``DDPMScheduler``, arXiv 2006.11239), both ``UNet2DModel``. The folder answers everything itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lsgm.config.architecture import PriorNetworkConfig, SamplerConfig, ScoreModelConfig, SDEConfig
from lsgm.config.training import (
    DataConfig,
    NCSNTrainConfig,
    OptimConfig,
    ScoreObjectiveConfig,
    TrainConfig,
)
from lsgm.errors import UserError
from lsgm.importers.diffusers_names import unet_weights
from lsgm.importers.diffusers_reading import (
    DDPM,
    EXPLODING,
    DiffusersFolder,
    read_diffusers,
)
from lsgm.importers.runs import ImportedRun, Weights
from lsgm.importers.score_runs import check_weights, meta_model, put_weights, write_run
from lsgm.models.images import DataSGM
from lsgm.networks.data_score import DataScore
from lsgm.networks.ncsnpp import NCSNpp

__all__ = [
    "config_of_folder",
    "import_diffusers",
    "load_diffusers",
]

ROOT_TWO = 2**0.5
NORM_EPS = 1e-6

COMMON: dict[str, Any] = {
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": None,
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_type": "UNetMidBlock2D",
    "norm_eps": NORM_EPS,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "upsample_type": "conv",
}
"""Options of ``UNet2DModel`` that both types have, and the values that the networks here have."""
TYPE: dict[str, dict[str, Any]] = {
    EXPLODING: {
        "time_embedding_type": "fourier",
        "center_input_sample": True,
        "mid_block_scale_factor": ROOT_TWO,
        "norm_num_groups": None,
        "in_channels": 3,
        "out_channels": 3,
    },
    DDPM: {
        "time_embedding_type": "positional",
        "center_input_sample": False,
        "mid_block_scale_factor": 1,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}
"""Those of one type."""
LIBRARY_DEFAULTS: dict[str, Any] = {
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "time_embedding_type": "positional",
    "center_input_sample": False,
}
"""What an option that is left out means, where it is not the value above."""
BLOCKS = {EXPLODING: ("SkipDownBlock2D", "SkipUpBlock2D"), DDPM: ("DownBlock2D", "UpBlock2D")}
CHAIN: dict[str, Any] = {
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "trained_betas": None,
    "thresholding": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "clip_sample_range": 1.0,
}
"""Options of ``DDPMScheduler`` and the values that our sampler has."""
VARIANCES = {"fixed_small": "small", "fixed_large": "large"}


def config_of_folder(folder: DiffusersFolder) -> NCSNTrainConfig:
    """Our configuration of a folder's model: network, diffusion and sampler; training is as
    published for its type.

    Raises:
        UserError: It has something that our networks or samplers do not.
    """
    exploding = folder.type == EXPLODING
    _check_options(folder)
    unet = folder.unet
    size, channels = unet.get("sample_size"), unet.get("in_channels", 3)
    if not isinstance(size, int) or isinstance(size, bool):
        raise UserError(f"{folder.path}: unet has sample_size {size}, not a whole number of pixels")
    if channels != unet.get("out_channels", 3):
        raise UserError(
            f"{folder.path}: unet maps {channels} channels to {unet.get('out_channels', 3)}; a "
            "score model has as many of both"
        )
    try:
        network = _network(folder, size)
        score = (_exploding if exploding else _chain)(folder, network)
        sampler = (_pc_sampler if exploding else _ddpm_sampler)(folder.scheduler)
        optim = OptimConfig(
            optimizer="adam", lr=2e-4, lr_min=2e-4, schedule="constant", eps=1e-8, weight_decay=0.0,
            warmup_steps=5000, clip_norm=1.0, ema_decay=0.999 if exploding else 0.9999,
        )  # fmt: skip
        return NCSNTrainConfig(
            name=folder.path.resolve().name,
            kind="score_sde",
            data=DataConfig(name="folder", image_size=size, channels=channels, flip=True),
            score=score,
            objective=ScoreObjectiveConfig(
                reduction="half_sum" if exploding else "mean", stratified_times=False
            ),
            sampler=sampler,
            optim=optim,
            train=TrainConfig(batch_size=64 if exploding else 128),
        )
    except (ValueError, TypeError, KeyError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{folder.path}: its options do not fit a configuration ({what})"
        ) from error


def _check_options(folder: DiffusersFolder) -> None:
    """Refuse what our networks or samplers do not have."""
    for name, ours in (COMMON | TYPE[folder.type]).items():
        found = folder.unet.get(name, LIBRARY_DEFAULTS.get(name, ours))
        same = (
            abs(found - ours) < 1e-6 * ours
            if isinstance(ours, float) and isinstance(found, int | float)
            else found == ours
        )
        if not same:
            raise UserError(
                f"{folder.path}: unet has {name} {found}; with {folder.type} only {ours} can be "
                "imported"
            )
    if folder.type != DDPM:
        return
    scheduler = folder.scheduler
    for name, ours in CHAIN.items():
        if scheduler.get(name, ours) != ours:
            raise UserError(
                f"{folder.path}: scheduler has {name} {scheduler[name]}; only {ours} can be "
                "imported"
            )
    if scheduler.get("variance_type", "fixed_small") not in VARIANCES:
        raise UserError(
            f"{folder.path}: scheduler has variance_type {scheduler['variance_type']}; "
            f"{' and '.join(VARIANCES)} can be imported"
        )


def _network(folder: DiffusersFolder, size: int) -> PriorNetworkConfig:
    unet, exploding = folder.unet, folder.type == EXPLODING
    widths = tuple(unet["block_out_channels"])
    first = widths[0]
    multiples = all(width % first == 0 for width in widths)
    attends = _attention_levels(folder)
    return PriorNetworkConfig(
        num_channels=first,
        num_scales=len(widths),
        channel_mult=tuple(width // first for width in widths) if multiples else None,
        widths=None if multiples else widths,
        num_cells_per_scale=unet.get("layers_per_block", 2),
        embedding_dim=2 * first if exploding else first,
        embedding_width=4 * first,
        embedding_type="fourier" if exploding else "positional",
        embedding_scale=16.0 if exploding else 1.0,
        dropout=unet.get("dropout", 0.0),
        fir=exploding,
        progressive="output_skip" if exploding else "none",
        progressive_input="input_skip" if exploding else "none",
        attention_resolutions=tuple(size >> i for i, attend in enumerate(attends) if attend),
        block="biggan" if exploding else "ddpm",
        rescale=exploding,
        norm_groups=None if exploding else unet.get("norm_num_groups", 32),
        up_attention="level" if exploding else "block",
        group_rule="diffusers" if exploding else "width",
    )


def _attention_levels(folder: DiffusersFolder) -> list[bool]:
    """Which levels have attention, finest first."""
    down, up = (list(folder.unet[f"{side}_block_types"]) for side in ("down", "up"))
    plain_down, plain_up = BLOCKS[folder.type]
    known = {plain_down, f"Attn{plain_down}", plain_up, f"Attn{plain_up}"}
    if unknown := [name for name in (*down, *up) if name not in known]:
        raise UserError(
            f"{folder.path}: unet has a {unknown[0]}; with {folder.type} only "
            f"{', '.join(sorted(known))} can be imported"
        )
    attends = [name != plain_down for name in down]
    if attends != [name != plain_up for name in reversed(up)]:
        raise UserError(
            f"{folder.path}: unet has attention at other levels on the way up than down, which our "
            "network cannot have"
        )
    return attends


def _exploding(folder: DiffusersFolder, network: PriorNetworkConfig) -> ScoreModelConfig:
    low, high = folder.scheduler["sigma_min"], folder.scheduler["sigma_max"]
    return ScoreModelConfig(
        ncsnpp=network,
        sde=SDEConfig(kind="vesde", sigma2_min=low**2, sigma2_max=high**2, time_eps=1e-5),
        data_range="unit",
        dequantise=False,
        condition="ln_sigma",
        centre_input=True,
        data_std=0.0,
    )


def _chain(folder: DiffusersFolder, network: PriorNetworkConfig) -> ScoreModelConfig:
    scheduler = folder.scheduler
    levels = scheduler.get("num_train_timesteps", 1000)
    return ScoreModelConfig(
        ncsnpp=network,
        sde=SDEConfig(
            kind="vpsde",
            beta_start=levels * scheduler.get("beta_start", 1e-4),
            beta_end=levels * scheduler.get("beta_end", 0.02),
            time_eps=1e-5,
        ),
        data_range="symmetric",
        dequantise=False,
        condition="index",
        discrete_levels=levels,
        data_std=0.0,
    )


def _pc_sampler(scheduler: Mapping[str, Any]) -> SamplerConfig:
    steps = scheduler.get("correct_steps", 1)
    return SamplerConfig(
        solver="discrete_pc",
        nfe=scheduler.get("num_train_timesteps", 2000) * (1 + steps),
        grid="time",
        t_end=scheduler.get("sampling_eps", 1e-5),
        predictor="reverse_diffusion",
        corrector_steps=steps,
        snr=scheduler.get("snr", 0.15),
        norm="batch",
        denoise=True,
    )


def _ddpm_sampler(scheduler: Mapping[str, Any]) -> SamplerConfig:
    return SamplerConfig(
        solver="ddpm",
        nfe=scheduler.get("num_train_timesteps", 1000),
        grid="time",
        t_end=0.0,
        variance=VARIANCES[scheduler.get("variance_type", "fixed_small")],  # type: ignore[arg-type]
        clip=scheduler.get("clip_sample", True),
        denoise=True,
    )


def load_diffusers(folder: DiffusersFolder, config: NCSNTrainConfig) -> DataSGM:
    """The model of ``config`` with a folder's weights.

    Raises:
        UserError: They do not fit.
    """
    model = meta_model(config)
    assert isinstance(model.score, DataScore) and isinstance(model.score.network, NCSNpp)
    left = dict(folder.weights)
    said = f"{folder.path}: its weights do not fit its unet options"
    try:
        state = unet_weights(model.score.network, left, folder.type == EXPLODING)
    except ValueError as error:
        raise UserError(f"{said}: {error}") from error
    named = {f"network.{name}": value for name, value in state.items()}
    check_weights(model, named, left, said, "take both from the same repository")
    return put_weights(model, named, folder.path)


def import_diffusers(
    folder: str | Path, out: str | Path, weights: Weights | None = None
) -> ImportedRun:
    """Turn a folder of diffusers into the run folder ``out``.

    Args:
        folder: With ``unet`` and ``scheduler``, or with their files.
        out: Folder of the run to write.
        weights: None: such a folder has one set.

    Raises:
        UserError: The folder does not fit, or ``out`` already holds a run.
    """
    if weights is not None:
        raise UserError(
            f"{folder}: a folder of diffusers has one set of weights; leave --weights out"
        )
    read = read_diffusers(folder)
    config = replace(config_of_folder(read), name=Path(out).name)
    model = load_diffusers(read, config)
    said = f"configuration by the folder ({read.type})"
    return write_run(model, config, out, read.file, "released", None, said)
