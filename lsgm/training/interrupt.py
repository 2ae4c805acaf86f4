"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint and a command to continue."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from types import FrameType, TracebackType

__all__ = ["StopSignal", "TrainingInterrupted", "resume_command"]


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop, saved a checkpoint and stopped; the message says how to continue.

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


class StopSignal:
    """Context that turns the first Ctrl-C or SIGTERM into a flag; the second one acts as usual."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.number != 0

    def __enter__(self) -> StopSignal:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()


def resume_command() -> str:
    """The command line of this process with ``--resume``, ready to paste."""
    arguments = list(sys.argv)
    if "--resume" not in arguments:
        arguments.append("--resume")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    else:
        start = [os.path.basename(sys.executable) or "python"]
    return shlex.join([*start, *arguments])
