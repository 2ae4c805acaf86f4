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
from lsgm.solvers import Solution, base, make_grid, make_solver

priors = parametrize_files("prior_*.pt")


@priors
def test_ode_sample(path: Path) -> None:
    """Two solves at one tolerance differ by their own errors: by more than usual where the flow
    amplifies them, which a finer solve of ours tells.
    """
    fixture = prior_fixture(path)
    score, arrays = fixture.scores["ema"], fixture.arrays
    sde, tolerance = score.sde, arrays["ode_tol"].item()
    start = arrays["ode_temp"].item() * math.sqrt(sde.prior_var) * arrays["ode_noise"]
    times = torch.tensor([1.0, arrays["ode_eps"].item()])

    def solve(tolerance: float) -> Solution:
        solver = make_solver("rk45", rtol=tolerance, atol=tolerance, velocity_dtype=torch.float32)
        return solver.solve(sde, score, start, times)

    solution, limit = solve(tolerance), 1e-3
    error = relative(solution.x, arrays["ode_sample"])
    if error > limit:
        limit += 2 * relative(solution.x, solve(tolerance / 10).x)
    assert error < limit
    assert solution.nfe == pytest.approx(arrays["ode_sample_nfe"].item(), rel=0.1, abs=12)


@priors
@pytest.mark.slow
def test_ode_log_density(path: Path) -> None:
    """As for the sample, the solver's own error counts where it is large."""
    fixture = prior_fixture(path)
    score, arrays = fixture.scores["ema"], fixture.arrays

    class GivenProbe(HutchinsonDivergence):
        def probe(self, x: Tensor, rng: object = None) -> Tensor:
            return arrays["nll_probe"][None]

    def solve(tolerance: float) -> tuple[Tensor, int]:
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
        return -density.log_prob, density.nfe

    tolerance, expected = arrays["ode_tol"].item(), arrays["nll"].double()
    nll, nfe = solve(tolerance)
    error, limit = (nll - expected).abs(), 1e-4 * expected.abs()
    if (error > limit).any():
        limit += 2 * (nll - solve(tolerance / 10)[0]).abs()
    assert (error <= limit).all()
    assert nfe == pytest.approx(arrays["nll_nfe"].item(), rel=0.1, abs=12)


@priors
def test_ancestral_sample(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published chain: our steps down to its last time, then its last step.

    That one, ``(z - sqrt(var) eps) / sqrt(1 - var)`` clamped, takes ``1 - var`` for the squared
    mean coefficient, which is ``(1 - var) / (1 - sigma2_0)``: with smoothed data the published
    samples are too wide by ``(1 - sigma2_0)^-1/2``. No solver of ours does that.
    """
    fixture = prior_fixture(path)
    score, arrays = fixture.scores["ema"], fixture.arrays
    sde = score.sde
    if "disc_sample" not in arrays:
        # it takes 1 - var for the squared mean coefficient
        assert fixture.published.sde_type in ("sub_vpsde", "vesde")
        pytest.skip("the published chain fits neither sub-VP nor VE")
    noise = list(arrays["disc_noise"])
    steps = len(noise) - 1
    start = 0.9 * noise.pop(0)
    monkeypatch.setattr(base, "randn", lambda *_, **__: noise.pop(0))
    large = fixture.args.get("denoising_stddevs", "beta") == "beta"
    predictor = "ancestral_large" if large else "ancestral"
    solver = make_solver("ancestral", predictor=predictor, denoise=False, noise_scale=0.9)
    times = make_grid("time", sde, steps, 0.0)[:-1]
    with torch.no_grad():
        x = solver.solve(sde, score, start, times).x
        var = sde.var(times[-1])
        x = (x - var.sqrt() * score(x, times[-1])) / (1 - var).sqrt()
    assert relative(x.clamp(-3, 3), arrays["disc_sample"]) < 1e-4
