"""What importers of score models share: a model without memory, weights put into it, a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lsgm.config.command_line import save_config
from lsgm.config.training import DataConfig, NCSNTrainConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.importers.runs import OWN_SPECS, ImportedRun, Weights
from lsgm.models.images import DataSGM, build_data_model
from lsgm.models.release import save
from lsgm.networks.resample import restore_filters
from lsgm.system.files import RunFolder
from lsgm.system.integrity import file_sha256

__all__ = ["check_weights", "few", "meta_model", "put_weights", "size_of", "spec_of", "write_run"]


def spec_of(data: DataConfig) -> DataSpec:
    """The facts of a configuration's images, without looking at any.

    Raises:
        UserError: A folder of images whose size or channels are not said.
    """
    own = OWN_SPECS.get(data.name)
    if own is not None:
        return replace(own, flip=own.flip if data.flip is None else data.flip)
    if data.image_size is None or data.channels is None:
        raise UserError("data: image_size and channels have to be known to import a checkpoint")
    flip = True if data.flip is None else data.flip
    return DataSpec("folder", data.channels, data.image_size, 0, binary=False, flip=flip)


def meta_model(config: NCSNTrainConfig) -> DataSGM:
    """The model of a configuration on the device ``meta``."""
    with torch.device("meta"):
        return build_data_model(config.kind, config.score, config.sampler, spec_of(config.data))


def check_weights(
    model: DataSGM, state: Mapping[str, Tensor], left: Iterable[str], said: str, hint: str = ""
) -> None:
    """Refuse weights that do not fit the model's score, or that are ``left`` over.

    Raises:
        UserError: ``said``, the first few problems, and the ``hint`` what to do.
    """
    expected = model.score.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in left]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} is {size_of(value)}, not {size_of(expected[name])}"
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if problems:
        raise UserError(f"{said}: {few(problems, '; ')}{hint and '; '}{hint}")


def put_weights(model: DataSGM, state: Mapping[str, Tensor], path: Path) -> DataSGM:
    """The model with checked weights, which are those of the file where nothing was done to them.

    Raises:
        UserError: Some are not finite.
    """
    if bad := [name for name, value in state.items() if not bool(value.isfinite().all())]:
        raise UserError(
            f"checkpoint {path}: {len(bad)} of its tensors hold NaN or infinity, {bad[0]} the "
            "first; the training had failed, take an earlier checkpoint"
        )
    model.score.load_state_dict(state, assign=True)
    restore_filters(model.score)
    return model.eval()


def write_run(
    model: DataSGM,
    config: NCSNTrainConfig,
    out: str | Path,
    file: Path,
    weights: Weights | Literal["released"],
    steps: int | None,
    said: str,
    named: str | None = None,
) -> ImportedRun:
    """Write the run folder ``out``; ``said``: how the configuration was found, ``named``: what it
    is called (None: its own name).

    Raises:
        UserError: It already holds a run.
    """
    sha256 = file_sha256(file)
    run = RunFolder.create(out)
    save_config(replace(config, name=run.path.name), run.config)
    notes = {
        "steps": steps,
        "imported": {
            "file": file.name,
            "sha256": sha256,
            "weights": weights,
            "config": named or config.name,
        },
    }
    save(model, run.path, config.data, notes)
    size = sum(p.numel() for p in model.parameters())
    return ImportedRun(run.path, model.kind, model.spec.name, size, weights, steps, said, sha256)


def few(items: Iterable[str], between: str = ", ") -> str:
    """The first three, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return between.join(items[:3]) + more


def size_of(value: Tensor) -> str:
    """A tensor's shape in words."""
    return " x ".join(map(str, value.shape)) or "a number"
