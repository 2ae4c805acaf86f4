"""Running average of the weights, kept beside the live model and never swapped into it."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lsgm.config.training import OptimConfig

__all__ = ["EMA", "make_average"]

Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


class EMA(AveragedModel):
    """Exponential moving average of a module's parameters.

    The first update copies the parameters, later ones set ema <- d * ema + (1 - d) * p. With a
    warm-up, d is the smaller of ``decay`` and ``(1 + n) / (10 + n)`` at the n-th update, so that a
    run of few steps does not end with a share ``decay^n`` of its first weights.
    Buffers (the statistics of batch norm) are copied from the live module, not averaged.
    ``.module`` is the averaged module, in evaluation mode and without gradients.

    Args:
        module: The live module; it is copied.
        decay: In [0, 1), per update.
        warmup: Average over fewer updates in the beginning.

    Raises:
        ValueError: If the decay is outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), not {decay}")

        def average(averages: Tensors, parameters: Tensors, updates: Tensor | int) -> None:
            n = int(updates)
            now = min(decay, (1 + n) / (10 + n)) if warmup else decay
            get_ema_multi_avg_fn(now)(averages, parameters, updates)

        super().__init__(module, multi_avg_fn=average)
        self.module.requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the live module's present parameters and buffers."""
        self.update_parameters(module)

    def train(self, mode: bool = True) -> EMA:
        """Stay in evaluation mode, whatever the stage around it does."""
        return super().train(False)


def make_average(module: nn.Module, config: OptimConfig) -> EMA | None:
    """The running average that ``config`` asks for, if it asks for one."""
    if config.ema_decay == 0:
        return None
    return EMA(module, config.ema_decay, warmup=config.ema_warmup)
