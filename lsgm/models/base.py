"""What sampling and editing ask of a model, whether it diffuses images or latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from lsgm.sde import LinearSDE
from lsgm.solvers import EpsFn, Solver
from vae.random import Rng

__all__ = [
    "DiffusionModel",
    "GroupedModel",
    "has_diffusion",
]


class DiffusionModel(Protocol):
    """What a solver can sample: a state that diffuses, and images made of it.

    A data-space model's state is the image; a latent model's is the part of the latents with a
    score-based prior, and ``finer`` are the other latents.
    """

    @property
    def sde(self) -> LinearSDE: ...

    @property
    def score(self) -> EpsFn:
        """The noise prediction."""

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of one state."""

    @property
    def device(self) -> torch.device: ...

    def prior_start(
        self, num: int, rng: Rng, temperature: float = 1.0, solver: Solver | None = None
    ) -> Tensor:
        """Where generation by ``solver`` starts, at ``t = 1``: ``(num, *state_shape)``."""

    def encode_state(
        self, x: Tensor, rng: Rng = None, *, mean: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """State ``(B, *state_shape)`` and finer latents of ``x (B, C, R, R)`` in [-1, 1]."""

    def sample_finer(self, num: int, rng: Rng, temperature: float = 1.0) -> list[Tensor]:
        """Draw the finer latents from their prior."""

    def decode_state(self, state: Tensor, finer: Sequence[Tensor], rng: Rng = None) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1]; a decoder that draws pixels takes ``rng``."""


def has_diffusion(model: object) -> TypeGuard[DiffusionModel]:
    """Whether a solver samples the model; the others draw their latents from N(0, I)."""
    return hasattr(model, "state_shape")


class GroupedModel(DiffusionModel, Protocol):
    """A model whose state is made of latent groups: G of equal size side by side in the channels,
    coarsest first; the finer latents are further groups.
    """

    @property
    def state_groups(self) -> int:
        """Number G of groups in the state."""
