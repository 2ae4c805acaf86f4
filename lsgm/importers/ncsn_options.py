"""The options that NCSN's and NCSNv2's runs keep in ``config.yml``, as a configuration of ours.

The file is a YAML dump of nested ``argparse.Namespace`` objects. It is read as plain mappings:
nothing that it names is imported or called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lsgm.config.architecture import LadderConfig, RefineNetConfig, SamplerConfig
from lsgm.config.command_line import load_config
from lsgm.config.training import DataConfig, NCSNTrainConfig
from lsgm.errors import UserError
from lsgm.importers.runs import OWN_SPECS

__all__ = ["PUBLISHED", "config_of_options", "read_options"]


PUBLISHED = {
    "ncsn": {"mnist": "mnist/ncsn", "cifar10": "cifar10/ncsn", "celeba": "celeba/ncsn"},
    "ncsnv2": {
        "cifar10": "cifar10/ncsnv2",
        "celeba": "celeba/ncsnv2",
        "church": "lsun/ncsnv2_church",
        "bedroom": "lsun/ncsnv2_bedroom",
        "tower": "lsun/ncsnv2_tower",
        "ffhq": "ffhq256/ncsnv2",
    },
}
"""Published runs of each format by the name of their folder, and their configuration in configs/.
"""

STAGES = {4: ((1, 2, 2, 2), (1, 1, 2, 4)), 5: ((1, 2, 2, 4, 4), (1, 1, 1, 2, 4))}
STAGES[6] = ((1, 2, 2, 2, 4, 4), (1, 1, 1, 1, 2, 4))
FIRST_STEP, FIRST_STEPS_EACH = 2e-5, 100
"""NCSN's Langevin dynamics, which its options do not hold."""


class _PlainLoader(yaml.SafeLoader):
    """Builds no Python objects (it is PyYAML's safe loader): those that a file names become
    mappings of their attributes, anything else that is no value None.
    """


def _plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    return loader.construct_mapping(node, deep=True) if isinstance(node, yaml.MappingNode) else None


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def read_options(file: Path) -> dict[str, Any]:
    """The options in a published ``config.yml``.

    Raises:
        UserError: It cannot be read, or lacks the sections ``data`` and ``model``.
    """
    try:
        options = yaml.load(file.read_text(), _PlainLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read as the run's options ({reason})") from None
    missing = {"data", "model"} - (options.keys() if isinstance(options, dict) else set())
    if missing:
        raise UserError(
            f"{file}: has no {' and no '.join(sorted(missing))}; it is not the config.yml of a "
            "run. Give another --config, or move it away"
        )
    return dict(options)


def config_of_options(options: Mapping[str, Any], stages: int, width: int) -> NCSNTrainConfig:
    """Our configuration of a run: that of the published run on its data with the values of its own.

    Args:
        options: As :func:`read_options` gives them.
        stages: Number of stages of the network, which the options do not say.
        width: Of its first stage.

    Raises:
        UserError: They describe what we do not have.
    """
    data, model = _section(options, "data"), _section(options, "model")
    sampling = _section(options, "sampling")
    for name in ("logit_transform", "rescaled"):
        if data.get(name):
            raise UserError(
                f"config.yml: data.{name} is on; only images in [0, 1] as they are can be imported"
            )
    if model.get("sigma_dist", "geometric") != "geometric":
        raise UserError("config.yml: model.sigma_dist is not geometric, as our noise levels are")
    first = "ema" not in model and "step_lr" not in sampling
    base = load_config(NCSNTrainConfig, _published(data, first))
    try:
        levels = int(model["num_classes"])
        largest, smallest = float(model["sigma_begin"]), float(model["sigma_end"])
        size, channels = int(data["image_size"]), int(data["channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"config.yml: data or model lacks a value or has a bad one ({error})"
        ) from (None)
    step = float(sampling.get("step_lr", FIRST_STEP))
    each = int(sampling.get("n_steps_each", FIRST_STEPS_EACH))
    denoise = bool(sampling.get("denoise", not first))
    mult, dilations = STAGES[stages]
    try:
        score = replace(
            base.score,
            refinenet=RefineNetConfig(width, mult, dilations, conditional=first),
            ladder=LadderConfig(2 * largest, 2 * smallest, levels),  # in [-1, 1]
        )
        sampler = SamplerConfig(
            solver="langevin",
            nfe=levels * each + denoise,
            step_ratio=2 * step / smallest**2,
            start="uniform",
            denoise=denoise,
        )
        return replace(
            base,
            score=score,
            sampler=sampler,
            data=_data(base.data, size, channels, bool(data.get("random_flip", False))),
            **_training(base, options),
        )
    except ValueError as error:
        raise UserError(f"config.yml: {error}") from None


def _section(options: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = options.get(name) or {}
    if not isinstance(section, Mapping):
        raise UserError(f"config.yml: {name} is no section with values")
    return section


def _published(data: Mapping[str, Any], first: bool) -> str:
    """Name of the configuration of the published run on the same data."""
    known = PUBLISHED["ncsn" if first else "ncsnv2"]
    dataset = str(data.get("dataset", "")).lower()
    if dataset == "lsun":
        dataset = str(data.get("category", "bedroom")).removesuffix("_outdoor")
    if dataset not in known:
        raise UserError(
            f"config.yml: data.dataset {data.get('dataset')!r} is not one of the published runs' "
            f"({', '.join(known)}); give one of our configurations with --config"
        )
    return known[dataset]


def _data(base: DataConfig, size: int, channels: int, flip: bool) -> DataConfig:
    own = OWN_SPECS.get(base.name)
    if own is not None and (own.image_size, own.channels) == (size, channels):
        return replace(base, flip=flip)
    return DataConfig(name="folder", image_size=size, channels=channels, flip=flip)


def _training(base: NCSNTrainConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of training with what the run had changed."""
    optim, training = _section(options, "optim"), _section(options, "training")
    model = _section(options, "model")
    lr = float(optim.get("lr", base.optim.lr))
    steps = int(training.get("n_iters", (base.train.max_steps or 0) + 1)) - 1
    sliced = training.get("algo") == "ssm"
    return {
        "objective": replace(base.objective, estimator="ssm" if sliced else "dsm"),
        "optim": replace(
            base.optim,
            lr=lr,
            lr_min=lr,
            eps=float(optim.get("eps", base.optim.eps)),
            weight_decay=float(optim.get("weight_decay", 0.0)),
            ema_decay=float(model.get("ema_rate", base.optim.ema_decay)),
        ),
        "train": replace(
            base.train,
            batch_size=int(training.get("batch_size", base.train.batch_size)),
            max_steps=steps or base.train.max_steps,
        ),
    }
