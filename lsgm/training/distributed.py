"""Several processes under ``torchrun``: NCCL on CUDA devices, gloo elsewhere.

One process alone needs no process group.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from lsgm.errors import UserError
from lsgm.system.device import choose_device

__all__ = [
    "World",
    "all_max",
    "all_mean",
    "distributed",
    "gather_rows",
    "on_main",
    "wrap",
]

T = TypeVar("T")

LONG_WAIT = timedelta(days=1)
"""How long processes wait for what one of them does alone (a download, say) or for the end of an
evaluation that they share."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run.

    Args:
        device: Where this process computes.
        rank: Index of this process, in [0, size).
        size: Number of processes.
        patient: A group of all processes, on the CPU, whose collectives may take
            :data:`LONG_WAIT`; None for one process.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    patient: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


@contextlib.contextmanager
def distributed(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, if it did, and leave them at the end.

    A process waits for the others ``timeout_minutes`` in a training step, and :data:`LONG_WAIT`
    where one of them works alone.

    Raises:
        UserError: If the device is not available.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    place = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size == 1:
        yield World(place)
        return
    timeout, meeting = timedelta(minutes=timeout_minutes), _meeting_point()
    if place.type == "cuda":
        dist.init_process_group("nccl", device_id=place, timeout=timeout, **meeting)
    else:
        dist.init_process_group("gloo", timeout=timeout, **meeting)
    try:
        patient = dist.new_group(backend="gloo", timeout=LONG_WAIT)
        yield World(place, dist.get_rank(), size, patient)
    finally:
        # The reducers have to be gone before the group they use.
        gc.collect()
        dist.destroy_process_group()


def _meeting_point() -> dict[str, Any]:
    """Where the processes find each other: under a name of its own for every restart by torchrun,
    whose store still holds the addresses of the processes that died.
    """
    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {
        "store": dist.PrefixStore(f"attempt_{attempt}", store),
        "rank": rank,
        "world_size": size,
    }


def wrap(stage: nn.Module, world: World, *, find_unused_parameters: bool = False) -> nn.Module:
    """Return a module whose backward pass averages gradients over the processes (one: `stage`)."""
    if world.size == 1:
        return stage
    # 1x1 kernels in channels-last have ambiguous strides; copying them costs nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    for buffer in stage.buffers():
        dist.broadcast(buffer, src=0)
    # Batch norm synchronises its statistics itself. PyTorch renames this option.
    parameters = inspect.signature(DistributedDataParallel).parameters
    renamed = "forward_sync_buffers" in parameters
    sync = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(
        stage,
        device_ids=None if world.device.type == "cpu" else [world.device],
        **sync,  # type: ignore[arg-type]
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
    )


def all_mean(x: Tensor, world: World) -> Tensor:
    """Mean of `x` over the processes."""
    if world.size > 1:
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.SUM)
        x /= world.size
    return x


def all_max(x: Tensor, world: World) -> Tensor:
    """Elementwise maximum of `x` over the processes."""
    if world.size > 1:
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def gather_rows(x: Tensor, world: World) -> Tensor:
    """The rows ``(n, ...)`` of all processes on the CPU of each, those of rank 0 first; a process
    without any may give ``(0,)``.
    """
    if world.size == 1:
        return x.cpu()
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, x.cpu(), group=world.patient)
    return torch.cat(parts)


def on_main(world: World, action: Callable[[], T]) -> T:
    """Run `action` on the main process alone and give its (picklable) result to all.

    Raises:
        UserError: On every process, if the action raised one.
    """
    if world.size == 1:
        return action()
    box: list[object] = [None, None, None]
    failure: BaseException | None = None
    if world.is_main:
        try:
            box[0] = action()
        except Exception as error:
            failure = error
            box[1], box[2] = isinstance(error, UserError), str(error)
    dist.broadcast_object_list(box, src=0, group=world.patient)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise (
            UserError(str(box[2])) if box[1] else RuntimeError(f"the main process failed: {box[2]}")
        )
    return box[0]  # type: ignore[return-value]
