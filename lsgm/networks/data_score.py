"""A U-net of images as a noise prediction under any linear SDE.

>>> from lsgm.networks.data_score import DataScore
>>> from lsgm.networks.ncsnpp import NCSNpp
>>> network = NCSNpp(channels=1, resolution=8, num_channels=8, num_cells_per_scale=1)
>>> score = DataScore(network, VESDE(), condition="log_sigma")
>>> tuple(score(torch.zeros(2, 1, 8, 8), torch.tensor([0.1, 0.9])).shape)
(2, 1, 8, 8)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lsgm.sde import VESDE, LinearSDE
from lsgm.tensors import expand_like

__all__ = ["DataScore"]


class DataScore(nn.Module):
    """Noise prediction of images by a network that may know the class.

    ``eps(x_t, t, c) = network(x_t / sqrt(m^2 s^2 + sigma^2), condition(t), c)``: the input of the
    network has the same size at every time, which matters under a variance-exploding SDE
    (arXiv 2206.00364 section 5). What is computed from the time follows arXiv 2011.13456's code in
    the order of float32 operations where its checkpoints depend on it: their frequencies multiply
    its rounding by a thousand.

    Args:
        network: maps ``(B, C, H, W)``, ``(B,)`` and the labels ``(B,)`` or None to ``(B, C, H,
            W)``; it runs in its own precision.
        sde: the diffusion.
        condition: ``"time"``; ``"log_sigma"``: ``ln(sigma / m) / 4``; ``"ln_sigma"``: ``ln sigma``
            of a VE SDE; ``"index"``: the number of a noise level (:meth:`index`).
        data_std: ``s``; 0 leaves the input as it is.
        levels: number of noise levels, for ``"index"``.
        centre: the network sees ``2 x - 1``.
    """

    def __init__(
        self,
        network: nn.Module,
        sde: LinearSDE,
        condition: str = "time",
        data_std: float = 0.5,
        levels: int | None = None,
        centre: bool = False,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.centre = centre
        self.network = network
        self.sde = sde
        self.condition = condition
        self.data_std = data_std

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicted noise ``(B, C, H, W)`` in float32, or in the dtype of ``x_t`` if wider.

        Args:
            x_t: ``(B, C, H, W)``.
            t: ``(B,)`` or a scalar.
            labels: ``(B,)`` int64, where the number of classes stands for no class.
        """
        dtype = next(self.parameters()).dtype
        with torch.autocast(x_t.device.type, enabled=False):
            t = t.reshape(-1)
            m, var = self.sde.mean_coef(t), self.sde.var(t)
            x = x_t.to(dtype)
            if self.data_std > 0:
                x = x * expand_like((m.square() * self.data_std**2 + var).rsqrt(), x)
            x = 2 * x - 1 if self.centre else x
            if self.condition == "time":
                given = t
            elif self.condition == "log_sigma":
                given = (0.5 * var.log() - m.log()) / 4
            else:
                given = self.index(t) if self.condition == "index" else self.ln_sigma(t)
        eps = self.network(x, given.to(dtype), labels)
        return eps.to(torch.promote_types(x_t.dtype, torch.float32))

    def ln_sigma(self, t: Tensor) -> Tensor:
        """``ln sigma`` at ``t (B,)`` of the VE SDE."""
        assert isinstance(self.sde, VESDE)
        low, high = math.sqrt(self.sde.sigma2_min), math.sqrt(self.sde.sigma2_max)
        return torch.log(low * (high / low) ** t)

    def index(self, t: Tensor) -> Tensor:
        """What the network is told of ``t (B,)`` among ``N`` levels: ``(N - 1) t`` under a VP SDE,
        where level 0 has the least noise; under a VE SDE the nearest whole number, where it has the
        most.
        """
        assert self.levels is not None
        if isinstance(self.sde, VESDE):
            return ((1 - t) * (self.levels - 1)).round()
        return t * (self.levels - 1)
