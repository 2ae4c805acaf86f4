"""The smallest model that a solver samples: its images are its states."""

from __future__ import annotations

import torch

from lsgm.data.spec import DataSpec
from lsgm.models.base import DiffusionModel


class StateModel(DiffusionModel):
    """Subclasses set ``sde``, ``score`` and ``state_shape``; nothing is encoded or clamped."""

    kind = "states"
    spec = DataSpec("states", 1, 2, 0, binary=False)
    state_shape = (1, 2, 2)
    device = torch.device("cpu")

    def describe(self):
        return {}

    def encode(self, x, rng=None, *, mean=False):
        return [x]

    def decode(self, latents, rng=None):
        return latents[0]

    def bound_values(self, x, rng=None, *, samples=1):
        raise NotImplementedError
