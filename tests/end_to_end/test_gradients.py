"""The gradient of each stage's one loss against the objectives of the paper, written out.

For the VP SDE with beta(t) = b0 + (b1 - b0) t, everything is known: m(t) = exp(-B(t) / 2) and
v(t) = 1 - m(t)^2 with B(t) = b0 t + (b1 - b0) t^2 / 2, and the Normal component of the score
predicts the noise sqrt(v) z_t.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, SDEConfig, VAEConfig
from lsgm.config.training import ObjectiveConfig
from lsgm.data import DataSpec, preprocess
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.times import make_proposal
from lsgm.training.stages.latent import LSGMStage, VAEStage
from lsgm.training.state import StepContext
from lsgm.weighting import make_weighting
from vae.random import randn

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
PRIOR = PriorConfig(
    network=PriorNetworkConfig(num_channels=8, num_cells_per_scale=1, embedding_dim=8),
    sde=SDEConfig(beta_start=0.1, beta_end=20.0, time_eps=0.01),
    mixing_init=-1.0,
)
TOP, GROUPS = 2, 4
ALPHA = torch.tensor([1.0, 1.0, 4.0, 4.0], dtype=torch.float64)  # 4^i at the i-th scale
IMAGES = 6
STEP, TOTAL_STEPS = 30, 100
OBJECTIVES = {
    "plain": ObjectiveConfig(kl_const_coeff=1.0, spectral_regularization=0.0),
    "annealed": ObjectiveConfig(
        kl_const_portion=0.0, kl_const_coeff=0.7, kl_balance=False, spectral_regularization=0.0
    ),
    "balanced": ObjectiveConfig(
        kl_const_portion=0.0, kl_const_coeff=0.7, spectral_regularization=0.0
    ),
}
BETA = {"plain": 1.0, "annealed": 0.79, "balanced": 0.79}  # 0.7 + 0.3 * 30 / 100


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch):
    # The stages leave half precision by .float(); here that has to mean float64 as well.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vae = build_vae(VAE, SPEC)
    model = LSGM(vae, build_prior(PRIOR, vae), SPEC, VAE, PRIOR).double()
    with torch.no_grad():
        for p in model.parameters():  # fresh output layers are zero and would hide gradients
            p += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(IMAGES, 1, 16, 16, generator=generator, dtype=torch.float64)


def gradients(stage, images):
    """Gradient of the stage's loss by name of the parameter, and its metrics."""
    stage.zero_grad(set_to_none=True)
    context = StepContext(STEP, TOTAL_STEPS, torch.Generator().manual_seed(7))
    output = stage(images, context)
    output.loss.backward()
    names = dict(stage.model.named_parameters())
    return {k: p.grad for k, p in names.items() if p.grad is not None}, output.metrics


def assert_same_gradients(found, objective, module, prefix):
    """Check `found` against the derivatives of `objective` for all parameters of a module."""
    parameters = dict(module.named_parameters())
    wanted = torch.autograd.grad(
        objective, list(parameters.values()), retain_graph=True, allow_unused=True
    )
    scale = max(g.abs().max() for g in wanted if g is not None)
    assert scale > 1e-3
    touched = 0
    for name, gradient in zip(parameters, wanted, strict=True):
        if gradient is None:
            assert found.get(f"{prefix}.{name}") is None
            continue
        touched += bool(gradient.abs().max() > 1e-6 * scale)
        torch.testing.assert_close(
            found[f"{prefix}.{name}"], gradient, rtol=1e-8, atol=float(1e-11 * scale),
            msg=lambda m, n=name: f"{prefix}.{n}: {m}",
        )  # fmt: skip
    assert touched > len(parameters) / 2


def group_sums(parts):
    return torch.stack([part.flatten(1).sum(1) for part in parts], dim=1)


def balance_weights(kl):
    size = (kl.detach().abs().mean(0) + 0.01) / ALPHA
    return size / size.mean()


def forward(model, images):
    """Generator after, reconstruction (B,), posterior, log q and finer groups' -log p (B, N)."""
    rng = torch.Generator().manual_seed(7)
    x = preprocess(images, SPEC, 8, rng, train=True)
    output = model.vae(x, rng=rng)
    bits = binary_cross_entropy_with_logits(output.likelihood.logits, (x + 1) / 2, reduction="none")
    posterior = output.posterior
    normal = group_sums([0.5 * (e.square() + math.log(2 * math.pi)) for e in posterior.eps])
    return rng, bits.flatten(1).sum(1), posterior, group_sums(posterior.log_q), normal


def variance(t):
    return 1 - torch.exp(-(0.1 * t + (20.0 - 0.1) * t.square() / 2))


def written_out(model, images, prior, kind, *, score_q=None):
    """The VAE's objective, the prior's, and the bound on -log p(x); with the draws of seed 7."""
    rng, reconstruction, posterior, log_q, normal = forward(model, images)
    z0 = torch.cat(posterior.eps[:TOP], dim=1)
    likelihood = make_weighting("likelihood")
    proposal_p = make_proposal(prior.proposal_p, model.sde, make_weighting(prior.weighting_p))
    separate = prior.proposal_q != "same" or prior.training == "disjoint"

    def draw(proposal):
        eps = randn(z0.shape, rng, device="cpu").double()
        times = proposal.sample(len(z0), rng, stratified=prior.stratified_times)
        t, density = (x.view(-1, 1, 1, 1) for x in (times.t, 1 / times.inverse_density))
        return eps, t, density

    def noisy(z, eps, t):
        return (1 - variance(t)).sqrt() * z + variance(t).sqrt() * eps

    def squared_error(score, z, eps, t):
        z_t, a = noisy(z, eps, t), torch.sigmoid(score.mixing_logit)
        normal = variance(t).sqrt() * z_t
        return ((1 - a) * normal + a * score.network(z_t, t.flatten()) - eps).square()

    def g2(t):
        return 0.1 + (20.0 - 0.1) * t

    eps, t, density = draw(
        make_proposal("importance", model.sde, likelihood) if separate else proposal_p
    )
    weight = g2(t) / (2 * variance(t)) / density
    elements = weight * squared_error(score_q or model.score, z0, eps, t)
    low, high = variance(torch.tensor([0.01, 1.0], dtype=torch.float64))
    if prior.control_variate:
        # int g2 / (2 v) (sqrt(v) z_t - eps)^2 dt by the substitution dv = g2 (1 - v) dt
        exact = (high - low) / 2 * z0.square()
        exact = exact + (torch.log(high / low) - (high - low)) / 2
        z_t = noisy(z0, eps, t)
        elements = elements - weight * (variance(t).sqrt() * z_t - eps).square() + exact
    constant = (1 + torch.log(2 * math.pi * low)) / 2
    cross_entropy = torch.cat([group_sums((elements + constant).chunk(TOP, 1)), normal[:, TOP:]], 1)
    kl = log_q + cross_entropy
    weights = balance_weights(kl) if kind == "balanced" else torch.ones(GROUPS).double()
    vae_objective = (reconstruction + BETA[kind] * (weights * kl).sum(1)).mean()
    if separate:
        eps, t, density = draw(proposal_p)
    weight_p = {"likelihood": g2(t) / (2 * variance(t)), "unweighted": torch.ones_like(t)}
    error = squared_error(model.score, z0.detach(), eps, t)
    prior_objective = (weight_p[prior.weighting_p] / density * error).flatten(1).sum(1).mean()
    return vae_objective, prior_objective, (reconstruction + kl.sum(1)).mean()


@pytest.mark.parametrize("weighting_p", ["likelihood", "unweighted"])
@pytest.mark.parametrize("proposal_q", ["same", "importance"])
@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("kind", list(OBJECTIVES))
def test_each_side_of_joint_training_gets_its_gradient(
    model, images, kind, control_variate, proposal_q, weighting_p
):
    prior = replace(
        PRIOR, control_variate=control_variate, proposal_q=proposal_q, weighting_p=weighting_p
    )
    stage = LSGMStage(model, OBJECTIVES[kind], prior).train()
    found, metrics = gradients(stage, images)
    vae_objective, prior_objective, bound = written_out(model, images, prior, kind)
    assert_same_gradients(found, vae_objective, model.vae, "vae")
    assert_same_gradients(found, prior_objective, model.score, "score")
    torch.testing.assert_close(metrics["prior_loss"], prior_objective.detach())
    torch.testing.assert_close(metrics["nelbo"], bound.detach())


def test_disjoint_training_against_the_averaged_prior(model, images):
    prior = replace(PRIOR, training="disjoint", update_q_ema=True, weighting_p="unweighted")
    stage = LSGMStage(model, OBJECTIVES["balanced"], prior).train()
    average = copy.deepcopy(model.score)
    with torch.no_grad():
        for p in average.parameters():
            p += 0.1 * torch.randn_like(p)
    stage.use_average({"prior": average})
    found, _ = gradients(stage, images)
    vae_objective, prior_objective, _ = written_out(
        model, images, prior, "balanced", score_q=average
    )
    assert_same_gradients(found, vae_objective, model.vae, "vae")
    assert_same_gradients(found, prior_objective, model.score, "score")
    assert all(p.grad is None for p in average.parameters())


def test_a_frozen_vae_gets_no_gradient_and_keeps_its_statistics(images, model):
    model = copy.deepcopy(model)
    prior = replace(PRIOR, training="frozen", weighting_p="unweighted")
    stage = LSGMStage(model, OBJECTIVES["balanced"], prior).train()
    assert set(stage.trainables()) == {"prior"}
    before = {name: value.clone() for name, value in model.vae.state_dict().items()}
    found, _ = gradients(stage, images)
    assert all(torch.equal(value, before[name]) for name, value in model.vae.state_dict().items())
    assert found and all(name.startswith("score.") for name in found)
    _, prior_objective, _ = written_out(model, images, prior, "plain")
    assert_same_gradients(found, prior_objective, model.score, "score")


@pytest.mark.parametrize("kind", list(OBJECTIVES))
def test_the_first_stage_gets_the_gradient_of_the_bound(model, images, kind):
    stage = VAEStage(VAEModel(model.vae, SPEC, VAE), OBJECTIVES[kind]).train()
    found, metrics = gradients(stage, images)
    _, reconstruction, _, log_q, normal = forward(model, images)
    kl = log_q + normal
    weights = balance_weights(kl) if kind == "balanced" else torch.ones(GROUPS).double()
    objective = (reconstruction + BETA[kind] * (weights * kl).sum(1)).mean()
    assert_same_gradients(found, objective, model.vae, "vae")
    torch.testing.assert_close(metrics["nelbo"], (reconstruction + kl.sum(1)).mean().detach())
