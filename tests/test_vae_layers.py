"""Layers and cells: weight norm, batch norm over processes, operations in another order."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from vae.cells import InvertedResidual, PlainNormConv, ResidualCell, SkipDown, SkipUp
from vae.decoder import LatentCombiner
from vae.layers import (
    BatchNorm,
    BatchNormSwish,
    DepthwiseConv2d,
    SqueezeExcitation,
    WeightNormConv2d,
    depthwise_conv2d,
    soft_clamp,
)


def test_weight_norm() -> None:
    conv = WeightNormConv2d(3, 5, 3).double()
    conv.log_weight_norm.data = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    norms = conv.kernel().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, conv.log_weight_norm.exp().flatten(), rtol=1e-4, atol=0)
    before = conv.kernel()
    conv.weight.data *= 7  # only the direction matters
    torch.testing.assert_close(conv.kernel(), before, rtol=1e-4, atol=1e-6)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.kernel(), conv.bias, padding=1))


def test_weight_norm_starts_as_the_plain_convolution() -> None:
    conv = WeightNormConv2d(8, 8, 3)
    torch.testing.assert_close(conv.kernel(), conv.weight, rtol=0.05, atol=0)


def test_depthwise_convolution_in_bfloat16_keeps_its_gradients() -> None:
    """Against float32 on the same rounded inputs: output and input gradient to the format's
    precision, the kernel's gradient, which is taken in float32, far closer.
    """
    torch.manual_seed(0)
    kernel = torch.randn(16, 1, 5, 5)
    x, grad = torch.randn(2, 16, 9, 8).bfloat16(), torch.randn(2, 16, 9, 8).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x_leaf = x.to(dtype, copy=True).requires_grad_()
        k_leaf = kernel.clone().requires_grad_()
        out = depthwise_conv2d(x_leaf, k_leaf)
        out.backward(grad.to(dtype))
        assert out.dtype == x_leaf.grad.dtype == dtype
        assert k_leaf.grad.dtype == torch.float32
        results.append([out.float(), x_leaf.grad.float(), k_leaf.grad])
    half, full = results
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(half, full, strict=True)]
    assert errors[0] < 2**-8 and errors[1] < 2**-8 and errors[2] < 1e-6


def test_depthwise_convolution_is_the_grouped_one() -> None:
    conv = DepthwiseConv2d(6, 5)
    x = torch.randn(2, 6, 7, 8)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = conv(x.contiguous(memory_format=layout))
        for c in range(6):
            expected = F.conv2d(x[:, c : c + 1], conv.weight[c : c + 1], padding=2)
            torch.testing.assert_close(out[:, c : c + 1], expected, rtol=1e-5, atol=1e-5)


def test_split_combiner_is_the_convolution_of_the_concatenation() -> None:
    combiner = LatentCombiner(6, 3)
    state, latent = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4)
    expected = F.conv2d(torch.cat([state, latent], 1), combiner.kernel(), combiner.bias)
    torch.testing.assert_close(combiner(state, latent), expected, rtol=1e-5, atol=1e-5)


def test_skip_paths() -> None:
    x = torch.randn(2, 5, 8, 6)
    down = SkipDown(5, 10)
    out = down(x)
    assert out.shape == (2, 10, 4, 3)
    s = F.silu(x)
    for conv, (i, j), part in zip(
        down.convs, ((0, 0), (1, 1), (0, 1), (1, 0)), out.split([2, 2, 2, 4], 1), strict=True
    ):
        expected = F.conv2d(s[:, :, i:, j:], conv.kernel(), conv.bias, stride=2)
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)
    up = SkipUp(5, 4)
    wide = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(up(x), up.conv(wide), rtol=1e-4, atol=1e-5)


def test_inverted_residual_may_upsample_late() -> None:
    """Outputs, gradients and running statistics are those of up-sampling at the very start."""
    torch.manual_seed(0)
    late = InvertedResidual(4, 6, 3, "up").double()
    early = copy.deepcopy(late)
    early.up = False
    for layer in early.modules():
        if isinstance(layer, BatchNorm):
            layer.multiplicity = 1
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    for _ in range(2):
        a, b = late(x), early(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        torch.testing.assert_close(a, b)
    (a**2).sum().backward()
    (b**2).sum().backward()
    for p, q in zip(late.parameters(), early.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for p, q in zip(late.buffers(), early.buffers(), strict=True):
        torch.testing.assert_close(p, q)


def test_batch_norm_swish() -> None:
    layer = BatchNormSwish(4)
    x = torch.randn(6, 4, 5, 5) * 3 + 1
    out = layer(x)
    centred = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(out, F.silu(centred), rtol=1e-4, atol=1e-4)
    assert layer.running_mean is not None and layer.running_var is not None
    torch.testing.assert_close(layer.running_mean, 0.05 * x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, 0.95 + 0.05 * x.var((0, 2, 3)))
    layer.eval()
    layer.running_mean.fill_(2)
    layer.running_var.fill_(4)
    torch.testing.assert_close(layer(x), F.silu((x - 2) / 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["conv", "plain_conv", "mbconv6"])
def test_layout_and_checkpointing_change_nothing(kind: str) -> None:
    torch.manual_seed(0)
    cell = ResidualCell(8, 8, kind)  # type: ignore[arg-type]
    others = copy.deepcopy(cell), copy.deepcopy(cell)
    others[1].checkpointing = True
    x = torch.randn(3, 8, 6, 6)
    reference = cell(x)
    reference.square().sum().backward()
    for other, given in zip(
        others, (x.contiguous(memory_format=torch.channels_last), x), strict=True
    ):
        out = other(given)
        out.square().sum().backward()
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)
        for p, q in zip(cell.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
        for p, q in zip(cell.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("kind", ["conv", "mbconv3"])
@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_cells_in_bfloat16_stay_near_float32(kind: str, resample: str) -> None:
    if kind == "mbconv3" and resample == "down":
        with pytest.raises(ValueError, match="down-sample"):
            ResidualCell(8, 8, "mbconv3", "down")
        return
    torch.manual_seed(0)
    cell = ResidualCell(8, 8, kind, resample)  # type: ignore[arg-type]
    x = torch.randn(4, 8, 8, 8)
    expected = cell(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = cell(x)
    assert out.dtype == torch.float32  # the residual stream
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())


def test_gates_are_float32_under_autocast() -> None:
    gate = SqueezeExcitation(32)
    x = torch.randn(2, 32, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = gate(x.bfloat16())
    assert out.dtype == torch.float32
    assert gate.squeeze.out_features == 4
    torch.testing.assert_close(out, gate(x), rtol=1e-2, atol=1e-2)


def test_widths_must_agree_without_resampling() -> None:
    with pytest.raises(ValueError, match="keeps its width"):
        ResidualCell(4, 6, "conv")


def test_soft_clamp() -> None:
    x = torch.linspace(-1e4, 1e4, 101).bfloat16()
    out = soft_clamp(x, 5.0)
    assert out.dtype == torch.float32
    assert out.abs().max() <= 5
    torch.testing.assert_close(soft_clamp(torch.tensor(0.01), 5.0), torch.tensor(0.01))


def test_plain_norm_conv_halves_and_doubles() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert PlainNormConv(4, 6, "down")(x).shape == (2, 6, 4, 4)
    assert PlainNormConv(4, 6, "up")(x).shape == (2, 6, 16, 16)


def make_block() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(
        ResidualCell(4, 6, "conv", "down"), ResidualCell(6, 4, "mbconv3", "up"), BatchNorm(4)
    )
    for layer in block.modules():
        if isinstance(layer, BatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return block.double()


def run_block(block: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = block(x)
    (out * weight).sum((1, 2, 3)).mean().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, 4, 4, generator=generator, dtype=torch.float64)
    x[:3] += 2  # the two halves differ, so that local statistics would be wrong
    return x, torch.randn(6, 4, 4, 4, generator=generator, dtype=torch.float64)


def half_the_batch(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        block = nn.parallel.DistributedDataParallel(make_block())
        x, weight = data()
        rows = slice(3 * rank, 3 * rank + 3)
        for _ in range(2):
            block.zero_grad()
            out, grad_x = run_block(block, x[rows], weight[rows])
        torch.save(
            {
                "out": out,
                "grad_x": grad_x / 2,
                "grads": [p.grad for p in block.parameters()],
                "buffers": list(block.module.buffers()),
            },
            f"{folder}/{rank}.pt",
        )
        del block
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes_see_the_batch_norm_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(half_the_batch, args=(port, str(tmp_path)), nprocs=2)
    block = make_block()
    x, weight = data()
    for _ in range(2):
        block.zero_grad()
        out, grad_x = run_block(block, x, weight)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(torch.cat([h["out"] for h in halves]), out, rtol=1e-6, atol=1e-6)
    grads = torch.cat([h["grad_x"] for h in halves])
    torch.testing.assert_close(grads, grad_x, rtol=1e-5, atol=1e-6)
    for half in halves:
        for mine, parameter in zip(half["grads"], block.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-5)
        for mine, buffer in zip(half["buffers"], block.buffers(), strict=True):
            torch.testing.assert_close(mine, buffer, rtol=1e-6, atol=1e-6)
