"""A command line of a few named arguments, which no configuration schema describes."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lsgm.errors import UserError

__all__ = ["ArgumentParser"]


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, where a mistake is a :class:`~lsgm.errors.UserError`; ``--help-all`` is
    ``--help``.

    Args:
        prog: Name of the program; None: of this process.
        description: What it does; of a docstring the first paragraph.
    """

    def __init__(self, prog: str | None, description: str | None) -> None:
        super().__init__(prog=prog, description=(description or "").split("\n\n")[0])
        self.add_argument("--help-all", action="help", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")
