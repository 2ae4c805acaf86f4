"""Overriding a configuration with command-line tokens ``--section.key value``, and the plain
options that stand beside them.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf import OmegaConf

from lsgm.config.keys import describe, misfit, schema_keys, suggestion
from lsgm.config.layers import lay_over, nested, take_value
from lsgm.errors import UserError

__all__ = [
    "HELP_ALL_FLAG",
    "HELP_FLAGS",
    "Option",
    "apply_overrides",
    "split_plain",
]

HELP_ALL_FLAG = "--help-all"


HELP_FLAGS = ("-h", "--help", HELP_ALL_FLAG)


T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """A plain command-line option beside the configuration.

    Attributes:
        name: Name without dashes.
        help: What it does.
        metavar: Shown for the value; None makes the option a switch.
        default: Its value when absent; a switch is off.
        words: Words that may stand after a switch and become its value.
    """

    name: str
    help: str
    metavar: str | None = None
    default: str | None = None
    words: tuple[str, ...] = ()

    @property
    def is_switch(self) -> bool:
        return self.metavar is None

    def take(self, values: Sequence[str]) -> Any:
        """The value that stands for the words after the option.

        Raises:
            UserError: There are too many or too few.
        """
        if self.is_switch and len(values) == 1 and values[0] in self.words:
            return values[0]
        if len(values) != (0 if self.is_switch else 1):
            switch = " or ".join(["takes no value", *self.words])
            needed = switch if self.is_switch else f"needs one value ({self.metavar})"
            raise UserError(f"--{self.name} {needed}, not {' '.join(values) or 'none'}")
        return True if self.is_switch else values[0]


def _groups(tokens: Sequence[str]) -> list[list[str]]:
    """Split tokens into one group per option: the option's name and its values (``--a=b`` counts as
    two tokens).
    """
    groups: list[list[str]] = []
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token.partition("=")
            groups.append(
                [name.replace("-", "_").replace("__", "--", 1)] + ([value] if equals else [])
            )
        elif groups:
            groups[-1].append(token)
        else:
            raise UserError(f"unexpected argument {token!r}; options look like --section.key value")
    return groups


def split_plain(
    argv: Sequence[str], plain: Sequence[Option], config_class: type, wants_help: bool = False
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Take the plain options out of the tokens and check that all other names are keys of the
    schema.

    Args:
        argv: The tokens.
        plain: The plain options.
        config_class: The schema.
        wants_help: Whether unknown names are passed over.

    Returns:
        The value of each plain option, and the words that were given for each key; the last ones
        where a key stands twice.

    Raises:
        UserError: For an unknown name, or a plain option with too many or too few values.
    """
    by_flag = {f"--{option.name}": option for option in plain}
    options: dict[str, Any] = {option.name: False if option.is_switch else None for option in plain}
    overrides: dict[str, list[str]] = {}
    valid = schema_keys(config_class)
    for flag, *values in _groups([token for token in argv if token not in HELP_FLAGS]):
        name = flag[2:]
        if flag in by_flag:
            options[name] = by_flag[flag].take(values)
        elif name in valid:
            overrides[name] = values
        elif not wants_help:
            names = [*valid, *(option.name for option in plain)]
            raise UserError(
                f"unknown option {flag}{suggestion(name, names).replace('mean ', 'mean --')}"
            )
    return options, overrides


def apply_overrides(config: T, overrides: dict[str, list[str]]) -> T:
    """Return ``config`` with other values for some keys, given as the words of a command line.

    Raises:
        UserError: A value does not fit, or its section refuses it.
    """
    if not overrides:
        return config
    schema, valid = OmegaConf.structured(config), schema_keys(type(config))
    values = {}
    for key, words in overrides.items():
        if any("${" in word for word in words):
            raise UserError(f"--{key}: ${{...}} is not expanded here; write what it stands for")
        if not words and not _takes_nothing(valid[key]):
            raise UserError(f"--{key}: needs a value (wanted: {describe(valid[key])})")
        values[key] = _value(valid[key], words)
        if not take_value(schema, key, values[key]):
            raise UserError(f"--{misfit(key, ' '.join(words), valid)}")
    return lay_over(type(config), config, nested(values), "--")


def _takes_nothing(hint: Any) -> bool:
    """Whether an option of this type may stand alone: a switch, or a list of any length."""
    lists = [kind for kind in _kinds(hint) if typing.get_origin(kind) is tuple]
    return bool in _kinds(hint) or any(typing.get_args(kind)[-1] is Ellipsis for kind in lists)


def _value(hint: Any, words: list[str]) -> Any:
    """What OmegaConf is to read for the words after an option: null as YAML writes it, a bare
    switch as true, and a list where the type is one or the words are several.
    """
    kinds = _kinds(hint)
    if types.NoneType in kinds and [word.lower() for word in words] in (["null"], ["none"]):
        return None
    if bool in kinds and not words:
        return True
    is_list = any(typing.get_origin(kind) is tuple for kind in kinds)
    return words if is_list or len(words) != 1 else words[0]


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union; of another type itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)
