"""Speed and memory, measured; every command prints medians of one go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lsgm.benchmark.data import data_command
from lsgm.benchmark.few_step import few_step_command
from lsgm.benchmark.few_step_images import few_step_images_command
from lsgm.benchmark.joint import joint_command
from lsgm.benchmark.memory import memory_command
from lsgm.benchmark.training import train_command
from lsgm.benchmark.vae import vae_command
from lsgm.benchmark.variance import variance_command

__all__ = ["COMMANDS"]

COMMANDS: dict[str, Callable[[Sequence[str], str], None]] = {
    "data": data_command,
    "few-step": few_step_command,
    "few-step-images": few_step_images_command,
    "joint": joint_command,
    "memory": memory_command,
    "train": train_command,
    "vae": vae_command,
    "variance": variance_command,
}
"""Benchmarks by name; a new one is one function over arguments and its name, and a line here."""
