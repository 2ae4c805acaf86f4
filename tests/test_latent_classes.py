"""Classes for the score-based prior of an LSGM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lsgm.commands.edit import edit_command
from lsgm.conditioning import hide_labels
from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, SDEConfig, VAEConfig
from lsgm.config.command_line import save_config
from lsgm.config.training import (
    DataConfig,
    LSGMTrainConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    VAETrainConfig,
)
from lsgm.data import DataSpec, LabelledImages, build_datasets
from lsgm.errors import UserError
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.models.loading import load
from lsgm.models.release import save
from lsgm.score import MixedNormalScore
from lsgm.sde import VPSDE
from lsgm.training.runs.latent import train_lsgm
from lsgm.training.stages.latent import LSGMStage
from lsgm.training.state import StepContext

SPEC = DataSpec("digits", 1, 16, 0, True, num_classes=10)
VAE = VAEConfig(
    num_channels_enc=4, num_channels_dec=4, channel_mult=(1, 1, 2), num_preprocess_cells=1,
    num_postprocess_cells=1, num_latent_scales=1, num_latent_per_group=2, num_preprocess_blocks=2,
)  # fmt: skip
NETWORK = PriorNetworkConfig(
    num_channels=8, num_scales=1, num_cells_per_scale=1, embedding_dim=8, attention_resolutions=()
)
PRIOR = PriorConfig(
    NETWORK, SDEConfig(time_eps=1e-2), class_conditional=True, mixing_init=0.0, label_dropout=0.0
)
PLAIN = ObjectiveConfig(
    kl_const_portion=0.0, kl_const_coeff=1.0, kl_balance=False, spectral_regularization=0.0
)


def make_model(prior: PriorConfig = PRIOR) -> LSGM:
    torch.manual_seed(0)
    vae = build_vae(VAE, SPEC)
    score = build_prior(prior, vae, num_classes=SPEC.num_classes)
    model = LSGM(vae, score, SPEC, VAE, prior)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()


class ClassMeans(nn.Module):
    """The exact noise prediction for latents N(mean of the class, 1), class K that of N(0, 1)."""

    def __init__(self, sde: VPSDE, means: Tensor) -> None:
        super().__init__()
        self.sde, self.means = sde, torch.cat([means, torch.zeros(1)])

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = torch.full((len(x),), len(self.means) - 1)
        mean = self.means[labels].view(-1, 1, 1, 1) * self.sde.mean_coef(t).view(-1, 1, 1, 1)
        return self.sde.var(t).sqrt().view(-1, 1, 1, 1) * (x - mean)


def test_guided_samples_of_gaussian_classes_have_the_law_that_guidance_promises():
    """With classes N(m, 1) and N(0, 1) for none, guidance by w leads to N(w m, 1): the guided score
    is that of the density p(x)^(1 - w) p(x | y)^w.
    """
    means, weight = torch.tensor([1.0, -2.0]), 1.5
    model = make_model()
    model.score = MixedNormalScore(ClassMeans(model.sde, means), model.sde, model.score.channels)
    with torch.no_grad():
        model.score.mixing_logit.fill_(30.0)  # the network alone
    labels = torch.arange(400) % 2
    sampler = model.sampler("heun", nfe=40)
    for scale in (0.0, 1.0, weight):
        batch = model.draw(
            400, torch.Generator().manual_seed(1), sampler, labels=labels, guidance=scale
        )
        state = batch.latents[0].double()
        for y, mean in enumerate(means.tolist()):
            own = state[labels == y]
            error = 4 / own.numel() ** 0.5
            assert own.mean().item() == pytest.approx(scale * mean, abs=error + 0.01 * scale)
            assert own.std().item() == pytest.approx(1.0, abs=error)


@torch.no_grad()
def test_guidance_of_the_mix_is_that_of_the_networks_share():
    model = make_model()
    x = torch.randn(6, *model.state_shape, dtype=torch.float64)
    t, labels = torch.linspace(0.1, 0.9, 6).double(), torch.arange(6)
    model.double()
    guided = model.eps_fn(labels, 2.5)(x, t)
    share = [model.score.residual(x, t, y) for y in (None, labels)]
    mixing, normal = model.score.mixing, model.sde.normal_component(x, t)
    expected = (1 - mixing) * normal + mixing * (share[0] + 2.5 * (share[1] - share[0]))
    torch.testing.assert_close(guided, expected)
    assert not torch.allclose(share[0], share[1])
    assert torch.equal(model.eps_fn(labels)(x, t), model.score(x, t, labels))
    none = torch.full((6,), 10)
    torch.testing.assert_close(model.score(x, t, none), model.score(x, t))


def test_hidden_labels_are_the_asked_fraction():
    labels = torch.arange(20_000) % 10
    hidden = hide_labels(labels, 10, 0.3, torch.Generator().manual_seed(0))
    changed = hidden != labels
    assert (hidden[changed] == 10).all()
    assert changed.double().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 20_000) ** 0.5)


def test_labels_reach_the_network_in_training():
    """The embedding rows of the classes in the batch, and no others, get a gradient."""
    for dropout, rows in ((0.0, {2, 5}), (1.0, {10})):
        prior = replace(PRIOR, label_dropout=dropout)
        stage = LSGMStage(make_model(prior), PLAIN, prior).train()
        images = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        batch = LabelledImages(images, torch.tensor([2, 5, 5, 2]))
        context = StepContext(1, 10, torch.Generator().manual_seed(2))
        stage(batch, context).loss.backward()
        gradient = stage.model.score.network.classes.weight.grad
        assert set(gradient.abs().sum(1).nonzero().flatten().tolist()) == rows


def test_a_prior_learns_what_the_classes_are():
    """Latents +-2 by class: the trained conditional noise prediction points to the own side."""
    sde = VPSDE(time_eps=1e-2)
    torch.manual_seed(0)

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 1))

        def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
            if labels is None:
                labels = torch.full((len(x),), 2)
            told = one_hot(labels, 3).to(x)
            given = torch.cat([x.flatten(1), t[:, None], told], 1)
            return self.body(given).view_as(x)

    from lsgm.objectives import prior_losses
    from lsgm.times import make_proposal
    from lsgm.weighting import make_weighting

    score = MixedNormalScore(Tiny(), sde, 1, mixing_init=0.0)
    optimizer = torch.optim.Adam(score.parameters(), 5e-3)
    likelihood = make_weighting("likelihood")
    proposal = make_proposal("importance", sde, likelihood)
    rng = torch.Generator().manual_seed(0)
    for _ in range(1000):
        labels = torch.randint(2, (256,), generator=rng)
        z = 4.0 * labels - 2 + 0.3 * torch.randn(256, generator=rng)
        told = hide_labels(labels, 2, 0.2, rng)
        losses = prior_losses(
            sde, lambda x, t: score(x, t, told), z.view(-1, 1, 1, 1),  # noqa: B023
            weighting_p=likelihood, proposal_p=proposal, likelihood=likelihood, rng=rng,
        )  # fmt: skip
        optimizer.zero_grad()
        losses.surrogate.backward()
        optimizer.step()
    from lsgm.conditioning import classifier_free
    from lsgm.solvers import make_grid, make_solver

    labels = torch.arange(200) % 2
    start = torch.randn(200, 1, 1, 1, generator=rng)
    times = make_grid("time", sde, 40, 1e-2)
    with torch.no_grad():
        ends = make_solver("heun").solve(sde, classifier_free(score, labels), start, times).x
        free = make_solver("heun").solve(sde, score, start, times).x
    assert (ends.flatten().sign() == 2 * labels - 1).double().mean() > 0.9
    assert 0.3 < (free > 0).double().mean() < 0.7  # without a class, both


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of digits and a class-conditional LSGM over it, hardly trained."""
    root = tmp_path_factory.mktemp("runs")
    data = DataConfig("digits")
    spec = build_datasets(data).spec
    torch.manual_seed(0)
    (root / "vae").mkdir()
    save(VAEModel(build_vae(VAE, spec), spec, VAE), root / "vae", data)
    save_config(VAETrainConfig(vae=VAE, data=data), root / "vae/config.yaml")
    train_lsgm(lsgm_config(root / "vae"), str(root / "lsgm"))
    return root


def lsgm_config(vae: Path, prior: PriorConfig = PRIOR, steps: int = 3) -> LSGMTrainConfig:
    optim = OptimConfig(optimizer="adamw", lr=1e-2, ema_decay=0.5)
    train = TrainConfig(
        batch_size=128, max_steps=steps, eval_every=1, eval_images=32, device="cpu", num_threads=1
    )
    return LSGMTrainConfig(
        vae_run=str(vae), data=DataConfig(), prior=prior, objective=PLAIN, optim_vae=optim,
        optim_prior=optim, train=train,
    )  # fmt: skip


def test_a_run_is_told_classes_and_draws_them(runs, tmp_path, capsys):
    model = load(runs / "lsgm")
    assert model.num_classes == 10 and model.prior_config.class_conditional
    first = model.score.network.classes.weight
    assert first.shape[0] == 11
    same = model.sample(2, labels=[3, 3], seed=5, nfe=4).images
    assert torch.equal(same, model.sample(2, labels=3, seed=5, nfe=4).images)
    assert not torch.equal(same, model.sample(2, labels=4, seed=5, nfe=4).images)
    edit_command(
        "class-conditional",
        ["--run", str(runs / "lsgm"), "--labels", "1", "7", "--samples", "2", "--nfe", "3",
         "--guidance", "2", "--device", "cpu", "--out", str(tmp_path / "x.png")],
    )  # fmt: skip
    assert "2 x 2 images" in capsys.readouterr().out and (tmp_path / "x.png").exists()


def test_a_resume_keeps_the_classes(runs, tmp_path):
    train_lsgm(lsgm_config(runs / "vae", steps=2), str(tmp_path / "b"))
    before = load(tmp_path / "b").score.network.classes.weight
    train_lsgm(lsgm_config(runs / "vae", steps=4), str(tmp_path / "b"), resume=True)
    model = load(tmp_path / "b")
    assert model.num_classes == 10
    assert not torch.equal(model.score.network.classes.weight, before)
    plain = replace(PRIOR, class_conditional=False)
    with pytest.raises(UserError, match="class_conditional"):
        train_lsgm(lsgm_config(runs / "vae", plain, steps=6), str(tmp_path / "b"), resume=True)


def test_mistakes(runs, tmp_path):
    model = load(runs / "lsgm")
    with pytest.raises(UserError, match="classes 0 to 9"):
        model.sample(1, labels=10, nfe=2)
    with pytest.raises(UserError, match="without classes"):
        load(runs / "vae").sample(1, labels=1)
    with pytest.raises(UserError, match=r"prior\.class_conditional: the data have no classes"):
        build_prior(PRIOR, model.vae)
    with pytest.raises(ValueError, match="label_dropout"):
        replace(PRIOR, label_dropout=1.5)
    info = json.loads((runs / "lsgm/run.json").read_text())
    assert info["prior"]["class_conditional"] is True
