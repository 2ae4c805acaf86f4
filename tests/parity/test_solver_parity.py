"""Samples and log-densities of the published prior, with its solver settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from prior_fixtures import parametrize_files, prior_fixture, relative
from torch import Tensor

from lsgm.divergence import HutchinsonDivergence
from lsgm.likelihood import ode_log_density
from lsgm.sde import VESDE
from lsgm.solvers import base, make_grid, make_solver

priors = parametrize_files("prior_*.pt")


@priors
def test_ode_sample(path: Path) -> None:
    fixture = prior_fixture(path)
    score, arrays = fixture.scores["ema"], fixture.arrays
    sde, tolerance = score.sde, arrays["ode_tol"].item()
    solver = make_solver("rk45", rtol=tolerance, atol=tolerance, velocity_dtype=torch.float32)
    start = arrays["ode_temp"].item() * math.sqrt(sde.prior_var) * arrays["ode_noise"]
    times = torch.tensor([1.0, arrays["ode_eps"].item()])
    solution = solver.solve(sde, score, start, times)
    assert relative(solution.x, arrays["ode_sample"]) < 1e-3
    assert solution.nfe == pytest.approx(arrays["ode_sample_nfe"].item(), rel=0.1, abs=12)


@priors
@pytest.mark.slow
def test_ode_log_density(path: Path) -> None:
    fixture = prior_fixture(path)
    score, arrays = fixture.scores["ema"], fixture.arrays

    class GivenProbe(HutchinsonDivergence):
        def probe(self, x: Tensor, rng: object = None) -> Tensor:
            return arrays["nll_probe"][None]

    tolerance = arrays["ode_tol"].item()
    density = ode_log_density(
        score.sde,
        score,
        arrays["nll_z0"],
        divergence=GivenProbe("gaussian"),
        t_end=arrays["ode_eps"].item(),
        rtol=tolerance,
        atol=tolerance,
        method="rk45",
        published=True,
    )
    torch.testing.assert_close(-density.log_prob.float(), arrays["nll"].float(), rtol=1e-4, atol=0)
    assert density.nfe == pytest.approx(arrays["nll_nfe"].item(), rel=0.1, abs=12)


@priors
def test_ancestral_sample(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = prior_fixture(path)
    score, arrays = fixture.scores["ema"], fixture.arrays
    if isinstance(score.sde, VESDE):
        pytest.skip("the published chain has no variance-exploding form")
    noise = list(arrays["disc_noise"])
    start = 0.9 * noise.pop(0)
    monkeypatch.setattr(base, "randn", lambda *_, **__: noise.pop(0))
    solver = make_solver("ancestral", predictor="ancestral_large", denoise=True, noise_scale=0.9)
    # The published chain's last step, from t = 1/8, ends at variance zero: the closing mean.
    times = make_grid("time", score.sde, 8, 0.0)[:-1]
    solution = solver.solve(score.sde, score, start, times)
    # The published sampler clamps its result.
    assert relative(solution.x.clamp(-3, 3), arrays["disc_sample"]) < 1e-4
    assert solution.nfe == 8
