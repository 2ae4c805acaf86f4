"""Running average of the weights, kept beside the live model and never swapped into it."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["EMA"]


class EMA(AveragedModel):
    """Exponential moving average of a module's parameters.

    The first update copies the parameters, later ones set ema <- decay * ema + (1 - decay) * p.
    Buffers (the statistics of batch norm) are copied from the live module, not averaged.
    ``.module`` is the averaged module, in evaluation mode and without gradients.

    Args:
        module: The live module; it is copied.
        decay: In [0, 1), per update.

    Raises:
        ValueError: If the decay is outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), not {decay}")
        super().__init__(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.module.requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the live module's present parameters and buffers."""
        self.update_parameters(module)

    def train(self, mode: bool = True) -> EMA:
        """Stay in evaluation mode, whatever the stage around it does."""
        return super().train(False)
