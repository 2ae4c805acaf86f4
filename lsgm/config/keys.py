"""The keys of a configuration schema, and how to speak of them in an error message.

A schema is a tree of dataclasses; a key is the dotted path to a leaf, as in YAML files and on the
command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from textwrap import shorten
from typing import Any, Literal

__all__ = [
    "describe",
    "fits",
    "misfit",
    "schema_keys",
    "section_class",
    "suggestion",
]


def schema_keys(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Return all dotted keys of a schema with their types."""
    hints = typing.get_type_hints(config_class)
    keys: dict[str, Any] = {}
    for item in dataclasses.fields(config_class):
        section = section_class(hints[item.name])
        if section is None:
            keys[f"{prefix}{item.name}"] = hints[item.name]
        else:
            keys |= schema_keys(section, f"{prefix}{item.name}.")
    return keys


def section_class(hint: Any) -> type | None:
    """Return the dataclass in `X` or `X | None`, else None."""
    return next(
        (
            t
            for t in (hint, *typing.get_args(hint))
            if dataclasses.is_dataclass(t) and isinstance(t, type)
        ),
        None,
    )


def describe(hint: Any) -> str:
    """Say in words what a value of this type looks like."""
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        types.NoneType: "null",
    }
    if hint in names:
        return names[hint]
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, args))
    if typing.get_origin(hint) is tuple:
        count = "a list" if args[-1] is Ellipsis else f"{len(args)} values"
        return f"{count}, each {describe(args[0])}"
    return " or ".join(describe(arg) for arg in args)


def fits(hint: Any, value: Any) -> bool:
    """Whether a plain value, as JSON holds it, is of a key's type (a list is a tuple)."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        items = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(items) == len(value) and all(map(fits, items, value))
    if args:
        return any(fits(arg, value) for arg in args)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def suggestion(key: str, valid: Sequence[str] | dict[str, Any]) -> str:
    """Return "; did you mean ...?" with the nearest valid key.

    A similar name in the same section comes first, then the same name in another section, then the
    most similar key.
    """
    section, _, last = key.rpartition(".")
    siblings = {
        name.rpartition(".")[2]: name for name in valid if name.rpartition(".")[0] == section
    }
    similar = difflib.get_close_matches(last, siblings, 1, 0.6)
    elsewhere = [name for name in valid if name.rpartition(".")[2] == last]
    near = (
        [siblings[name] for name in similar]
        or elsewhere
        or difflib.get_close_matches(key, list(valid), 1, 0.5)
    )
    if near:
        return f"; did you mean {near[0]}?"
    return f"; valid here: {', '.join(siblings.values())}" if siblings else ""


def misfit(key: str, value: Any, valid: dict[str, Any]) -> str:
    """Say that a value is not what the key takes, in one line."""
    wanted = describe(valid[key]) if key in valid else "a section of keys"
    return f"{key}: {shorten(repr(value), 200)} does not fit (wanted: {wanted})"
