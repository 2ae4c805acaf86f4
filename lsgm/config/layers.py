"""The layers of a configuration: what a YAML file or a command line says is laid over a schema or
over what is there already.

OmegaConf reads the values; every mistake becomes one :class:`~lsgm.errors.UserError` line.
"""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lsgm.config.checks import check_values
from lsgm.config.keys import misfit, schema_keys, suggestion
from lsgm.config.packaged import suggest_config
from lsgm.errors import UserError
from lsgm.system.integrity import signed_text

__all__ = ["lay_over", "nested", "read_layer", "take_value"]

T = TypeVar("T")


def read_layer(path: Path) -> DictConfig:
    """Return the keys of a YAML file.

    Raises:
        UserError: It cannot be read, is no YAML, or does not hold keys.
    """
    try:
        text = signed_text(path.read_text("utf-8"))
        keys = OmegaConf.create(text)
        mentions = _mentions_environment(OmegaConf.to_container(keys, resolve=False))
    except FileNotFoundError:
        hint = suggest_config(path) if path.suffix != ".yaml" else ""
        raise UserError(f"{path}: no such configuration file{hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, where a YAML file is needed") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({_one_line(error)})") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)})") from error
    except RecursionError:
        raise UserError(f"{path}: cannot be read (RecursionError: nested too deeply)") from None
    except (ValueError, OverflowError) as error:  # a signature or a value of YAML's own types
        raise UserError(f"{path}: {_one_line(error)}") from error
    if mentions:
        raise UserError(f"{path}: ${{...}} is not expanded; write what it stands for")
    if not isinstance(keys, DictConfig) or not keys:
        raise UserError(f"{path}: must hold 'key: value' lines")
    return keys


def _mentions_environment(value: Any) -> bool:
    """Whether a reference ``${...}``, which OmegaConf would expand, is in a plain value."""
    if isinstance(value, dict):
        return any(_mentions_environment(part) for item in value.items() for part in item)
    if isinstance(value, list):
        return any(map(_mentions_environment, value))
    return isinstance(value, str) and "${" in value


def lay_over(
    schema: type[T],
    base: T | None,
    keys: DictConfig,
    place: str,
    retired: frozenset[str] = frozenset(),
) -> T:
    """Return a configuration with the values of ``keys`` over those of ``base``.

    Args:
        schema: Its class.
        base: A configuration. None: the defaults of the schema.
        keys: As from :func:`read_layer`; retired keys are taken out of it.
        place: What stands before a key in a message: ``"FILE: "``, or ``"--"``.
        retired: Keys that are read and forgotten.

    Raises:
        UserError: For an unknown key, or a value that does not fit or that its section refuses.
    """
    below = OmegaConf.structured(schema if base is None else base)
    valid = schema_keys(schema)
    for key in list(_leaves(keys)):
        if key in retired:
            section, _, name = key.rpartition(".")
            OmegaConf.select(keys, section).pop(name)
        elif key not in valid and not any(name.startswith(f"{key}.") for name in valid):
            raise UserError(f"{place}unknown key {key}{suggestion(key, valid)}")
    try:
        merged = typing.cast(DictConfig, OmegaConf.merge(below, keys))
        with _naming_sections(merged, place):
            config = typing.cast(T, OmegaConf.to_object(merged))
            check_values(config)
        return config
    except OmegaConfBaseException as error:
        for key in _leaves(keys):  # OmegaConf does not always name the key: find it
            value = OmegaConf.select(keys, key)
            if not take_value(below, key, value):
                raise UserError(f"{place}{misfit(key, value, valid)}") from error
        raise UserError(f"{place}{_one_line(error)}") from error


def take_value(schema: DictConfig, key: str, value: Any) -> bool:
    """Whether a schema takes a value for a dotted key."""
    try:
        taken = OmegaConf.merge(schema, nested({key: value}))
        return not OmegaConf.is_missing(taken, key)  # what OmegaConf takes "???" for
    except OmegaConfBaseException:
        return False


def nested(values: dict[str, Any]) -> DictConfig:
    """Return {"a": {"b": value}} for each key "a.b"."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return OmegaConf.create(tree)


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of everything in a mapping that is not itself a mapping."""
    for name in node:
        key = f"{prefix}{name}"
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and len(child):
            yield from _leaves(child, f"{key}.")
        else:
            yield key


@contextlib.contextmanager
def _naming_sections(merged: DictConfig, place: str) -> Iterator[None]:
    """Turn a section's ValueError("field: ...") into a UserError with place and section."""
    try:
        yield
    except ValueError as error:
        section = _failing_section(merged)
        raise UserError(f"{place}{section}{_one_line(error)}") from error


def _failing_section(merged: DictConfig, prefix: str = "") -> str:
    for name in map(str, merged):
        child = merged[name]
        if isinstance(child, DictConfig):
            try:
                OmegaConf.to_object(child)
            except ValueError:
                return _failing_section(child, f"{prefix}{name}.")
    return prefix


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
