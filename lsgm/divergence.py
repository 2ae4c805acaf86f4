r"""Divergence ``tr(dv/dx)`` of a vector field that acts on each image of a batch by itself.

``exact`` differentiates once for each dimension; Hutchinson's estimator ``p^T (dv/dx) p``
(arXiv 1810.01367 section 3.1) once for each probe, unbiased for probes of zero mean and unit
covariance. The batch is the first axis; ``(B, D)`` and ``(B, C, H, W)`` are alike.

>>> from lsgm.divergence import make_divergence
>>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
>>> for name in ("exact", "hutchinson"):
...     divergence = make_divergence(name)
...     value, trace = divergence(torch.square, x, divergence.probe(x))
...     print(name, trace.tolist())
exact [6.0, 14.0]
hutchinson [6.0, 14.0]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lsgm.tensors import sum_except_batch
from vae.random import Rng, rand, randn

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "ExactDivergence",
    "HutchinsonDivergence",
    "make_divergence",
]

Field = Callable[[Tensor], Tensor]


class Divergence(ABC):
    """A way to compute or estimate the divergence of ``fn: (B, *shape) -> (B, *shape)``."""

    random: ClassVar[bool]
    """Whether the value is an unbiased estimate that depends on a probe."""

    @abstractmethod
    def probe(self, x: Tensor, rng: Rng = None) -> Tensor:
        """Probes for ``x (B, *shape)``: ``(P, B, *shape)``; P is 0 where none are needed."""

    @abstractmethod
    def per_probe(self, fn: Field, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        """``fn(x) (B, *shape)`` and its divergence by each probe ``(P, B)``, one row where there
        are none; without gradients, and works under ``torch.no_grad()``.
        """

    def __call__(self, fn: Field, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        """``fn(x) (B, *shape)`` and its divergence ``(B,)``, the mean over the probes."""
        value, traces = self.per_probe(fn, x, probe)
        return value, traces.mean(0)


@dataclass(frozen=True)
class ExactDivergence(Divergence):
    """The trace itself: one call of ``fn`` and one backward pass for each dimension."""

    random: ClassVar[bool] = False

    def probe(self, x: Tensor, rng: Rng = None) -> Tensor:
        return x.new_empty((0, *x.shape))

    def per_probe(self, fn: Field, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = fn(x)
            flat = value.flatten(1)
            divergence = x.new_zeros(len(x))
            for i in range(flat.shape[1]):
                divergence = divergence + _gradient(flat[:, i].sum(), x).flatten(1)[:, i]
        return value.detach(), divergence[None]


@dataclass(frozen=True)
class HutchinsonDivergence(Divergence):
    """Mean of ``p^T (dv/dx) p`` over random probes: one call of ``fn``, one backward pass for each
    probe.

    Args:
        distribution: ``"rademacher"`` (entries +-1: exact for a diagonal Jacobian) or
            ``"gaussian"`` (the published one).
        num_probes: Probes averaged over.
    """

    random: ClassVar[bool] = True
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    num_probes: int = 1

    def __post_init__(self) -> None:
        if self.distribution not in ("rademacher", "gaussian"):
            raise ValueError(
                f"distribution must be 'rademacher' or 'gaussian', got {self.distribution!r}"
            )
        if self.num_probes < 1:
            raise ValueError(f"num_probes must be at least 1, got {self.num_probes}")

    def probe(self, x: Tensor, rng: Rng = None) -> Tensor:
        draws = [self._draw(x, rng) for _ in range(self.num_probes)]
        return torch.stack(draws)

    def _draw(self, x: Tensor, rng: Rng) -> Tensor:
        if self.distribution == "gaussian":
            return randn(x.shape, rng, device=x.device, dtype=x.dtype)
        return 1 - 2 * (rand(x.shape, rng, device=x.device, dtype=x.dtype) < 0.5).to(x.dtype)

    def per_probe(self, fn: Field, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = fn(x)
            traces = [sum_except_batch(_gradient((value * p).sum(), x) * p) for p in probe]
        return value.detach(), torch.stack(traces)


def _gradient(scalar: Tensor, x: Tensor) -> Tensor:
    """``d scalar / dx``, zero where the scalar does not depend on x."""
    if not scalar.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(scalar, x, retain_graph=True, materialize_grads=True)
    return gradient


DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "exact": ExactDivergence,
    "hutchinson": HutchinsonDivergence,
}


def make_divergence(name: str, **options: object) -> Divergence:
    """The divergence of that name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}: choose from {', '.join(DIVERGENCES)}")
    return DIVERGENCES[name](**options)
