"""Every bound of a model whose likelihood is known exactly: on the right side of the truth, and
towards it as the estimator is given more.
"""

from __future__ import annotations

import math

import pytest
import torch
from linear_gaussian import linear_gaussian_lsgm
from sde_cases import CASES
from torch import Tensor

from lsgm.divergence import HutchinsonDivergence
from lsgm.errors import UserError
from lsgm.evaluation.likelihood.bounds import nelbo, normal_nelbo, ode_nelbo, posterior_draw
from lsgm.evaluation.likelihood.importance import (
    convergence,
    exact_iw_bound,
    iw,
    iw_of_groups,
    path_iw_bound,
)
from lsgm.likelihood import ode_log_density
from lsgm.models.latent import LSGM, VAEModel
from lsgm.sde import VPSDE
from vae.objective import importance_weighted_bound
from vae.random import RowGenerators

SDES = pytest.mark.parametrize("name", ["vp", "geometric", "subvp", "ve-wide"])
IMAGES = 200


def gap(values: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean of bound minus truth over images, and its standard error."""
    difference = values - truth
    return difference.mean().item(), difference.std().item() / math.sqrt(len(difference))


def check_bounds(gaps: list[tuple[float, float]], last: float) -> None:
    """No bound lies below the truth, each below the one before, and the last closer than that."""
    assert all(mean > -4 * error for mean, error in gaps), gaps
    assert all(a[0] > b[0] for a, b in zip(gaps, gaps[1:], strict=False)), gaps
    assert gaps[0][0] > 4 * gaps[0][1], gaps
    assert gaps[-1][0] < last + 4 * gaps[-1][1], gaps


def exact_elbo_gap(model: LSGM) -> float:
    """``KL( q(z | x) || p(z | x) )`` of the stand-in's encoder, the same for every image."""
    vae = model.vae
    q = torch.distributions.MultivariateNormal(
        torch.zeros(3, dtype=torch.float64), torch.diag(vae.sigma.square())
    )
    p = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), vae.covariance)
    return torch.distributions.kl_divergence(q, p).item()


def test_the_normal_prior():
    lsgm = linear_gaussian_lsgm(VPSDE(), normal=True)
    model = VAEModel(lsgm.vae, lsgm.spec, lsgm.vae_config)
    x, truth = lsgm.vae.images(IMAGES)
    gaps = [gap(nelbo(model, iter([x]), samples=64).per_image, truth)]
    assert abs(gaps[0][0] - exact_elbo_gap(lsgm)) < 4 * gaps[0][1]
    reports = [iw(model, iter([x]), k=k) for k in (2, 8, 32, 256)]
    gaps += [gap(report.per_image, truth) for report in reports]
    check_bounds(gaps, 0.005)
    assert [r.bound for r in reports[:2]] == ["IW-2, N(0, I) prior", "IW-8, N(0, I) prior"]
    other = normal_nelbo(lsgm, iter([x]), samples=64)
    assert torch.equal(other.per_image, nelbo(model, iter([x]), samples=64).per_image)


@SDES
def test_the_cross_entropy_nelbo(name):
    """With the exact score the variational bound of the prior is tight but for the last step's
    Normal decoder, whose gap is below half the cutoff's variance times the misfit of the prior.
    """
    model = linear_gaussian_lsgm(CASES[name])
    x, truth = model.vae.images(IMAGES)
    mean, error = gap(nelbo(model, iter([x]), samples=200).per_image, truth)
    cutoff = model.sde.var(torch.tensor(model.sde.time_eps, dtype=torch.float64)).item()
    assert mean > exact_elbo_gap(model) - 4 * error
    assert mean < exact_elbo_gap(model) + 4 * error + 5 * cutoff
    assert error < 0.1 * mean


@SDES
def test_the_ode_nelbo(name):
    model = linear_gaussian_lsgm(CASES[name])
    x, truth = model.vae.images(IMAGES)
    options = {"tolerance": 1e-4, "seed": 3}
    exact = ode_nelbo(model, iter([x]), divergence="exact", **options)
    noisy = ode_nelbo(model, iter([x]), probes=8, **options)
    mean, error = gap(exact.per_image, truth)
    assert abs(mean - exact_elbo_gap(model)) < 4 * error + 1e-3
    # the same posterior draws: what differs is the noise of the probes, whose size is reported
    mean, error = gap(noisy.per_image, exact.per_image)
    assert abs(mean) < 4 * error + 1e-4
    expected = math.sqrt(noisy.settings["probe_variance"] / 8 / IMAGES)
    assert error == pytest.approx(expected, rel=0.3)
    assert exact.settings["probe_variance"] == 0
    assert exact.settings["tolerance_change"] < 0.05


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_importance_weights_with_the_exact_ode_density(name):
    model = linear_gaussian_lsgm(CASES[name])
    x, truth = model.vae.images(100)
    reports = [exact_iw_bound(model, iter([x]), k=k, tolerance=1e-3) for k in (1, 6, 32)]
    check_bounds([gap(report.per_image, truth) for report in reports], 0.02)
    assert reports[2].bound == "IW-32, score-based prior by its ODE"
    assert reports[2].settings["nelbo"] > reports[2].nats.mean
    assert 1 < reports[2].settings["effective_draws"] < 32


@SDES
def test_importance_weights_over_paths(name):
    """Few steps make another prior, so only bounds of many draws need fall with the steps."""
    model = linear_gaussian_lsgm(CASES[name])
    x, truth = model.vae.images(IMAGES)
    ks, steps = (1, 4, 32), (1, 4, 16)
    rows = convergence(model, [x[:120], x[120:]], k=ks, steps=steps, calibration=1024, seed=2)
    gaps = {(row.steps, row.k): row.nats.mean - truth.mean().item() for row in rows}
    for n in steps:
        assert all(gaps[n, a] > gaps[n, b] for a, b in zip(ks, ks[1:], strict=False))
    assert gaps[1, 32] > gaps[4, 32] + 0.01
    assert gaps[4, 32] > gaps[16, 32] - 0.01
    report = path_iw_bound(model, iter([x]), k=32, steps=16, calibration=1024, seed=1)
    mean, error = gap(report.per_image, truth)
    assert -4 * error < mean < 0.03 + 4 * error
    assert abs(mean - gaps[16, 32]) < 6 * error


@pytest.mark.parametrize("steps", [1, 5])
def test_paths_cost_nothing_under_a_normal_prior(steps):
    """The same draws of the latents give the same weights as the analytic density."""
    model = linear_gaussian_lsgm(VPSDE(), normal=True)
    x, _ = model.vae.images(50)
    report = iw(model, iter([x]), k=1, steps=steps, calibration=0)
    assert report.bound == f"IW-1, score-based prior, paths of {steps} steps"
    draw = posterior_draw(model, model.vae.encoder(x), x, RowGenerators.of(0, range(50)))
    log_p = -0.5 * (draw.top.double().square() + math.log(2 * math.pi)).flatten(1).sum(1)
    torch.testing.assert_close(report.per_image, -draw.log_weight(log_p), atol=1e-3, rtol=0)


def test_exponentiated_estimates_lie_below_the_truth_and_are_refused():
    model = linear_gaussian_lsgm(VPSDE())
    x, truth = model.vae.images(50)
    rng, draws = torch.Generator().manual_seed(0), 256
    many = x.repeat_interleave(draws, 0)
    draw = posterior_draw(model, model.vae.encoder(many), many, rng)

    def density(**options: object):
        return ode_log_density(
            model.sde, model.score, draw.top, rtol=1e-4, atol=1e-4, t_end=1e-5, **options
        )

    def bound(log_prob: Tensor) -> Tensor:
        return -importance_weighted_bound(draw.log_weight(log_prob).reshape(50, draws).T)

    noisy = density(divergence=HutchinsonDivergence("gaussian"), rng=rng)
    mean, error = gap(bound(noisy.log_prob), truth)
    assert mean < -0.1 - 4 * error
    mean, error = gap(bound(density().exact()), truth)
    assert abs(mean) < 0.02 + 4 * error
    with pytest.raises(ValueError, match="estimated divergence cannot be exponentiated"):
        noisy.exact()
    with pytest.raises(UserError, match="hutchinson divergence is an estimate"):
        exact_iw_bound(model, iter([x]), k=2, divergence="hutchinson")


def test_requests_that_cannot_be_met_are_refused():
    model = linear_gaussian_lsgm(VPSDE())
    with pytest.raises(UserError, match="2 latent dimensions.*limit of 1"):
        exact_iw_bound(model, iter([]), k=2, max_dims=1)
    with pytest.raises(UserError, match="unknown time grid 'cosine'"):
        path_iw_bound(model, iter([]), k=2, grid="cosine")
    with pytest.raises(UserError, match="steps must be at least 1"):
        path_iw_bound(model, iter([]), k=2, steps=0)
    with pytest.raises(ValueError, match=r"\[1, 3\], got 4"):
        iw_of_groups(torch.zeros(3, 2), 4)
