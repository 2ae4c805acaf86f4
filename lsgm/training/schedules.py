"""Learning rates as pure functions of the step, so that a resumed run continues exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["SCHEDULES", "Schedule", "constant", "cosine", "learning_rate", "published"]


@dataclass(frozen=True)
class Schedule:
    """What a schedule depends on besides the step.

    Args:
        lr: Learning rate after the warm-up.
        lr_min: Learning rate at the end.
        warmup_steps: Steps of the linear warm-up.
        total_steps: Steps of the whole run.
        steps_per_epoch: Steps in an epoch.
    """

    lr: float
    lr_min: float
    warmup_steps: int
    total_steps: int
    steps_per_epoch: int


def cosine(schedule: Schedule, step: int) -> float:
    """Rise linearly to lr in `warmup_steps` steps, then fall along half a cosine to lr_min."""
    if step < schedule.warmup_steps:
        return schedule.lr * (step + 1) / schedule.warmup_steps
    span = max(1, schedule.total_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    return schedule.lr_min + (schedule.lr - schedule.lr_min) * 0.5 * (
        1.0 + math.cos(math.pi * progress)
    )


def published(schedule: Schedule, step: int) -> float:
    """The published runs' schedule (2007.03898, 2106.05931): after the warm-up once an epoch.

    The warm-up starts at 0 and ends one step below lr. That last value is held for one epoch and is
    where the cosine starts. The published recursion lr_j = lr_min + (1 + cos(pi j/T)) /
    (1 + cos(pi (j-1)/T)) * (lr_{j-1} - lr_min) telescopes into the closed form used here.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return schedule.lr * step / warmup
    start = schedule.lr * (warmup - 1) / warmup if warmup else schedule.lr
    warmup_epochs = -(-warmup // schedule.steps_per_epoch)
    epochs = -(-schedule.total_steps // schedule.steps_per_epoch)
    last = epochs - warmup_epochs - 1
    index = min(step // schedule.steps_per_epoch - warmup_epochs, last)
    if index <= 0:
        return start
    return schedule.lr_min + (start - schedule.lr_min) * 0.5 * (
        1.0 + math.cos(math.pi * index / last)
    )


def constant(schedule: Schedule, step: int) -> float:
    """Rise linearly to lr in `warmup_steps` steps and stay there."""
    return schedule.lr * min(1.0, (step + 1) / max(1, schedule.warmup_steps))


SCHEDULES: dict[str, Callable[[Schedule, int], float]] = {
    "cosine": cosine,
    "published": published,
    "constant": constant,
}


def learning_rate(name: str, schedule: Schedule, step: int) -> float:
    """Learning rate of optimizer step number `step` (the first is 0).

    Raises:
        ValueError: If there is no schedule of that name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[name](schedule, step)
