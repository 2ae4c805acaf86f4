"""The second stage: its gradients against finite differences, regularisers, inactive channels,
whole short runs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, SDEConfig, VAEConfig
from lsgm.config.command_line import load_config, save_config
from lsgm.config.training import (
    DataConfig,
    LSGMTrainConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
    VAETrainConfig,
)
from lsgm.data import DataSpec
from lsgm.data.registry import build_datasets
from lsgm.errors import UserError
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae, prior_config_from
from lsgm.models.loading import load
from lsgm.models.release import save
from lsgm.networks import NCSNpp
from lsgm.networks.layers import GroupNorm
from lsgm.objectives import NormalControlVariate, latent_cross_entropy, prior_losses
from lsgm.sampling.draw import draw_samples
from lsgm.sampling.sampler import SolverOptions
from lsgm.score import MixedNormalScore
from lsgm.sde import LinearSDE, largest_squared_distance, make_sde
from lsgm.solvers import AdaptiveODE
from lsgm.tensors import expand_like
from lsgm.times import make_proposal
from lsgm.training.runs.latent import train_lsgm
from lsgm.training.runs.scan import LatentScan
from lsgm.training.stages.latent import LSGMStage, score_convolutions
from lsgm.training.state import StepContext, TrainState
from lsgm.weighting import make_weighting
from vae.objective import standard_normal_log_prob
from vae.regularization import SpectralNormRegularizer

SPEC = DataSpec(name="digits", channels=1, image_size=16, padding=0, binary=True)
VAE = VAEConfig(
    num_channels_enc=4,
    num_channels_dec=4,
    channel_mult=(1, 1, 2),
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_latent_scales=2,
    num_groups_per_scale=2,
    num_latent_per_group=2,
    cell="res_bnswish",
)
NETWORK = PriorNetworkConfig(num_channels=8, num_cells_per_scale=1, embedding_dim=8)
SDES = {
    "vpsde": SDEConfig(),
    "geometric": SDEConfig("geometric", sigma2_0=3e-5, sigma2_min=3e-5, sigma2_max=0.999),
    "subvpsde": SDEConfig("subvpsde"),
    "vesde": SDEConfig("vesde", sigma2_0=1e-2, sigma2_min=1e-2, sigma2_max=50.0),
}
PLAIN = ObjectiveConfig(
    kl_const_portion=0.0, kl_const_coeff=0.7, kl_balance=False, spectral_regularization=0.0
)
PENALISED = {"spectral_regularization": 0.3, "norm_regularization": 0.2}


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages leave half precision by .float(); here that has to mean float64 as well."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def make_model(prior: PriorConfig) -> LSGM:
    torch.manual_seed(0)
    vae = build_vae(VAE, SPEC)
    model = LSGM(vae, build_prior(prior, vae), SPEC, VAE, prior)
    with torch.no_grad():
        for p in model.parameters():  # fresh output layers are zero and would hide gradients
            p += 0.1 * torch.randn_like(p)
    return model


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def context() -> StepContext:
    return StepContext(30, 100, torch.Generator().manual_seed(7))


def slope(stage: LSGMStage, module: nn.Module, metric: str, x: Tensor) -> tuple[float, float]:
    """Derivative along one random direction in the module's parameters: of a metric by central
    differences, and of the loss by its gradient.
    """
    stage.zero_grad(set_to_none=True)
    stage(x, context()).loss.backward()
    moved = [p for p in module.parameters() if p.grad is not None]
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in moved]
    by_gradient = sum((p.grad * d).sum().item() for p, d in zip(moved, directions, strict=True))
    size, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(moved, directions, strict=True):
                p.add_(d, alpha=sign * size)
            with torch.enable_grad():  # as in training: the factors of groups are for the gradient
                values.append(stage(x, context()).metrics[metric].item())
        for p, d in zip(moved, directions, strict=True):
            p.add_(d, alpha=size)
    return (values[0] - values[1]) / (2 * size), by_gradient


@pytest.mark.parametrize(
    ("kind", "mixed", "changes"),
    [
        ("vpsde", True, {}),
        ("vpsde", False, {}),
        ("vpsde", False, {"control_variate": False}),
        ("vpsde", False, {"proposal_q": "optimal", "weighting_p": "unweighted"}),
        ("geometric", True, {"weighting_p": "reweighted", "training": "disjoint"}),
        ("geometric", False, {"proposal_p": "uniform"}),
        ("subvpsde", True, {"weighting_p": "unweighted"}),
        ("vesde", True, {}),
        ("vesde", True, {"weighting_p": "unweighted", "proposal_q": "uniform"}),
        ("vesde", False, {"control_variate": False, "training": "disjoint"}),
    ],
)
def test_gradients_are_those_of_the_two_objectives(
    in_float64: None, kind: str, mixed: bool, changes: dict[str, object]
) -> None:
    """By finite differences: the VAE's parameters get the gradient of the annealed bound, the
    prior's that of its own objective, for every SDE, mixed or not, with the control variate or not.
    """
    prior = PriorConfig(NETWORK, SDES[kind], mixed=mixed, mixing_init=-1.0)
    prior = replace(prior, **changes)
    model = make_model(prior).double()
    stage = LSGMStage(model, PLAIN, prior).train()
    x = images().double()
    assert (model.score.mixing_logit is not None) == mixed
    for module, metric in ((model.vae, "vae_loss"), (model.score, "prior_loss")):
        differences, gradient = slope(stage, module, metric, x)
        assert abs(gradient) > 1e-2
        assert gradient == pytest.approx(differences, rel=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"control_variate": False},
        {"training": "disjoint", "weighting_p": "unweighted"},
        {"proposal_q": "optimal"},
    ],
)
@pytest.mark.parametrize("balanced", [False, True])
def test_free_bits_spare_the_encoder_and_not_the_prior(
    in_float64: None, changes: dict[str, object], balanced: bool
) -> None:
    """Groups whose KL, under the score-based prior where they have it, is below ``free_bits`` leave
    the VAE's loss: top ones with their cross-entropy, finer ones under N(0, I). By finite
    differences; the prior's own gradient does not change.
    """
    prior = replace(PriorConfig(NETWORK, SDES["vpsde"], mixing_init=-1.0), **changes)
    model = make_model(prior).double()
    x = images().double()
    plain = replace(PLAIN, kl_balance=balanced)
    stage = LSGMStage(model, plain, prior).train()
    output = stage(x, context())
    kl = [output.metrics[f"kl_group/{k}"].item() for k in range(4)]  # two of each scale
    for limit in ((kl[0] + kl[1]) / 2, (kl[2] + kl[3]) / 2):
        freed = LSGMStage(model, replace(plain, free_bits=limit), prior).train()
        charged = [value for value in kl if value > limit]
        assert len(charged) in (1, 3)
        if balanced:  # the balancing weights change with the KL, and carry no gradient
            continue
        differences, gradient = slope(freed, model.vae, "vae_loss", x)
        assert gradient == pytest.approx(differences, rel=2e-5)
        metrics = freed(x, context()).metrics
        assert metrics["vae_loss"].item() == pytest.approx(
            metrics["reconstruction"].item() + freed.kl_coefficient(context()) * sum(charged),
            rel=1e-9,
        )
    of_prior, of_vae = [], []
    for trained in (stage, freed):
        trained.zero_grad(set_to_none=True)
        trained(x, context()).loss.backward()
        of_prior.append([p.grad.clone() for p in model.score.parameters()])
        of_vae.append([p.grad for p in model.vae.parameters() if p.grad is not None])
    for got, wanted in zip(*of_prior, strict=True):
        torch.testing.assert_close(got, wanted)
    assert not all(torch.allclose(a, b) for a, b in zip(*of_vae, strict=True))
    # with all groups free the VAE gets the reconstruction's gradient alone
    spared = LSGMStage(model, replace(plain, free_bits=1e9), prior).train()
    differences, gradient = slope(spared, model.vae, "reconstruction", x)
    assert gradient == pytest.approx(differences, rel=2e-5)


def test_free_bits_of_a_frozen_encoder_are_refused() -> None:
    prior = PriorConfig(NETWORK, SDES["vpsde"], training="frozen")
    with pytest.raises(UserError, match=r"^objective\.free_bits: 0\.5 .* frozen needs 0$"):
        LSGMStage(make_model(prior), replace(PLAIN, free_bits=0.5), prior)


def test_a_weighting_that_the_sde_does_not_allow_is_named() -> None:
    prior = PriorConfig(NETWORK, SDES["vesde"], weighting_p="rescaled", proposal_p="uniform")
    with pytest.raises(UserError, match=r"prior\.proposal_p.*rescaled.*var < 1"):
        LSGMStage(make_model(prior), PLAIN, prior)
    prior = PriorConfig(NETWORK, SDES["geometric"], weighting_p="nonesuch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown weighting"):
        LSGMStage(make_model(prior), PLAIN, prior)


@pytest.mark.parametrize("training", ["joint", "disjoint", "frozen"])
def test_the_priors_regularisers_reach_the_prior_alone(in_float64: None, training: str) -> None:
    """They add weight * (sum of singular values, sum of largest gains) and nothing else."""
    prior = PriorConfig(NETWORK, SDES["vpsde"], training=training)  # type: ignore[arg-type]
    model = make_model(prior).double()
    x, gradients, losses = images().double(), [], []
    for penalised in (False, True):
        stage = LSGMStage(model, PLAIN, replace(prior, **PENALISED) if penalised else prior)
        if penalised:
            stage.regularizers["prior_spectral"](2000)
        stage.train().zero_grad(set_to_none=True)
        output = stage(x, context())
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    score = model.score
    kernels = [layer.weight for layer in score.modules() if isinstance(layer, nn.Conv2d)]
    gains = [layer.weight for layer in score.modules() if isinstance(layer, GroupNorm)]
    assert len(kernels) > 10 and len(gains) > 10
    spectral = torch.stack([torch.linalg.matrix_norm(k.flatten(1), ord=2) for k in kernels]).sum()
    norm = torch.stack([gain.abs().max() for gain in gains]).sum()
    assert output.metrics["prior_spectral"].item() == pytest.approx(spectral.item(), rel=1e-5)
    assert output.metrics["prior_norm"].item() == pytest.approx(norm.item(), rel=1e-12)
    penalty = 0.3 * spectral + 0.2 * norm
    assert losses[1] - losses[0] == pytest.approx(penalty.item(), rel=1e-5)
    names = {id(p): name for name, p in model.named_parameters()}
    exact = torch.autograd.grad(penalty, [*kernels, *gains])
    expected = {names[id(p)]: g for p, g in zip([*kernels, *gains], exact, strict=True)}
    plain, penalised_gradients = gradients
    assert plain.keys() == penalised_gradients.keys()
    assert any(name.startswith("vae.") for name in plain) == (training != "frozen")
    for name, gradient in penalised_gradients.items():
        wanted = plain[name] + expected.get(name, torch.zeros_like(gradient))
        scale = max(wanted.abs().max().item(), 1.0)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=2e-3 * scale, msg=name)


def test_without_a_spectral_weight_only_the_gains_count() -> None:
    prior = PriorConfig(NETWORK, SDES["vpsde"], norm_regularization=0.2)
    stage = LSGMStage(make_model(prior), PLAIN, prior).train()
    output = stage(images(), context())
    assert not stage.regularizers and "prior_spectral" not in output.metrics
    assert output.metrics["prior_norm"] > 0


def test_the_spectral_regulariser_leaves_out_linear_and_filtered_layers() -> None:
    network = NCSNpp(
        4, 8, num_channels=8, num_scales=2, num_cells_per_scale=1, fir=True,
        progressive="residual", progressive_input="residual",
    )  # fmt: skip
    counted = score_convolutions(network)
    convolutions = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    left_out = convolutions - counted.keys()
    # one down- and one up-sampling pyramid between two scales
    assert len(left_out) == 2 and all("resample" in name for name in left_out)
    assert SpectralNormRegularizer(counted).num_layers == len(convolutions) - 2


def test_power_iteration_goes_on_from_a_checkpoint() -> None:
    """The state of both regularisers is in the checkpoint; one from before they existed is read."""
    prior = PriorConfig(NETWORK, SDES["vpsde"], **PENALISED)
    objective = replace(PLAIN, spectral_regularization=0.1)
    optim = {name: OptimConfig(lr=1e-3) for name in ("vae", "prior")}
    states = []
    for seed in range(2):
        stage = LSGMStage(make_model(prior), objective, prior).train()
        for spectral in stage.regularizers.values():  # as if drawn from another seed
            spectral.u = {shape: u.roll(seed, 1) for shape, u in spectral.u.items()}
        scaler = GradScaler("cpu", enabled=False)
        states.append(TrainState(stage, optim, scaler, total_steps=10, steps_per_epoch=5))
    first, second = states
    assert set(first.stage.regularizers) == {"spectral", "prior_spectral"}
    first.stage(images(), context())
    second.load_state_dict(first.state_dict(), "a checkpoint")
    a, b = (state.stage(images(), context()).metrics for state in states)
    for name in ("regularizer", "prior_spectral", "prior_norm"):
        assert torch.equal(a[name], b[name])
    older = {name: v for name, v in first.state_dict()["extra"].items() if name == "spectral"}
    third = LSGMStage(make_model(prior), objective, prior)
    third.load_extra_state(older)
    assert not third.regularizers["spectral"].fresh and third.regularizers["prior_spectral"].fresh


@pytest.mark.parametrize(("kind", "atol"), [("vpsde", 1e-4), ("geometric", 2e-3)])
@torch.no_grad()
def test_inactive_channels_cost_what_they_cost_under_n01(kind: str, atol: float) -> None:
    """All channels inactive: the bound of the LSGM is that of its VAE under N(0, I), pointwise,
    whatever the network says.
    """
    prior = PriorConfig(NETWORK, SDES[kind], mixing_init=-1.0)
    model = make_model(prior).eval()
    x = 2.0 * images().round() - 1.0
    normal = VAEModel(model.vae, SPEC, VAE).nelbo(x, torch.Generator().manual_seed(5))
    active = model.nelbo(x, torch.Generator().manual_seed(5))
    model.score.deactivate(torch.ones(model.score.channels, dtype=torch.bool))
    inactive = model.nelbo(x, torch.Generator().manual_seed(5))
    latents = math.prod(model.vae.top_shape)
    torch.testing.assert_close(inactive.total, normal.total, rtol=0, atol=atol * latents)
    assert (active.total - normal.total).abs().min() > 10 * atol * latents


@torch.no_grad()
def test_an_inactive_group_costs_what_it_costs_under_n01() -> None:
    """With some channels inactive: theirs is the exact cross-entropy to N(0, 1), and the others do
    not see them.
    """
    prior = PriorConfig(NETWORK, SDES["vpsde"], mixing_init=-1.0)
    score = make_model(prior).score.eval()
    off = torch.tensor([True, True, False, False])
    score.deactivate(off)
    generator = torch.Generator().manual_seed(2)
    z0 = torch.randn(5, *score.channel_mask.shape[1:2], 4, 4, generator=generator)
    likelihood = make_weighting("likelihood")
    sde = score.sde
    times = make_proposal("importance", sde, likelihood).sample(5, generator)

    def elements(z: Tensor) -> Tensor:
        return latent_cross_entropy(
            sde, score, z, times, likelihood, torch.Generator().manual_seed(4),
            control_variate=NormalControlVariate.of(sde),
        ).elements  # fmt: skip

    low, high = sde.var(torch.tensor([sde.time_eps, 1.0], dtype=torch.float64)).tolist()
    # int g2 / (2 v) E (sqrt(v) z_t - eps)^2 dt + (1 + ln 2 pi v_low) / 2, by dv = g2 (1 - v) dt;
    # it becomes -ln N(z; 0, 1) as v_low -> 0 and v_high -> 1
    exact = (high - low) / 2 * z0.square() + (math.log(2 * math.pi * high) + 1 - high + low) / 2
    first = elements(z0)
    torch.testing.assert_close(first[:, off], exact[:, off], rtol=0, atol=1e-4)
    torch.testing.assert_close(exact, -standard_normal_log_prob(z0), rtol=0, atol=low * 10)
    moved = z0 + torch.where(off, 1.0, 0.0).view(1, -1, 1, 1)
    torch.testing.assert_close(elements(moved)[:, ~off], first[:, ~off], rtol=0, atol=1e-5)
    assert (first[:, ~off] - exact[:, ~off]).abs().max() > 1e-2


def test_inactive_channels_give_the_encoder_the_gradient_of_n01(in_float64: None) -> None:
    prior = PriorConfig(NETWORK, SDES["vpsde"], mixing_init=-1.0)
    score = make_model(prior).double().score
    off = torch.tensor([True, False, True, False])
    score.deactivate(off)
    z0 = torch.randn(3, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    likelihood = make_weighting("likelihood")
    losses = prior_losses(
        score.sde,
        score,
        z0,
        weighting_p=likelihood,
        proposal_p=make_proposal("importance", score.sde, likelihood),
        likelihood=likelihood,
        balance=0.6,
        control_variate=NormalControlVariate.of(score.sde),
        rng=torch.Generator().manual_seed(0),
    )
    (gradient,) = torch.autograd.grad(losses.surrogate, z0)
    low, high = score.sde.var(torch.tensor([score.sde.time_eps, 1.0], dtype=torch.float64)).tolist()
    exact = 0.6 * (high - low) * z0.detach() / len(z0)
    torch.testing.assert_close(gradient[:, off], exact[:, off], rtol=0, atol=1e-5)
    assert (gradient[:, ~off] - exact[:, ~off]).abs().max() > 1e-3


class GaussianNetwork(nn.Module):
    """The exact noise prediction for data from N(mean, scale^2), both trained."""

    def __init__(self, sde: LinearSDE) -> None:
        super().__init__()
        self.sde = sde
        self.mean = nn.Parameter(torch.zeros(()))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        m, v = (expand_like(c, x) for c in (self.sde.mean_coef(t), self.sde.var(t)))
        return v.sqrt() * (x - m * self.mean) / (m.square() * torch.exp(2 * self.log_scale) + v)


@pytest.mark.parametrize("kind", ["vpsde", "vesde"])
def test_an_unmixed_prior_learns_and_generates_its_data(kind: str) -> None:
    """Trained on N(1.5, 0.5^2), the network alone finds both numbers, and its probability flow is
    the linear map between the marginals.
    """
    sde = make_sde(kind, **({"sigma2_min": 1e-2, "sigma2_max": 9.0} if kind == "vesde" else {}))
    score = MixedNormalScore(GaussianNetwork(sde), sde, 1, mixed=False)
    weighting = make_weighting("unweighted")
    proposal = make_proposal("importance", sde, weighting)
    optimizer = torch.optim.Adam(score.parameters(), lr=0.1)
    rng = torch.Generator().manual_seed(1)
    for step in range(120):
        z0 = 1.5 + 0.5 * torch.randn(512, 1, 1, 1, generator=rng)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 120)
        losses = prior_losses(
            sde,
            score,
            z0,
            weighting_p=weighting,
            proposal_p=proposal,
            likelihood=make_weighting("likelihood"),
            stratified=True,
            rng=rng,
        )
        optimizer.zero_grad()
        losses.surrogate.backward()
        optimizer.step()
    assert score.network.mean.item() == pytest.approx(1.5, abs=0.05)
    assert score.network.log_scale.exp().item() == pytest.approx(0.5, abs=0.05)
    start = sde.prior_sample((8, 1, 1, 1), rng)
    ends = torch.tensor([1.0, sde.time_eps], dtype=torch.float64)
    with torch.no_grad():
        end = AdaptiveODE(rtol=1e-6, atol=1e-6).solve(sde, score, start, ends).x
    mean = 1.5 * sde.mean_coef(ends)
    std = (0.25 * sde.mean_coef(ends).square() + sde.var(ends)).sqrt()
    expected = mean[1] + std[1] / std[0] * (start - mean[0])
    torch.testing.assert_close(end, expected.float(), rtol=0, atol=0.1)


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a VAE, not trained."""
    folder = tmp_path_factory.mktemp("vae")
    config = VAETrainConfig(vae=replace(VAE, num_latent_scales=1, channel_mult=(1, 2)))
    torch.manual_seed(0)
    model = VAEModel(build_vae(config.vae, SPEC), SPEC, config.vae)
    save(model, folder, config.data)
    save_config(config, folder / "config.yaml")
    return folder


def short_run(vae_run: Path, prior: PriorConfig, steps: int = 3) -> LSGMTrainConfig:
    return LSGMTrainConfig(
        vae_run=str(vae_run),
        data=DataConfig(),
        prior=prior,
        objective=PLAIN,
        optim_vae=OptimConfig(optimizer="adamw", lr=1e-3, ema_decay=0.5),
        optim_prior=OptimConfig(optimizer="adamw", lr=1e-3, ema_decay=0.5),
        train=TrainConfig(
            batch_size=128, max_steps=steps, eval_images=32, device="cpu", num_threads=1
        ),
    )


def test_an_unmixed_run_trains_and_samples(vae_run: Path, tmp_path: Path) -> None:
    prior = PriorConfig(NETWORK, mixed=False)
    train_lsgm(short_run(vae_run, prior), str(tmp_path / "run"))
    model = load(tmp_path / "run")
    assert isinstance(model, LSGM) and model.score.mixing_logit is None
    fresh = build_prior(prior, model.vae).network.head.conv  # starts as (almost) zero
    assert fresh.weight.abs().max() < 1e-4 < model.score.network.head.conv.weight.abs().max()
    options = SolverOptions(batch_size=8)
    drawn = draw_samples(model, 8, options).images
    assert drawn.std(0).max() > 1e-3 and 0 <= drawn.min() and drawn.max() <= 1


def test_a_vesde_run_has_the_range_of_the_encodings(vae_run: Path, tmp_path: Path) -> None:
    """sigma2_max is the largest squared distance between encodings, and is in the release."""
    prior = PriorConfig(NETWORK, SDES["vesde"])
    train_lsgm(short_run(vae_run, prior), str(tmp_path / "run"))
    model = load(tmp_path / "run")
    assert isinstance(model, LSGM)
    data = build_datasets(DataConfig())
    x = data.train.batch(torch.arange(200))
    x = 2 * (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < x).float() - 1
    with torch.no_grad():
        eps = model.vae.encode(x, rng=torch.Generator().manual_seed(2)).eps
    some = float(largest_squared_distance([model.vae.concat_top(eps)]))
    assert 0.5 * model.sde.prior_var < some < 1.5 * model.sde.prior_var
    assert model.sde.prior_var != SDES["vesde"].sigma2_max
    start = model.sde.prior_sample((4, *model.vae.top_shape), torch.Generator().manual_seed(0))
    assert start.std().item() == pytest.approx(math.sqrt(model.sde.prior_var), rel=0.1)


def test_a_run_goes_on_from_an_lsgm_with_a_deeper_context(tmp_path: Path) -> None:
    """It starts at the averaged weights of the run, whose bounds the added blocks leave as they
    are, and refuses another prior.
    """
    vae = replace(VAE, num_latent_scales=1, channel_mult=(1, 2), context_size=3, context_channels=6)
    torch.manual_seed(0)
    untrained = VAEModel(build_vae(vae, SPEC), SPEC, vae)
    (tmp_path / "vae").mkdir()
    save(untrained, tmp_path / "vae", DataConfig())
    prior = PriorConfig(NETWORK)
    first = train_lsgm(short_run(tmp_path / "vae", prior), str(tmp_path / "first"))
    config = replace(
        short_run(tmp_path / "vae", prior, steps=1),
        vae_run=None,
        lsgm_run=str(first),
        add_context_blocks=2,
        optim_vae=OptimConfig(lr=1e-12, lr_min=0.0),
        optim_prior=OptimConfig(lr=1e-12, lr_min=0.0),
    )
    old, new = load(first), load(train_lsgm(config, str(tmp_path / "second")))
    assert isinstance(old, LSGM) and isinstance(new, LSGM)
    assert new.vae_config.context_blocks == vae.context_blocks + 2
    x = 2 * (torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.3) - 1.0
    with torch.no_grad():
        bounds = [m.nelbo(x, torch.Generator().manual_seed(1)) for m in (old, new)]
    torch.testing.assert_close(bounds[1].kl, bounds[0].kl, rtol=1e-2, atol=0)  # batch statistics
    assert not torch.equal(bounds[1].reconstruction, bounds[0].reconstruction)
    torch.testing.assert_close(bounds[1].total, bounds[0].total, rtol=1e-2, atol=0)
    with pytest.raises(UserError, match=r"^prior\.mixed: not that of the run that --lsgm"):
        train_lsgm(replace(config, prior=PriorConfig(NETWORK, mixed=False)), str(tmp_path / "no"))
    with pytest.raises(UserError, match="is not the run of an LSGM"):
        train_lsgm(replace(config, lsgm_run=str(tmp_path / "vae")), str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_inactive_channels_and_both_averages_are_in_the_release(
    vae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before training, kept through a resume, and released with the averaged weights."""
    inactive = torch.tensor([True, False, False, True])
    monkeypatch.setattr(LatentScan, "inactive_channels", lambda *_, **__: inactive)
    prior = PriorConfig(NETWORK, drop_inactive=True)
    out = tmp_path / "run"
    train_lsgm(short_run(vae_run, prior, steps=2), str(out))
    monkeypatch.setattr(LatentScan, "inactive_channels", lambda *_, **__: ~inactive)
    train_lsgm(short_run(vae_run, prior, steps=4), str(out), resume=True)
    model = load(out)
    assert isinstance(model, LSGM)
    assert torch.equal(model.score.channel_mask.flatten() == 0, inactive)
    last = max((out / "checkpoints").glob("step_*.pt"))
    state = torch.load(last, weights_only=True)
    for side, name in (("prior", "score"), ("vae", "vae")):
        released = dict(getattr(model, name).named_parameters())
        live = {k: state["weights"][f"model.{name}.{k}"] for k in released}
        average = {k: state["ema"][side][f"module.{k}"] for k in released}
        assert all(torch.equal(released[k], average[k]) for k in released)
        assert any(not torch.equal(average[k], live[k]) for k in live)


@pytest.mark.parametrize(
    ("line", "draws", "shared"),
    [
        ({}, 1, True),  # Alg. 3
        ({"proposal_q": "importance"}, 2, False),  # Alg. 1
        ({"training": "disjoint"}, 2, False),  # Alg. 2
        ({"training": "frozen"}, 1, True),
    ],
)
def test_one_line_selects_the_algorithm(
    monkeypatch: pytest.MonkeyPatch, line: dict[str, str], draws: int, shared: bool
) -> None:
    """How often noise and times are drawn, and whether one network evaluation serves both sides."""
    prior = PriorConfig(NETWORK, weighting_p="unweighted", **line)  # type: ignore[arg-type]
    stage = LSGMStage(make_model(prior), PLAIN, prior).train()
    evaluated: list[int] = []
    stage.model.score.register_forward_hook(lambda *_: evaluated.append(1))
    stage(images(), context())
    assert (stage.proposal_q is None) == shared
    assert len(evaluated) == draws


def test_a_key_without_effect_from_an_older_run_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("prior:\n  weighting_q: likelihood\n  proposal_q: uniform\n")
    assert load_config(LSGMTrainConfig, path).prior == PriorConfig(proposal_q="uniform")
    described = asdict(PriorConfig(NETWORK)) | {"weighting_q": "same"}
    assert prior_config_from(described) == PriorConfig(NETWORK)
    with pytest.raises(UserError, match=r"unknown key prior\.weighting_r"):
        path.write_text("prior:\n  weighting_r: likelihood\n")
        load_config(LSGMTrainConfig, path)


def test_inactive_channels_need_the_normal_component() -> None:
    with pytest.raises(ValueError, match="drop_inactive: needs mixed"):
        PriorConfig(mixed=False, drop_inactive=True)
