"""The exceptions that a script turns into a single line on stderr and exit code 2."""

from __future__ import annotations

__all__ = ["NonFiniteError", "UserError"]


class UserError(Exception):
    """A mistake of the person at the command line: what is wrong, where, and what would be right.

    The message is one line. Library code raises ``ValueError`` for what a caller can cause; this
    class is for what
    arrives from outside: command lines, configuration files, data files, run folders.
    """


class NonFiniteError(UserError):
    """A sampler gave values that are NaN or infinite, which no picture can show."""
