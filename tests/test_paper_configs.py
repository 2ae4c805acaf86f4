"""The configurations of the paper's experiments, built without memory on the meta device.

Expected numbers: arXiv 2106.05931, Table 7 / App. G, and the released configurations.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lsgm.config.command_line import load_config
from lsgm.config.training import LSGMTrainConfig, TrainConfig, VAETrainConfig
from lsgm.data.spec import DataSpec
from lsgm.models.latent import build_prior, build_vae
from vae import HierarchicalVAE
from vae.layers import BatchNorm, Conv2d, WeightNormConv2d

CONFIGS = Path(__file__).parent.parent / "configs"
SPECS = {
    "cifar10": DataSpec("cifar10", 3, 32, 0, binary=False),
    "mnist": DataSpec("mnist", 1, 28, 2, binary=True),
    "omniglot": DataSpec("omniglot", 1, 28, 2, binary=True),
    "folder": DataSpec("folder", 3, 256, 0, binary=False),
}
OWN = ("_small", "_one_gpu", "_ablation", "_context", "_deep", "_deeper")
"""Ends of names of configurations that are not the papers'."""
TRAINING_IMAGES = {"cifar10": 50_000, "mnist": 60_000, "omniglot": 24_345, "celebahq256": 27_000}


@dataclass(frozen=True)
class FirstStage:
    """Published structure of a VAE.

    Attributes:
        parameters: Number of values.
        tensors: Number of parameter tensors.
        convolutions: Convolutions that the spectral regulariser counts.
        norms: Batch norms.
        top: Shape of the decoder's first feature map.
        latents: Latent channels at each side, coarsest first.
        batch: Images per step over all GPUs.
        epochs: Of training.
    """

    parameters: int
    tensors: int
    convolutions: int
    norms: int
    top: tuple[int, int, int]
    latents: dict[int, int]
    batch: int
    epochs: int


CIFAR10 = (100_867_740, 1434, 254, 168, (256, 16, 16), {16: 180}, 256)
FIRST = {
    "cifar10/vae_balanced": FirstStage(*CIFAR10, epochs=600),
    "cifar10/vae_fid": FirstStage(*CIFAR10, epochs=400),
    "cifar10/vae_nll": FirstStage(
        130_622_772, 598, 130, 60, (512, 16, 16), {16: 180}, 256, epochs=400
    ),
    "mnist/vae": FirstStage(3_005_822, 288, 59, 48, (128, 8, 8), {8: 40}, 200, epochs=200),
    "omniglot/vae": FirstStage(5_384_190, 373, 73, 66, (128, 16, 16), {16: 60}, 128, epochs=200),
    "celebahq256/vae_quantitative": FirstStage(
        51_296_572, 2524, 662, 314, (256, 32, 32), {32: 160, 64: 160, 128: 160}, 64, epochs=200
    ),
    "celebahq256/vae_qualitative": FirstStage(
        17_789_540, 2084, 547, 259, (128, 64, 64), {64: 200, 128: 200}, 64, epochs=200
    ),
}


@dataclass(frozen=True)
class SecondStage:
    """Published structure of a prior.

    Attributes:
        vae: Configuration of its first stage.
        shape: Channels and side of its input.
        widths: Channels of the network at each of its scales.
        sde: Kind of the diffusion.
        losses: Weighting and time proposal of the prior's loss, then the proposal of the encoder's.
        penalties: Weights of the prior's spectral and norm regularisers and of the VAE's.
        training: How it is trained with the VAE.
        mixing_init: Initial mixing logit.
        batch: Images per step over all GPUs.
        epochs: Of training.
        warmup: Epochs of warm-up.
    """

    vae: str
    shape: tuple[int, int]
    widths: tuple[int, ...]
    sde: str
    losses: tuple[str, str, str]
    penalties: tuple[float, float, float]
    training: str
    mixing_init: float
    batch: int
    epochs: int
    warmup: int


LIKELIHOOD = ("likelihood", "importance")
UNWEIGHTED = ("unweighted", "importance")
REWEIGHTED = ("reweighted", "importance")
SECOND = {
    "cifar10/lsgm_balanced": SecondStage(
        "cifar10/vae_balanced", (180, 16), (512,) * 3, "vpsde", (*UNWEIGHTED, "same"),
        (0.0, 1e-2, 1e-2), "joint", -3.0, 256, 1875, 5,
    ),
    "cifar10/lsgm_fid": SecondStage(
        "cifar10/vae_fid", (180, 16), (512,) * 3, "vpsde", (*UNWEIGHTED, "same"),
        (0.0, 1e-2, 1e-2), "joint", -3.0, 256, 1875, 5,
    ),
    "cifar10/lsgm_nll": SecondStage(
        "cifar10/vae_nll", (180, 16), (512,) * 3, "geometric", ("likelihood", "uniform", "same"),
        (1e-2, 1e-2, 1e-2), "joint", -3.0, 256, 1875, 5,
    ),
    "mnist/lsgm": SecondStage(
        "mnist/vae", (40, 8), (256,) * 2, "vpsde", (*LIKELIHOOD, "same"),
        (0.0, 0.0, 1e-2), "joint", -6.0, 128, 800, 20,
    ),
    "omniglot/lsgm": SecondStage(
        "omniglot/vae", (60, 16), (256,) * 3, "vpsde", (*LIKELIHOOD, "same"),
        (1e-3, 1e-3, 1e-2), "joint", -6.0, 128, 1500, 20,
    ),
    "celebahq256/lsgm_quantitative": SecondStage(
        "celebahq256/vae_quantitative", (160, 32), (256, 512, 512, 512), "vpsde",
        (*REWEIGHTED, "importance"), (1e-2, 1e-2, 1e-1), "disjoint", -6.0, 64, 1000, 20,
    ),
    "celebahq256/lsgm_qualitative": SecondStage(
        "celebahq256/vae_qualitative", (200, 64), (256, 256, 512, 512, 512), "geometric",
        (*REWEIGHTED, "importance"), (1e-2, 1e-2, 1e-1), "disjoint", -6.0, 64, 1000, 20,
    ),
    "celebahq256/lsgm_qualitative_frozen": SecondStage(
        "celebahq256/vae_qualitative", (200, 64), (320, 320, 640, 640, 640), "vpsde",
        (*REWEIGHTED, "same"), (1e-2, 1e-2, 1e-1), "frozen", -6.0, 96, 1500, 20,
    ),
}  # fmt: skip


def steps_per_epoch(name: str, batch: int) -> int:
    return TRAINING_IMAGES[name.split("/")[0]] // batch


@functools.cache
def first_stage(name: str) -> tuple[VAETrainConfig, HierarchicalVAE]:
    config = load_config(VAETrainConfig, CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        return config, build_vae(config.vae, SPECS[config.data.name])


@pytest.mark.parametrize("name", FIRST)
def test_first_stage(name: str) -> None:
    expected, (config, vae) = FIRST[name], first_stage(name)
    parameters = list(vae.parameters())
    assert len(parameters) == expected.tensors
    assert sum(p.numel() for p in parameters) == expected.parameters
    modules = list(vae.modules())
    assert sum(isinstance(m, (Conv2d, WeightNormConv2d)) for m in modules) == expected.convolutions
    assert sum(isinstance(m, BatchNorm) for m in modules) == expected.norms
    assert tuple(vae.decoder.top_feature.shape) == expected.top
    latents: dict[int, int] = {}
    for channels, height, width in vae.latent_shapes:
        assert height == width
        latents[height] = latents.get(height, 0) + channels
    assert list(latents.items()) == list(expected.latents.items())
    assert (config.train.batch_size, config.train.epochs) == (expected.batch, expected.epochs)
    optim = config.optim_vae
    assert optim.warmup_steps == 5 * steps_per_epoch(name, expected.batch)
    assert (optim.optimizer, optim.lr, optim.lr_min, optim.eps) == ("adamax", 1e-2, 1e-4, 1e-3)
    assert (optim.schedule, optim.clip_norm, optim.ema_decay) == ("published", 0, 0)
    check_published(name, {"objective": config.objective, "optim_vae": config.optim_vae})
    check_release(config.train, best=True)


OPTIM = {"betas": (0.9, 0.999), "weight_decay": 3e-4, "clip_norm": 0.0, "ema_warmup": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "objective": {"kl_balance_sync": False, "free_bits": 0.0},
    "optim_vae": OPTIM,
    "optim_prior": OPTIM,
    "prior": {
        "mixed": True,
        "predict": "noise",
        "kl_scales_prior": True,
        "frozen_statistics": "batch",
        "inactive_mask": "training",
        "q_ema_dropout": True,
        "class_conditional": False,
        "label_dropout": 0.0,
        "control_variate": False,
        "stratified_times": False,
    },
}
"""What is the same in all published runs of LSGM, and where our own default is mostly another."""

OTHER_SOFTWARE = {"impl"}
"""Keys that choose an implementation of the same mathematics: they may stay at their default."""


def check_published(name: str, sections: dict[str, Any]) -> None:
    """The sections have the published values, and the file says all of theirs itself: a default
    may be ours, and a new option has to be decided on for every configuration of the paper.
    """
    written = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    for section, config in sections.items():
        values = {key: getattr(config, key) for key in PUBLISHED[section]}
        assert values == PUBLISHED[section]
        names = {field.name for field in dataclasses.fields(config)} - OTHER_SOFTWARE
        assert names - written[section].keys() == set(), f"{name}.yaml: {section}"
    assert "release" in written["train"]


def check_release(train: TrainConfig, *, best: bool) -> None:
    """The best evaluation is one of all test images, about forty times in a run."""
    assert train.release == ("best" if best else "last")
    if best:
        assert train.eval_images >= 3000
    assert train.eval_every == max(train.epochs // 40, 1)


@pytest.mark.parametrize("name", SECOND)
def test_second_stage(name: str) -> None:
    expected, (_, vae) = SECOND[name], first_stage(SECOND[name].vae)
    config = load_config(LSGMTrainConfig, CONFIGS / f"{name}.yaml")
    prior = config.prior
    channels, side = expected.shape
    assert vae.top_shape == (channels, side, side)
    with torch.device("meta"):
        score = build_prior(prior, vae)
    network = score.network
    assert (network.channels, network.resolution) == expected.shape
    assert network.conv_in.weight.shape == (expected.widths[0], channels, 3, 3)
    widths = tuple(level.blocks[-1].conv_out.weight.shape[0] for level in network.down)
    assert widths == expected.widths
    assert all(len(level.blocks) == 8 for level in network.down)
    assert prior.sde.kind == expected.sde
    assert (prior.weighting_p, prior.proposal_p, prior.proposal_q) == expected.losses
    of_prior = (prior.spectral_regularization, prior.norm_regularization)
    assert of_prior == expected.penalties[:2]
    if prior.training != "frozen":
        assert config.objective.spectral_regularization == expected.penalties[2]
    assert (prior.training, prior.mixing_init) == (expected.training, expected.mixing_init)
    assert (config.train.batch_size, config.train.epochs) == (expected.batch, expected.epochs)
    warmup = expected.warmup * steps_per_epoch(name, expected.batch)
    optim = config.optim_prior
    assert optim.warmup_steps == warmup
    assert (optim.lr, optim.eps, optim.ema_decay) == (optim.lr_min, 1e-4, 0.9999)
    assert optim.schedule == "published"
    sections: dict[str, Any] = {"prior": prior, "optim_prior": optim}
    if prior.training != "frozen":
        assert config.optim_vae.warmup_steps == warmup
        assert config.optim_vae.schedule == "published"
        sections |= {"objective": config.objective, "optim_vae": config.optim_vae}
    check_published(name, sections)
    # The others are released at their best FID, which training does not measure.
    check_release(config.train, best=prior.weighting_p == "likelihood")
    assert prior.update_q_ema == (name == "celebahq256/lsgm_qualitative")


@pytest.mark.parametrize("section", ["prior", "optim_prior", "objective"])
def test_a_key_that_a_configuration_leaves_to_its_default_is_noticed(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a new option, whose default is ours, is decided on for the paper's configurations."""
    path = CONFIGS / "mnist/lsgm.yaml"
    config = load_config(LSGMTrainConfig, path)
    monkeypatch.setitem(globals(), "CONFIGS", tmp_path)
    for key in yaml.safe_load(path.read_text())[section].keys() - PUBLISHED[section].keys():
        written = yaml.safe_load(path.read_text())
        del written[section][key]
        (tmp_path / "less.yaml").write_text(yaml.safe_dump(written))
        with pytest.raises(AssertionError, match=section):
            check_published("less", {section: getattr(config, section)})


def test_every_configuration_of_the_paper_is_checked() -> None:
    found = {
        path.relative_to(CONFIGS).with_suffix("").as_posix()
        for folder in TRAINING_IMAGES
        for path in (CONFIGS / folder).glob("*.yaml")
        if path.stem.startswith(("vae", "lsgm")) and not path.stem.endswith(OWN)
    }
    assert found == {*FIRST, *SECOND}
