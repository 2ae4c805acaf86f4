"""Kill a training at a chosen moment: the n-th time that it does something which matters to what is
on disk.

As a program, under torchrun, it runs a script and kills the process of rank ``KILL_RANKS[i]`` in
its step ``KILL_STEPS[i]``, where i counts the restarts.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

LARGE = 4096
"""Bytes; a checkpoint is hundreds of writes, most of them small."""


def kill_at(count: int, number: int = signal.SIGKILL) -> None:
    """Send this process a signal at the `count`-th moment from now.

    A moment is just before or, every other time, just after a file is made, written, flushed, moved
    into place or removed, and before or after an optimizer step.
    """
    import tempfile

    from lsgm.training.logging import RunLogger
    from lsgm.training.step import Step

    seen = 0

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == count and count % 2:
                os.kill(os.getpid(), number)
            result = original(*args, **kwargs)
            if seen >= count and not count % 2:
                os.kill(os.getpid(), number)
            return result

        setattr(owner, name, watched)

    watch(tempfile, "mkstemp")
    for name in ("fsync", "replace", "unlink", "truncate", "mkdir", "write"):
        watch(os, name)
    watch(Step, "__call__")
    watch(RunLogger, "write")
    _watch_writes(watch)


def _watch_writes(watch: Callable[[Any, str], None]) -> None:
    original = os.fdopen

    class Watched:
        """A file whose large writes are moments, half of each on disk before the kill."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            if len(view) < LARGE:
                return self.file.write(view)
            half = self.file.write(view[: len(view) // 2])
            self.file.flush()
            return half + self.second(view[len(view) // 2 :])

        def second(self, view: Any) -> int:
            return self.file.write(view)

    watch(Watched, "second")
    os.fdopen = lambda *args, **kwargs: Watched(original(*args, **kwargs))


def main() -> None:
    import lsgm.training.step as steps

    restart, rank = (int(os.environ[k]) for k in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
    ranks, at = ([int(n) for n in os.environ[k].split(",")] for k in ("KILL_RANKS", "KILL_STEPS"))
    original = steps.Step.__call__

    def killed(self: Any, *args: Any) -> Any:
        if restart < len(ranks) and rank == ranks[restart] and self.state.step == at[restart]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    steps.Step.__call__ = killed
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
