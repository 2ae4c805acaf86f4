"""The one exception that a script turns into a single line on stderr and exit code 2."""

from __future__ import annotations

__all__ = ["MALFORMED", "UserError", "malformed"]

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a file leads to whose content is of other types than it should be."""


class UserError(Exception):
    """A mistake of the person at the command line: what is wrong, where, and what would be right.

    The message is one line. Library code raises ``ValueError`` for what a caller can cause; this
    class is for what
    arrives from outside: command lines, configuration files, data files, run folders.
    """


def malformed(source: object, expected: str, error: Exception) -> UserError:
    """One line for a file that is read like ``expected`` and is something else."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return UserError(f"{source}: not {expected} ({type(error).__name__}: {first})")
