r"""The noise levels of discrete variance-preserving diffusions (arXiv 2006.11239 section 2).

DDPM's chain ``x_i = sqrt(1 - beta_i) x_(i-1) + sqrt(beta_i) e`` with ``beta_i`` linear in ``i`` has
the kernel ``x_i = sqrt(abar_i) x + sqrt(1 - abar_i) e``, ``abar_i`` the product of the ``1 - beta``
up to ``i``. In score-SDE's convention ``beta_i`` runs from ``beta_start / N`` to ``beta_end / N``
and level ``i = 0 ... N - 1`` lies at the time ``i / (N - 1)`` of the VP SDE that is the chain's
limit (arXiv 2011.13456 appendix B).

>>> from lsgm.discrete_noise import BetaTable
>>> from lsgm.sde import VPSDE
>>> table, t = BetaTable.of(VPSDE(), num_levels=1000), torch.tensor([0.5], dtype=torch.float64)
>>> bool((table.var(t) - VPSDE().var(t)).abs() < 1e-2)  # the limit of many levels
True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm.sde import VPSDE
from lsgm.tensors import expand_like

__all__ = ["BetaTable"]


@dataclass(frozen=True)
class BetaTable:
    """The levels of a discrete VP diffusion; times are those of the VP SDE.

    Attributes:
        beta_start, beta_end: Of the VP SDE, so ``N`` times those of the chain.
        num_levels: ``N``; above ``beta_end``, or the chain has no noise to give.

    Raises:
        ValueError: There are too few levels.
    """

    beta_start: float
    beta_end: float
    num_levels: int

    def __post_init__(self) -> None:
        if self.num_levels <= self.beta_end:
            raise ValueError(
                f"a discrete VP diffusion needs more than beta_end = {self.beta_end:g} levels, "
                f"not {self.num_levels}"
            )

    @classmethod
    def of(cls, sde: VPSDE, num_levels: int) -> BetaTable:
        """The chain whose limit is ``sde``."""
        return cls(sde.beta_start, sde.beta_end, num_levels)

    @property
    def times(self) -> Tensor:
        """The levels' times, ``(N,)`` float64 from 1 down to 0."""
        return torch.linspace(1, 0, self.num_levels, dtype=torch.float64)

    @property
    def betas(self) -> Tensor:
        """``beta_i``, ``(N,)`` float64, least noise first."""
        n = self.num_levels
        return torch.linspace(self.beta_start / n, self.beta_end / n, n, dtype=torch.float64)

    @property
    def alphas_cumprod(self) -> Tensor:
        """``abar_i``, ``(N,)`` float64."""
        return (1 - self.betas).cumprod(0)

    def index(self, t: Tensor) -> Tensor:
        """The level nearest to ``t (B,)``: int64."""
        position = t.double() * (self.num_levels - 1)
        return position.round().long().clamp(0, self.num_levels - 1)

    def mean_coef(self, t: Tensor) -> Tensor:
        """``sqrt(abar)`` at the level nearest to ``t (B,)``."""
        return self._at(self.alphas_cumprod.sqrt(), t)

    def var(self, t: Tensor) -> Tensor:
        """``1 - abar`` at the level nearest to ``t (B,)``."""
        return self._at(1 - self.alphas_cumprod, t)

    def perturb(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """``sqrt(abar) x0 + sqrt(1 - abar) eps``: ``x0, eps (B, *d)``, ``t (B,)``."""
        return expand_like(self.mean_coef(t), x0) * x0 + expand_like(self.var(t).sqrt(), x0) * eps

    def _at(self, table: Tensor, t: Tensor) -> Tensor:
        return table.to(t.device)[self.index(t)].to(t.dtype)
