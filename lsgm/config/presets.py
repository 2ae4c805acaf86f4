"""Sensible choices for data of one's own: ``--preset small | medium | large``.

A preset is a function of what the data are: size, kind and number of pictures. *small* is meant for
two CPU cores, *medium* for one GPU of 8 to 24 GB, *large* is the published architecture for the
size, made for eight large GPUs. What is chosen stands in full in the
run's ``config.yaml``; every key can be given in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, SDEConfig, VAEConfig
from lsgm.config.command_line import load_config
from lsgm.config.training import (
    DataConfig,
    LSGMTrainConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    VAETrainConfig,
)

__all__ = ["DataFacts", "Machine", "PresetName", "choose_preset", "lsgm_preset", "vae_preset"]

PresetName = Literal["small", "medium", "large"]

GIB = 2**30
MEDIUM_MEMORY, LARGE_MEMORY = 8 * GIB, 40 * GIB


@dataclass(frozen=True)
class DataFacts:
    """What a preset has to know of the data.

    Attributes:
        height, width: Of the images as the network sees them, in pixels.
        channels: 1 or 3.
        binary: Whether pixels are 0 or 1.
        count: Training images.
    """

    height: int
    width: int
    channels: int
    binary: bool
    count: int


@dataclass(frozen=True)
class Machine:
    """What computes: ``kind`` cpu, cuda, ...; ``memory`` of one device in bytes, its number of
    ``devices``, and whether it has instructions for ``bf16``.
    """

    kind: str
    memory: int
    devices: int = 1
    bf16: bool = False


def choose_preset(machine: Machine) -> tuple[PresetName, str]:
    """The preset for a machine, and why."""
    memory = f"{machine.memory / GIB:.0f} GiB"
    if machine.kind == "cpu":
        return "small", f"a CPU with {memory}"
    if machine.memory < MEDIUM_MEMORY:
        return "small", f"{machine.kind} with {memory}"
    if machine.memory < LARGE_MEMORY or machine.devices < 4:
        return "medium", f"{machine.devices} x {machine.kind} with {memory}"
    return "large", f"{machine.devices} x {machine.kind} with {memory}"


@dataclass(frozen=True)
class _Size:
    """Numbers of a preset that is made by formula.

    ``width``: of the finest level at 32 pixels or fewer; ``widest``: of any; ``groups`` of
    ``latents`` channels (grey: two thirds); ``images`` of 32 x 32 in a training (binary: three
    times); ``prior``: width, cells a resolution.
    """

    width: int
    widest: int
    groups: int
    latents: int
    images: int
    prior: tuple[int, int]
    batch: int


_SIZES = {
    "small": _Size(24, 96, 4, 12, 100_000, (96, 2), 64),
    "medium": _Size(64, 256, 10, 12, 8_000_000, (256, 4), 128),
}
_LARGE = {
    "binary": ("mnist/vae", "mnist/lsgm"),
    "small": ("cifar10/vae_balanced", "cifar10/lsgm_balanced"),
    "large": ("celebahq256/vae_quantitative", "celebahq256/lsgm_quantitative"),
}
"""Published configurations, for binary data, sides below 128, and others."""
TOP_SIDE = 8
FEWEST_IMAGES = 8_000
KL_BETWEEN_STAGES = 0.7
"""The KL's coefficient at which the first stage ends and the second begins."""


def _halvings(facts: DataFacts) -> int:
    """Halvings from the image to the latents, whose shorter side is about :data:`TOP_SIDE`."""
    halvings = 0
    height, width = facts.height, facts.width
    while min(height, width) >= 2 * TOP_SIDE and height % 2 == width % 2 == 0:
        height, width, halvings = height // 2, width // 2, halvings + 1
    return halvings


def _published(facts: DataFacts) -> tuple[str, str]:
    if facts.binary:
        return _LARGE["binary"]
    return _LARGE["small" if max(facts.height, facts.width) < 128 else "large"]


def _run(name: str, size: _Size, facts: DataFacts, machine: Machine) -> TrainConfig:
    """The loop: passes over the data that make up the preset's number of images."""
    images = size.images * 32**2 / (facts.height * facts.width) * (3 if facts.binary else 1)
    epochs = max(1, round(max(images, FEWEST_IMAGES) / facts.count))
    batch = max(1, min(size.batch, facts.count // 4 or 1))
    steps = epochs * max(1, facts.count // batch)
    return TrainConfig(
        epochs=epochs,
        batch_size=batch,
        precision="bf16" if machine.bf16 else "float32",
        eval_every=max(1, epochs // 8),
        eval_images=1000,
        log_every=max(1, min(50, steps // 20)),
        checkpoint_every=max(1, min(1000, steps // 20)),
    )


def _decoder(name: PresetName, facts: DataFacts) -> Literal["bin", "dl", "dml"]:
    """A mixture of logistics; in "small" at 128 pixels and more, where its ten components take most
    of the step, a single one.
    """
    if facts.binary:
        return "bin"
    return "dl" if name == "small" and max(facts.height, facts.width) >= 128 else "dml"


def _warmup(train: TrainConfig, facts: DataFacts) -> int:
    steps = train.epochs * max(1, facts.count // train.batch_size)
    return min(200, max(1, steps // 10))


def vae_preset(
    name: PresetName, facts: DataFacts, data: DataConfig, machine: Machine
) -> VAETrainConfig:
    """The first stage.

    Raises:
        UserError: The published architecture does not fit the size of the images.
    """
    title = f"{data.name}-vae-{name}"
    if name == "large":
        return replace(load_config(VAETrainConfig, _published(facts)[0]), name=title, data=data)
    size, halvings = _SIZES[name], _halvings(facts)
    # finer images get fewer channels: the cost of a level is in proportion to its area
    finest = max(8, size.width // 2 ** max(0, halvings - 2))
    widths = [min(size.widest, finest * 2**level) for level in range(halvings + 1)]
    grey = facts.channels == 1
    train = _run(name, size, facts, machine)
    return VAETrainConfig(
        name=title,
        data=data,
        vae=VAEConfig(
            num_channels_enc=finest,
            num_channels_dec=finest,
            channel_mult=tuple(w // finest for w in widths),
            num_preprocess_blocks=halvings,
            num_preprocess_cells=1,
            num_postprocess_cells=1,
            num_latent_scales=1,
            num_groups_per_scale=max(1, size.groups * 3 // 4) if grey else size.groups,
            num_latent_per_group=size.latents * 2 // 3 if grey else size.latents,
            num_cell_per_cond_enc=1,
            num_cell_per_cond_dec=2,
            cell="res_bnswish",
            decoder_dist=_decoder(name, facts),
        ),
        objective=ObjectiveConfig(
            # the second stage's prior takes what 0.7 leaves of the latents beyond N(0, I)
            kl_anneal_portion=0.25, kl_const_coeff=0.1, kl_max_coeff=KL_BETWEEN_STAGES,
            spectral_regularization=0.0,
        ),
        optim_vae=OptimConfig(
            optimizer="adamax", lr=1e-2, lr_min=1e-4, warmup_steps=_warmup(train, facts),
            clip_norm=200.0, ema_decay=0.998,
        ),
        train=train,
    )  # fmt: skip


def lsgm_preset(
    name: PresetName,
    facts: DataFacts,
    data: DataConfig,
    machine: Machine,
    latents: tuple[int, int, int],
) -> LSGMTrainConfig:
    """The second stage, over a VAE whose coarsest latents have the shape ``latents (C, h, w)``."""
    title = f"{data.name}-lsgm-{name}"
    if name == "large":
        found = load_config(LSGMTrainConfig, _published(facts)[1])
        return replace(found, name=title, data=data)
    size, (_, height, width) = _SIZES[name], latents
    channels, cells = size.prior
    scales = 1
    while (
        scales < 3
        and min(height, width) % 2**scales == max(height, width) % 2**scales == 0
        and (min(height, width) >> scales >= 4)
    ):
        scales += 1
    train = _run(name, size, facts, machine)
    warmup = _warmup(train, facts)
    prior = PriorConfig(
        network=PriorNetworkConfig(
            num_channels=channels * 2 // 3 // 32 * 32 if facts.channels == 1 else channels,
            num_scales=scales,
            num_cells_per_scale=cells,
            embedding_dim=64,
            attention_resolutions=() if name == "small" else (8,),
        ),
        sde=SDEConfig(kind="vpsde", time_eps=1e-2),
        # a correction starts at N(0, I) whatever the mixing
        predict="correction",
        mixing_init=-1.0,
        weighting_p="likelihood",
        proposal_p="importance",
        training="joint",
    )
    return LSGMTrainConfig(
        name=title,
        data=data,
        prior=prior,
        objective=ObjectiveConfig(
            kl_const_portion=0.0, kl_const_coeff=KL_BETWEEN_STAGES, kl_anneal_portion=0.3,
            kl_balance=False, spectral_regularization=0.0,
        ),
        optim_vae=OptimConfig(
            optimizer="adamax", lr=3e-3, lr_min=1e-5, warmup_steps=warmup, clip_norm=200.0,
            ema_decay=0.998,
        ),
        optim_prior=OptimConfig(
            optimizer="adamw", lr=1e-3, lr_min=1e-5, betas=(0.9, 0.99), eps=1e-8,
            warmup_steps=warmup, clip_norm=200.0, ema_decay=0.998,
        ),
        train=train,
    )  # fmt: skip


PRESETS: tuple[str, ...] = get_args(PresetName)
