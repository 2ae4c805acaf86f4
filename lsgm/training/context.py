"""What the training loop is given, and what it gives to evaluations and at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from lsgm.config.training import TrainConfig
from lsgm.system.files import RunFolder
from lsgm.training.distributed import World
from lsgm.training.state import Stage, TrainState

__all__ = ["BatchSource", "DrawCurves", "EvalContext", "Evaluate", "FitResult"]


class BatchSource(Protocol):
    """This process's part of every global batch, as a function of (epoch, step)."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch."""
        ...

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (step in the epoch, images (b, C, R, R) float32 in [0, 1]) from `start` on."""
        ...


@dataclass(frozen=True)
class EvalContext:
    """What an evaluation gets. It runs on every process, without gradients.

    Args:
        stage: The live stage, in evaluation mode.
        models: For each side the averaged module if there is one, else the live one; in evaluation
            mode.
        step: Optimizer steps done.
        epoch: Epochs done.
        total_steps: Optimizer steps of the run.
        config: The settings of the run.
        run: The run's folder.
        world: The processes and this one's device.
        log_image: ``log_image(name, image (C, H, W) in [0, 1])`` shows an image in TensorBoard.
        bar: ``bar(what, total)`` is a context in which the function that it gives moves a progress
            bar by so many of the ``total``.
    """

    stage: Stage
    models: Mapping[str, nn.Module]
    step: int
    epoch: int
    total_steps: int
    config: TrainConfig
    run: RunFolder
    world: World
    log_image: Callable[[str, Tensor], None]
    bar: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class FitResult:
    """The end of a run.

    Args:
        state: The trained stage and what trained it.
        train_seconds: Time spent in training over all sessions, in seconds, without evaluations and
            checkpoints.
        metrics: Result of the last evaluation of this session.
    """

    state: TrainState
    train_seconds: float
    metrics: Mapping[str, float | None]


Evaluate = Callable[[EvalContext], Mapping[str, float | None]]
DrawCurves = Callable[[RunFolder], None]
