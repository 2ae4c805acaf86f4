"""Work in a process of its own, which never outlives the one that asked for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

__all__ = [
    "in_fresh_process",
]

T = TypeVar("T")


def in_fresh_process(job: Callable[..., T], *args: object) -> T:
    """``job(*args)`` in a new process, so that one measurement's memory does not hide another's.

    However this process ends, that one ends with it. The job and its arguments are pickled; what it
    raises is raised here.

    Raises:
        RuntimeError: The process ended before the job did (killed, or out of memory).
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, job, args), daemon=True)
    process.start()
    sender.close()  # so that the pipe ends with the other process
    try:
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if error is not None:
        raise error
    return result


def _serve(sender: Connection, job: Callable[..., Any], args: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: the other one ends this
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sender.send((job(*args), None))
    except Exception as error:
        sender.send((None, error))


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one, killed ones included, and follow."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
