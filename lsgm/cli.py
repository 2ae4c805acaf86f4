"""What every script does around its main function: the allocator is set, and errors become one line
and an exit code.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from lsgm.allocator import keep_freed_memory
from lsgm.errors import UserError

__all__ = ["EXIT_BROKEN_PIPE", "EXIT_INTERRUPTED", "EXIT_OTHER", "EXIT_USER_ERROR", "run"]

EXIT_OTHER = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def run(main: Callable[[], None]) -> NoReturn:
    """Call `main` and exit: 0 done, 2 a user's mistake, 128 + signal (130: Ctrl-C; 141: nobody
    reads the output any more) interrupted, 1 anything else.

    A user's mistake and a full disk are one line on stderr; an unexpected exception keeps its
    traceback.
    """
    keep_freed_memory()
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a closed pipe has to show here, not while the interpreter ends
    except UserError as error:
        _say(" ".join(str(error).split()))
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt as interrupt:
        _say("interrupted")
        sys.exit(getattr(interrupt, "exit_code", EXIT_INTERRUPTED))
    except BrokenPipeError:
        _drop_output()
        sys.exit(EXIT_BROKEN_PIPE)
    except Exception as error:
        if not any(map(_is_full_disk, _chain(error))):
            raise
        reason = " ".join(str(error).split())
        _say(f"no space left on the disk ({reason}); free some, then continue with --resume")
        sys.exit(EXIT_OTHER)
    sys.exit(0)


def _say(line: str) -> None:
    try:
        print(f"error: {line}", file=sys.stderr, flush=True)
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
        current = current.__cause__ or current.__context__


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return True
    # Writers in compiled code (safetensors) report the system's error as text.
    return "No space left on device" in str(error)
