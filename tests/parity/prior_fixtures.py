"""Numbers recorded from the published prior, found in the folder that ``LSGM_PARITY_DIR`` names.

Files: ``sde_TYPE.npz``, ``iw_TYPE_MODE.npz``, ``prior_NAME.pt`` with ``prior_NAME.npz``. Whatever
    is there is tested; without the
variable the tests are skipped.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lsgm.importers.official_prior import SDE_KINDS, load_official_prior
from lsgm.score import MixedNormalScore
from lsgm.sde import LinearSDE, make_sde

__all__ = [
    "Arrays",
    "PriorFixture",
    "array_sets",
    "fixture_files",
    "parametrize_files",
    "prior_fixture",
    "relative",
]


def fixture_files(pattern: str) -> list[Path]:
    """Files of the parity folder that match, in order; none if the folder is not given."""
    folder = os.environ.get("LSGM_PARITY_DIR")
    return sorted(Path(folder).glob(pattern)) if folder else []


def parametrize_files(pattern: str, name: str = "path") -> pytest.MarkDecorator:
    """Run a test once for each matching file, or skip it where there is none."""
    missing = pytest.mark.skip(reason=f"no {pattern} in LSGM_PARITY_DIR")
    values: list[Any] = [pytest.param(path, id=path.stem) for path in fixture_files(pattern)]
    return pytest.mark.parametrize(name, values or [pytest.param(None, marks=missing)])


@dataclass(frozen=True)
class Arrays:
    """Arrays of one ``.npz`` under a key prefix."""

    data: Any
    prefix: str = ""

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.data

    def numpy(self, key: str) -> np.ndarray:
        """The array as it is."""
        return self.data[self.prefix + key]

    def __getitem__(self, key: str) -> Tensor:
        """The array as a tensor of its own dtype."""
        return torch.from_numpy(np.array(self.numpy(key)))

    def text(self, key: str) -> str:
        """A string."""
        return str(self.numpy(key))


@dataclass(frozen=True)
class ArraySet:
    """One parameter set of an ``sde_`` or ``iw_`` file."""

    sde: LinearSDE
    kind: str
    arrays: Arrays


@functools.cache
def array_sets(path: Path) -> list[ArraySet]:
    """The parameter sets of an ``sde_*.npz`` or ``iw_*.npz``."""
    data = dict(np.load(path, allow_pickle=False))
    sets = []
    for i in range(int(data["num_sets"])):
        arrays = Arrays(data, f"set{i}_")
        params = json.loads(arrays.text("params"))
        kind = SDE_KINDS[params.pop("sde_type")]
        sets.append(ArraySet(make_sde(kind, **params), kind, arrays))
    return sets


@dataclass(frozen=True)
class PriorFixture:
    """A published checkpoint and what it computes.

    Attributes:
        name: file stem.
        raw: the checkpoint's dictionary (VAE and prior).
        arrays: the recorded numbers.
        config: full settings of the run.
        scores: the prior with raw and with EMA weights, in eval mode, under ``"raw"`` and
            ``"ema"``.
    """

    name: str
    raw: dict[str, Any]
    arrays: Arrays
    config: dict[str, Any]
    scores: dict[str, MixedNormalScore]


@functools.cache
def prior_fixture(path: Path) -> PriorFixture:
    """Load ``prior_NAME.pt`` and the arrays beside it. The modules are shared: copy one before
    changing it.
    """
    # argparse namespaces of plain values; the files come from the tests' own reference folder
    raw = torch.load(path, map_location="cpu", weights_only=False)
    arrays = Arrays(dict(np.load(path.with_suffix(".npz"), allow_pickle=False)))
    scores = {weights: load_official_prior(raw, weights) for weights in ("raw", "ema")}
    return PriorFixture(path.stem, raw, arrays, json.loads(arrays.text("config")), scores)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
