"""The C library's allocator, set for networks on a CPU."""

from __future__ import annotations

import ctypes

__all__ = [
    "keep_freed_memory",
]

# Parameters of mallopt(3), glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


_NEVER = -1


_TOP_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let the process keep the memory of freed tensors for the next ones; True if that is so.

    By default glibc returns every large block to the system when it is freed. A step of training
    or a batch of an evaluation asks for the same gigabytes again each time, and the system clears
    them page by page: up to a half of the processor's time. The process's resident memory then
    stays at its peak. Where the C library has no such setting nothing is done.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    # With no block mapped by itself, and a heap that never shrinks, freed blocks are used again.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER, _M_TOP_PAD: _TOP_PAD}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
