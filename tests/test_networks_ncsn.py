from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsgm.networks import NCSNpp
from lsgm.networks.classifier import Classifier
from lsgm.networks.ncsn import NCSN
from lsgm.networks.refinenet import (
    ChainedPooling,
    Fusion,
    InstanceNormPlus,
    RefineBlock,
    ResidualUnits,
    StageBlock,
)
from lsgm.noise_ladder import NoiseLadder
from lsgm.sde import VPSDE

LADDER = NoiseLadder(1.0, 0.01, 5)


def small(conditional: bool = True, **options: object) -> NCSN:
    torch.manual_seed(0)
    return NCSN(3, 8, LADDER, num_channels=4, conditional=conditional, **options).double()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Layers against their formulas


def test_instance_norm_plus_against_the_formula() -> None:
    """arXiv 1907.05600 appendix A.1, with its alpha as ``gamma alpha``."""
    torch.manual_seed(0)
    norm = InstanceNormPlus(6, 3).double()
    weight = norm.table.weight
    assert weight[:, :12].mean().item() == pytest.approx(1, abs=0.02)
    assert not weight[:, 12:].any()
    nn.init.normal_(weight)
    x, level = 2 * noise(2, 6, 5, 4) + 1, torch.tensor([2, 0])
    out = norm(x, level)
    for b, i in enumerate(level.tolist()):
        gamma, alpha, beta = weight[i].view(3, 6)
        mu = torch.stack([x[b, k].mean() for k in range(6)])
        relative = (mu - mu.mean()) / (mu.var() + 1e-5).sqrt()
        for k in range(6):
            deviation = (x[b, k].var(correction=0) + 1e-5).sqrt()
            z = gamma[k] * (x[b, k] - mu[k]) / deviation + beta[k]
            torch.testing.assert_close(out[b, k], z + gamma[k] * alpha[k] * relative[k])
    single = InstanceNormPlus(6).double()
    single.table.weight.data.copy_(weight[2:].data)
    torch.testing.assert_close(single(x, None)[:1], out[:1])


def test_instance_norm_plus_keeps_brightness() -> None:
    """Plain instance norm forgets the channels' means; this one keeps what is relative."""
    norm = InstanceNormPlus(4).double()
    x = noise(1, 4, 6, 6)
    shifted = x.clone()
    shifted[:, 0] += 1
    torch.testing.assert_close(F.instance_norm(shifted), F.instance_norm(x))
    assert (norm(shifted, None) - norm(x, None)).abs().max() > 0.1
    torch.testing.assert_close(norm(x + 1, None), norm(x, None))


def elu_conv(x: Tensor, norm: nn.Module, conv: nn.Conv2d, dilation: int = 1) -> Tensor:
    return F.conv2d(
        F.elu(norm(x, None)), conv.weight, conv.bias, padding=dilation, dilation=dilation
    )


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("opens", [False, True])
def test_stage_block_against_the_formula(dilation: int, opens: bool) -> None:
    torch.manual_seed(0)
    width = 6 if opens else 4
    block = StageBlock(4, width, 1, dilation, opens).double()
    x = noise(2, 4, 8, 8)
    h = elu_conv(x, block.norm_in, block.conv_in, dilation)
    h = elu_conv(h, block.norm_out, block.conv_out, dilation)
    if not opens:
        expected = x + h
    elif dilation == 1:
        expected = F.avg_pool2d(h, 2) + F.avg_pool2d(block.shortcut(x), 2)
        assert block.shortcut.weight.shape == (6, 4, 1, 1)
    else:
        expected = h + block.shortcut(x)
        assert block.shortcut.weight.shape == (6, 4, 3, 3)
        assert block.shortcut.dilation == (2, 2)
    torch.testing.assert_close(block(x, None), expected)
    assert expected.shape[-1] == (4 if opens and dilation == 1 else 8)


@pytest.mark.parametrize("levels", [None, 1])
def test_refine_blocks_against_the_formula(levels: int | None) -> None:
    torch.manual_seed(0)
    x, y = noise(2, 4, 8, 8), noise(2, 6, 4, 4, seed=1)
    units = ResidualUnits(4, 2, levels).double()
    h = x
    for i in (0, 2):
        inner = elu_conv(h, units.norms[i], units.convs[i])
        h = h + elu_conv(inner, units.norms[i + 1], units.convs[i + 1])
    torch.testing.assert_close(units(x, None), h)
    assert all(conv.bias is None for conv in units.convs)

    fusion = Fusion((4, 6), 5, levels).double()
    first, second = (
        conv(norm(z, None))
        for z, norm, conv in zip((x, y), fusion.norms, fusion.convs, strict=True)
    )
    # corners aligned: output pixel i lies at input position 3 i / 7
    ramp = torch.linspace(0, 3, 8, dtype=torch.float64)
    hat = (1 - (ramp[:, None] - torch.arange(4)).abs()).clamp(min=0)
    torch.testing.assert_close(fusion((x, y), None), first + hat @ second @ hat.T)

    pooling = ChainedPooling(4, levels).double()
    total = path = F.elu(x)
    for norm, conv in zip(pooling.norms, pooling.convs, strict=True):
        padded = F.pad(norm(path, None), (2,) * 4, value=-math.inf if levels is None else 0.0)
        windows = padded.unfold(2, 5, 1).unfold(3, 5, 1).flatten(-2)
        path = conv(windows.amax(-1) if levels is None else windows.mean(-1))
        total = total + path
    torch.testing.assert_close(pooling(x, None), total)

    block = RefineBlock((4, 6), 5, levels, output_units=3).double()
    inputs = [unit(z, None) for unit, z in zip(block.inputs, (x, y), strict=True)]
    expected = block.output(block.pooling(block.fusion(inputs, None), None), None)
    torch.testing.assert_close(block((x, y), None), expected)
    assert len(block.output.convs) == 6 and all(len(u.convs) == 4 for u in block.inputs)


# The network


@pytest.mark.parametrize("conditional", [True, False])
def test_noise_prediction_is_minus_sigma_times_the_score(conditional: bool) -> None:
    """With the last layer a constant one the score is 1 at each level (NCSN) or ``1 / sigma``
    (NCSNv2), and ``eps = -sigma score``.
    """
    net = small(conditional)
    nn.init.zeros_(net.conv_out.weight)
    nn.init.ones_(net.conv_out.bias)
    x, t = noise(5, 3, 8, 8), LADDER.times
    sigma = LADDER.sigmas[:, None, None, None].expand_as(x)
    torch.testing.assert_close(net(x, t), -sigma if conditional else -torch.ones_like(x))


def test_only_the_level_of_the_time_is_used() -> None:
    net = small()
    net(noise(1, 3, 8, 8), LADDER.times[3:4]).square().sum().backward()
    tables = [m.table.weight.grad for m in net.modules() if isinstance(m, InstanceNormPlus)]
    for table in tables:
        assert table[3].any() and not table[[0, 1, 2, 4]].any()


def test_times_between_levels_take_the_nearest() -> None:
    net = small()
    x = noise(3, 3, 8, 8)
    at = net(x, torch.full((3,), 0.5))  # t = 1, 3/4, 1/2, 1/4, 0
    torch.testing.assert_close(net(x, torch.tensor([0.4, 0.5, 0.6])), at)
    assert (net(x, torch.full((3,), 0.7)) - at).abs().max() > 1e-3
    torch.testing.assert_close(net(x, torch.tensor(0.5)), at)


def test_the_plain_network_sees_no_time() -> None:
    net = small(False)
    x = noise(2, 3, 8, 8)
    torch.testing.assert_close(net(x, torch.tensor([0.0, 1.0])), net(x, torch.tensor([1.0, 0.3])))


@pytest.mark.parametrize("conditional", [True, False])
def test_images_do_not_see_each_other_and_every_weight_counts(conditional: bool) -> None:
    net = small(conditional)
    x, t = noise(5, 3, 8, 8), LADDER.times
    out = net(x, t)
    torch.testing.assert_close(out[1:2], net(x[1:2], t[1:2]))
    out.square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("side", "halvings"), [(28, 1), (32, 1), (64, 1), (96, 2), (128, 2), (256, 3)]
)
def test_depth_follows_the_resolution(side: int, halvings: int) -> None:
    """arXiv 2006.09011 appendix B: four stages to 64 pixels, five to 128, six to 256."""
    with torch.device("meta"):
        net = NCSN(3, side, LADDER, num_channels=4, conditional=False)
    assert len(net.stages) == len(net.refine) == 4 + (side > 64) + (side > 128)
    assert sum(stage.blocks[0].halves for stage in net.stages) == halvings
    assert net.stages[-1].blocks[-1].conv_out.dilation == (4, 4)


def test_precision() -> None:
    net = small().float()
    x, t = noise(2, 3, 8, 8).float(), torch.tensor([0.2, 0.9])
    reference = net(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t)
    assert half.dtype == torch.float32
    assert (half - reference).norm() / reference.norm() < 0.05
    ordered = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        ordered(x.to(memory_format=torch.channels_last), t), reference, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resolution": 9}, "cannot be halved"),
        ({"channel_mult": (1, 2)}, "one number a stage"),
        ({"dilations": (2, 1, 1, 1)}, "starts with 1"),
        ({"channel_mult": (2, 2, 2, 2)}, "must start with 1"),
        ({"num_channels": 1}, "at least 2"),
    ],
)
def test_mistakes(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NCSN(**{"channels": 3, "resolution": 8, "ladder": LADDER, "num_channels": 4, **options})


# Numbers of parameters, from the layers of the papers


def conv(a: int, b: int, kernel: int = 3, bias: bool = True) -> int:
    return kernel**2 * a * b + b * bias


def ncsn_parameters(
    channels: int, width: int, mults: Sequence[int], dilations: Sequence[int], levels: int | None
) -> int:
    """By adding up the layers; ``levels`` is None for NCSNv2, whose decoder does not normalise."""
    widths = [width * m for m in mults]

    def norm(c: int) -> int:
        return 3 * c * (levels or 1)

    def inner(c: int) -> int:
        return 3 * c * levels if levels else 0

    def block(a: int, b: int) -> int:
        return norm(a) + conv(a, a) + norm(a) + conv(a, b)

    def units(c: int, n: int) -> int:
        return 2 * n * (inner(c) + conv(c, c, bias=False))

    total = conv(channels, width) + 2 * block(width, width)
    for a, b, dilation in zip(widths, widths[1:], dilations[1:], strict=False):
        total += block(a, b) + conv(a, b, 1 if dilation == 1 else 3) + block(b, b)
    last = widths[-1]
    total += units(last, 2) + 2 * (inner(last) + conv(last, last, bias=False)) + units(last, 1)
    for i in reversed(range(len(widths) - 1)):
        a, b = widths[i], widths[max(i - 1, 0)]
        total += 2 * units(a, 2) + 2 * (inner(a) + conv(a, b))
        total += 2 * (inner(b) + conv(b, b, bias=False)) + units(b, 1 if i else 3)
    return total + norm(width) + conv(width, channels)


FOUR, FIVE = ((1, 2, 2, 2), (1, 1, 2, 4)), ((1, 2, 2, 4, 4), (1, 1, 1, 2, 4))
SIX = ((1, 2, 2, 2, 4, 4), (1, 1, 1, 1, 2, 4))


@pytest.mark.parametrize(
    ("channels", "side", "width", "levels", "depth", "expected"),
    [
        (1, 28, 64, 10, FOUR, 7_638_657),
        (3, 32, 128, 10, FOUR, 30_117_635),
        (3, 64, 128, None, FOUR, 29_694_083),  # "29.7 M"
        (3, 128, 128, None, FIVE, 83_445_379),
        (3, 256, 128, None, SIX, 94_132_611),
    ],
)
def test_parameters_of_ncsn(
    channels: int,
    side: int,
    width: int,
    levels: int | None,
    depth: tuple[Sequence[int], Sequence[int]],
    expected: int,
) -> None:
    assert ncsn_parameters(channels, width, *depth, levels) == expected
    ladder = NoiseLadder(1.0, 0.01, levels or 232)
    with torch.device("meta"):
        net = NCSN(channels, side, ladder, num_channels=width, conditional=levels is not None)
    assert count(net) == expected


def ncsnpp_parameters(
    nf: int, mults: Sequence[int], blocks: int, pyramid: str, features: int, side: int
) -> int:
    """NCSN++ (``pyramid`` ``"residual"`` or ``"skip"``) and DDPM++ (``"none"``) on 3 channels, by
    adding up the layers of arXiv 2011.13456 appendix H.
    """
    time = 4 * nf

    def attention(c: int) -> int:
        return 2 * c + 4 * (c * c + c)

    def residual(a: int, b: int, resampled: bool = False) -> int:
        shortcut = conv(a, b, 1) if a != b or resampled else 0
        return 2 * a + conv(a, b) + (time * b + b) + 2 * b + conv(b, b) + shortcut

    total = (features * time + time) + (time * time + time) + conv(3, nf)
    skips, width, carried = [nf], nf, 3
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            total += residual(width, nf * mult)
            width = nf * mult
            skips.append(width)
            total += attention(width) if side >> level == 16 else 0
        if level < len(mults) - 1:
            total += residual(width, width, resampled=True)
            skips.append(width)
            if pyramid == "residual":
                total += conv(carried, width)
                carried = width
            elif pyramid == "skip":
                total += conv(3, width, 1)
    total += 2 * residual(width, width) + attention(width)
    for level in reversed(range(len(mults))):
        for _ in range(blocks + 1):
            total += residual(width + skips.pop(), nf * mults[level])
            width = nf * mults[level]
        total += attention(width) if side >> level == 16 else 0
        total += 2 * width + conv(width, 3) if pyramid == "skip" else 0
        total += residual(width, width, resampled=True) if level else 0
    return total + (2 * width + conv(width, 3) if pyramid != "skip" else 0)


@pytest.mark.parametrize(
    ("side", "nf", "mults", "blocks", "pyramid", "expected"),
    [
        # the released checkpoints hold 128 frozen frequencies more: 62 758 915, 107 587 075 and
        # 65 574 549 numbers (published counts of checkpoint_24, _12 and FFHQ's _48)
        (32, 128, (1, 2, 2, 2), 4, "residual", 62_758_915 - 128),
        (32, 128, (1, 2, 2, 2), 8, "residual", 107_587_075 - 128),
        (256, 128, (1, 1, 2, 2, 2, 2, 2), 2, "skip", 65_574_549 - 128),
        # from the layers
        (32, 128, (1, 2, 2, 2), 4, "none", 61_804_419),
        (32, 128, (1, 2, 2, 2), 8, "none", 106_632_579),
        (1024, 16, (1, 2, 4, 8, 16, 32, 32, 32), 1, "skip", 105_785_880),
    ],
)
def test_parameters_of_score_sde(
    side: int, nf: int, mults: Sequence[int], blocks: int, pyramid: str, expected: int
) -> None:
    fourier = pyramid != "none"
    features = 2 * nf if fourier else nf
    assert ncsnpp_parameters(nf, mults, blocks, pyramid, features, side) == expected
    with torch.device("meta"):
        net = NCSNpp(
            3,
            side,
            num_channels=nf,
            num_scales=len(mults),
            channel_mult=mults,
            num_cells_per_scale=blocks,
            embedding_dim=features,
            embedding_width=4 * nf,
            embedding_type="fourier" if fourier else "positional",
            fir=fourier,
            progressive="output_skip" if pyramid == "skip" else "none",
            progressive_input={"skip": "input_skip"}.get(pyramid, pyramid),
        )
    assert count(net) == expected


# Classes


def test_class_embedding() -> None:
    """Added to the time embedding; starts without effect; no labels are the null class."""
    torch.manual_seed(0)
    options = {"num_channels": 8, "embedding_dim": 8}
    net = NCSNpp(1, 8, num_classes=3, **options).double()
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    net.classes.weight.data.zero_()
    x, t = noise(4, 1, 8, 8), torch.rand(4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(net(x, t, labels), net(x, t))
    nn.init.normal_(net.classes.weight)
    torch.testing.assert_close(net(x, t)[3:], net(x, t, labels)[3:])
    assert all((net(x, t) - net(x, t, labels))[i].abs().max() > 1e-3 for i in range(3))
    plain = NCSNpp(1, 8, **options).double()
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith("classes")}
    plain.load_state_dict(weights)
    net.classes.weight.data.zero_()
    torch.testing.assert_close(plain(x, t), net(x, t, labels))


# Classifiers


def test_classifier_probabilities_and_independence() -> None:
    torch.manual_seed(0)
    net = Classifier(3, 8, 5, num_channels=8, noise_conditional=True).double()
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    x, t = noise(4, 3, 8, 8), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    total = sum(net.log_prob(torch.full((4,), k), x, t).exp() for k in range(5))
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(net(x, t)[1:2], net(x[1:2], t[1:2]))
    assert (net(x, t) - net(x, t.flip(0))).abs().max() > 1e-4
    torch.testing.assert_close(net(x, torch.tensor(0.3)), net(x, torch.full((4,), 0.3)))


@pytest.mark.parametrize("noise_conditional", [False, True])
def test_classifier_mistakes(noise_conditional: bool) -> None:
    net = Classifier(1, 28, 10, num_channels=4, noise_conditional=noise_conditional)
    x, t = torch.zeros(2, 1, 28, 28), torch.rand(2)
    assert net(x, t if noise_conditional else None).shape == (2, 10)
    with pytest.raises(ValueError, match="time"):
        net(x, None if noise_conditional else t)
    with pytest.raises(ValueError, match="cannot be halved"):
        Classifier(1, 27, 10)
    with pytest.raises(ValueError, match="at least 2 classes"):
        Classifier(1, 28, 1)


def test_noise_conditional_classifier_learns_the_posterior() -> None:
    """Two Gaussian classes, of which ``p(y | x_t)`` and its gradient are known at every time."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    sde, mu, std = VPSDE(), 0.5, 0.5
    net = Classifier(1, 4, 2, num_channels=8, num_scales=1, noise_conditional=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)

    def draw(n: int) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.randint(2, (n,), generator=rng)
        x0 = mu * (2.0 * y - 1)[:, None, None, None] + std * torch.randn(n, 1, 4, 4, generator=rng)
        t = 0.1 + 0.9 * torch.rand(n, generator=rng)
        return y, sde.perturb(x0, t, torch.randn(n, 1, 4, 4, generator=rng)), t

    for _ in range(150):
        y, x, t = draw(256)
        optimizer.zero_grad()
        (-net.log_prob(y, x, t)).mean().backward()
        optimizer.step()
    y, x, t = draw(2000)
    m = sde.mean_coef(t)
    slope = 2 * m * mu / (m.square() * std**2 + sde.var(t))
    exact = F.logsigmoid((2 * y - 1) * slope * x.sum((1, 2, 3)))
    x.requires_grad_()
    learned = net.log_prob(y, x, t)
    (gradient,) = torch.autograd.grad(learned.sum(), x)
    # excess cross entropy: the divergence from the exact posterior, in nats
    assert -0.01 < (exact - learned).mean().item() < 0.05
    known = (1 - exact.exp()) * (2 * y - 1) * slope
    aligned = gradient.detach().mean((1, 2, 3))
    correlation = torch.corrcoef(torch.stack([aligned, known]))[0, 1].item()
    assert correlation > 0.8
