"""Random mutations of configurations and command lines, from a seed."""

from __future__ import annotations

import random
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from lsgm.config.keys import schema_keys

__all__ = ["mutated_flags", "mutated_yaml"]

WORDS = (
    "", " ", "x", "null", "true", "no", "~", "???", "-", "--", "'", "\\", "é", "a" * 3000, "../..",
    "${oc.env:HOME}", "${train.seed}", "${", "[1, 2]", "[]", "[[1]]", "{a: 1}", "2001-01-01",
    "2001-99-99", "0x10", "1_000", "1:30", "!!int x", "!!python/object:os.system x", "&a [*a]",
    "*x", "%", "@", "|", "a: b: c", '"\\0"', "\t",
)  # fmt: skip
INTEGERS = (
    "-1", "0", "1", "2", "3", "5", "8", "1000000000", "9223372036854775807", "9223372036854775808",
    "99999999999999999999", "-99999999999999999999",
)  # fmt: skip
NUMBERS = (
    "-1", "0", "1", "2", "0.5", "-0.5", "0.1", "0.9", "1e-3", "1e-30", "1e-300", "1e30", "1e308",
    "1e400", "nan", ".nan", "inf", ".inf", "-inf",
)  # fmt: skip
LISTS = ("1", "2 1", "1 2", "0 1", "-1 2", "1 2 3", "2 2 2 2", "1000000000 2", "0.5 0.9", "16")
DEVICES = ("cuda", "cuda:99", "meta", "mps", "xpu", "cpu:0", "CPU", "gpu:", "-1")


def _value(rng: random.Random, key: str, hint: Any) -> str:
    """A value for a key: more often than not of its own type."""
    if key.endswith("device"):
        return rng.choice(DEVICES)
    arguments = _arguments(hint)
    kinds = {hint, *arguments, typing.get_origin(hint)}
    own = (
        (LISTS if any(typing.get_origin(kind) is tuple for kind in kinds) else ())
        or [a for a in arguments if isinstance(a, str)]
        or (NUMBERS if float in kinds else ())
        or (("true", "false") if bool in kinds else ())
        or (INTEGERS if int in kinds else ())
        or WORDS
    )
    return rng.choice(own if rng.random() < 0.8 else rng.choice((INTEGERS, NUMBERS, WORDS)))


def _arguments(hint: Any) -> list[Any]:
    """Arguments of a type and of the types in it."""
    own = list(typing.get_args(hint))
    return own if typing.get_origin(hint) is Literal else own + sum(map(_arguments, own), [])


def _typo(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice("abz.-_ 0é") + text[place + rng.randrange(2) :]


def mutated_flags(
    rng: random.Random, schema: type, skip: Sequence[str] = (), count: int = 1
) -> list[str]:
    """Tokens of ``count`` options; most are right names with values that may not be."""
    keys = {k: hint for k, hint in schema_keys(schema).items() if k not in skip}
    tokens: list[str] = []
    for _ in range(count):
        key = rng.choice(list(keys))
        value = _value(rng, key, keys[key])
        name = _typo(rng, key) if rng.random() < 0.1 else key
        tokens += rng.choice(
            [
                *(3 * [[f"--{name}", *value.split(" ")]]),
                [f"--{name}", value],
                [f"--{name}={value}"],
                [f"--{name.replace('_', '-')}", value],
                [f"--{name}"],
            ]
        )
    return tokens


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for name in sections:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _mutate_value(rng: random.Random, text: str, schema: type, skip: Sequence[str]) -> str:
    """Another value in a line of its own, written as it is."""
    tree, keys = yaml.safe_load(text), schema_keys(schema)
    key = rng.choice([k for k in keys if k not in skip])
    _set(tree, key, "@@")
    dumped: str = yaml.safe_dump(tree, sort_keys=False)
    value = _value(rng, key, keys[key])
    if value in LISTS and rng.random() < 0.9:
        value = f"[{value.replace(' ', ', ')}]"
    return dumped.replace("'@@'", value)


def _mutate_section(rng: random.Random, text: str, schema: type, skip: Sequence[str]) -> str:
    """Something else than a section, or a section somewhere else."""
    tree = yaml.safe_load(text)
    section = rng.choice([k for k, v in tree.items() if isinstance(v, dict)])
    other = rng.choice([None, 3, "x", [1], {}, True, {"x": {"y": 1}}, [[]], dict(tree)])
    if rng.random() < 0.5:
        tree[section] = other
    else:
        _set(tree, f"{section}.{rng.choice(list(tree[section]))}", other)
    return yaml.safe_dump(tree, sort_keys=False)


def _mutate_line(rng: random.Random, text: str, schema: type, skip: Sequence[str]) -> str:
    """A line that is gone, twice there, moved or indented otherwise."""
    lines = text.splitlines()
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    choice = rng.randrange(4)
    if choice == 0:
        del lines[i]
    elif choice == 1:
        lines.insert(j, lines[i])
    elif choice == 2:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines[i] = rng.choice(["  ", "\t", " ", "- "]) + lines[i].strip()
    return "\n".join(lines) + "\n"


def _mutate_character(rng: random.Random, text: str, schema: type, skip: Sequence[str]) -> str:
    """A character that is another, missing or too many."""
    place = rng.randrange(len(text))
    new = rng.choice([*"[]{}:,#&*!|>'\"%@`?-. \t\n0x\0\x85", "é", "${", "<<"])
    return text[:place] + new + text[place + rng.randrange(2) :]


MUTATIONS: tuple[Callable[[random.Random, str, type, Sequence[str]], str], ...] = (
    _mutate_value,
    _mutate_value,
    _mutate_value,
    _mutate_section,
    _mutate_line,
    _mutate_character,
)


def mutated_yaml(
    rng: random.Random, path: Path, text: str, schema: type, skip: Sequence[str] = ()
) -> Path:
    """``text`` after one mutation, written to ``path``."""
    path.write_text(rng.choice(MUTATIONS)(rng, text, schema, skip), encoding="utf-8")
    return path
