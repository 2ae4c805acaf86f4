"""The baseline computes what our network computes; the accounts of a step are right."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lsgm.benchmark import joint
from lsgm.benchmark.accounting import (
    DEPTHWISE,
    OTHER,
    count_flops,
    operator_kind,
    peak_memory,
    time_shares,
)
from lsgm.benchmark.joint import NAMES, PriorStage, joint_ratios, measure_joint, phases
from lsgm.benchmark.plain import PLAIN, make_plain
from lsgm.benchmark.training import REPEATS_OPTION, positive_number
from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, VAEConfig
from lsgm.config.training import LSGMTrainConfig, OptimConfig, TrainConfig, VAETrainConfig
from lsgm.errors import UserError
from lsgm.tensors import expand_like
from lsgm.training.state import StepContext
from vae import HierarchicalVAE
from vae.layers import BatchNorm
from vae.random import randn


def small_vae() -> HierarchicalVAE:
    """Inverted residuals, flows, and steps up and down, in float64."""
    torch.manual_seed(0)
    return HierarchicalVAE(
        image_channels=1,
        image_size=8,
        num_channels_enc=8,
        num_channels_dec=8,
        channel_mult=(1, 2),
        num_preprocess_blocks=1,
        num_preprocess_cells=1,
        num_postprocess_cells=1,
        num_latent_scales=1,
        num_groups_per_scale=2,
        num_latent_per_group=2,
        num_cell_per_cond_enc=1,
        num_cell_per_cond_dec=1,
        num_nf=1,
    ).double()


@pytest.mark.parametrize("training", [True, False])
def test_plain_build_is_the_same_function(training: bool) -> None:
    """Same likelihood, gradients and running statistics, to rounding."""
    fast = small_vae().train(training)
    plain = copy.deepcopy(fast)
    make_plain(plain)
    assert not {type(m) for m in plain.modules()} & set(PLAIN)
    assert {type(m) for m in fast.modules()} >= set(PLAIN)
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64).round() * 2 - 1
    noise = [torch.randn(3, *shape, dtype=torch.float64) for shape in fast.latent_shapes]
    losses: list[Tensor] = []
    for vae in (fast, plain):
        output = vae(x, noise=noise)
        losses.append(vae.reconstruction(output, x).sum() + output.posterior.log_q[1].sum())
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)
    for a, b in zip(fast.modules(), plain.modules(), strict=True):
        if isinstance(a, BatchNorm) and isinstance(b, BatchNorm):
            torch.testing.assert_close(b.running_mean, a.running_mean, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(b.running_var, a.running_var, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("groups", [1, 6])
def test_operations_of_a_convolution(groups: int) -> None:
    """Forward, gradient of the input and gradient of the kernel cost the same, dense or not."""
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    forward = 2 * (2 * 4 * 5) * 6 * (6 // groups) * 9
    assert count_flops(lambda _: layer(x).sum().backward(), 0) == 3 * forward
    assert count_flops(lambda _: layer(x.detach()).sum().backward(), 0) == 2 * forward


def test_kinds_of_operators() -> None:
    x, dense, depthwise = [2, 8, 4, 4], [8, 8, 3, 3], [8, 1, 3, 3]
    assert operator_kind("aten::mkldnn_convolution", [x, dense, []]) == "convolution"
    assert operator_kind("aten::mkldnn_convolution", [x, depthwise, []]) == DEPTHWISE
    assert operator_kind("aten::convolution_backward", [x, x, depthwise]) == DEPTHWISE
    assert operator_kind("aten::convolution_backward", [x, x, dense]) == "convolution"
    grey = [2, 1, 4, 4]  # one channel in, eight out: dense
    assert operator_kind("aten::mkldnn_convolution", [grey, depthwise, []]) == "convolution"
    kinds = {
        "aten::native_batch_norm_backward": "batch norm",
        "aten::upsample_bilinear2d": "resampling",
        "aten::addmm": "matrix product",
        "aten::linalg_vector_norm": "reduction",
        "aten::_foreach_addcmul_": "optimizer",
        "aten::silu_backward": "elementwise",
        "autograd::engine::evaluate_function: MulBackward0": OTHER,
    }
    assert {name: operator_kind(name, []) for name in kinds} == kinds


def test_shares_add_up() -> None:
    a = torch.randn(64, 64)
    shares = time_shares(lambda _: (a @ a).exp_().sum(), 0, torch.device("cpu"))
    assert sum(share.share for share in shares) == pytest.approx(1)
    assert {"matrix product", "elementwise", "reduction"} <= {share.kind for share in shares}
    assert [s.share for s in shares] == sorted((s.share for s in shares), reverse=True)


def test_count_options() -> None:
    assert positive_number({"repeats": None}, REPEATS_OPTION) == 7
    for wrong in ("0", "-1", "many", "1.5"):
        with pytest.raises(UserError, match="--repeats"):
            positive_number({"repeats": wrong}, REPEATS_OPTION)


VAE_CONFIG = VAETrainConfig(
    vae=VAEConfig(
        num_channels_enc=4,
        num_channels_dec=4,
        num_preprocess_cells=1,
        num_postprocess_cells=1,
        num_latent_per_group=2,
    )
)
LSGM_CONFIG = LSGMTrainConfig(
    prior=PriorConfig(
        network=PriorNetworkConfig(
            num_channels=8, num_scales=2, num_cells_per_scale=1, embedding_dim=8
        ),
        spectral_regularization=1e-3,
        norm_regularization=1e-2,
    ),
    optim_prior=OptimConfig(optimizer="adamw", lr=1e-4),
    train=TrainConfig(batch_size=4, device="cpu"),
)


def test_a_step_of_the_prior_alone_is_its_objective_and_no_more() -> None:
    """On given latents its gradient is that of the weighted error and the prior's regularisers,
    from one evaluation of the network; the VAE takes no part.
    """
    made = phases(VAE_CONFIG, LSGM_CONFIG)
    stage, latents = made[joint.PRIOR].stage, made[joint.PRIOR].data
    assert isinstance(stage, PriorStage)
    assert {id(p) for p in stage.parameters()} == {id(p) for p in stage.score.parameters()}
    calls = []
    stage.score.network.register_forward_hook(lambda *_: calls.append(1))
    rng = torch.Generator().manual_seed(3)
    stage(latents, StepContext(0, 1, rng)).loss.backward()
    assert len(calls) == 1
    got = [p.grad.clone() for p in stage.score.parameters()]

    rng = torch.Generator().manual_seed(3)
    sde = stage.score.sde
    eps = randn(latents.shape, rng, device="cpu")
    times = stage.proposal.sample(len(latents), rng, stratified=True)
    t = times.t.float()
    error = (stage.score(sde.perturb(latents, t, eps), t) - eps).square()
    weight = expand_like(stage.weighting(sde, times.t) * times.inverse_density, error)
    loss = (weight * error).sum() / len(latents)
    # the power iteration of the spectral term has moved on, and hardly changes a gradient of 1e-3
    gains = [m.weight for m in stage.score.modules() if isinstance(m, nn.GroupNorm)]
    loss = loss + 1e-2 * sum(w.abs().max() for w in gains)
    want = torch.autograd.grad(loss, list(stage.score.parameters()), materialize_grads=True)
    biases = [i for i, p in enumerate(stage.score.parameters()) if p.ndim == 1]
    assert biases
    for i in biases:
        torch.testing.assert_close(got[i], want[i], rtol=1e-3, atol=1e-4)


def test_steps_that_are_compared_share_vae_prior_and_batch() -> None:
    made = phases(VAE_CONFIG, LSGM_CONFIG)
    assert set(made) == set(NAMES)
    vae, prior, both, frozen = (
        {id(p) for side in made[name].stage.trainables().values() for p in side.parameters()}
        for name in (joint.VAE, joint.PRIOR, joint.JOINT, joint.FROZEN)
    )
    assert vae | prior == both
    assert not vae & prior
    assert frozen == prior
    assert made[joint.VAE].data is made[joint.JOINT].data
    assert len(made[joint.PRIOR].data) == len(made[joint.JOINT].data) == 4


def test_joint_command_reports_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "in_fresh_process", lambda job, *arguments: job(*arguments))
    lines: list[str] = []
    cost = measure_joint(VAE_CONFIG, LSGM_CONFIG, repeats=2, progress=lines.append)
    assert len(cost.rounds) == len(cost.cpu_rounds) == 2
    assert all(0 < seconds for row in (*cost.rounds, *cost.cpu_rounds) for seconds in row)
    assert cost.parameters[joint.JOINT] == cost.parameters[joint.VAE] + cost.parameters[joint.PRIOR]
    assert [line.split(":")[0] for line in lines] == ["by the clock", "CPU time"]
    median = joint_ratios(cost.rounds)
    assert f"{min(median):.3f} to {max(median):.3f} in a round" in lines[0]
    assert [line.split()[0] for line in cost.lines()[1:]] == [name.split()[0] for name in NAMES] + [
        "memory:"
    ]
    assert max(cost.memory[joint.VAE], cost.memory[joint.PRIOR]) < cost.memory[joint.JOINT]
    assert cost.memory[joint.JOINT] <= cost.memory[joint.VAE] + cost.memory[joint.PRIOR]
    frozen = replace(LSGM_CONFIG, prior=replace(LSGM_CONFIG.prior, training="frozen"))
    with pytest.raises(UserError, match="prior.training: frozen has no joint step"):
        measure_joint(VAE_CONFIG, frozen)


def test_peak_memory_is_what_tensors_take_at_once() -> None:
    kept: list[Tensor] = []

    def step(number: int) -> None:
        a = torch.ones(1024, 1024)  # 4 MiB
        b = a + 1  # and 4 more
        del a, b
        kept.append(torch.ones(1024, 256))  # 1 MiB that stays

    assert peak_memory(step, 1, torch.device("cpu")) == pytest.approx(8.0, abs=0.1)
    assert peak_memory(step, 3, torch.device("cpu")) == pytest.approx(10.0, abs=0.1)


def test_ratio_of_the_joint_step() -> None:
    order = {joint.VAE: 2.0, joint.PRIOR: 3.0, joint.JOINT: 4.0, joint.FROZEN: 100.0}
    rounds = [[order[name] for name in NAMES], [2 * order[name] for name in NAMES]]
    assert joint_ratios(rounds) == [pytest.approx(0.8)] * 2
