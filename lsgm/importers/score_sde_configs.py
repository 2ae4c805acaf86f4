"""Which of our configurations a checkpoint of score-SDE is of.

A file says nothing about it. The network shows in the names and shapes of the weights, a VE model's
noise in its list of levels; between the SDEs of one network only the name that the authors gave to
the checkpoint's folder decides, or whoever imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lsgm.config.command_line import load_config
from lsgm.config.packaged import packaged_configs
from lsgm.config.training import NCSNTrainConfig
from lsgm.errors import UserError

__all__ = ["PUBLISHED", "Choice", "choose_config", "network_facts"]

PUBLISHED = {
    "ve/cifar10_ncsnpp": "cifar10/score_ve_discrete",
    "ve/cifar10_ncsnpp_continuous": "cifar10/score_ve",
    "ve/cifar10_ncsnpp_deep_continuous": "cifar10/score_ve_deep",
    "vp/cifar10_ddpm": "cifar10/score_vp_ddpm_discrete",
    "vp/cifar10_ddpm_continuous": "cifar10/score_vp_ddpm",
    "vp/cifar10_ddpmpp": "cifar10/score_vp_discrete",
    "vp/cifar10_ddpmpp_continuous": "cifar10/score_vp",
    "vp/cifar10_ddpmpp_deep_continuous": "cifar10/score_vp_deep",
    "subvp/cifar10_ddpm_continuous": "cifar10/score_subvp_ddpm",
    "subvp/cifar10_ddpmpp_continuous": "cifar10/score_subvp",
    "subvp/cifar10_ddpmpp_deep_continuous": "cifar10/score_subvp_deep",
    "ve/bedroom_ncsnpp_continuous": "lsun/score_ve_bedroom",
    "ve/church_ncsnpp_continuous": "lsun/score_ve_church",
    "ve/ffhq_256_ncsnpp_continuous": "ffhq256/score_ve",
    "ve/celebahq_256_ncsnpp_continuous": "celebahq256/score_ve",
    "ve/ffhq_1024_ncsnpp_continuous": "ffhq1024/score_ve",
}
"""Published checkpoints by the name of their folder, and the packaged configuration of each."""


@dataclass(frozen=True)
class Choice:
    """A configuration, what it is called, and in words how it was found."""

    config: NCSNTrainConfig
    name: str
    said: str


@dataclass(frozen=True)
class NetworkFacts:
    """What names and shapes say about a network; compared to tell one configuration from another.

    Attributes:
        kind: ``"ncsnpp"``, ``"ddpm"`` (blocks of either network) or ``"refinenet"``.
        channels: Of the images.
        width: Of the first convolution.
        fourier: Fourier features rather than sinusoids.
        modules: For each module the sorted shapes of its weights.
    """

    kind: str
    channels: int
    width: int
    fourier: bool
    modules: tuple[tuple[tuple[int, ...], ...], ...]

    def __str__(self) -> str:
        embedding = "Fourier" if self.fourier else "positional"
        return (
            f"a {self.kind} network of {len(self.modules)} modules, first width {self.width}, "
            f"{embedding} embedding, images of {self.channels} channels"
        )


def network_facts(state: Mapping[str, Tensor]) -> NetworkFacts:
    """The facts of a network in published names."""
    if "begin_conv.weight" in state:
        width, channels = state["begin_conv.weight"].shape[:2]
        shapes = tuple((tuple(value.shape),) for value in state.values())
        return NetworkFacts("refinenet", channels, width, False, shapes)
    by_module: dict[int, list[tuple[int, ...]]] = {}
    for name, value in state.items():
        _, number, *_ = name.split(".")
        if number.isdigit():
            by_module.setdefault(int(number), []).append(tuple(value.shape))
    modules = tuple(tuple(sorted(by_module[k])) for k in sorted(by_module))
    first = next((v for v in state.values() if v.ndim == 4), torch.empty(0, 0))
    fourier = "all_modules.0.W" in state
    # A residual block with a map of pixels for its shortcut is DDPM's.
    maps = [name.removesuffix("NIN_0.W") for name in state if name.endswith(".NIN_0.W")]
    ddpm = any(f"{module}Conv_0.weight" in state for module in maps)
    kind = "ddpm" if ddpm else "ncsnpp"
    return NetworkFacts(kind, first.shape[1], first.shape[0], fourier, modules)


def choose_config(
    path: Path,
    state: Mapping[str, Tensor],
    fits: Callable[[NCSNTrainConfig], bool],
    given: str | Path | None = None,
) -> Choice:
    """The configuration of a checkpoint: the one given, else that of the published folder in which
    the file lies, else the only one whose network and noise it has.

    Args:
        path: The file.
        state: Its weights in published names.
        fits: Whether the checkpoint is of a configuration, with all its shapes and noise levels.
        given: A YAML file or a packaged one by its name, or the name of a published checkpoint.

    Raises:
        UserError: None fits, or several do, which are named.
    """
    if given is not None:
        name = PUBLISHED.get(str(given))
        config = _load(given if name is None else packaged_configs()[name])
        return Choice(config, str(given), f"configuration {given}")
    folders = "/".join(path.resolve().parent.parts[-2:])
    packaged = packaged_configs()
    if folders in PUBLISHED:
        said = f"configuration {PUBLISHED[folders]} by the name of the folder, {folders}"
        return Choice(_load(packaged[PUBLISHED[folders]]), PUBLISHED[folders], said)
    facts = network_facts(state)
    fitting = {
        published: one
        for published, name in PUBLISHED.items()
        if (one := _fitting(packaged[name], facts, fits)) is not None
    }
    distinct: dict[str, NCSNTrainConfig] = {}
    for published, config in fitting.items():
        known = [(other.score, other.sampler) for other in distinct.values()]
        if (config.score, config.sampler) not in known:
            distinct[published] = config
    if not distinct:
        raise UserError(
            f"checkpoint {path}: it is {facts}, which no configuration of ours has; give one with "
            "--config"
        )
    if len(distinct) > 1:
        raise UserError(
            f"checkpoint {path}: the same network is that of {', '.join(fitting)}; say which with "
            "--config"
        )
    ((published, config),) = distinct.items()
    name = PUBLISHED[published]
    return Choice(config, name, f"configuration {name} by the shapes of the weights ({facts})")


def _load(file: str | Path) -> NCSNTrainConfig:
    config = load_config(NCSNTrainConfig, file)
    if config.kind == "classifier":
        raise UserError(f"--config: {file} is of a classifier, not of a score model")
    return config


def _fitting(
    file: Path, facts: NetworkFacts, fits: Callable[[NCSNTrainConfig], bool]
) -> NCSNTrainConfig | None:
    """The configuration of a file, if the checkpoint is of it."""
    config = load_config(NCSNTrainConfig, file)
    network = config.score.ncsnpp
    kind = "ddpm" if network.block == "ddpm" else "ncsnpp"
    fourier = network.embedding_type == "fourier"
    if (kind, fourier, network.num_channels) != (facts.kind, facts.fourier, facts.width):
        return None
    return config if fits(config) else None
