from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lsgm.noise_ladder import (
    LadderTimes,
    NoiseLadder,
    langevin_variance,
    level_overlap,
    ratio_for_overlap,
    select_step,
)
from lsgm.sde import largest_squared_distance
from lsgm.solvers.langevin import AnnealedLangevin

# arXiv 2006.09011 appendix B and the released configurations, images in [0, 1]: side, sigma_1,
# levels, Langevin steps a level, epsilon; sigma_L is 0.01
PUBLISHED = {
    "cifar10": (32, 50.0, 232, 5, 6.2e-6),
    "celeba": (64, 90.0, 500, 5, 3.3e-6),
    "bedroom": (128, 190.0, 1086, 3, 1.8e-6),
    "ffhq": (256, 348.0, 2311, 3, 0.9e-6),
}


def test_levels_are_geometric_and_are_those_of_the_sde() -> None:
    ladder = NoiseLadder(50.0, 0.01, 232)
    sigmas = ladder.sigmas
    assert len(sigmas) == 232
    assert sigmas[0].item() == pytest.approx(50) and sigmas[-1].item() == pytest.approx(0.01)
    torch.testing.assert_close(sigmas[:-1] / sigmas[1:], torch.full_like(sigmas[1:], ladder.ratio))
    sde = ladder.sde()
    torch.testing.assert_close(sde.var(ladder.times).sqrt(), sigmas)
    torch.testing.assert_close(sde.inverse_var(sigmas.square()), ladder.times)
    again = NoiseLadder.of(sde, 232)
    torch.testing.assert_close(again.sigmas, sigmas)
    assert ladder.sde(0.3).time_eps == 0.3


def test_index_is_the_nearest_level_in_log_sigma() -> None:
    ladder = NoiseLadder(1.0, 0.01, 10)
    assert ladder.index(ladder.times).tolist() == list(range(10))
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distance = (ladder.sde().var(t).log()[:, None] / 2 - ladder.sigmas.log()).abs()
    assert torch.equal(ladder.index(t), distance.argmin(1))
    assert ladder.index(torch.tensor(1.0)).item() == 0
    assert ladder.index(torch.tensor([0.0], dtype=torch.float32)).item() == 9


def test_ladder_times_are_even_over_the_levels() -> None:
    ladder = NoiseLadder(1.0, 0.01, 10)
    proposal = LadderTimes(ladder)
    rho = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    sample = proposal.from_uniform(rho)
    assert (sample.t.diff() >= 0).all()
    assert ladder.index(sample.t).bincount().tolist() == [100] * 10
    assert torch.equal(sample.inverse_density, torch.ones(1000, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    stratified = proposal.sample(50, generator, stratified=True)
    assert ladder.index(stratified.t).bincount(minlength=10).tolist() == [5] * 10


def test_overlap_is_the_mass_of_the_shells() -> None:
    """Technique 2 against norms of Gaussians, whose exact law is chi."""
    dimension, ratio, n = 300, 1.08, 200_000
    rng = torch.Generator().manual_seed(0)
    half = torch.full((n,), dimension / 2, dtype=torch.float64)
    r = (2 * torch._standard_gamma(half, generator=rng)).sqrt()
    centre, width = math.sqrt(dimension) * ratio, 3 * ratio / math.sqrt(2)
    inside = ((r - centre).abs() < width).double().mean().item()
    assert level_overlap(ratio, dimension) == pytest.approx(inside, abs=0.01)
    assert level_overlap(1.0, dimension) == pytest.approx(math.erf(3 / math.sqrt(2)))


@pytest.mark.parametrize("dimension", [5, 64, 3072, 196_608])
@pytest.mark.parametrize("overlap", [0.1, 0.5, 0.9])
def test_ratio_solves_its_equation(dimension: int, overlap: float) -> None:
    ratio = ratio_for_overlap(dimension, overlap)
    assert ratio > 1 and level_overlap(ratio, dimension) == pytest.approx(overlap, abs=1e-8)


def test_ratio_in_high_dimensions() -> None:
    """At overlap 1/2 the upper term is one, so ``sqrt(2D)(gamma - 1) = 3 gamma``."""
    for dimension in (3072, 12_288):
        root = math.sqrt(2 * dimension)
        assert ratio_for_overlap(dimension) == pytest.approx(root / (root - 3), rel=1e-7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ladders(name: str) -> None:
    """The published numbers of levels have one overlap, 0.567, which the paper calls about 1/2."""
    side, sigma_max, levels, _, _ = PUBLISHED[name]
    dimension = 3 * side**2
    ladder = NoiseLadder(sigma_max, 0.01, levels)
    assert level_overlap(ladder.ratio, dimension) == pytest.approx(0.567, abs=0.001)
    ours = NoiseLadder.for_data(sigma_max, 0.01, dimension)
    assert 0.93 < ours.num_levels / levels < 0.96
    assert NoiseLadder.for_data(sigma_max, 0.01, dimension, 0.567).num_levels == pytest.approx(
        levels, rel=0.01
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_step_sizes(name: str) -> None:
    """Technique 4 gives the published ``epsilon`` to the two digits that are published."""
    _, sigma_max, levels, steps, epsilon = PUBLISHED[name]
    step = select_step(NoiseLadder(sigma_max, 0.01, levels), steps)
    assert round(step.epsilon, 7) == pytest.approx(epsilon)
    assert step.step_ratio == pytest.approx(2 * step.epsilon / 0.01**2)
    # sigma in [-1, 1] is twice that in [0, 1]; the ratio has no unit
    doubled = select_step(NoiseLadder(2 * sigma_max, 0.02, levels), steps)
    assert doubled.step_ratio == pytest.approx(step.step_ratio, rel=1e-3)
    assert doubled.epsilon == pytest.approx(4 * step.epsilon, rel=1e-3)


def test_selected_step_is_the_best() -> None:
    ladder = NoiseLadder(10.0, 0.01, 50)
    chosen = select_step(ladder, 10)
    grid = torch.linspace(1e-3, 0.999, 5000).tolist()
    best = min(grid, key=lambda step: abs(langevin_variance(step, 10, ladder.ratio) - 1))
    assert chosen.step_ratio / 2 == pytest.approx(best, abs=1e-3)


def test_variance_of_annealed_langevin() -> None:
    """Technique 4's variance against our solver on data at the origin, whose ``eps`` is exact."""
    ladder, steps, n = NoiseLadder(2.0, 0.5, 2), 4, 200_000
    sde, step = ladder.sde(), 0.15

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return x / sde.var(t).sqrt()[:, None]

    rng = torch.Generator().manual_seed(0)
    start = ladder.ratio * 0.5 * torch.randn(n, 1, generator=rng, dtype=torch.float64)
    times = torch.tensor([1e-9, 0.0], dtype=torch.float64)
    # both levels are the smaller one, so the solver takes 2 * steps steps there
    solver = AnnealedLangevin(steps_per_level=steps, step_ratio=2 * step)
    x = solver.solve(sde, eps, start, times, rng).x
    expected = langevin_variance(step, 2 * steps, ladder.ratio) * 0.5**2
    assert x.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / n))
    variance = ladder.ratio**2
    for _ in range(2 * steps):
        variance = (1 - step) ** 2 * variance + 2 * step
    assert variance == pytest.approx(langevin_variance(step, 2 * steps, ladder.ratio))


def test_largest_level_from_data() -> None:
    """Technique 1: the largest distance between two images."""
    x = torch.rand(50, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    sigma = math.sqrt(largest_squared_distance([x[:20], x[20:]]))
    assert sigma == pytest.approx(max((a - b).norm().item() for a in x for b in x), rel=1e-5)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        NoiseLadder(0.01, 1.0, 10)
    with pytest.raises(ValueError, match="at least 2 levels"):
        NoiseLadder(1.0, 0.01, 1)
    with pytest.raises(ValueError, match="at least 5 dimensions"):
        ratio_for_overlap(4)
    with pytest.raises(ValueError, match="overlap"):
        ratio_for_overlap(100, 1.0)
    with pytest.raises(ValueError, match="stable"):
        langevin_variance(2.0, 5, 1.1)
