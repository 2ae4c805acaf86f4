"""How the threads of a parallel operation wait for each other."""

from __future__ import annotations

import os

__all__ = [
    "wait_briefly",
]

_SETTINGS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""GNU's runtime, the one in PyTorch's wheels, counts turns of its loop (by default 300,000,
a few milliseconds), LLVM's and Intel's milliseconds (200 by default)."""


def wait_briefly() -> None:
    """Let a thread that waits give its core up soon, unless the user has chosen how it waits.

    By default a waiting thread spins for milliseconds: on a machine with more threads than cores it
    so keeps the very thread that it waits for from running. A short spin, the one that GNU's
    runtime takes where a process has more threads than cores, still covers the gaps between the
    operations of a network. The runtime reads this when it is loaded, so it must be set before
    PyTorch is.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", *_SETTINGS}:
        os.environ.update(_SETTINGS)
