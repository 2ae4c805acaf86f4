"""Stored noise in the place of drawn noise, and arrays of fixtures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrays:
    """One ``.npz``."""

    path: Path

    @cached_property
    def stored(self) -> dict[str, Any]:
        with np.load(self.path, allow_pickle=False) as stored:
            return dict(stored)

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.stored[name]))

    def text(self, name: str) -> str:
        return str(self.stored[name])

    def texts(self, name: str) -> list[str]:
        return [str(text) for text in self.stored[name]]


OPENED: dict[Path, Arrays] = {}


def fixtures(patterns: str, *needed: str) -> list[Any]:
    """Parameters of a test: all files of these patterns in ``LSGM_PARITY_DIR`` that hold the arrays
    needed.
    """
    folder = os.environ.get("LSGM_PARITY_DIR")
    paths = (
        [p for pattern in patterns.split() for p in Path(folder).glob(pattern)] if folder else []
    )
    found = [OPENED.setdefault(path, Arrays(path)) for path in sorted(paths)]
    found = [arrays for arrays in found if all(name in arrays for name in needed)]
    missing = pytest.mark.skip(reason=f"no {patterns} in LSGM_PARITY_DIR")
    return [pytest.param(arrays, id=arrays.path.stem) for arrays in found] or [
        pytest.param(None, marks=missing)
    ]


class Replay:
    """Gives stored normals in their order, whatever draws them."""

    def __init__(self, draws: Tensor | Sequence[Tensor]) -> None:
        self.draws = iter(draws)

    def __call__(self, shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        draw = next(self.draws)
        assert tuple(draw.shape) == tuple(shape)
        return draw.clone().to(kwargs.get("dtype", draw.dtype))


def close(ours: Tensor, theirs: Tensor, limit: float, what: str = "") -> None:
    """The largest difference over the largest entry is within the limit."""
    assert ours.shape == theirs.shape, what
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= limit, f"{what}: {error:.2e} > {limit:.0e}"
