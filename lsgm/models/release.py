"""The release form of a trained model: ``model.safetensors`` and ``run.json`` in its run folder.

What is here knows no model; :func:`lsgm.models.loading.load` turns a description into one.
"""

from __future__ import annotations

import json
import platform
import typing
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from lsgm.config.checks import check_values
from lsgm.config.keys import fits, misfit, section_class
from lsgm.config.training import DataConfig
from lsgm.errors import MALFORMED, UserError
from lsgm.system.files import atomic_write, atomic_write_json
from lsgm.system.integrity import file_sha256, seal, sealed_sha256
from lsgm.system.safetensors import write_safetensors

__all__ = [
    "DESCRIPTION",
    "Described",
    "WEIGHTS",
    "check_weights",
    "given_class",
    "load_data_config",
    "load_weights",
    "description_error",
    "read_description",
    "require_given",
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
    model: Described,
    folder: Path,
    data: DataConfig | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write the model's weights and description, with the SHA-256 of both, into ``folder``; each
    file appears whole or not at all. ``data``: what the model was trained on, if that is known.

    Raises:
        UserError: A weight is NaN or infinite.
    """
    _require_finite(model.state_dict(), folder)
    with atomic_write(folder / WEIGHTS) as file:
        write_safetensors(file, model.state_dict())
    description = {
        "kind": model.kind,
        **model.describe(),
        **({} if data is None else {"data": asdict(data)}),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **(notes or {}),
    }
    hashes = {WEIGHTS: file_sha256(folder / WEIGHTS)}
    atomic_write_json(folder / DESCRIPTION, seal(description, DESCRIPTION, hashes))


def given_class(module: object) -> str:
    """What a description says of a module that is not the library's."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def require_given(description: Mapping[str, Any], modules: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``modules`` that a run's description says it has to be given, and all of them.

    Raises:
        UserError: one is missing, or not wanted.
    """
    wanted: Mapping[str, str] = description.get("given", {})
    for name, what in wanted.items():
        if name not in modules:
            raise UserError(
                f"its {name} ({what}) is not one of the library's: give it, "
                f"lsgm.load(run, {name}=...)"
            )
    if unknown := sorted(set(modules) - set(wanted)):
        raise UserError(f"this model is not to be given {', '.join(unknown)}")
    return dict(modules)


def _require_finite(state: dict[str, torch.Tensor], folder: Path) -> None:
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{folder}: {name} is NaN or infinite: these weights are not released")


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of a run's ``run.json``.

    Raises:
        UserError: The folder is not a finished run, or the file is not what was written.
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
        description = json.loads((folder / DESCRIPTION).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / DESCRIPTION}: not valid JSON ({error})") from None
    if not isinstance(description, dict):
        raise UserError(f"{folder / DESCRIPTION}: expected a JSON object")
    try:
        sealed_sha256(description, DESCRIPTION)
    except ValueError as error:
        raise description_error(folder / DESCRIPTION, error) from None
    return description


def description_error(source: Path, error: Exception) -> UserError:
    """What is wrong with a description in the file ``source``, by the error that it led to."""
    reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return UserError(f"{source}: {reason}")


def section(cls: type, values: dict[str, Any]) -> Any:
    """A config dataclass and the sections in it from plain JSON values.

    Raises:
        ValueError: Values that are no mapping, or not those of the dataclass.
        KeyError: A section is missing. (A single key has its default: older runs lack newer ones.)
    """
    built = _section(cls, values)
    check_values(built)
    return built


def _section(cls: type, values: dict[str, Any]) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"expected the keys of {cls.__name__}, not {shorten(repr(values), 100)}")
    hints = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise ValueError(f"{cls.__name__} has no key {shorten(unknown[0], 100)!r}")
    built: dict[str, Any] = {}
    for name, hint in hints.items():
        inner = section_class(hint)
        if inner is not None:
            built[name] = _section(inner, values[name])
        elif name in values:
            value = values[name]
            if not fits(hint, value):
                raise ValueError(misfit(name, value, {name: hint}))
            built[name] = tuple(value) if isinstance(value, list) else value
    return cls(**built)


def check_weights(folder: Path, description: Mapping[str, Any]) -> None:
    """Compare the weights' file of a run with the hash in its description, if that has one.

    Raises:
        UserError: It is another file.
    """
    path, hashes = folder / WEIGHTS, sealed_sha256(description, DESCRIPTION) or {}
    if WEIGHTS in hashes and file_sha256(path) != hashes[WEIGHTS]:
        raise UserError(
            f"{path}: damaged, or of another run (its sha256 is not the one in {DESCRIPTION})"
        )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of a run into ``model``.

    Raises:
        UserError: The file is damaged, holds another architecture, or numbers that are not finite.
    """
    path = folder / WEIGHTS
    try:
        state = load_file(path)
        model.load_state_dict(state)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: weights do not fit {DESCRIPTION}: {first[:200]}") from None
    for name, tensor in model.state_dict().items():
        # load_state_dict would have converted silently.
        if state[name].dtype != tensor.dtype:
            raise UserError(f"{path}: {name} is {state[name].dtype}, not {tensor.dtype}")
        if not bool(state[name].isfinite().all()):
            raise UserError(f"{path}: {name} holds numbers that are not finite")


def load_data_config(folder: str | Path, root: str | None = None) -> DataConfig:
    """The data section that a run was trained with; ``root`` says where the data lie now, if
    elsewhere.

    Raises:
        UserError: The folder is not a finished run, or its description is damaged.
    """
    folder = Path(folder)
    description = read_description(folder)
    if "data" not in description:
        raise UserError(
            f"{folder / DESCRIPTION}: data is missing: the run was trained in Python, on data that "
            "no configuration names"
        )
    try:
        data: DataConfig = section(DataConfig, description["data"])
    except MALFORMED as error:
        raise description_error(folder / DESCRIPTION, error) from error
    return replace(data, root=root) if root else data
