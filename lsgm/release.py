"""The release form of a trained model: ``model.safetensors`` and ``run.json`` in its run folder.

What is here knows no model; :func:`lsgm.models.load` turns a description into one.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from lsgm.config import DataConfig
from lsgm.errors import UserError
from lsgm.files import atomic_write, atomic_write_json
from lsgm.safetensors_file import write_safetensors

__all__ = [
    "DESCRIPTION",
    "MISFITS",
    "WEIGHTS",
    "Described",
    "load_data_config",
    "load_weights",
    "misfit",
    "read_description",
    "save",
    "section",
]

WEIGHTS = "model.safetensors"
DESCRIPTION = "run.json"


class Described(Protocol):
    """A model that can say how to rebuild it."""

    @property
    def kind(self) -> str:
        """Name of the kind of model."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values from which the architecture can be rebuilt."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        ...


def save(
    model: Described, folder: Path, data: DataConfig, notes: dict[str, Any] | None = None
) -> None:
    """Write the model's weights and description into ``folder``; each file appears whole or not at
    all.
    """
    with atomic_write(folder / WEIGHTS) as file:
        write_safetensors(file, model.state_dict())
    description = {
        "kind": model.kind,
        **model.describe(),
        "data": asdict(data),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **(notes or {}),
    }
    atomic_write_json(folder / DESCRIPTION, description)


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of a run's ``run.json``.

    Raises:
        UserError: The folder is not a finished run.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            hint = (
                "training has not finished; continue it with --resume"
                if (folder / "checkpoints").is_dir()
                else "not a run"
            )
            raise UserError(f"{folder}: {name} is missing ({hint})")
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / DESCRIPTION}: not valid JSON ({error})") from None
    if not isinstance(description, dict):
        raise UserError(f"{folder / DESCRIPTION}: expected a JSON object")
    return description


MISFITS = (KeyError, TypeError, ValueError)


def misfit(folder: Path, error: Exception) -> UserError:
    """What is wrong with a run's description, by the error that it led to."""
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return UserError(f"{folder / DESCRIPTION}: {reason}")


def section(cls: type, values: dict[str, Any]) -> Any:
    """A config dataclass from plain JSON values.

    Raises:
        ValueError: Values that are no mapping, or not those of the dataclass.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected the keys of {cls.__name__}, not {values!r}")
    converted = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**converted)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of a run into ``model``.

    Raises:
        UserError: The file is damaged or holds another architecture.
    """
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except safetensors.SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: damaged or truncated ({error})") from None
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{folder / WEIGHTS}: weights do not fit {DESCRIPTION}: {first[:200]}"
        ) from None


def load_data_config(folder: str | Path, root: str | None = None) -> DataConfig:
    """The data section that a run was trained with; ``root`` says where the data lie now, if
    elsewhere.

    Raises:
        UserError: The folder is not a finished run, or its description is damaged.
    """
    folder = Path(folder)
    description = read_description(folder)
    try:
        data: DataConfig = section(DataConfig, description["data"])
    except MISFITS as error:
        raise misfit(folder, error) from error
    return replace(data, root=root) if root else data
