"""What every command does around its main function: the allocator is set, and signals and errors
become one line and an exit code.

Nothing here imports torch, so that a script which imports this first, and the rest inside its main
function, ends with one line also while it is loading.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from lsgm.errors import Interrupted, UserError
from lsgm.system.allocator import keep_freed_memory
from lsgm.system.signals import STOP_SIGNALS

__all__ = [
    "EXIT_BROKEN_PIPE",
    "EXIT_INTERRUPTED",
    "EXIT_OTHER",
    "EXIT_USER_ERROR",
    "run",
]

EXIT_OTHER = 1


EXIT_USER_ERROR = 2


EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0 done, 2 a user's mistake, 128 + signal (130: Ctrl-C; 141: nobody
    reads the output any more) interrupted, 1 anything else.

    A user's mistake, a signal and what the system refuses (``OSError``: a full or read-only disk, a
    folder that is gone) are one line on stderr; an unexpected exception keeps its traceback.
    """
    keep_freed_memory()
    try:
        try:
            with _stopping():
                main()
        finally:
            sys.stdout.flush()  # a closed pipe has to show here, not while the interpreter ends
    except UserError as error:
        _say(str(error))
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        _say(f"interrupted{by}")
        sys.exit(getattr(interrupt, "exit_code", EXIT_INTERRUPTED))
    except BrokenPipeError:
        _drop_output()
        sys.exit(EXIT_BROKEN_PIPE)
    except Exception as error:
        code, line = _explain(error)
        if not line:
            raise
        _say(line)
        sys.exit(code)
    sys.exit(0)


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Within, the signals raise :class:`Interrupted`, so that what is being written is cleaned
    up. One that is ignored stays ignored (``nohup``).
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped", number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # only there handlers can be set
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and line for what the system refused; no line for anything else."""
    if any(map(_is_full_disk, _chain(error))):
        advice = "free some, then continue with --resume"
        return EXIT_OTHER, f"no space left on the disk ({error}); {advice}"
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.strerror:
            where = f"{cause.filename}: " if cause.filename is not None else ""
            return EXIT_OTHER, f"{where}{cause.strerror}"
        if isinstance(cause, OSError):
            return EXIT_OTHER, f"{cause}" or type(cause).__name__
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return EXIT_USER_ERROR, "a path with a NUL character in it names no file"
    return EXIT_OTHER, ""


def _say(line: str) -> None:
    try:
        print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _drop_output()


def _drop_output() -> None:
    """Send what is still to be written nowhere: ``--help | head`` has read enough."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a stream in memory
            os.dup2(nowhere, stream.fileno())


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that led to it."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return True
    # Writers in compiled code (safetensors) report the system's error as text.
    return "No space left on device" in str(error)
