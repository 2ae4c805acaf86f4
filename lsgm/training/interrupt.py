"""Ctrl-C and a scheduler's signals end a run between two steps, with a checkpoint and a command to
continue; in an evaluation they end it at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

from lsgm.errors import Interrupted
from lsgm.system.signals import STOP_SIGNALS

__all__ = ["StopNow", "StopSignal", "TrainingInterrupted", "resume_command"]


class TrainingInterrupted(Interrupted):
    """The run was asked to stop, saved a checkpoint and stopped; the message says how to
    continue.
    """


class StopNow(Interrupted):
    """A signal within :meth:`StopSignal.at_once`."""


class StopSignal:
    """Context that turns the first Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 into a flag and says so; the
    second one acts as usual. SIGHUP stays ignored where it is (``nohup``).

    Args:
        announce: Whether this process says on stderr that it stops.
    """

    def __init__(self, announce: bool = True) -> None:
        self.number = 0
        self.announce = announce
        self._before: dict[int, object] = {}
        self._at_once = False

    def __bool__(self) -> bool:
        return self.number != 0

    def __enter__(self) -> StopSignal:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *STOP_SIGNALS):
                ignored = signal.getsignal(number) is signal.SIG_IGN
                if not (ignored and number == getattr(signal, "SIGHUP", None)):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, the first signal raises :class:`StopNow`; so does one that came before."""
        self._at_once = True
        try:
            if self:
                raise StopNow("stopped", self.number)
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        if self.announce:
            what = "now" if self._at_once else "after this step"
            line = f"{signal.Signals(number).name}: stopping {what}, with a checkpoint\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())  # print() may be what was interrupted
        if self._at_once:
            raise StopNow("stopped", number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()


def resume_command() -> str:
    """The command line of this process with ``--resume``, ready to paste."""
    arguments = list(sys.argv)
    if not any(a == "--resume" or a.startswith("--resume=") for a in arguments):
        arguments.append("--resume")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    elif arguments[0].endswith(".py"):
        start = [os.path.basename(sys.executable) or "python"]
    else:  # the program lsgm
        start = []
    return shlex.join([*start, *arguments])
