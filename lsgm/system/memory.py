"""Networks that this machine cannot hold are refused before any of their memory is taken."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from lsgm.errors import UserError

__all__ = [
    "build_within_memory",
    "physical_memory",
    "process_peak",
]

M = TypeVar("M", bound=nn.Module)


MAX_TENSORS = 10_000
"""Most weight tensors of a network; the largest published one has 2,524."""


class _TooLarge(Exception):
    """The weights so far are more than there may be."""


class _Tally:
    """Registration hook that adds up the weights of the modules being built."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self.tensors = 0

    def __call__(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is None:
            return
        self.bytes += value.numel() * value.element_size()
        self.tensors += 1
        if self.tensors > MAX_TENSORS:
            raise _TooLarge(f"more than {MAX_TENSORS} weight tensors")
        if self.bytes > self.most_bytes:
            gib = 2**30
            raise _TooLarge(
                f"at least {self.bytes / gib:.4g} GiB of weights, and this machine has "
                f"{self.most_bytes / gib:.4g} GiB of memory"
            )


def build_within_memory(build: Callable[[], M], what: str) -> M:
    """``build()``, after a rehearsal on the meta device, which allocates nothing.

    Args:
        build: Builds a network; it draws the same numbers with and without the rehearsal.
        what: The section of the configuration, for the message.

    Raises:
        UserError: The network refuses its arguments, has more weights than memory holds, or too
            many layers.
    """
    tally = _Tally(physical_memory())
    hooks: list[Any] = [
        register_module_parameter_registration_hook(tally),
        register_module_buffer_registration_hook(tally),
    ]
    try:
        with torch.device("meta"):
            build()
    except _TooLarge as error:
        raise UserError(f"{what}: the network is too large: {error}") from None
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    except (RuntimeError, OverflowError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise UserError(
            f"{what}: the network is too large ({str(error).splitlines()[0]})"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    return build()


def physical_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such file, or "max"
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def process_peak(device: torch.device) -> int:
    """Most bytes that were in use at once since the process began: by tensors on a CUDA device, by
    the whole process on others.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on every system

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
