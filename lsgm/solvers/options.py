"""The options of all solvers, as their own signatures and docstrings say them.

What a command line or a table needs to know of a solver's arguments is read from the solvers: a new
argument, or a new solver in ``SOLVERS``, is an option without another line.
"""

from __future__ import annotations

import inspect
import re
import typing
from dataclasses import dataclass, fields
from functools import cache, partial
from types import UnionType
from typing import Any

from lsgm.solvers import SOLVERS
from lsgm.solvers.base import Solver

__all__ = ["SolverOption", "argument_docs", "solver_class", "solver_options"]

PLAIN = (bool, int, float)


@dataclass(frozen=True)
class SolverOption:
    """An argument that some solvers have.

    Attributes:
        name: Of the argument.
        type: bool, int, float, or str for whatever else is written as text.
        solvers: Names of the solvers that have it.
        help: What it is; where solvers say it differently, each in turn.
    """

    name: str
    type: type
    solvers: tuple[str, ...]
    help: str


def solver_class(name: str) -> type[Solver]:
    """The class of the solver of that name."""
    built: Any = SOLVERS[name]
    return typing.cast("type[Solver]", built.func if isinstance(built, partial) else built)


@cache
def solver_options() -> dict[str, SolverOption]:
    """The arguments of all solvers by name, in the order in which solvers have them."""
    found: dict[str, dict[str, str]] = {}
    types: dict[str, type] = {}
    for solver in SOLVERS:
        cls = solver_class(solver)
        docs, hints = argument_docs(cls), typing.get_type_hints(cls)
        shared = {item.name for item in fields(Solver)}  # after what is a solver's own
        for name in sorted(inspect.signature(SOLVERS[solver]).parameters, key=shared.__contains__):
            found.setdefault(name, {})[solver] = docs.get(name, "")
            types[name] = _plain_type(hints[name])
    return {
        name: SolverOption(name, types[name], tuple(docs), _together(docs))
        for name, docs in found.items()
    }


def argument_docs(cls: type[Solver]) -> dict[str, str]:
    """What the ``Args:`` of a solver and of its bases say, by argument, in one line each."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Args:\n")
        entries = re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
        for names, text in entries:
            plain = re.sub(r":\w+:`~?(.*?)`", r"\1", text).replace("``", "")
            docs |= dict.fromkeys(names.split(", "), " ".join(plain.split()))
    return docs


def _plain_type(hint: Any) -> type:
    """The one plain type in ``hint``; str where there are others."""
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    kinds = {kind for kind in typing.get_args(hint) if kind is not type(None)} if union else {hint}
    (kind,) = kinds if len(kinds) == 1 else (str,)
    return kind if kind in PLAIN else str


def _together(docs: dict[str, str]) -> str:
    """What solvers say of one argument, with the names of those that have it."""
    texts: dict[str, list[str]] = {}
    for solver, text in docs.items():
        texts.setdefault(text, []).append(solver)
    if len(docs) == len(SOLVERS) and len(texts) == 1:
        return next(iter(texts))
    return " ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
