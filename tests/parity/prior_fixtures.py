"""Numbers recorded from the published prior, found in the folder that ``LSGM_PARITY_DIR`` names.

Files: ``sde_TYPE.npz``, ``iw_TYPE_MODE.npz``, ``prior_NAME.pt`` with ``prior_NAME.npz``. Whatever
is there is tested, whichever options its arguments hold; and so are the files of
:mod:`own_fixtures`, which need no folder.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_fixtures import own_files
from published import PublishedSDE
from torch import Tensor

from lsgm.importers.official import read_official_checkpoint
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


def parametrize_files(pattern: str, own: bool = True) -> pytest.MarkDecorator:
    """Run a test with the fixture ``path`` once for each matching file.

    Those of our own making come after the given ones, or not at all (``own``); where there are
    none, the test is skipped.
    """
    missing = pytest.mark.skip(reason=f"no {pattern} in LSGM_PARITY_DIR")
    files: list[Any] = [*fixture_files(pattern), *(own_files(pattern) if own else [])]
    values: list[Any] = [pytest.param(file, id=file.stem) for file in files]
    return pytest.mark.parametrize(
        "path", values or [pytest.param(None, marks=missing)], indirect=True
    )


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
    """One parameter set of an ``sde_`` or ``iw_`` file: our SDE, and the published formulas."""

    sde: LinearSDE
    published: PublishedSDE
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
        published = PublishedSDE(**params)
        kind = SDE_KINDS[params.pop("sde_type")]
        sets.append(ArraySet(make_sde(kind, **params), published, kind, arrays))
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

    @property
    def args(self) -> dict[str, Any]:
        """The checkpoint's arguments."""
        return dict(vars(self.raw["args"]))

    @property
    def published(self) -> PublishedSDE:
        """The SDE in its published form."""
        return PublishedSDE(**{f.name: self.args[f.name] for f in fields(PublishedSDE)})


@functools.cache
def prior_fixture(path: Path) -> PriorFixture:
    """Load ``prior_NAME.pt`` and the arrays beside it. The modules are shared: copy one before
    changing it.
    """
    raw = read_official_checkpoint(path).raw
    arrays = Arrays(dict(np.load(path.with_suffix(".npz"), allow_pickle=False)))
    scores = {weights: load_official_prior(raw, weights) for weights in ("raw", "ema")}
    return PriorFixture(path.stem, raw, arrays, json.loads(arrays.text("config")), scores)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
