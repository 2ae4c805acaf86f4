"""The signals that ask a process to stop."""

from __future__ import annotations

import signal

__all__ = ["STOP_SIGNALS"]

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
"""Signals that end a command as Ctrl-C does: a scheduler's or a closed terminal's."""
