"""The examples in docstrings print what they say, and no room of the library is without one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import lsgm
import vae

ROOTS = [Path(package.__file__).parent for package in (lsgm, vae) if package.__file__]
PUBLIC = """
    lsgm.conditioning lsgm.discrete_noise lsgm.divergence lsgm.likelihood lsgm.noise_ladder
    lsgm.objectives lsgm.path_bound lsgm.score lsgm.score_matching lsgm.tensors lsgm.times
    lsgm.weighting
    lsgm.networks.classifier lsgm.networks.data_score lsgm.networks.embeddings lsgm.networks.ncsn
    lsgm.networks.levels lsgm.networks.ncsnpp lsgm.networks.resample
    lsgm.solvers lsgm.solvers.base lsgm.solvers.ddpm lsgm.solvers.discrete lsgm.solvers.exponential
    lsgm.solvers.grids lsgm.solvers.langevin lsgm.solvers.normal_reference lsgm.solvers.ode
    lsgm.solvers.pilot lsgm.solvers.predictor_corrector lsgm.solvers.stochastic
    vae vae.context vae.distributions vae.flows vae.objective vae.random vae.regularization
""".split()
"""Modules that must show an example; others may."""


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


WITH_EXAMPLES = sorted(
    _name(path, root)
    for root in ROOTS
    for path in root.rglob("*.py")
    if ">>> " in path.read_text("utf-8")
)


@pytest.mark.parametrize("name", sorted({*WITH_EXAMPLES, *PUBLIC}))
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = doctest.testmod(module)
    assert result.failed == 0  # doctest has printed the difference
    assert result.attempted > 0, f"{name} shows no example"
