"""What models give back, samples and bounds with their standard errors, and what they recommend."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lsgm.solvers import (
    make_solver,
    solver_parameters,
)
from lsgm.solvers.sampler import (
    DEFAULT_NFE,
    DEFAULT_SOLVER,
    DEFAULT_T_END,
    PILOT_GRID,
)

__all__ = [
    "Batch",
    "Bound",
    "Estimate",
    "LADDER_GRID",
    "SamplerDefaults",
    "Samples",
]

NO_SOLVER = "decoder only"
"""What takes the place of the sampler's name for a model whose latents are N(0, I)."""


PUBLISHED_SOLVERS = ("discrete_pc", "ddpm")


FEW_STEP_SHARE = 10
"""Our few-step solver is meant with fewer evaluations than a published sampler takes, which is made
for its own number, and with this share of what another stochastic sampler recommends."""


LADDER_GRID = "ladder"


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its standard error, both in nats an image (None: a single image)."""

    mean: float
    standard_error: float | None

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From one value per image, ``(N,)``."""
        spread = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(values.mean().item(), spread)

    def __str__(self) -> str:
        spread = "n/a" if self.standard_error is None else f"{self.standard_error:.2f}"
        return f"{self.mean:.2f} +- {spread}"


@dataclass(frozen=True)
class Bound:
    """A bound on the negative log-likelihood of images.

    Attributes:
        name: Which bound, under which prior.
        unit: Of the values.
        values: One per image, ``(B,)`` float64.
    """

    name: str
    unit: str
    values: Tensor

    @property
    def mean(self) -> float:
        """Over the images."""
        return Estimate.of(self.values).mean

    @property
    def standard_error(self) -> float | None:
        """Of the mean, over images and the draws behind them; None for a single image."""
        return Estimate.of(self.values).standard_error

    def __str__(self) -> str:
        return f"{self.name}: {Estimate.of(self.values)} {self.unit}"


@dataclass(frozen=True)
class Batch:
    """One batch of samples: ``images (B, C, H, W)`` in [0, 1], the ``latents`` that they were
    decoded from, coarsest first (a data-space model has none), the network evaluations, and which
    images of the seed they are.
    """

    images: Tensor
    latents: tuple[Tensor, ...]
    nfe: int
    index: Sequence[int] = ()


@dataclass(frozen=True)
class Samples:
    """Images of a model, on the CPU.

    Attributes:
        images: ``(N, C, H, W)`` in [0, 1]; of a decoder its means.
        latents: What they were decoded from, ``(N, L, h, w)`` each, coarsest first; empty for a
            model of the images themselves.
        nfe: Network evaluations of a batch, mean over the batches.
        seconds: Time taken.
        solver: Name of the solver.
    """

    images: Tensor
    latents: tuple[Tensor, ...]
    nfe: float
    seconds: float
    solver: str = NO_SOLVER


OWN_OPTIONS = frozenset({"predictor", "corrector_steps"})


OPTIONS_OF_ALL = frozenset({"denoise", "state_dtype"})
"""Options that say nothing of which solver is meant."""


@dataclass(frozen=True)
class SamplerDefaults:
    """The sampler that a model recommends: names and numbers as the command line takes them.

    ``grid`` ``ladder`` is the model's own noise levels, None what suits the solver. ``options`` are
    arguments of solvers, of which each solver, the recommended one and any other, takes those that
    it has (:meth:`options_of`).
    """

    solver: str = DEFAULT_SOLVER
    nfe: int = DEFAULT_NFE
    grid: str | None = None
    t_end: float = DEFAULT_T_END
    options: dict[str, Any] = field(default_factory=dict)

    def options_of(self, solver: str) -> dict[str, Any]:
        """The recommended arguments that the solver of that name has; what makes one predictor-
        corrector another (:data:`OWN_OPTIONS`) is the recommended solver's alone.
        """
        own = set(solver_parameters(solver))
        if solver != self.solver:
            own -= OWN_OPTIONS
        return {name: value for name, value in self.options.items() if name in own}

    def means_few_steps(
        self, nfe: int | None, grid: str | None, options: Collection[str] = ()
    ) -> bool:
        """Whether the evaluations or the grid asked for are none for the recommended sampler, which
        draws noise, and no other option says that it is meant.
        """
        if not OPTIONS_OF_ALL.issuperset(options):
            return False
        try:
            own = make_solver(self.solver, **self.options_of(self.solver))
        except ValueError:
            return False  # which is said where it is used
        if not own.stochastic:
            return False
        share = 1 if self.solver in PUBLISHED_SOLVERS else FEW_STEP_SHARE
        few = nfe is not None and nfe < self.nfe / share
        return grid != LADDER_GRID and (few or grid == PILOT_GRID)

    def solver_for(
        self, nfe: int | None, grid: str | None = None, options: Collection[str] = ()
    ) -> str:
        """The recommended solver for that many evaluations (None: the recommended number), that
        grid and further options.
        """
        return DEFAULT_SOLVER if self.means_few_steps(nfe, grid, options) else self.solver
