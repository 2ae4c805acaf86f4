"""The tail of importance-sampled estimates: known shares, and the warning of an evaluation."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from linear_gaussian import linear_gaussian_lsgm
from quadrature import integrate
from sde_cases import CASES
from torch import Tensor, nn

from lsgm.evaluation.likelihood.bounds import nelbo
from lsgm.evaluation.likelihood.tails import HEAVY_TAIL, HeavyTailWarning, tail_share
from lsgm.models.latent import VAEModel
from lsgm.times import make_proposal
from lsgm.weighting import make_weighting


def test_shares_of_known_distributions() -> None:
    """From the quantile q of a hundredth: Normal 2 (q phi(q) + 0.005); exponential 0.01 ((q - 1)^2
    + 2 q) with q = ln 100; of a Pareto tail without variance nearly all.
    """
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(400_000, generator=rng, dtype=torch.float64)
    q = 2.575829
    exact = 2 * (q * math.exp(-(q**2) / 2) / math.sqrt(2 * math.pi) + 0.005)
    assert tail_share(normal) == pytest.approx(exact, rel=0.02)
    uniform = torch.rand(400_000, generator=rng, dtype=torch.float64)
    q = math.log(100)
    assert tail_share(-uniform.log()) == pytest.approx(0.01 * ((q - 1) ** 2 + 2 * q), rel=0.02)
    assert tail_share(uniform**-0.9) > 0.95
    assert tail_share(normal[:49]) is None and tail_share(torch.ones(100)) is None
    # one of a hundred, however few there are
    assert tail_share(torch.tensor([0.0] * 59 + [60.0])) == pytest.approx(59 / 60, rel=1e-6)


class Biased(nn.Module):
    """A noise prediction that stays wrong by a constant where that of Normal data is exact."""

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score, self.sde = score, score.sde

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.score(z, t) + 0.7


def test_an_evaluation_warns_of_a_heavy_tail_and_has_none_by_default() -> None:
    """The mixture proposal's mean is right; the paper's is too low, and says so."""
    sde = CASES["vp"]
    model = linear_gaussian_lsgm(sde)
    model.score = Biased(model.score)
    x, _ = model.vae.images(2000)
    likelihood = make_weighting("likelihood")
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeavyTailWarning)
        report = nelbo(model, iter([x]), samples=4)
    assert report.settings["tail_share"] < HEAVY_TAIL
    importance = make_proposal("importance", sde, likelihood)
    nelbo_at = model.nelbo
    model.nelbo = functools.partial(nelbo_at, proposal=importance)
    with pytest.warns(HeavyTailWarning, match=r"of the scatter comes from 1% of 8000 draws; the"):
        heavy = nelbo(model, iter([x]), samples=4)
    assert heavy.settings["tail_share"] > HEAVY_TAIL
    # the error of 0.49 in each of two dimensions, weighted by the likelihood, is what is added
    excess = 2 * 0.49 * integrate(lambda t: likelihood(sde, t), sde.time_eps)
    exact = nelbo(linear_gaussian_lsgm(sde), iter([x]), samples=4).nats.mean + excess
    error = report.nats.standard_error
    assert error is not None
    assert abs(report.nats.mean - exact) < 4 * error
    assert (
        "tail_share"
        not in nelbo(VAEModel(model.vae, model.spec, model.vae_config), iter([x])).settings
    )
