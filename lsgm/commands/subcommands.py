"""Commands that have commands of their own: ``edit inpaint``, ``benchmark train``."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lsgm.errors import UserError

__all__ = ["choose_subcommand"]


def choose_subcommand(
    known: Collection[str], argv: Sequence[str], prog: str, description: str | None
) -> tuple[str, list[str]] | None:
    """Return the name that comes first in ``argv`` and the arguments after it; None where there is
    nothing more to do: the help was asked for, and is printed.

    Raises:
        UserError: It is none of the known ones.
    """
    name, *arguments = argv or ["--help"]
    if name in ("-h", "--help", "--help-all"):
        print(f"usage: {prog} {{{','.join(known)}}} [--help] ...\n")
        print("\n".join(line.strip() for line in (description or "").splitlines()))
        return None
    if name not in known:
        what = prog.split()[-1].removesuffix(".py")
        raise UserError(f"{name}: no such {what}; known are {', '.join(known)}")
    return name, arguments
