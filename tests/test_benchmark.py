"""The baseline computes what our network computes; the accounts of a step are right."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lsgm.benchmark.accounting import (
    DEPTHWISE,
    OTHER,
    count_flops,
    operator_kind,
    time_shares,
)
from lsgm.benchmark.plain import PLAIN, make_plain
from lsgm.benchmark.training import REPEATS_OPTION, positive_number
from lsgm.errors import UserError
from vae import HierarchicalVAE
from vae.layers import BatchNorm


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
