r"""Weights ``w(t)`` of the loss ``w(t) ||eps_theta(z_t, t) - eps||^2`` (arXiv 2106.05931).

The weighting says *what* is minimised; how times are drawn (:mod:`lsgm.times`) only changes the
estimator's variance.

>>> from lsgm.sde import VPSDE
>>> from lsgm.weighting import make_weighting
>>> sde, t = VPSDE(), torch.tensor([0.1, 1.0], dtype=torch.float64)
>>> likelihood, reweighted = make_weighting("likelihood"), make_weighting("reweighted")
>>> torch.allclose(likelihood(sde, t) * sde.var(t), reweighted(sde, t))
True
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lsgm.registry import WEIGHTINGS
from lsgm.sde import LinearSDE

__all__ = [
    "WEIGHTINGS",
    "LikelihoodWeighting",
    "RescaledWeighting",
    "ReweightedWeighting",
    "UnweightedWeighting",
    "Weighting",
    "make_weighting",
]


@dataclass(frozen=True)
class Weighting(ABC):
    """A positive function of time for each SDE."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, sde: LinearSDE, t: Tensor) -> Tensor:
        """Weight of the squared error at ``t (B,)``: ``(B,)``."""


@dataclass(frozen=True)
class LikelihoodWeighting(Weighting):
    """``g2 / (2 var)``: with the SDE's constant, a cross entropy in nats.

    arXiv 2106.05931 theorem 1.
    """

    name: ClassVar[str] = "likelihood"

    def __call__(self, sde: LinearSDE, t: Tensor) -> Tensor:
        return 0.5 * sde.g2(t) / sde.var(t)


@dataclass(frozen=True)
class UnweightedWeighting(Weighting):
    """``1``: plain noise prediction (arXiv 2006.11239 eq. 14; "drop_all" in the published code)."""

    name: ClassVar[str] = "unweighted"

    def __call__(self, sde: LinearSDE, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class ReweightedWeighting(Weighting):
    """``g2 / 2``: the likelihood's weight times ``var`` ("drop_sigma2t" in the published code)."""

    name: ClassVar[str] = "reweighted"

    def __call__(self, sde: LinearSDE, t: Tensor) -> Tensor:
        return 0.5 * sde.g2(t)


@dataclass(frozen=True)
class RescaledWeighting(Weighting):
    """``1 / (2 (1 - var))``: uniform times importance-sample it for N(0, I) data (VP).

    Raises:
        ValueError: the SDE's variance exceeds one, where this weight is singular and then negative.
    """

    name: ClassVar[str] = "rescaled"

    def __call__(self, sde: LinearSDE, t: Tensor) -> Tensor:
        if sde.prior_var > 1:
            raise ValueError(
                "the rescaled weighting needs var < 1, "
                f"but {type(sde).__name__} reaches {sde.prior_var:g}"
            )
        return 0.5 / sde.one_minus_var(t)


def make_weighting(name: str) -> Weighting:
    """Build a weighting by its name in :data:`lsgm.registry.WEIGHTINGS`.

    Raises:
        ValueError: unknown name.
    """
    weighting: Weighting = WEIGHTINGS[name]()
    return weighting
