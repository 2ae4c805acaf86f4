"""Score models in data space: pixels, conditioning, the recommended samplers."""

import math

import pytest
import torch
from oracles import GaussianOracle

from lsgm.config.architecture import (
    LadderConfig,
    PriorNetworkConfig,
    RefineNetConfig,
    SamplerConfig,
    ScoreModelConfig,
    SDEConfig,
)
from lsgm.data.pixels import Pixels
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models.images import DataSGM, build_data_model
from lsgm.networks.data_score import DataScore
from lsgm.noise_ladder import select_step
from lsgm.sde import VESDE, VPSDE
from lsgm.solvers import make_grid, make_solver
from lsgm.solvers.sampler import Sampler

SPEC = DataSpec("toy", channels=1, image_size=4, padding=2, binary=True, num_classes=3)
NETWORK = PriorNetworkConfig(
    num_channels=8, num_scales=2, num_cells_per_scale=1, embedding_dim=8, attention_resolutions=()
)
REFINENET = RefineNetConfig(num_channels=4, channel_mult=(1, 2), dilations=(1, 1))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def build(kind="score_sde", sampler=None, **options):
    options = {"ncsnpp": NETWORK, "refinenet": REFINENET, **options}
    return build_data_model(kind, ScoreModelConfig(**options), sampler or SamplerConfig(), SPEC)


def stir(module):
    """Give every weight a value: networks start as zero."""
    for i, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p.data, std=0.1, generator=rng(i))
    return module.eval()


def with_oracle(model, mean, std):
    """The model with the exact noise prediction of Gaussian data in place of its network."""
    oracle = GaussianOracle(model.sde, torch.full(model.state_shape, mean), torch.tensor(std**2))
    model = model.with_score(torch.nn.Linear(1, 1))
    model.eps_fn = lambda labels=None, guidance=1.0: oracle.eps
    return model


# Pixels


@pytest.mark.parametrize("data_range", ["unit", "symmetric"])
@pytest.mark.parametrize("dequantise", [True, False])
def test_pixels_there_and_back(data_range, dequantise):
    pixels = Pixels.of(SPEC, data_range, dequantise)
    levels = torch.randint(0, 256, (5, 1, 8, 8), generator=rng()).float()
    y = pixels.to_network(levels / 255, rng(), noise=True)
    inner = levels[..., 2:6, 2:6]
    assert (pixels.spec.padding, pixels.spec.binary, y.shape[1:]) == (0, False, pixels.shape)
    v = 256 * ((y + 1) / 2 if data_range == "symmetric" else y)
    if dequantise:  # the level is the whole part of v, and v - k is evenly spread
        assert torch.equal(v.floor(), inner)
        assert abs((v - inner).mean().item() - 0.5) < 4 / math.sqrt(12 * v.numel())
        expected = v.numel() / len(v) * math.log((2 if data_range == "symmetric" else 1) / 256)
        assert pixels.log_det_v == pytest.approx(expected)
    quiet = pixels.to_network(levels / 255)
    torch.testing.assert_close(pixels.to_images(quiet), inner / 255, rtol=0, atol=1e-6)
    assert torch.equal(pixels.to_network(inner / 255), quiet)  # padding or not


def test_pixels_refuse_another_size():
    with pytest.raises(ValueError, match=r"1, 4, 4.*not \(2, 1, 3, 3\)"):
        Pixels.of(SPEC, "unit", True).spec.unpad(torch.zeros(2, 1, 3, 3))


# The noise prediction


@pytest.mark.parametrize("sde", [VPSDE(time_eps=1e-5), VESDE(1e-4, 2500.0, 1e-5)])
def test_the_network_sees_inputs_of_unit_size(sde):
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t, labels):
            seen.append((x, t))
            return x

    score = DataScore(Spy(), sde, condition="log_sigma", data_std=0.5)
    data = 0.5 * torch.randn(4000, 1, 2, 2, generator=rng())
    noise = torch.randn(data.shape, generator=rng(1))
    for time in (1e-3, 0.2, 0.6, 1.0):
        t = torch.full((len(data),), time)
        score(sde.perturb(data, t, noise), t)
        x, given = seen[-1]
        assert x.std().item() == pytest.approx(1.0, abs=0.03)
        sigma, m = sde.var(t).sqrt(), sde.mean_coef(t)
        torch.testing.assert_close(given, (sigma / m).log() / 4, rtol=1e-4, atol=1e-5)


def test_classes_change_the_prediction_and_no_class_is_the_last():
    model = build(class_conditional=True)
    x, t = torch.randn(3, 1, 4, 4, generator=rng()), torch.full((3,), 0.4)
    labels = torch.tensor([0, 1, 2])
    fresh = model.score(x, t, labels)
    torch.testing.assert_close(fresh, model.score(x, t))  # classes start without effect
    stir(model)
    given, none = model.score(x, t, labels), model.score(x, t)
    assert (given - none).abs().max() > 1e-3
    torch.testing.assert_close(none, model.score(x, t, torch.full((3,), 3)))
    guided = model.eps_fn(labels, guidance=2.5)(x, t)
    torch.testing.assert_close(guided, none + 2.5 * (given - none), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="classes 0 to 2"):
        model.eps_fn(torch.tensor([0, 3, 1]))
    with pytest.raises(UserError, match="without classes"):
        build().eps_fn(labels)


def test_refinenet_and_unet_serve_the_ladder():
    """At the ladder's times both are noise predictions under one SDE, whose levels are NCSN's."""
    ladder = LadderConfig(sigma_max=2.0, sigma_min=0.05, levels=5)
    for network in ("refinenet", "ncsnpp"):
        model = stir(build("ncsn", network=network, ladder=ladder))
        sigmas = model.sde.var(model.ladder.times).sqrt()
        torch.testing.assert_close(sigmas, model.ladder.sigmas)
        ratios = sigmas[1:] / sigmas[:-1]
        assert (ratios - ratios[0]).abs().max() < 1e-12
        x = torch.randn(5, 1, 4, 4, generator=rng())
        assert torch.isfinite(model.score(x, model.ladder.times.float())).all()


# Sampling


@pytest.mark.parametrize(
    ("kind", "options", "sampler"),
    [
        ("ncsn", {"data_range": "unit"}, SamplerConfig(nfe=1000, denoise=False)),
        ("score_sde", {"sde": SDEConfig(kind="vpsde", time_eps=1e-5)}, SamplerConfig(nfe=400)),
        (
            "score_sde",
            {"sde": SDEConfig(kind="vesde", sigma2_max=900.0, time_eps=1e-5)},
            SamplerConfig(nfe=400),
        ),
        (
            "score_sde",
            {"sde": SDEConfig(kind="subvpsde", time_eps=1e-3)},
            SamplerConfig("heun", 40),
        ),
    ],
)
def test_the_recommended_sampler_gives_the_data(kind, options, sampler):
    """Mean and standard deviation of Gaussian data, to the samplers' bias (in 16 dimensions, where
    the norms that scale the corrector's step fluctuate)."""
    model = with_oracle(build(kind, sampler, **options), 0.4, 0.2)
    recommended, noise = model.default_sampler(), rng()
    start = model.prior_start(400, noise, solver=recommended.method)
    solution = recommended.solve(model.sde, model.eps_fn(), start, noise)
    assert solution.nfe == model.defaults.nfe or abs(solution.nfe - sampler.nfe) <= 2
    assert solution.x.mean().item() == pytest.approx(0.4, abs=0.02)
    assert solution.x.std().item() == pytest.approx(0.2, abs=0.035)
    images = model.decode([solution.x])
    assert images.min() >= 0 and images.max() <= 1
    torch.testing.assert_close(images, model.pixels.to_images(solution.x.float()).clamp(0, 1))


def test_given_solver_replaces_the_recommended_one():
    model = with_oracle(build(), 0.0, 0.5)
    times = make_grid("time", model.sde, 6, 1e-3)
    assert model.sample(2, sampler=Sampler("euler", times=times)).nfe == 6
    assert model.sample(2, sampler=Sampler("heun", nfe=9, grid="time")).nfe == 8


@pytest.mark.parametrize("data_range", ["unit", "symmetric"])
def test_ncsn_may_start_from_uniform_noise(data_range):
    """Over the data's range, as published; only for Langevin dynamics, which forget their start."""
    sampler = SamplerConfig(start="uniform")
    model = build("ncsn", sampler, data_range=data_range, ladder=LadderConfig(3.0, 0.01, 5))
    low = -1.0 if data_range == "symmetric" else 0.0
    solver = model.default_sampler().method
    start = model.prior_start(4000, rng(), solver=solver)
    assert start.min() >= low and start.max() <= 1
    assert start.mean().item() == pytest.approx((1 + low) / 2, abs=0.01)
    assert start.var().item() == pytest.approx((1 - low) ** 2 / 12, rel=0.03)
    for other in (None, make_solver("heun")):
        assert model.prior_start(4000, rng(), solver=other).std().item() == pytest.approx(
            3, rel=0.03
        )
    plain = build("ncsn", data_range=data_range, ladder=LadderConfig(3.0, 0.01, 5))
    assert plain.prior_start(4000, rng(), solver=solver).std().item() == pytest.approx(3, rel=0.03)


def test_defaults_of_the_ladder():
    model = build("ncsn", SamplerConfig(nfe=50, step_ratio=None))
    chosen = model.defaults
    assert (chosen.solver, chosen.grid, chosen.t_end, chosen.nfe) == ("langevin", "ladder", 0.0, 51)
    assert chosen.options["steps_per_level"] == 5
    assert chosen.options["step_ratio"] == select_step(model.ladder, 5).step_ratio
    sampler = model.default_sampler()
    solver, times = sampler.method, sampler.times
    assert torch.equal(times, model.ladder.times)
    assert solver.evaluations(len(times) - 1) == 51


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: build(sampler=SamplerConfig("langevin")).default_sampler(), "kind ncsn"),
        (lambda: build(sampler=SamplerConfig("nonsense")).default_sampler(), "nonsense"),
        (lambda: build("ncsn", ladder=LadderConfig(None, 0.01)), "sigma_max"),
        (lambda: build(network="refinenet"), "noise levels"),
        (
            lambda: build_data_model(
                "score_sde",
                ScoreModelConfig(ncsnpp=NETWORK, class_conditional=True),
                SamplerConfig(),
                DataSpec("toy", 1, 4, 0, False),
            ),
            "no classes",
        ),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_state_is_the_image():
    model = build(dequantise=False)
    assert isinstance(model, DataSGM)
    x = torch.rand(2, 1, 8, 8, generator=rng())
    latents = model.encode(2 * x - 1)
    assert len(latents) == 1 and model.sample_finer(2, rng()) == []
    torch.testing.assert_close(model.decode(latents), x[..., 2:6, 2:6], rtol=0, atol=1e-6)
    start = model.prior_start(500, rng(), temperature=2.0)
    assert start.shape == (500, *model.state_shape)
    assert start.std().item() == pytest.approx(2.0, rel=0.05)
