"""The text of ``--help``: the fields of a schema with what their docstrings say of them."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import shutil
import textwrap
import types
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from lsgm.config.keys import schema_keys, section_class
from lsgm.config.overrides import HELP_ALL_FLAG, Option

__all__ = ["field_docs", "help_text"]


def help_text(
    config: Any,
    plain: Sequence[Option] = (),
    prog: str | None = None,
    description: str | None = None,
    shown: Sequence[str] | None = None,
) -> str:
    """Return the text of ``--help``.

    Args:
        config: The configuration whose values are shown as defaults.
        plain: The plain options, shown first.
        prog: Name of the program; None: of this process.
        description: What it does.
        shown: Keys to show; the others are counted. None: all.
    """
    docs = field_docs(type(config))
    keys = schema_keys(type(config))
    chosen = [key for key in keys if shown is None or key in shown]
    width = min(shutil.get_terminal_size((100, 24)).columns, 100) - 2
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--option value ...]",
        description=description,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=max(width, 40)),
    )
    groups = {"": parser.add_argument_group("options")}
    groups[""].add_argument("-h", "--help", action="store_true", help="show this text")
    for option in plain:
        default = f" (default: {option.default})" if option.default else ""
        _add(groups[""], option.name, option.metavar or "", option.help + default)
    for key in chosen:
        section, _, _ = key.rpartition(".")
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{section}", docs[section])
        default = f"(default: {_shown(_get(config, key))})"
        _add(groups[section], key, _metavar(keys[key]), f"{docs[key]} {default}")
    if hidden := len(keys) - len(chosen):
        parser.epilog = f"{HELP_ALL_FLAG} shows {hidden} more options."
    return parser.format_help()


def _add(group: Any, name: str, metavar: str, text: str) -> None:
    # %: argparse would fill it in
    group.add_argument(f"--{name}", metavar=metavar, help=text.replace("%", "%%"))


def field_docs(config_class: type, prefix: str = "") -> dict[str, str]:
    """Return what the field's metadata (``help``) or the source below it says of each field of a
    schema, by dotted key, sections too; "" where nothing is said.
    """
    hints = typing.get_type_hints(config_class)
    own: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        own |= _docs_of_class(base) if dataclasses.is_dataclass(base) else {}
    docs: dict[str, str] = {}
    for item in dataclasses.fields(config_class):
        docs[f"{prefix}{item.name}"] = item.metadata.get("help") or own.get(item.name, "")
        if (section := section_class(hints[item.name])) is not None:
            docs |= field_docs(section, f"{prefix}{item.name}.")
    return docs


@cache
def _docs_of_class(config_class: type) -> dict[str, str]:
    """The string below each annotated name in the body of a class."""
    try:
        source = inspect.getsource(config_class)
    except (OSError, TypeError):  # made at run time
        return {}
    (definition,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(definition, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                docs[field.target.id] = " ".join(below.value.value.split())
    return docs


def _metavar(hint: Any) -> str:
    """A type as the help shows it: ``INT``, ``FLOAT FLOAT``, ``{joint,frozen}``."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if typing.get_origin(hint) is tuple:
        return f"[{_metavar(args[0])} ...]" if args[-1] is ... else " ".join(map(_metavar, args))
    if args:  # a union
        return "|".join(_metavar(arg) for arg in args if arg is not types.NoneType)
    return {str: "TEXT", bool: "{true,false}"}.get(hint, hint.__name__.upper())


def _shown(value: Any) -> str:
    """A value as one would write it after its option."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(_shown, value)) or "none"
    return str(value) if value != "" else '""'


def _get(config: Any, key: str) -> Any:
    """The value of a dotted key; of a section that is None its own default."""
    for name in key.split("."):
        section = section_class(typing.get_type_hints(type(config))[name])
        config = getattr(config, name)
        if config is None and section is not None:
            config = section()
    return config
