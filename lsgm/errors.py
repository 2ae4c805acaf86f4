"""The exceptions that a command turns into a single line on stderr and an exit code."""

from __future__ import annotations

import signal

__all__ = [
    "MALFORMED",
    "Interrupted",
    "NonFiniteError",
    "UserError",
    "malformed",
    "one_line",
    "require",
]

MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a file leads to whose content is of other types than it should be."""


class UserError(Exception):
    """A mistake of the person at the command line: what is wrong, where, and what would be right.

    The message is one line. Library code raises ``ValueError`` for what a caller can cause; this
    class is for what arrives from outside: command lines, configuration files, data files, run
    folders.
    """


class NonFiniteError(UserError):
    """A sampler gave values that are NaN or infinite, which no picture can show."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop.

    Args:
        message: One line.
        number: The signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process ended by this signal (130 for Ctrl-C)."""
        return 128 + self.number


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds."""
    if not condition:
        raise ValueError(message)


def malformed(source: object, expected: str, error: Exception) -> UserError:
    """One line for a file that is read like ``expected`` and is something else."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return UserError(f"{source}: not {expected} ({type(error).__name__}: {first})")


def one_line(error: BaseException, longest: int = 200) -> str:
    """What an error of another library says, in one line; its name where it says nothing."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return said[:longest] or type(error).__name__
