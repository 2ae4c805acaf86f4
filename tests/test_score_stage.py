"""Stages of score models and classifiers: their losses against closed forms, and labels."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from oracles import GaussianOracle

from lsgm.config.architecture import (
    ClassifierConfig,
    LadderConfig,
    PriorNetworkConfig,
    SamplerConfig,
    ScoreModelConfig,
    SDEConfig,
)
from lsgm.config.training import ScoreObjectiveConfig
from lsgm.data import ArrayDataset, Batches, Datasets, DataSpec, LabelledImages
from lsgm.divergence import HutchinsonDivergence
from lsgm.errors import UserError
from lsgm.models.classifier import build_classifier
from lsgm.models.images import build_data_model
from lsgm.noise_ladder import NoiseLadder
from lsgm.training.runs.images import fit_noise
from lsgm.training.stages.classifier import ClassifierStage
from lsgm.training.stages.score import ScoreStage
from lsgm.training.state import StepContext

SPEC = DataSpec("toy", channels=1, image_size=4, padding=0, binary=False, num_classes=3)
NETWORK = PriorNetworkConfig(
    num_channels=8, num_scales=2, num_cells_per_scale=1, embedding_dim=8, attention_resolutions=()
)
MEAN, STD = 0.1, 0.3


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def build(kind="score_sde", **options):
    return build_data_model(
        kind, ScoreModelConfig(ncsnpp=NETWORK, **options), SamplerConfig(), SPEC
    )


class Exact(torch.nn.Module):
    """The exact noise prediction of Gaussian data, and a record of the labels it was given."""

    def __init__(self, sde):
        super().__init__()
        self.oracle = GaussianOracle(sde, torch.full((1, 4, 4), MEAN), torch.tensor(STD**2))
        self.labels = []

    def forward(self, x_t, t, labels=None):
        self.labels.append(labels)
        return self.oracle.eps(x_t, t)


def gaussian_data(num, seed=0):
    return MEAN + STD * torch.randn(num, 1, 4, 4, generator=rng(seed))


def optimal_error(sde, t):
    """``E (eps_hat - eps)^2`` a value for these data: ``m^2 s^2 / (m^2 s^2 + var)``."""
    signal = sde.mean_coef(t).square() * STD**2
    return signal / (signal + sde.var(t))


@pytest.mark.parametrize("estimator", ["dsm", "ssm", "ssm_vr"])
def test_ncsn_loss_is_the_mean_over_the_levels(estimator):
    """1907.05600, eq. 6 with lambda = sigma^2, for every estimator."""
    model = build("ncsn", ladder=LadderConfig(2.0, 0.05, 6), data_range="unit")
    model = model.with_score(Exact(model.sde))
    stage = ScoreStage(model, estimator=estimator)
    losses = [stage.loss(gaussian_data(1200, 100 + i), None, rng(i)) for i in range(6)]
    for result in losses:  # every level as often as every other
        levels = model.ladder.index(result.times.t).bincount(minlength=6)
        assert levels.tolist() == [200] * 6
    values = torch.tensor([r.loss.item() / 16 for r in losses])
    expected = optimal_error(model.sde, model.ladder.times).mean().item()
    assert values.mean().item() == pytest.approx(
        expected, abs=4 * values.std().item() / math.sqrt(6) + 1e-4
    )


@pytest.mark.parametrize("kind", ["vpsde", "subvpsde", "vesde"])
@pytest.mark.parametrize(
    ("weighting", "proposal"),
    [("unweighted", "uniform"), ("likelihood", "importance"), ("likelihood", "weighted")],
)
def test_score_sde_loss_is_the_integral_over_time(kind, weighting, proposal):
    sde = SDEConfig(kind=kind, sigma2_min=1e-3, sigma2_max=100.0, time_eps=1e-2)
    model = build(sde=sde)
    model = model.with_score(Exact(model.sde))
    objective = ScoreObjectiveConfig(weighting=weighting, proposal=proposal)
    stage = ScoreStage(model, **asdict(objective))
    values = torch.tensor(
        [stage.loss(gaussian_data(2000, 100 + i), None, rng(i)).loss.item() / 16 for i in range(8)]
    )
    t = torch.linspace(model.sde.time_eps, 1, 20001, dtype=torch.float64)
    expected = torch.trapezoid(stage.weighting(model.sde, t) * optimal_error(model.sde, t), t)
    assert values.mean().item() == pytest.approx(
        expected.item(), rel=2e-3, abs=4 * values.std().item() / math.sqrt(8)
    )


def published_ve_loss(model, x, rng, *, reduce_mean):
    """2011.13456, eq. 7 with ``lambda = sigma^2``, in the units and with the reduction published:
    the score of the noisy image against ``-eps / sigma``.
    """
    sde = model.sde
    eps = torch.randn(x.shape, generator=rng)
    u = torch.rand(len(x), generator=rng, dtype=torch.float64)
    t = sde.time_eps + (1 - sde.time_eps) * u
    sigma = sde.var(t).sqrt().float()[:, None, None, None]
    score = -model.score(x + sigma * eps, t.float()) / sigma
    losses = (sigma * score + eps).square().flatten(1)
    return (losses.mean(1) if reduce_mean else 0.5 * losses.sum(1)).mean()


def gradient_norm(loss, model):
    gradients = torch.autograd.grad(loss, list(model.score.parameters()))
    return torch.nn.utils.get_total_norm(gradients).item()


def test_the_loss_has_the_published_scale_that_clipping_sees():
    """``half_sum`` is what published VE models are clipped by, at norm 1: half of D times the
    gradient of the mean, whose logged value stays the mean.
    """
    sde = SDEConfig(kind="vesde", sigma2_min=1e-4, sigma2_max=100.0, time_eps=1e-5)
    model = build(sde=sde, data_std=0.0, dequantise=False)
    with torch.no_grad():
        for p in model.score.parameters():  # the fresh output layer is zero
            p += 0.1 * torch.randn(p.shape, generator=rng(3))
    images = torch.rand(64, 1, 4, 4, generator=rng())
    x = model.pixels.to_network(images, rng(), noise=True)
    norms, logged = {}, []
    for reduction in ("mean", "sum", "half_sum"):
        objective = ScoreObjectiveConfig(reduction=reduction, stratified_times=False)
        output = ScoreStage(model, **asdict(objective))(images, StepContext(0, 1, rng(1)))
        norms[reduction] = gradient_norm(output.loss, model)
        logged.append(output.metrics["loss"].item())
        if reduction != "sum":
            published = published_ve_loss(model, x, rng(1), reduce_mean=reduction == "mean")
            assert output.loss.item() == pytest.approx(published.item(), rel=1e-4)
            assert norms[reduction] == pytest.approx(gradient_norm(published, model), rel=1e-4)
    assert norms["half_sum"] == pytest.approx(8 * norms["mean"], rel=1e-5)
    assert norms["sum"] == pytest.approx(16 * norms["mean"], rel=1e-5)
    assert logged[1:] == pytest.approx(logged[:1] * 2)


@pytest.mark.parametrize("estimator", ["dsm", "ssm", "ssm_vr"])
def test_half_the_sum_is_ncsns_loss(estimator):
    """1907.05600, eq. 5: ``sigma^2 / 2 (score + z / sigma)^2``; sliced, ``sigma^2 (v^T ds/dx v +
    (v^T s)^2 / 2)``. The constant D / 2 apart, which no gradient sees.
    """
    model = build("ncsn", ladder=LadderConfig(2.0, 0.05, 6), data_range="unit", dequantise=False)
    model = model.with_score(Exact(model.sde))
    objective = ScoreObjectiveConfig(estimator=estimator, reduction="half_sum")
    images = torch.rand(600, 1, 4, 4, generator=rng())
    stage = ScoreStage(model, **asdict(objective))
    output = stage(images, StepContext(0, 1, rng(1)))
    x = model.pixels.to_network(images, rng(), noise=True)
    # the same draws: noise, times, projections
    noise = rng(1)
    eps = torch.randn(x.shape, generator=noise)
    t = stage.proposal.sample(len(x), noise, stratified=True).t.float()
    sigma = model.sde.var(t).sqrt()[:, None, None, None]
    x_t = x + sigma * eps
    if estimator == "dsm":
        score = -model.score(x_t, t) / sigma
        expected = 0.5 * sigma.square() * (score + eps / sigma).square()
    else:
        v = HutchinsonDivergence(num_probes=1).probe(x, noise)[0]
        slope = -1 / (STD**2 + sigma.square())
        score = slope * (x_t - MEAN)
        square = score.square() if estimator == "ssm_vr" else None
        along = (score * v).flatten(1).sum(1)[:, None, None, None].square() / 16
        expected = sigma.square() * (
            slope * v.square() + 0.5 * (along if square is None else square)
        )
    values = expected.flatten(1).sum(1).mean().item() + (0.0 if estimator == "dsm" else 8.0)
    assert output.loss.item() == pytest.approx(values, rel=1e-4)


def test_classes_are_hidden_as_often_as_asked():
    model = build(class_conditional=True)
    exact = Exact(model.sde)
    stage = ScoreStage(model.with_score(exact), label_dropout=0.3)
    labels = torch.arange(4000) % 3
    batch = LabelledImages(torch.rand(4000, 1, 4, 4, generator=rng()), labels)
    output = stage(batch, StepContext(0, 1, rng()))
    given = exact.labels[-1]
    hidden = given == 3
    assert torch.equal(given[~hidden], labels[~hidden])
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    assert output.loss.item() > 0 and set(output.metrics) == {"error", "loss"}
    # a model without classes is given none
    plain = Exact(model.sde)
    ScoreStage(build().with_score(plain))(batch, StepContext(0, 1, rng()))
    assert plain.labels[-1] is None


def test_labels_travel_with_their_images():
    """Image i is i everywhere and has the label i % 3, through shuffling and processes."""
    images = torch.arange(60, dtype=torch.uint8).reshape(-1, 1, 1, 1).repeat(1, 1, 4, 4)
    dataset = ArrayDataset(images, torch.arange(60) % 3)
    for rank in (0, 1):
        plain, labelled = (
            Batches(dataset, 12, train=True, seed=5, rank=rank, world_size=2, labels=flag)
            for flag in (False, True)
        )
        for (a, x), (b, batch) in zip(plain.epoch(1), labelled.epoch(1), strict=True):
            assert a == b and torch.equal(x, batch.images)
            assert torch.equal((batch.images[:, 0, 0, 0] * 255).round().long() % 3, batch.labels)
    with pytest.raises(ValueError, match="no labels"):
        Batches(ArrayDataset(images), 12, train=True, labels=True)


def test_noise_from_the_data():
    images = torch.zeros(40, 1, 4, 4)
    images[7] = 1.0  # the largest distance in [0, 1] is sqrt(16) * 255 / 256
    datasets = Datasets(ArrayDataset(images), ArrayDataset(images), SPEC)
    config = ScoreModelConfig(
        ncsnpp=NETWORK, data_range="unit", ladder=LadderConfig(None, 0.01, None)
    )
    ladder = fit_noise("ncsn", config, datasets).ladder
    assert ladder.sigma_max == pytest.approx(4 * 255 / 256, rel=1e-5)
    assert ladder.levels == NoiseLadder.for_data(ladder.sigma_max, 0.01, 16).num_levels
    ve = replace(
        config, sde=SDEConfig(kind="vesde", sigma2_max=9.0, time_eps=1e-5), data_range="symmetric"
    )
    assert fit_noise("score_sde", ve, datasets).sde.sigma2_max == 9.0
    fitted = fit_noise("score_sde", replace(ve, fit_sigma_max=True), datasets)
    assert fitted.sde.sigma2_max == pytest.approx(64 * (255 / 256) ** 2, rel=1e-5)


@pytest.mark.parametrize("count", [1, 40])
def test_noise_cannot_be_taken_from_images_that_are_all_alike(count):
    images = ArrayDataset(torch.full((count, 1, 4, 4), 0.3))
    datasets = Datasets(images, images, SPEC)
    ve = ScoreModelConfig(
        ncsnpp=NETWORK, sde=SDEConfig(kind="vesde", time_eps=1e-5), fit_sigma_max=True
    )
    ladder = ScoreModelConfig(ncsnpp=NETWORK, ladder=LadderConfig(None, 0.01, None))
    for kind, config in (("score_sde", ve), ("ncsn", ladder)):
        with pytest.raises(UserError, match=r"training images of \w+ are alike .*; give it"):
            fit_noise(kind, config, datasets)


def test_a_weighting_that_does_not_fit_is_named():
    model = build(sde=SDEConfig(kind="vesde", sigma2_max=100.0, time_eps=1e-5))
    with pytest.raises(UserError, match="objective: the rescaled weighting"):
        ScoreStage(model, weighting="rescaled", proposal="importance")


# Classifiers


def classifier(noise_conditional):
    config = ClassifierConfig(noise_conditional, num_channels=8, num_scales=2)
    return build_classifier(config, ScoreModelConfig(), SPEC)


@pytest.mark.parametrize("noise_conditional", [False, True])
def test_a_classifier_learns_the_brightness(noise_conditional):
    model = classifier(noise_conditional)
    stage = ClassifierStage(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    labels = torch.arange(48) % 3
    images = (labels / 2.0).reshape(-1, 1, 1, 1) * torch.ones(48, 1, 4, 4)
    torch.manual_seed(0)
    for step in range(30):
        output = stage(LabelledImages(images, labels), StepContext(step, 30, rng(step)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model.eval()
    assert (model(images).argmax(1) == labels).float().mean() > 0.95
    assert output.metrics["accuracy"] > (0.45 if noise_conditional else 0.95)


def test_guidance_adds_the_gradient_of_the_log_probability():
    model, judge = build(), classifier(True)
    labels, t = torch.tensor([0, 2]), torch.tensor([0.3, 0.6])
    x = torch.randn(2, 1, 4, 4, generator=rng())
    hook = judge.guide(model, labels, scale=2.0)
    eps = torch.zeros_like(x)
    x_in = x.clone().requires_grad_()
    log_p = judge.network(x_in, t).log_softmax(1)[torch.arange(2), labels].sum()
    (gradient,) = torch.autograd.grad(log_p, x_in)
    sigma = model.sde.var(t).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(hook.adjust_eps(eps, x, t), -2.0 * sigma * gradient)
    with pytest.raises(UserError, match="clean images only"):
        classifier(False).guide(model, labels)
    with pytest.raises(UserError, match="under VPSDE.*the model under"):
        judge.guide(build("ncsn"), labels)
    with pytest.raises(UserError, match="classes 0 to 2"):
        judge.guide(model, torch.tensor([0, 3]))
