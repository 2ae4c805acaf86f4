from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsgm.networks import NCSNpp
from lsgm.networks.embeddings import FourierFeatures, PositionalFeatures, TimeEmbedding
from lsgm.networks.layers import (
    AttentionBlock,
    GroupNormSiLU,
    ResidualBlock,
    conv,
    linear,
    num_groups,
)
from lsgm.networks.resample import (
    ConvDownsample,
    ConvUpsample,
    Downsample,
    FIRConvDownsample,
    FIRConvUpsample,
    FIRDownsample,
    FIRUpsample,
    Upsample,
)

SMALL = {"num_channels": 16, "num_scales": 2, "num_cells_per_scale": 1, "embedding_dim": 16}


def small(seed: int = 0, **options: object) -> NCSNpp:
    torch.manual_seed(seed)
    return NCSNpp(6, 8, **{**SMALL, **options})


def awake(net: NCSNpp, seed: int = 1) -> NCSNpp:
    """Give the layers that start at almost zero ordinary weights, so that every part of the network
    counts.
    """
    rng = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        if parameter.abs().max() < 1e-3:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return net.eval()


def upfirdn(x: Tensor, kernel: Tensor, up: int, down: int, before: int, after: int) -> Tensor:
    """Zeros between samples, zero padding, true convolution, decimation: by the definition, in
    loops over taps.
    """
    batch, channels, height, width = x.shape
    stuffed = x.new_zeros(batch, channels, height * up, width * up)
    stuffed[:, :, ::up, ::up] = x
    padded = F.pad(stuffed, (before, after, before, after))
    size = kernel.shape[0]
    rows, columns = padded.shape[2] - size + 1, padded.shape[3] - size + 1
    out = x.new_zeros(batch, channels, rows, columns)
    for i, j in itertools.product(range(size), range(size)):
        out += kernel[size - 1 - i, size - 1 - j] * padded[:, :, i : i + rows, j : j + columns]
    return out[:, :, ::down, ::down]


@pytest.fixture
def kernel() -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
    return torch.outer(taps, taps)


def test_fir_resampling_against_its_definition(kernel: Tensor) -> None:
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(FIRUpsample().double()(x), upfirdn(x, 4 * kernel, 2, 1, 2, 1))
    torch.testing.assert_close(FIRDownsample().double()(x), upfirdn(x, kernel, 1, 2, 1, 1))
    half = FIRUpsample()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.shape == (2, 3, 16, 12)


def test_fir_convolutions_against_their_definition(kernel: Tensor) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    down = FIRConvDownsample(3, 5).double()
    nn.init.normal_(down.conv.bias)
    expected = F.conv2d(upfirdn(x, kernel, 1, 1, 2, 2), down.conv.weight, down.conv.bias, stride=2)
    torch.testing.assert_close(down(x), expected)
    assert expected.shape == (2, 5, 4, 4)
    up = FIRConvUpsample(3, 5).double()
    nn.init.normal_(up.conv.bias)
    stuffed = x.new_zeros(2, 3, 15, 15)
    stuffed[:, :, ::2, ::2] = x
    wide = F.conv2d(F.pad(stuffed, (2, 2, 2, 2)), up.conv.weight)
    expected = upfirdn(wide, 4 * kernel, 1, 1, 1, 1) + up.conv.bias[:, None, None]
    torch.testing.assert_close(up(x), expected)
    assert expected.shape == (2, 5, 16, 16)


def test_plain_resampling() -> None:
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(Upsample()(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(Downsample()(x), x.view(2, 3, 2, 2, 2, 2).mean((3, 5)))
    assert ConvUpsample(3, 5)(x).shape == (2, 5, 8, 8)
    layer = ConvDownsample(3, 5)
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), layer.conv.weight, stride=2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layer", [FIRUpsample(), FIRDownsample(), Upsample(), Downsample()])
def test_resampling_keeps_constants_inside(layer: nn.Module) -> None:
    y = layer(torch.ones(1, 1, 8, 8))
    torch.testing.assert_close(y[..., 1:-1, 1:-1], torch.ones_like(y[..., 1:-1, 1:-1]))


def test_attention_against_the_formula() -> None:
    torch.manual_seed(0)
    block = AttentionBlock(8).double()
    nn.init.normal_(block.out.weight)
    for layer in (block.qkv, block.out):
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    h = block.norm(x).flatten(2)
    wq, wk, wv = block.qkv.weight.chunk(3)
    bq, bk, bv = block.qkv.bias.chunk(3)
    q, k, v = (w @ h + b[:, None] for w, b in ((wq, bq), (wk, bk), (wv, bv)))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(8), dim=-1)
    mixed = torch.einsum("bij,bcj->bci", weights, v)
    out = (block.out.weight @ mixed + block.out.bias[:, None]).view_as(x)
    torch.testing.assert_close(block(x), (x + out) / math.sqrt(2))


def test_residual_block_against_the_formula() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, 12, 5, resample=FIRDownsample()).double()
    nn.init.normal_(block.conv_out.weight)
    x, time = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    down = FIRDownsample().double()
    h = down(F.silu(F.group_norm(x, 2, eps=1e-6)))
    h = block.conv_in(h) + block.time(time)[:, :, None, None]
    h = block.conv_out(F.silu(F.group_norm(h, 3, eps=1e-6)))
    torch.testing.assert_close(block(x, time), (block.shortcut(down(x)) + h) / math.sqrt(2))


def test_blocks_keep_the_variance_at_the_start() -> None:
    """Every block starts as ``x / sqrt(2)``, apart from resampling and the change of width."""
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(
        ResidualBlock(8, 8, 5)(x, torch.randn(2, 5)), x / math.sqrt(2), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(AttentionBlock(8)(x), x / math.sqrt(2), rtol=0, atol=1e-3)


def test_initial_scales() -> None:
    torch.manual_seed(0)
    for layer, variance in (
        (conv(40, 80), 2 / (9 * 120)),
        (linear(200, 100), 2 / 300),
        (conv(40, 80, scale=1e-10), 2e-10 / (9 * 120)),
    ):
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.05)
        assert not layer.bias.any()
    assert AttentionBlock(128).qkv.weight.var().item() == pytest.approx(0.1 / 128, rel=0.05)


def test_group_norm() -> None:
    assert [num_groups(c) for c in (2, 4, 20, 128, 512)] == [1, 1, 5, 32, 32]
    x = torch.randn(2, 8, 4, 4).to(torch.bfloat16)
    norm = GroupNormSiLU(8)
    plain = norm.to(torch.bfloat16)(x)
    ordered = norm(x.to(memory_format=torch.channels_last))
    assert ordered.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ordered, plain)


def test_time_features() -> None:
    t = torch.tensor([0.0, 0.123, 1.0], dtype=torch.float64)
    features = PositionalFeatures(8, 1000.0)(t)
    for j in range(4):
        angle = 1000 * t * 10000 ** (-j / 3)
        torch.testing.assert_close(features[:, j], angle.sin(), rtol=0, atol=1e-10)
        torch.testing.assert_close(features[:, 4 + j], angle.cos(), rtol=0, atol=1e-10)
    fourier = FourierFeatures(400, 16.0)
    assert fourier.frequencies.std().item() == pytest.approx(16, rel=0.2)
    assert not list(fourier.parameters()) and "frequencies" in fourier.state_dict()
    torch.testing.assert_close(
        fourier(t.float())[:, :200], (2 * math.pi * t.float()[:, None] * fourier.frequencies).sin()
    )


def test_time_embedding_stays_in_float32_under_autocast() -> None:
    embedding = TimeEmbedding(16, "positional", 1000.0)
    t = torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = embedding(t)
    assert inside.dtype == torch.float32 and torch.equal(inside, embedding(t))


@pytest.mark.parametrize("fir", [False, True])
@pytest.mark.parametrize("progressive", ["none", "output_skip", "residual"])
@pytest.mark.parametrize("progressive_input", ["none", "input_skip", "residual"])
@pytest.mark.parametrize("combine", ["sum", "cat"])
def test_every_option_starts_at_zero_and_trains(
    fir: bool, progressive: str, progressive_input: str, combine: str
) -> None:
    net = small(
        fir=fir,
        progressive=progressive,
        progressive_input=progressive_input,
        progressive_combine=combine,
        channel_mult=(1, 2, 4),
        attention_resolutions=(4,),
    )
    x, t = torch.randn(2, 6, 8, 8), torch.rand(2)
    assert net(x, t).shape == x.shape
    assert net(x, t).abs().max() < 1e-3
    awake(net)(x, t).square().sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_scalar_time_is_the_same_time_for_all() -> None:
    net = awake(small())
    x = torch.randn(3, 6, 8, 8)
    torch.testing.assert_close(net(x, torch.tensor(0.3)), net(x, torch.full((3,), 0.3)))
    assert (net(x, torch.tensor(0.3)) - net(x, torch.tensor(0.7))).abs().max() > 1e-3


def test_images_do_not_see_each_other() -> None:
    net = awake(small(fir=True))
    x, t = torch.randn(3, 6, 8, 8), torch.rand(3)
    torch.testing.assert_close(net(x, t)[1:2], net(x[1:2], t[1:2]), rtol=1e-4, atol=1e-5)


def test_attention_placement() -> None:
    def count(net: nn.Module) -> int:
        return sum(isinstance(module, AttentionBlock) for module in net.modules())

    # one after each encoder block, one after the last decoder block of the level, one in the middle
    assert count(small(attention_resolutions=(8,), num_cells_per_scale=3)) == 3 + 1 + 1
    assert count(small(attention_resolutions=(8, 4))) == 2 + 2 + 1
    assert count(small(attention_resolutions=(), middle_attention=False)) == 0


def test_memory_format_and_precision() -> None:
    net = awake(small(attention_resolutions=(8,), fir=True))
    x, t = torch.randn(2, 6, 8, 8), torch.rand(2)
    reference = net(x, t)
    net = net.to(memory_format=torch.channels_last)
    ordered = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(ordered, t), reference, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(ordered, t).float()
    assert (half - reference).norm() / reference.norm() < 0.03
    net64 = net.double()
    torch.testing.assert_close(
        net64(x.double(), t.double()).float(), reference, rtol=1e-3, atol=1e-4
    )


def test_dropout_only_in_training() -> None:
    net = awake(small(dropout=0.5))
    x, t = torch.randn(2, 6, 8, 8), torch.rand(2)
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_scales": 5}, "cannot be halved"),
        ({"channel_mult": (1,)}, "channel_mult"),
        ({"progressive": "skip"}, "unknown progressive 'skip'"),
        ({"progressive_input": "output_skip"}, "unknown progressive_input"),
        ({"progressive_combine": "add"}, "unknown progressive_combine"),
        ({"embedding_type": "sine"}, "unknown embedding_type"),
        ({"embedding_dim": 7}, "embedding_dim"),
    ],
)
def test_mistakes(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        small(**options)


@pytest.mark.parametrize("block", ["biggan", "ddpm"])
def test_activation_checkpointing_gives_the_same_gradients_from_less_memory(block: str) -> None:
    """Dropout included: the recomputation draws what the forward pass drew."""
    options = {"block": block, "dropout": 0.3, "attention_resolutions": (8,), "fir": True}
    found = {}
    for recompute in (False, True):
        net = awake(small(**options, activation_checkpointing=recompute)).double().train()
        rng = torch.Generator().manual_seed(2)
        x = torch.randn(3, 6, 8, 8, generator=rng, dtype=torch.float64).requires_grad_()
        kept: dict[int, int] = {}

        def keep(saved: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            out = net(x, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
            size = sum(kept.values()) - sum(p.nbytes for p in net.parameters())
        out.square().sum().backward()
        found[recompute] = [out.detach(), x.grad, *(p.grad for p in net.parameters())]
        found[recompute, "bytes"] = size
    for plain, recomputed in zip(found[False], found[True], strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-12, atol=1e-12)
    assert found[True, "bytes"] < 0.5 * found[False, "bytes"]
