"""The contract of all models: what one line of Python gives is what the commands give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_toy import SPEC, classifier, lsgm_model, score_model, shaken, vae
from oracles import GaussianOracle
from state_model import StateModel

import lsgm
from lsgm.commands.sample import SampleOptions, sample_to_file
from lsgm.config.architecture import (
    LadderConfig,
    RefineNetConfig,
    SamplerConfig,
    ScoreModelConfig,
)
from lsgm.config.training import DataConfig
from lsgm.errors import UserError
from lsgm.evaluation.likelihood.bounds import nelbo
from lsgm.evaluation.likelihood.images import data_ode_bound
from lsgm.likelihood import OdeLogDensity
from lsgm.models.base import BATCH_SIZE, DiffusionModel, Model
from lsgm.models.images import build_data_model
from lsgm.models.latent import LSGM
from lsgm.models.loading import load_classifier
from lsgm.models.release import load_data_config, save
from lsgm.sde import VESDE, VPSDE
from lsgm.solvers import make_grid, make_solver
from lsgm.solvers.base import Hook
from lsgm.solvers.sampler import OptionError, Sampler


def ncsn_model() -> Model:
    torch.manual_seed(0)
    config = ScoreModelConfig(
        network="refinenet",
        refinenet=RefineNetConfig(num_channels=4, channel_mult=(1, 2), dilations=(1, 1)),
        ladder=LadderConfig(3.0, 0.05, 4),
    )
    return shaken(build_data_model("ncsn", config, SamplerConfig(nfe=8), SPEC))


MODELS: dict[str, Callable[[], Model]] = {
    "vae": vae,
    "lsgm": lsgm_model,
    "ncsn": ncsn_model,
    "score_sde": score_model,
}
every_kind = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for kind, make in MODELS.items():
        make().save(root / kind, DataConfig(name="digits"))
    return root


@every_kind
def test_a_line_of_python_draws_what_the_command_draws(runs: Path, tmp_path: Path, kind: str):
    run = runs / kind
    model = lsgm.load(run)
    images = model.sample(16, nfe=5, seed=0).images
    # a VAE evaluates no network that a solver would call, which the command says
    nfe = {} if kind == "vae" else {"nfe": 5}
    options = {"run": str(run), "n": 16, "seed": 0, "device": "cpu", "out": str(tmp_path / "x.npz")}
    sample_to_file(SampleOptions(**options, **nfe))
    assert np.array_equal(np.load(tmp_path / "x.npz")["images"], images.numpy())
    assert images.shape == (16, *model.shape) and 0 <= images.min() and images.max() <= 1
    # some images of the recommended sampler, warmer and in other batches
    sample_to_file(SampleOptions(**options, temperature=0.8, index=(1, 14), latents=kind == "lsgm"))
    found, drawn = np.load(tmp_path / "x.npz"), model.sample(16, temperature=0.8)
    assert np.array_equal(found["images"], drawn.images[[1, 14]].numpy())
    again = model.sample(16, temperature=0.8, batch_size=5).images
    torch.testing.assert_close(again, drawn.images, atol=2e-4, rtol=0)
    assert not torch.equal(model.sample(16, temperature=0.8, seed=1).images, drawn.images)


@every_kind
def test_every_model_keeps_the_contract(runs: Path, kind: str):
    model = lsgm.load(runs / kind)
    assert isinstance(model, Model) and model.kind == kind and not model.training
    assert model.device == torch.device("cpu") and model.shape == (3, 8, 8)
    assert model.has_latents == (kind in ("vae", "lsgm"))
    assert (model.diffusion is None) == (kind == "vae")
    drawn = model.sample(3, seed=2)
    assert drawn.seconds > 0 and (drawn.nfe > 0) == (kind != "vae")
    # images come from their latents, and have a code
    if model.has_latents:
        with torch.no_grad():
            torch.testing.assert_close(model.decode(drawn.latents), drawn.images)
    else:
        assert drawn.latents == ()
    padded = torch.nn.functional.pad(drawn.images, (2,) * 4)
    assert torch.equal(model.unpad(padded), drawn.images)
    with pytest.raises(ValueError, match="with or without padding"):
        model.unpad(drawn.images[..., :-1])
    x = model.preprocess(torch.randint(0, 256, drawn.images.shape) / 255)
    assert x.shape == (3, 3, 8, 8) and x.min() >= -1 and x.max() <= 1
    with torch.no_grad():
        latents = model.encode(x, mean=True)
        assert torch.equal(latents[0], model.encode(x, mean=True)[0])
        assert model.decode(latents).shape == drawn.images.shape
        assert model.reconstruct(x).shape == drawn.images.shape
    if isinstance(model, DiffusionModel):
        assert latents[0].shape[1:] == model.state_shape


@every_kind
def test_a_bound_is_that_of_the_evaluation(kind: str, monkeypatch: pytest.MonkeyPatch):
    rng = torch.Generator().manual_seed(0)
    x = 2 * torch.randint(0, 256, (4, 3, 8, 8), generator=rng) / 255 - 1

    def solved(sde, eps_fn, z0, *, divergence, rng, **options):
        # what the solve is given; it would take a minute
        value = (z0 * divergence.probe(z0, rng)[0]).flatten(1).sum(1)
        return OdeLogDensity(value, 1, z0, value[None], random=True)

    monkeypatch.setattr("lsgm.models.image_likelihood.ode_log_density", solved)
    model = MODELS[kind]()
    if model.has_latents:
        bound = model.bound(x, samples=2, seed=3)
        report = nelbo(model, [x], samples=2, seed=3)
    else:
        bound = model.bound(x, samples=2, seed=3)
        report = data_ode_bound(model, [x], draws=2, seed=3)
    assert bound.name == report.bound and bound.unit == "nats per image"
    assert torch.equal(bound.values, report.per_image)
    assert (bound.mean, bound.standard_error) == (report.nats.mean, report.nats.standard_error)
    spread = bound.values.std().item() / math.sqrt(len(bound.values))
    assert bound.standard_error == pytest.approx(spread)
    assert f"+- {spread:.2f} nats per image" in str(bound)


def test_latents_of_a_prior_are_its_state_and_the_finer_groups():
    model = lsgm_model()
    drawn = model.sample(2, nfe=4)
    assert [tuple(z.shape[1:]) for z in drawn.latents] == [model.state_shape]
    assert model.state_groups == 2 and model.state_shape[0] == 2 * SPEC_GROUP
    plain = model.under_normal()
    groups = model.vae.split_top(drawn.latents[0])
    with torch.no_grad():
        assert torch.equal(plain.decode(groups), model.decode(drawn.latents))
    assert not isinstance(plain, LSGM) and plain.diffusion is None


SPEC_GROUP = 2
"""Channels of a latent group of the toy VAE."""


def test_classes_are_those_of_the_images(runs: Path):
    model = lsgm.load(runs / "score_sde")
    labels = [0, 1, 2, 3, 3]
    drawn = model.sample(5, labels=labels, batch_size=2).images
    torch.testing.assert_close(drawn[4:], model.sample(5, labels=3).images[4:], atol=2e-4, rtol=0)
    assert (model.sample(5, labels=0).images[3:] - drawn[3:]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="2 classes for 3 images"):
        model.sample(3, labels=[0, 1])
    with pytest.raises(UserError, match="classes 0 to 3"):
        model.sample(1, labels=4)
    for kind in ("vae", "lsgm", "ncsn"):
        with pytest.raises(UserError, match="without classes"):
            lsgm.load(runs / kind).sample(1, labels=0)


def test_a_sampler_of_one_s_own(runs: Path):
    """What it says is done: solver, evaluations, end, start and hooks."""
    model = lsgm.load(runs / "lsgm")
    seen = []

    class Seen(Hook):
        def project(self, x_t, t, rng):
            seen.append(t[0].item())
            return x_t

    sampler = Sampler("heun", nfe=8, grid="time", t_end=0.2, hooks=[Seen()])
    drawn = model.sample(3, sampler=sampler)
    assert (drawn.nfe, drawn.solver) == (8, "heun")
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2])
    named = model.sample(3, sampler=model.sampler("heun", nfe=8, grid="time", t_end=0.2))
    assert torch.equal(drawn.images, named.images)
    cool = model.sample(3, sampler=replace(sampler, temperature=0.5)).images
    assert torch.equal(cool, model.sample(3, sampler=sampler, temperature=0.5).images)
    assert not torch.equal(cool, drawn.images)
    times = make_grid("time", model.sde, 4, 0.2)
    given = model.sample(3, sampler=Sampler(make_solver("heun"), times=times))
    assert torch.equal(given.images, drawn.images) and given.solver == "Heun"


def test_what_does_not_fit_is_said(runs: Path):
    model, plain = lsgm.load(runs / "lsgm"), lsgm.load(runs / "vae")
    for call, words in (
        (lambda: model.sample(1, sampler=Sampler(), nfe=3), "nfe: the sampler has its own"),
        (lambda: plain.sample(1, sampler=Sampler()), r"latents are N\(0, I\)"),
        (lambda: model.sample(0), "n: must be positive"),
        (lambda: model.sample(1, sampler=Sampler("heun", nfe=1)), "nfe: heun needs at least 2"),
        (lambda: model.sample(1, sampler=Sampler("dopri5", nfe=9)), "nfe: dopri5 is adaptive"),
        (lambda: model.sampler("dopri5", grid="time"), "grid: dopri5 is adaptive"),
        (lambda: model.sampler("ancestral", snr=0.1), "snr: ancestral takes no corrector"),
        (lambda: model.sampler("heun", order=3), "heun.*has no option order"),
        (lambda: model.sampler(grid="ladder"), "grid: only models trained on a list"),
        (lambda: Sampler("magic"), "unknown solver 'magic'"),
        (lambda: Sampler(times=torch.tensor([1.0, 0.5]), nfe=3), "times: they are the steps"),
        (lambda: Sampler(temperature=0.0), "temperature: must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert issubclass(OptionError, ValueError)


def test_a_run_is_a_model_s_or_a_classifier_s(runs: Path, tmp_path: Path):
    (tmp_path / "judge").mkdir()
    save(classifier(), tmp_path / "judge")
    assert load_classifier(tmp_path / "judge").num_classes == 4
    with pytest.raises(UserError, match="judge: a classifier.*load_classifier"):
        lsgm.load(tmp_path / "judge")
    with pytest.raises(UserError, match="vae: is not a classifier"):
        load_classifier(runs / "vae")


def test_a_model_saves_itself_where_its_data_are_unknown(tmp_path: Path):
    model = lsgm_model()
    model.save(tmp_path / "new" / "run")
    loaded = lsgm.load(tmp_path / "new" / "run")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(loaded.sample(2, nfe=4).images, model.sample(2, nfe=4).images)
    with pytest.raises(UserError, match="data that no configuration names"):
        load_data_config(tmp_path / "new" / "run")


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma2_min=1e-4, sigma2_max=25.0)])
def test_denoising_is_the_posterior_mean(sde):
    class Gaussian(StateModel):
        def __init__(self):
            super().__init__()
            self.sde = sde
            self.score = GaussianOracle(sde, torch.tensor([[[0.3]]]), torch.tensor(0.25)).eps

    x_t, t = torch.randn(5, 1, 1, 1).double(), torch.linspace(0.1, 1, 5).double()
    m, var = (c.reshape(-1, 1, 1, 1) for c in (sde.mean_coef(t), sde.var(t)))
    exact = 0.3 + 0.25 * m / (0.25 * m**2 + var) * (x_t - 0.3 * m)
    torch.testing.assert_close(Gaussian().denoise(x_t, t), exact)


def test_five_lines_sample_a_mixture():
    """The example of :mod:`lsgm.solvers.sampler`, against the mixture's own moments."""
    sde, means = VPSDE(), torch.tensor([[-2.0, 0.0], [2.0, 0.0]])

    def eps(x, t):
        m, var = sde.mean_coef(t)[:, None], sde.var(t)[:, None]
        to_means, spread = x[:, None] - m[..., None] * means, 0.04 * m**2 + var
        share = (-to_means.square().sum(-1) / (2 * spread)).softmax(1)[..., None]
        return var.sqrt() / spread * (share * to_means).sum(1)

    num = 4000
    sampler = Sampler("heun", nfe=60)
    x = sampler(sde, eps, (num, 2), seed=0).x
    side = x[:, 0].sign()
    assert side.mean().abs() < 4 / math.sqrt(num)
    inner = x - side[:, None] * means[1]
    assert inner.mean(0).abs().max() < 4 * 0.2 / math.sqrt(num)
    assert (inner.std(0) / 0.2 - 1).abs().max() < 4 / math.sqrt(2 * num) + 0.01
    # every state has noise of its own
    assert torch.allclose(sampler(sde, eps, (10, 2), seed=0).x, x[:10], atol=1e-5)
    assert not torch.allclose(sampler(sde, eps, (10, 2), seed=1).x, x[:10], atol=1e-2)
    cold = Sampler("heun", nfe=60, temperature=1e-3)(sde, eps, (10, 2)).x
    assert cold[:, 1].abs().max() < 0.01 < inner[:, 1].abs().max()
    pilot = Sampler("normal_reference", nfe=6, grid="pilot")(sde, eps, (500, 2), seed=0)
    assert pilot.nfe <= 6 and 1.5 < pilot.x[:, 0].abs().mean() < 2.5


def test_batches_are_those_of_the_command_line():
    assert SampleOptions().batch_size == BATCH_SIZE
