"""The second stage's objectives against the published ones: every recorded draw, loss and gradient.

Noise and uniforms are replayed (:class:`Replay`), so both sides see the same draws. Where the
published figure is off by a known factor, ours is multiplied by that factor before it is compared,
and compared without it with the closed form.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prior_fixtures import ArraySet, PriorFixture, parametrize_files, prior_fixture
from published_step import supported_modes
from quadrature import integrate
from test_iw_parity import published_factor
from torch import Tensor

import vae.random
from lsgm.config.command_line import load_run_config
from lsgm.config.training import LSGMTrainConfig
from lsgm.importers.official import (
    load_official_regularizer,
    load_official_vae,
    read_official_checkpoint,
)
from lsgm.importers.official_names import published_names
from lsgm.importers.official_prior import (
    WEIGHTINGS,
    load_official_prior,
    prior_arguments,
    published_modules,
)
from lsgm.importers.runs import import_official_lsgm
from lsgm.models.latent import LSGM
from lsgm.models.loading import load
from lsgm.objectives import PriorLosses, prior_losses
from lsgm.sde import VESDE, LinearSDE, SubVPSDE
from lsgm.times import TimeProposal, TimeSample, make_proposal
from lsgm.training.stages.latent import LSGMStage, score_convolutions
from lsgm.training.state import StepContext
from lsgm.weighting import make_weighting
from vae.objective import kl_balance_alpha, standard_normal_log_prob
from vae.regularization import SpectralNormRegularizer, norm_regularizer

priors = parametrize_files("prior_*.pt")
each_mode = pytest.mark.parametrize("mode", [mode for mode in WEIGHTINGS if "reweight" not in mode])
STEPS = [f"{kind}_{mode}" for kind in ("joint", "disjoint") for mode in ("eval", "train")]


class Replay:
    """Takes the place of the one function that draws noise, and hands out recorded arrays.

    Normal draws and uniforms ``(B,)`` come in the order given. Other uniforms (binarisation and
    flips of the images, which the recorded images have behind them) are 1/2, which changes neither
    black nor white and flips nothing.
    """

    def __init__(self, normals: Sequence[Tensor], uniforms: Sequence[Tensor]) -> None:
        self.normals, self.uniforms = list(normals), list(uniforms)

    def __call__(
        self, draw: object, shape: Sequence[int], rng: object, device: Any, dtype: torch.dtype
    ) -> Tensor:
        if draw is torch.rand and len(shape) > 1:
            return torch.full(tuple(shape), 0.5, dtype=dtype)
        recorded = (self.normals if draw is torch.randn else self.uniforms).pop(0)
        assert recorded.shape == tuple(shape)
        return recorded.to(dtype)

    @property
    def used_up(self) -> bool:
        return not self.normals and not self.uniforms


@dataclass(frozen=True)
class Published(TimeProposal):
    """A proposal whose weights are the published ones, off by ``factor``."""

    proposal: TimeProposal
    factor: float

    def from_uniform(self, rho: Tensor) -> TimeSample:
        sample = self.proposal.from_uniform(rho)
        return TimeSample(sample.t, sample.inverse_density * self.factor)


def factor_of(mode: str, fixture: PriorFixture) -> float:
    kind = prior_arguments(fixture.raw["args"]).sde_kind
    sde = fixture.scores["raw"].sde
    return published_factor(mode, ArraySet(sde, fixture.published, kind, fixture.arrays))


def density(mode: str, sde: LinearSDE) -> Callable[[Tensor], Tensor]:
    """The density that the times of a published mode have, up to a factor, written out."""
    exploding = isinstance(sde, VESDE)
    if isinstance(sde, SubVPSDE) and mode in ("ll_iw", "drop_all_iw", "drop_sigma2t_iw"):
        return density(mode, sde.vpsde)  # iw_subvp_like_vp_sde

    def total(t: Tensor) -> Tensor:
        return 1 - sde.sigma2_0 + sde.var(t) if exploding else torch.ones_like(t)

    def remaining(t: Tensor) -> Tensor:
        return 1 / total(t) if exploding else sde.one_minus_var(t)

    if mode.endswith("_uniform") or mode == "rescale_iw":
        return torch.ones_like
    if mode == "ll_iw" or (mode == "drop_all_iw" and exploding):
        return lambda t: sde.g2(t) * remaining(t) / sde.var(t)
    if mode == "drop_all_iw":
        return sde.one_minus_var
    return lambda t: sde.g2(t) * remaining(t)


def target(mode: str, sde: LinearSDE, t: Tensor) -> Tensor:
    """The weight that a mode realises, written out."""
    if mode.startswith("ll_"):
        return sde.g2(t) / (2 * sde.var(t))
    if mode.startswith("drop_all"):
        return torch.ones_like(t)
    return sde.g2(t) / 2 if mode.startswith("drop_sigma2t") else 0.5 / (1 - sde.var(t))


def losses_of(
    fixture: PriorFixture, weights: str, mode: str, image: int, monkeypatch: pytest.MonkeyPatch
) -> PriorLosses:
    """Our losses for one image of a recorded draw: a mean over one image is that image's."""
    one = slice(image, image + 1)
    arrays, score = fixture.arrays, fixture.scores[weights]
    weighting, proposal = WEIGHTINGS[mode]
    replay = Replay([arrays["obj_noise"][one]], [arrays["obj_rho"][one]])
    monkeypatch.setattr(vae.random, "_draw", replay)
    losses = prior_losses(
        score.sde,
        score,
        arrays["obj_z0"][one],
        weighting_p=make_weighting(weighting),
        proposal_p=make_proposal(proposal, score.sde, make_weighting(weighting)),
        likelihood=make_weighting("likelihood"),
    )
    assert replay.used_up
    return losses


@priors
@each_mode
@pytest.mark.parametrize("weights", ["raw", "ema"])
@torch.no_grad()
def test_objective_of_each_mode(
    path: Path, mode: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prior's objective and cross-entropy, per image, in each published mode.

    Two published families are not the integral over ``[time_eps, 1]`` that the bound needs:
    uniform times (and ``rescale_iw``, uniform too) give a mean, ``1 / (1 - time_eps)`` of it; and
    the normaliser of ``drop_all_iw`` for VP lacks ``beta_start`` in an exponent. Ours agrees with
    the figure up to that factor, and without it with ``w(t) / density(t) |eps_hat - eps|^2``, the
    density normalised by quadrature.
    """
    fixture = prior_fixture(path)
    arrays, sde = fixture.arrays, fixture.scores[weights].sde
    if mode not in supported_modes(fixture.args):
        assert f"obj_{mode}_p_{weights}" not in arrays
        pytest.skip("this mode is not among the published ones of the SDE")
    if mode == "rescale_iw" and sde.prior_var > 1:
        exceeds = sde.var(arrays[f"obj_{mode}_t"]) > 1
        assert torch.equal(arrays[f"obj_{mode}_p_{weights}"] < 0, exceeds)
        with pytest.raises(ValueError, match="var < 1"):
            losses_of(fixture, weights, mode, 0, monkeypatch)
        return
    factor, constant = factor_of(mode, fixture), sde.cross_entropy_constant()
    times = make_proposal(WEIGHTINGS[mode][1], sde, make_weighting(WEIGHTINGS[mode][0]))
    t = times.from_uniform(arrays["obj_rho"]).t
    published = fixture.published
    allowed = 1e-6 + 1e-4 * t + published.time_rounding(t)
    assert ((t - arrays[f"obj_{mode}_t"]).abs() <= allowed).all()
    heights = density(mode, sde)
    size = integrate(heights, sde.time_eps)
    inverse_density = size / heights(t)
    for image, rho in enumerate(arrays["obj_rho"]):
        ends = torch.linspace(sde.time_eps, t[image].item(), 200, dtype=torch.float64)
        assert integrate(heights, sde.time_eps, ends) / size == pytest.approx(rho.item(), abs=1e-6)
        losses = losses_of(fixture, weights, mode, image, monkeypatch)
        weighted = losses.cross_entropy - constant
        p, q = losses.prior.item(), weighted.sum().item()
        # what float32 leaves of the recorded weights at this time
        digits = (published.rounding(t) + published.end_rounding(t))[image].item()
        recorded = arrays[f"obj_{mode}_p_{weights}"][image].item()
        assert factor * p == pytest.approx(recorded, rel=1e-4 + digits)
        recorded = arrays[f"obj_{mode}_ce_{weights}"][image].item()
        recorded_q = recorded - weighted.numel() * published.constant(sde.time_eps)
        sums = 1e-6 * abs(recorded)  # of which the recorded float32 number is the difference
        assert factor * q == pytest.approx(recorded_q, rel=1e-4 + digits, abs=sums)
        z0, eps = (arrays[f"obj_{key}"][image : image + 1].double() for key in ("z0", "noise"))
        z_t = sde.mean_coef(t[image]) * z0 + sde.var(t[image]).sqrt() * eps
        error = (fixture.scores[weights](z_t, t[image : image + 1]) - eps).square().sum()
        exact = (target(mode, sde, t) * inverse_density)[image] * error
        assert p == pytest.approx(exact.item(), rel=1e-5)
        exact = (target("ll_", sde, t) * inverse_density)[image] * error
        assert q == pytest.approx(exact.item(), rel=1e-5)


@functools.cache
def imported(path: Path) -> tuple[LSGM, LSGMTrainConfig]:
    """The whole model with its training weights, and its settings, by way of a run folder."""
    raw = "dae_optimizer" in prior_fixture(path).raw
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        import_official_lsgm(path, run, "raw" if raw else None)
        model, config = load(run), load_run_config(run)
    assert isinstance(model, LSGM) and isinstance(config, LSGMTrainConfig)
    return model, config


def vae_noise(fixture: PriorFixture) -> list[Tensor]:
    keys = [key for key in fixture.arrays.data if key.startswith("step_vae_noise_")]
    return [fixture.arrays[f"step_vae_noise_{i}"] for i in range(len(keys))]


def images_of(fixture: PriorFixture) -> Tensor:
    return fixture.arrays["step_x_u8"].float() / 255


@priors
@torch.no_grad()
def test_pieces_of_the_bound(path: Path) -> None:
    fixture, (model, config) = prior_fixture(path), imported(path)
    arrays, vae_ = fixture.arrays, model.vae
    bits = model.vae_config.num_x_bits
    x = torch.floor(images_of(fixture) * 255 / 2 ** (8 - bits)) / (2**bits - 1) * 2 - 1
    output = vae_.infer(vae_.encoder(x), None, vae_noise(fixture))

    def close(ours: Tensor, key: str) -> None:
        torch.testing.assert_close(ours.float(), arrays[key].float(), rtol=1e-4, atol=1e-3)

    sums = [part.flatten(1).sum(1) for part in output.posterior.log_q]
    close(vae_.reconstruction(output, x), "step_recon")
    close(torch.stack(sums, dim=1), "step_log_q_per_group")
    close(torch.stack(sums).sum(0), "step_sum_log_q")
    top = vae_.num_groups_per_scale
    close(vae_.concat_top(output.posterior.eps), "step_eps_top")
    finer = [-standard_normal_log_prob(e).flatten(1).sum(1) for e in output.posterior.eps[top:]]
    if finer:
        close(torch.stack(finer, dim=1), "step_rem_per_group")
        close(torch.stack(finer).sum(0), "step_remaining_ce")
    else:
        assert arrays["step_remaining_ce"].item() == 0
    close(kl_balance_alpha(vae_.groups_per_scale), "step_kl_alpha")
    stage = LSGMStage(model, config.objective, config.prior)
    context = StepContext(
        int(arrays["step_global_step"]), fixture.config["num_total_iter"], torch.Generator()
    )
    assert stage.kl_coefficient(context) == pytest.approx(arrays["step_kl_coeff"].item(), rel=1e-12)


@dataclass(frozen=True)
class StepResult:
    """What a training step computes.

    Attributes:
        metrics: of the stage.
        gradients: by our names of the model's parameters.
    """

    metrics: dict[str, float]
    gradients: dict[str, Tensor]


def train_step(path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> StepResult:
    """Our step on the recorded images and draws, with the published weights of time."""
    fixture, (model, config) = prior_fixture(path), imported(path)
    arrays, disjoint = fixture.arrays, step.startswith("disjoint")
    mode_p, mode_q = (arrays.text(f"{step}_iw_{side}") for side in "pq")
    weighting_p, proposal_p = WEIGHTINGS[mode_p]
    prior = replace(
        config.prior,
        training="disjoint" if disjoint else "joint",
        weighting_p=weighting_p,
        proposal_p=proposal_p,
        proposal_q=WEIGHTINGS[mode_q][1],
        update_q_ema=bool(arrays.numpy(f"{step}_update_q_ema")),
        control_variate=False,
        stratified_times=False,
        spectral_regularization=0.0,
        norm_regularization=0.0,
    )
    model = copy.deepcopy(model)
    stage = LSGMStage(model, replace(config.objective, spectral_regularization=0.0), prior).train()
    if step.endswith("eval"):
        model.vae.eval()
    if prior.update_q_ema:
        stage.use_average({"prior": copy.deepcopy(fixture.scores["ema"])})
    stage.proposal_p = Published(stage.proposal_p, factor_of(mode_p, fixture))
    if stage.proposal_q is None:
        noises, uniforms = ["joint"], ["p"]
    else:
        stage.proposal_q = Published(stage.proposal_q, factor_of(mode_q, fixture))
        # The published joint step has one noise for both draws, ours one for each.
        noises, uniforms = ["q", "p"] if disjoint else ["joint", "joint"], ["q", "p"]
    replay = Replay(
        vae_noise(fixture) + [arrays[f"step_noise_{name}"] for name in noises],
        [arrays[f"step_rho_{name}"] for name in uniforms],
    )
    monkeypatch.setattr(vae.random, "_draw", replay)
    context = StepContext(
        int(arrays["step_global_step"]), fixture.config["num_total_iter"], torch.Generator()
    )
    output = stage(images_of(fixture), context)
    assert replay.used_up
    output.loss.backward()
    return StepResult(
        {name: value.item() for name, value in output.metrics.items()},
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    )


def prior_labels(fixture: PriorFixture) -> dict[str, Tensor]:
    """For each of our parameters of the prior, which published one each number comes from."""
    state = fixture.raw["dae_state_dict"]
    labelled = {name: torch.full_like(v, float(i)) for i, (name, v) in enumerate(state.items())}
    score = load_official_prior({**fixture.raw, "dae_state_dict": labelled}, "raw")
    return {name: p.detach() for name, p in score.named_parameters()}


def check_norms(ours: dict[str, float], names: Any, norms: Any) -> None:
    assert len(names) > 0
    largest = float(max(norms))
    for name, norm in zip(names, norms, strict=True):
        # a parameter without influence has no gradient here and one of zero there
        expected = pytest.approx(float(norm), rel=1e-3, abs=1e-3 * largest)
        assert ours.get(str(name), 0.0) == expected, name
    assert {name for name, norm in ours.items() if norm > 0} <= {str(name) for name in names}


@priors
@pytest.mark.parametrize("step", STEPS)
def test_losses_and_gradients_of_a_step(
    path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, and the gradient that reaches every parameter of VAE and prior.

    Where both objectives are equal (likelihood weighting and one draw), the published prior takes
    the gradient of the VAE's loss, KL coefficient included: ``prior.kl_scales_prior``, which an
    imported run has.
    """
    fixture, result = prior_fixture(path), train_step(path, step, monkeypatch)
    arrays = fixture.arrays
    losses = arrays[f"{step}_losses"].tolist()
    assert result.metrics["vae_loss"] == pytest.approx(losses[0], rel=1e-4)
    assert imported(path)[1].prior.kl_scales_prior
    mode_p, mode_q = (arrays.text(f"{step}_iw_{side}") for side in "pq")
    equal = mode_q == "reweight_p_samples" and mode_p in ("ll_uniform", "ll_iw")
    assert len(losses) == (1 if equal else 2)
    if not equal:
        assert result.metrics["prior_loss"] == pytest.approx(losses[1], rel=1e-4)

    vae_ = {
        name.removeprefix("vae."): g for name, g in result.gradients.items() if name[:4] == "vae."
    }
    score = {
        name.removeprefix("score."): g
        for name, g in result.gradients.items()
        if name.startswith("score.")
    }
    names = published_names(imported(path)[0].vae)
    norms = {name: vae_[ours].norm().item() for name, ours in names.items() if ours in vae_}
    check_norms(
        norms, arrays.numpy(f"{step}_vae_grad_names"), arrays.numpy(f"{step}_vae_grad_norms")
    )
    labels = prior_labels(fixture)
    squares = torch.zeros(len(fixture.raw["dae_state_dict"]), dtype=torch.float64)
    for name, gradient in score.items():
        squares.index_add_(0, labels[name].long().flatten(), gradient.double().square().flatten())
    norms = dict(zip(fixture.raw["dae_state_dict"], squares.sqrt().tolist(), strict=True))
    check_norms(
        norms, arrays.numpy(f"{step}_dae_grad_names"), arrays.numpy(f"{step}_dae_grad_norms")
    )

    for ours, key in (
        (score["mixing_logit"].flatten(), "mixing_logit"),
        (score["network.conv_in.weight"], "in_conv"),
        (vae_[names["enc_sampler.0.1.bias"]], "enc_sampler0_bias"),
    ):
        expected = arrays[f"{step}_grad_{key}"]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@priors
@pytest.mark.parametrize("custom", [False, True])
def test_weights_of_the_regularisers_are_imported(path: Path, custom: bool, tmp_path: Path) -> None:
    """With custom_conv_dae the published search finds no convolution of the prior."""
    fixture, given = prior_fixture(path), imported(path)[1]
    args = {**fixture.args, "custom_conv_dae": custom}
    torch.save({**fixture.raw, "args": args}, tmp_path / "custom.pt")
    import_official_lsgm(tmp_path / "custom.pt", tmp_path / "run")
    config = load_run_config(tmp_path / "run")
    assert isinstance(config, LSGMTrainConfig)
    weight = args["weight_decay_norm_dae"]
    spectral = 0 if custom else weight
    assert config.prior.spectral_regularization == spectral
    assert config.prior.norm_regularization == weight
    assert config.objective.spectral_regularization == args["weight_decay_norm_vae"]
    if custom == fixture.args["custom_conv_dae"]:
        assert given.prior == config.prior


@priors
@torch.no_grad()
def test_regularisers(path: Path) -> None:
    """Four iterations on from the stored vectors, of the training weights."""
    fixture = prior_fixture(path)
    arrays, raw = fixture.arrays, fixture.raw
    if "reg_dae_spectral" not in arrays:
        assert "dae_sn_calculator" not in raw
        pytest.skip("a release without power-iteration vectors")
    score = fixture.scores["raw"]
    assert norm_regularizer(score).item() == pytest.approx(arrays["reg_dae_norm"].item(), rel=1e-4)
    if "reg_vae_spectral" in arrays:
        checkpoint = read_official_checkpoint(path)
        vae_ = load_official_vae(checkpoint)
        spectral = load_official_regularizer(checkpoint, vae_)()
        assert spectral.item() == pytest.approx(arrays["reg_vae_spectral"].item(), rel=1e-4)
        norm = arrays["reg_vae_norm"].item()
        assert norm_regularizer(vae_).item() == pytest.approx(norm, rel=1e-4)
    if fixture.args["custom_conv_dae"]:
        assert arrays["reg_dae_spectral"].item() == 0
        return
    convolutions = score_convolutions(score)
    names = {module: name for name, module in score.named_modules()}
    order = [
        names[layer]
        for module in published_modules(score.network)
        for layer in module.modules()
        if names[layer] in convolutions
    ]
    assert sorted(order) == sorted(convolutions)
    # In published order, so that the stored vectors are those of the right layers.
    regularizer = SpectralNormRegularizer({name: convolutions[name] for name in order})
    vectors = {f"{r}x{c}": u for (r, c), u in raw["dae_sn_calculator"]["sr_u"].items()}
    regularizer.load_state_dict({"u": vectors, "fresh": False})
    assert regularizer().item() == pytest.approx(arrays["reg_dae_spectral"].item(), rel=1e-4)
    exact = sum(torch.linalg.matrix_norm(c.weight.flatten(1), 2) for c in convolutions.values())
    assert regularizer(2000).item() == pytest.approx(exact.item(), rel=1e-3)
