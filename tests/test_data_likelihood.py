"""Likelihood of 8-bit images against Gaussians, whose densities are known."""

import math

import pytest
import torch
from oracles import GaussianOracle

from lsgm.data.pixels import Pixels
from lsgm.data.spec import DataSpec
from lsgm.divergence import HutchinsonDivergence
from lsgm.models.image_likelihood import ode_data_likelihood
from lsgm.sde import VESDE, VPSDE, SubVPSDE

SPEC = DataSpec("toy", channels=2, image_size=3, padding=1, binary=True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def images(pixels=None, oracle=None, num=3):
    """Padded 8-bit images, drawn from an oracle of what is diffused or evenly."""
    levels = torch.randint(0, 256, (num, 2, 5, 5), generator=rng(1)).float()
    if oracle is not None:
        drawn = 255 * pixels.to_images(oracle.sample(num, 0.0, rng(4)))
        levels[..., 1:4, 1:4] = drawn.round().clamp(0, 255).float()
    return levels / 255.0


def oracle_of(sde, pixels):
    """Data ``y`` that are Gaussian as the diffusion sees them, with a standard deviation of each
    value of its own."""
    mean = 0.3 * torch.randn(pixels.shape, generator=rng(2), dtype=torch.float64)
    variance = 0.2 + torch.rand(pixels.shape, generator=rng(3), dtype=torch.float64)
    return GaussianOracle(sde, mean, variance)


@pytest.mark.parametrize(
    ("sde", "data_range"),
    [
        (VPSDE(time_eps=1e-5), "symmetric"),
        (VPSDE(time_eps=1e-5), "unit"),
        (SubVPSDE(time_eps=1e-3), "symmetric"),
        (VESDE(1e-4, 2500.0, 1e-5), "unit"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_equals_the_closed_form_through_the_whole_transform(sde, data_range):
    pixels = Pixels.of(SPEC, data_range, True)
    oracle = oracle_of(sde, pixels)
    x = images(pixels, oracle)
    found = ode_data_likelihood(sde, oracle.eps, pixels, x, tolerance=1e-5, rng=rng())
    # by hand: the levels of the inner 3x3, u of the same seed, and a density of v
    k = 255 * x[..., 1:4, 1:4].double()
    u = torch.rand(k.shape, generator=rng(), dtype=torch.float32)
    scale, shift = (1 / 256, 0.0) if data_range == "unit" else (1 / 128, -1.0)
    y = scale * (k + u) + shift
    # the model's own prior at t = 1, without the mismatch to N(0, 1)
    expected = -oracle.ode_log_prob(y, sde.time_eps) - k[0].numel() * math.log(scale)
    assert (found.nats - expected).abs().max() / k[0].numel() < 1e-4
    torch.testing.assert_close(found.bits_per_dim, found.nats / (18 * math.log(2)))
    if isinstance(sde, VPSDE):  # there that is the density of the data, to 1e-3 nats a value
        clean = torch.distributions.Normal(oracle.mean, oracle.variance.sqrt())
        data = -clean.log_prob(y).flatten(1).sum(1) - k[0].numel() * math.log(scale)
        assert (found.nats - data).abs().max() / k[0].numel() < 1e-3


def test_probabilities_of_all_levels_sum_to_one():
    """One pixel: the probability of its 256 levels and of what lies outside is one."""
    spec = DataSpec("toy", channels=1, image_size=1, padding=0, binary=False)
    pixels = Pixels.of(spec, "symmetric", True)
    sde = VPSDE(time_eps=1e-5)
    shape = torch.zeros(1, 1, 1, dtype=torch.float64)
    oracle = GaussianOracle(sde, shape, shape + 0.09)
    x = (torch.arange(256) / 255.0).reshape(-1, 1, 1, 1)
    found = ode_data_likelihood(sde, oracle.eps, pixels, x, draws=8, tolerance=1e-6, rng=rng())
    inside = math.erf(1 / (0.3 * math.sqrt(2)))
    assert torch.exp(-found.importance_weighted).sum().item() == pytest.approx(inside, abs=2e-3)


def test_more_draws_tighten_the_bound():
    """A density that varies within a grey level: K = 8 is below K = 1 by more than chance, and
    neither is below the exact value by more than chance."""
    spec = DataSpec("toy", channels=1, image_size=1, padding=0, binary=False)
    pixels = Pixels.of(spec, "unit", True)
    sde = VPSDE(time_eps=1e-6)
    mean = torch.full((1, 1, 1), 100.2 / 256, dtype=torch.float64)
    oracle = GaussianOracle(sde, mean, torch.full_like(mean, (0.5 / 256) ** 2))
    x = torch.full((200, 1, 1, 1), 100 / 255.0, dtype=torch.float64)
    found = ode_data_likelihood(sde, oracle.eps, pixels, x, draws=8, tolerance=1e-5, rng=rng())
    gap = found.nats - found.importance_weighted
    assert gap.min() >= -1e-9  # Jensen, for every image
    assert gap.mean() > 10 * gap.std() / math.sqrt(len(gap))
    # in units of v: the data's own spread and that of the kernel at the cutoff
    kernel = 256 * sde.var(torch.tensor(sde.time_eps, dtype=torch.float64)).sqrt().item()
    normal = torch.distributions.Normal(100.2, math.hypot(0.5, kernel))
    low, high = normal.cdf(torch.tensor([100.0, 101.0], dtype=torch.float64))
    exact = -math.log((high - low).item())
    errors = [b.std() / math.sqrt(len(b)) for b in (found.importance_weighted, found.nats)]
    assert found.importance_weighted.mean() > exact - 3 * errors[0]
    assert found.nats.mean() > exact + 3 * errors[1]


def test_random_divergence_agrees_and_gives_no_weighted_bound():
    sde = VPSDE(time_eps=1e-5)
    pixels = Pixels.of(SPEC, "symmetric", True)
    oracle = oracle_of(sde, pixels)
    exact, random = (
        ode_data_likelihood(
            sde, oracle.eps, pixels, images(), draws=2, divergence=d, tolerance=1e-6, rng=rng()
        )
        for d in (None, HutchinsonDivergence())
    )
    assert exact.importance_weighted is not None and random.importance_weighted is None
    assert "Hutchinson" in random.estimator and "uniform" in random.convention
    # Rademacher probes are exact for a diagonal Jacobian; the draws of u differ
    assert (exact.nats - random.nats).abs().max() < 0.3
    assert exact.nfe == pytest.approx(random.nfe, abs=50)


def test_a_model_trained_without_dequantisation_is_evaluated_with_it():
    """As the same model with it, and the report says so."""
    sde = VPSDE(time_eps=1e-5)
    trained, without = (Pixels.of(SPEC, "symmetric", flag) for flag in (True, False))
    eps = oracle_of(sde, trained).eps
    same, found = (
        ode_data_likelihood(sde, eps, pixels, images(), tolerance=1e-4, rng=rng())
        for pixels in (trained, without)
    )
    assert torch.equal(same.nats, found.nats)
    assert "trained without it" in found.convention and "trained" not in same.convention


def test_refuses_what_has_no_such_likelihood():
    sde = VPSDE(time_eps=1e-5)
    pixels = Pixels.of(SPEC, "symmetric", True)
    eps = oracle_of(sde, pixels).eps
    with pytest.raises(ValueError, match="8-bit"):
        ode_data_likelihood(sde, eps, pixels, images() * 0.997)
    with pytest.raises(ValueError, match="at least one draw"):
        ode_data_likelihood(sde, eps, pixels, images(), draws=0)
