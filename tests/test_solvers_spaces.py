"""The same solvers, unchanged, on a latent prior and on images: the moments of exact models.

The latent prior is a mixed-Normal score whose network is the closed form that makes the mix exact;
the images are a mixture with an exact noise prediction. Both are solved by one `Solver` object.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracles import GaussianOracle, MixtureOracle
from torch import nn

from lsgm.score import MixedNormalScore
from lsgm.sde import VPSDE
from lsgm.solvers import make_grid, make_solver

SDE = VPSDE()
T_END = 0.25
NUM = 1500
SOLVERS = {
    "annealed Langevin": (
        make_solver("langevin", steps_per_level=40, step_ratio=0.3),
        make_grid("log_snr", SDE, 7, T_END),
    ),
    "predictor-corrector": (
        make_solver("predictor_corrector", predictor="ancestral", norm="expected", snr=0.1),
        make_grid("time", SDE, 60, T_END),
    ),
}


class Residual(nn.Module):
    """The network of a mixed-Normal score that is exact for the oracle's data: ``(eps - (1 - a)
    normal) / a``.
    """

    def __init__(self, oracle: GaussianOracle, mixing: float) -> None:
        super().__init__()
        self.oracle, self.mixing = oracle, mixing

    def forward(self, x, t):
        normal = SDE.normal_component(x, t)
        return (self.oracle.eps(x, t) - (1 - self.mixing) * normal) / self.mixing


def latent_prior():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 2, 2, generator=generator)
    variance = 0.2 + torch.rand(4, 2, 2, generator=generator)
    oracle = GaussianOracle(SDE, mean, variance)
    logit = -1.5
    network = Residual(oracle, 1 / (1 + math.exp(-logit)))
    return oracle, MixedNormalScore(network, SDE, 4, mixing_init=logit), (4, 2, 2)


def images():
    oracle = MixtureOracle.ring(SDE, (1, 3, 3))
    return oracle, oracle.eps, (1, 3, 3)


SPACES = {"latents": latent_prior, "images": images}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", SOLVERS)
def test_moments_in_both_spaces(name, space):
    solver, times = SOLVERS[name]
    oracle, score, shape = SPACES[space]()
    rng = torch.Generator().manual_seed(1)
    start = SDE.prior_sample((NUM, *shape), rng)
    solution = solver.solve(SDE, score, start, times, rng)
    assert solution.x.shape == (NUM, *shape)
    assert solution.x.dtype == torch.float32
    assert solution.nfe == solver.evaluations(len(times) - 1)
    ours, exact = (z.double().flatten(1) for z in (solution.x, oracle.sample(20 * NUM, T_END, rng)))
    std = exact.std(0)
    error = 4.5 / math.sqrt(NUM)
    assert ((ours.mean(0) - exact.mean(0)) / std).abs().max() < error + 0.04
    white = [torch.cov(z.T / std[:, None]) for z in (ours, exact)]
    # Langevin steps of finite size widen the law a little.
    assert (white[0] - white[1]).abs().max() < math.sqrt(2) * error + 0.08


def test_the_latent_prior_is_the_oracle():
    oracle, score, shape = latent_prior()
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(score(x.float(), t).double(), oracle.eps(x, t), atol=1e-4, rtol=1e-4)
