"""Overriding a configuration with command-line tokens ``--section.key value`` (parsed by tyro), and
the plain options that stand beside them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tyro
from omegaconf import MISSING

from lsgm.config.checks import check_values
from lsgm.config.keys import describe, misfit, schema_keys, section_class, suggestion
from lsgm.errors import UserError

__all__ = [
    "Option",
    "apply_overrides",
    "parse_tokens",
    "split_plain",
]

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
    argv: Sequence[str], plain: Sequence[Option], config_class: type, wants_help: bool
) -> tuple[dict[str, Any], list[str]]:
    """Take the plain options out of the tokens and check that all other names are keys of the
    schema.
    """
    by_flag = {f"--{option.name}": option for option in plain}
    options: dict[str, Any] = {option.name: False if option.is_switch else None for option in plain}
    overrides: list[str] = []
    valid = schema_keys(config_class)
    for flag, *values in _groups([token for token in argv if token not in ("-h", "--help")]):
        option = by_flag.get(flag)
        if option is not None:
            if option.is_switch and len(values) == 1 and values[0] in option.words:
                options[option.name] = values[0]
                continue
            if len(values) != (0 if option.is_switch else 1):
                needed = (
                    " or ".join(["takes no value", *option.words])
                    if option.is_switch
                    else f"needs one value ({option.metavar})"
                )
                raise UserError(f"{flag} {needed}, not {' '.join(values) or 'none'}")
            options[option.name] = True if option.is_switch else values[0]
        elif flag[2:] in valid:
            overrides += [flag, *_yaml_words(valid[flag[2:]], values)]
        elif not wants_help:
            names = [*valid, *(option.name for option in plain)]
            raise UserError(
                f"unknown option {flag}{suggestion(flag[2:], names).replace('mean ', 'mean --')}"
            )
    return options, overrides


def _yaml_words(hint: Any, values: list[str]) -> list[str]:
    """Accept true, false and null as YAML writes them, and a bare switch as true."""
    kinds = {hint, *typing.get_args(hint)}
    if bool in kinds and not values:
        return ["True"]
    words = {"true": "True", "false": "False"} if bool in kinds else {}
    if types.NoneType in kinds:
        words |= {"null": "None", "none": "None"}
    return [words.get(value.lower(), value) for value in values]


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """Return `config` with command-line overrides; raises UserError."""
    _, tokens = split_plain(overrides, (), type(config), False)
    if not tokens:
        return config
    try:
        changed = parse_tokens(config, tokens)
        check_values(changed)
        return changed
    except ValueError as error:
        raise UserError(f"--{error}") from None
    except _ParseFailure as failure:
        raise UserError(_explain(config, tokens, str(failure))) from None


class _ParseFailure(Exception):
    """tyro refused the tokens; the message is the first paragraph of what it would have printed."""


def _explain(config: Any, tokens: Sequence[str], message: str) -> str:
    """Return the line for tokens that tyro refused with `message`."""
    constraint = re.match(r"Error parsing experiment\.?(\S*): (\w+: .*)", message)
    if constraint:
        section, rest = constraint.groups()
        return f"--{section}.{rest}" if section else f"--{rest}"
    valid = schema_keys(type(config))
    for flag, *values in _groups(tokens):
        try:
            parse_tokens(config, [flag, *values])
        except _ParseFailure:
            if not values:
                return f"{flag}: needs a value (wanted: {describe(valid[flag[2:]])})"
            return f"--{misfit(flag[2:], ' '.join(values), valid)}"
    return message


def parse_tokens(
    config: T,
    tokens: Sequence[str],
    plain: Sequence[Option] = (),
    prog: str | None = None,
    description: str | None = None,
) -> T:
    """Run tyro over the schema with `config` as defaults; exits only for ``--help``."""
    config = _open_sections(config, tokens)
    fields: list[tuple[str, Any, Any]] = [
        (
            option.name,
            Annotated[
                bool if option.is_switch else str | None,
                tyro.conf.FlagCreatePairsOff,
                tyro.conf.arg(help=option.help, metavar=option.metavar),
            ],
            False if option.is_switch else option.default,
        )
        for option in plain
    ]
    # The empty name puts the sections at the top level.
    experiment = Annotated[  # type: ignore[valid-type]  # a type known at run time only
        type(config),
        tyro.conf.arg(name=""),
        tyro.conf.FlagConversionOff,
        tyro.conf.AvoidSubcommands,
    ]
    fields.append(("experiment", experiment, dataclasses.field(default=MISSING)))
    wrapper = dataclasses.make_dataclass("CommandLineFields", fields, frozen=True)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = tyro.cli(
                wrapper,
                prog=prog,
                description=description or "",
                args=list(tokens),
                default=wrapper(experiment=config),
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise _ParseFailure(_first_paragraph(printed.getvalue())) from None
    except ValueError as error:  # of the outermost dataclass; those of sections tyro prints
        raise _ParseFailure(f"Error parsing experiment: {error}") from None
    return typing.cast(T, parsed.experiment)


def _first_paragraph(box: str) -> str:
    """Return the first paragraph inside the box, of line-drawing or ASCII, that tyro prints."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│| ")
        if set(text) - set("─-+╰╯"):
            lines.append(text)
        elif lines:
            break
    return " ".join(lines)


def _open_sections(config: T, tokens: Sequence[str]) -> T:
    """Replace sections that are None by their defaults where the tokens (or ``--help``) ask for
    their keys.
    """
    hints = typing.get_type_hints(type(config))
    opened = {
        item.name: section()
        for item in dataclasses.fields(config)  # type: ignore[arg-type]
        if getattr(config, item.name) is None
        and (section := section_class(hints[item.name])) is not None
        and any(token == "--help" or token.startswith(f"--{item.name}.") for token in tokens)
    }
    return dataclasses.replace(config, **opened) if opened else config  # type: ignore[type-var]
