"""``--data``, ``--image_size`` and ``--preset`` of the training commands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lsgm.config.command_line import (
    CONFIG_FILE,
    RunConfig,
    load_config,
    load_run_config,
    run_folder,
)
from lsgm.config.overrides import HELP_FLAGS, Option
from lsgm.config.presets import PRESETS, DataFacts, Machine, choose_preset, lsgm_preset, vae_preset
from lsgm.config.training import DataConfig, LSGMTrainConfig, VAETrainConfig
from lsgm.errors import UserError

__all__ = ["PRESET", "SHORT_OPTIONS", "lsgm_base", "rewritten", "vae_base"]

PRESET = Option(
    "preset",
    "small (two CPU cores), medium (one GPU) or large (as published), fitted to size and number of "
    "the images; below a --config file and all other options. Default, without --config: by the "
    "device's memory",
    "NAME",
)
SHORT_OPTIONS = (
    Option("data", "folder of pictures or of packed data (data.root), or a dataset's name", "PATH"),
    Option("image_size", "side in pixels (data.image_size)", "N"),
    Option("image_width", "width, where image_size is the height (data.image_width)", "N"),
)


def rewritten(argv: Sequence[str]) -> list[str]:
    """The arguments with the short options in full: ``--data PATH`` is ``--data.name folder
    --data.root PATH``, or ``--data.name`` alone for the name of a dataset.

    Raises:
        UserError: One of them lacks its value.
    """
    from lsgm.registry import DATASETS

    argv, found = list(argv), []
    while argv:
        token = argv.pop(0)
        if token in ("--data", "--image_size", "--image_width"):
            if not argv or argv[0].startswith("--"):
                raise UserError(f"{token}: needs a value")
            value = argv.pop(0)
            if token != "--data":
                found += [f"--data.{token[2:]}", value]
            elif value in DATASETS and value != "folder":
                found += ["--data.name", value]
            else:
                found += ["--data.name", "folder", "--data.root", value]
        else:
            found.append(token)
    return found


def _wanted(argv: Sequence[str], without_file: bool) -> tuple[bool, str | None]:
    """Whether the configuration is a preset's, and its name if one is given; ``without_file``:
    also where neither a preset nor a file is named.
    """
    name = None
    if "--preset" in argv:
        place = list(argv).index("--preset") + 1
        name = argv[place] if place < len(argv) else ""
        if name not in PRESETS:
            raise UserError(f"--preset: there is no {name!r}; there are {', '.join(PRESETS)}")
    if set(HELP_FLAGS) & set(argv):
        return False, None
    return name is not None or (without_file and "--config" not in argv), name


def _overrides(full: Sequence[str], section: str) -> list[str]:
    """Those tokens that set keys of a section."""
    found: list[str] = []
    taking = False
    for token in full:
        if token.startswith("--"):
            taking = token.startswith(f"--{section}.")
        if taking:
            found.append(token)
    return found


def _machine(device: str) -> Machine:
    import torch

    from lsgm.system.device import choose_device
    from lsgm.system.memory import physical_memory
    from lsgm.training.precision import computes_bf16

    chosen = choose_device(device)
    if chosen.type != "cuda":
        return Machine(chosen.type, physical_memory(), bf16=computes_bf16(chosen))
    memory = torch.cuda.get_device_properties(chosen).total_memory
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    return Machine("cuda", memory, devices, bf16=torch.cuda.is_bf16_supported())


def _facts(data: DataConfig) -> DataFacts:
    from lsgm.data import build_datasets

    built = build_datasets(data)
    height, width = built.spec.network_shape
    return DataFacts(height, width, built.spec.channels, built.spec.binary, len(built.train))


def _device(full: Sequence[str]) -> str:
    given = load_config(VAETrainConfig, None, _overrides(full, "train"))
    return given.train.device


def _say(name: str, why: str, facts: DataFacts, config: RunConfig, full: Sequence[str]) -> None:
    goes_on = (
        "--resume" in full and (run_folder(config, _value(full, "--out")) / CONFIG_FILE).is_file()
    )  # by its own configuration
    kind = "binary" if facts.binary else "grey" if facts.channels == 1 else "colour"
    if goes_on or os.environ.get("RANK", "0") != "0":
        return
    print(
        f"preset {name} ({why}) for {facts.count} {kind} images of {facts.height} x {facts.width}: "
        f"{config.train.epochs} epochs of batches of {config.train.batch_size}; all of it in "
        "config.yaml",
        flush=True,
    )


def _chosen(name: str | None, machine: Machine) -> tuple[Any, str]:
    return (name, "as asked") if name is not None else choose_preset(machine)


def vae_base(argv: Sequence[str], full: Sequence[str]) -> VAETrainConfig | None:
    """The configuration below all others of a first stage; None: no preset is asked for.

    Raises:
        UserError: There is no such preset, or the data cannot be read.
    """
    wanted, name = _wanted(argv, "--data.name" in full)
    if not wanted:
        return None
    given = load_config(VAETrainConfig, _value(full, "--config"), _overrides(full, "data"))
    machine, facts = _machine(_device(full)), _facts(given.data)
    chosen, why = _chosen(name, machine)
    config = vae_preset(chosen, facts, given.data, machine)
    _say(chosen, why, facts, config, full)
    return config


def lsgm_base(argv: Sequence[str], full: Sequence[str]) -> LSGMTrainConfig | None:
    """As :func:`vae_base`, of a second stage: without ``--config``, unless the VAE is of the
    embedded digits, which have a configuration of their own.
    """
    wanted, name = _wanted(argv, True)
    run = _value(full, "--vae")
    if not wanted or run is None:
        return None
    data = load_run_config(run).data
    if data is None or (name is None and data.name == "digits"):
        return None
    from lsgm.models.loading import load

    if given := _overrides(full, "data"):
        data = load_config(VAETrainConfig, None, given).data
    machine, facts = _machine(_device(full)), _facts(data)
    chosen, why = _chosen(name, machine)
    model: Any = load(run)
    if not hasattr(model, "vae"):
        raise UserError(f"--vae: {run} is not the run of a VAE")
    latents = model.vae.top_shape
    config = lsgm_preset(chosen, facts, data, machine, latents)
    _say(chosen, why, facts, config, full)
    return config


def _value(argv: Sequence[str], flag: str) -> str | None:
    found = [argv[i + 1] for i, token in enumerate(argv[:-1]) if token == flag]
    return found[-1] if found else None
