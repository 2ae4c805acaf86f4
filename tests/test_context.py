"""The autoregressive decoder: causality, exact likelihood, and draws that follow it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lsgm.config.architecture import VAEConfig
from lsgm.data import DataSpec
from lsgm.evaluation.quality.scores import _pixels, scored_images
from lsgm.models.latent import VAEModel
from vae import HierarchicalVAE, elbo
from vae.context import AutoregressiveBernoulli, CausalContext, CausalConv2d
from vae.random import RowGenerators


def context(
    channels: int = 1, width: int = 6, size: int = 5, blocks: int = 2, seed: int = 0
) -> CausalContext:
    torch.manual_seed(seed)
    net = CausalContext(channels, width, size, blocks)
    with torch.no_grad():  # far from independent pixels
        net.first.log_weight_norm.add_(1.5)
        net.last.log_weight_norm.add_(1.5)
    return net.double()


@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_a_pixel_depends_on_exactly_the_pixels_before_it_within_reach(
    size: int, blocks: int
) -> None:
    net = context(size=size, blocks=blocks)
    side, i, j = 15, 9, 7
    x = torch.randn(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    features = torch.randn(1, 6, side, side, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(net(features, x)[0, 0, i, j], x)
    seen = {(int(a), int(b)) for a, b in gradient[0, 0].nonzero()}
    assert seen, "nothing is seen"
    assert all((a, b) < (i, j) for a, b in seen)
    assert all(i - a <= net.reach and abs(b - j) <= net.reach for a, b in seen)
    # All of the first window, and the two ends of the reach.
    first = size // 2
    window = {(a, b) for a in range(i - first, i + 1) for b in range(j - first, j + first + 1)}
    assert {p for p in window if p < (i, j)} <= seen
    assert min(a for a, _ in seen) == i - net.reach
    assert min(b for _, b in seen) == j - net.reach


def test_a_deepened_context_keeps_its_log_odds_sees_further_and_learns() -> None:
    net = context()
    features = torch.randn(4, 6, 12, 12, dtype=torch.float64)
    x = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    before, reach = net(features, x), net.reach
    trained = {name: value.clone() for name, value in net.state_dict().items()}
    net.deepen(2)
    after = net(features, x)
    assert (after - before).square().mean().sqrt() < 0.01 * before.std()
    assert net.reach == reach + 2 and len(net.causal_blocks()) == 4
    assert all(torch.equal(net.state_dict()[name], value) for name, value in trained.items())
    after.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_the_likelihood_sums_to_one_over_all_images() -> None:
    net = context(size=3, blocks=1)
    features = torch.randn(1, 6, 3, 4, dtype=torch.float64)
    images = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=12)), dtype=torch.float64)
    likelihood = AutoregressiveBernoulli(features.expand(len(images), -1, -1, -1), net)
    log_prob = likelihood.log_prob(images.view(-1, 1, 3, 4)).flatten(1).sum(1)
    assert log_prob.logsumexp(0).item() == pytest.approx(0.0, abs=1e-9)


def test_draws_have_the_probabilities_that_the_likelihood_says() -> None:
    net = context(size=3, blocks=1)
    features = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    images = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    exact = AutoregressiveBernoulli(features.expand(64, -1, -1, -1), net)
    probability = exact.log_prob(images.view(-1, 1, 2, 3)).flatten(1).sum(1).exp()
    n = 40_000
    likelihood = AutoregressiveBernoulli(features.expand(n, -1, -1, -1), net)
    draws = likelihood.sample(torch.Generator().manual_seed(1)).flatten(1)
    codes = ((draws + 1) / 2 @ (2.0 ** torch.arange(5, -1, -1).to(draws))).long()
    counts = torch.bincount(codes, minlength=64).double()
    chi2 = ((counts - n * probability).square() / (n * probability)).sum().item()
    assert chi2 < 63 + 5 * math.sqrt(2 * 63)


def test_the_mean_estimate_is_unbiased() -> None:
    net = context(size=3, blocks=1)
    features = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    images = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    images = images.view(-1, 1, 2, 3)
    exact = AutoregressiveBernoulli(features.expand(64, -1, -1, -1), net)
    probability = exact.log_prob(images).flatten(1).sum(1).exp()
    mean = (probability.view(-1, 1, 1, 1) * images).sum(0)
    n = 20_000
    likelihood = AutoregressiveBernoulli(features.expand(n, -1, -1, -1), net)
    pictures = likelihood.mean_estimate(torch.Generator().manual_seed(2))
    error = pictures.mean(0) - mean
    standard_error = pictures.std(0) / math.sqrt(n) + 1e-7
    assert ((error / standard_error).abs() < 4.5).all()


def test_a_draw_by_windows_equals_one_by_whole_images() -> None:
    net = context(channels=2, size=5, blocks=2)
    crop, side = 1, 9
    features = torch.randn(3, 6, side, side, dtype=torch.float64)
    likelihood = AutoregressiveBernoulli(features, net, crop)
    draw = likelihood.sample(torch.Generator().manual_seed(3)).double()
    uniform = torch.rand(draw.shape, generator=torch.Generator().manual_seed(3))
    whole = -torch.ones_like(draw)
    for i in range(crop, side - crop):
        for j in range(crop, side - crop):
            on = uniform[..., i, j] < torch.sigmoid(net(features, whole)[..., i, j])
            whole[..., i, j] = torch.where(on, 1.0, -1.0).double()
    assert torch.equal(draw, whole)
    assert (draw[:, :, 0] == -1).all()


def small_vae(**changes: object) -> HierarchicalVAE:
    torch.manual_seed(0)
    options: dict[str, object] = {
        "image_channels": 1,
        "image_size": 16,
        "num_channels_enc": 8,
        "num_channels_dec": 8,
        "channel_mult": (1, 2),
        "num_preprocess_blocks": 1,
        "num_preprocess_cells": 1,
        "num_postprocess_cells": 1,
        "num_latent_scales": 1,
        "num_groups_per_scale": 2,
        "num_latent_per_group": 3,
        "num_cell_per_cond_enc": 1,
        "num_cell_per_cond_dec": 1,
        "crop": 2,
        "context_size": 5,
        "context_channels": 8,
    }
    return HierarchicalVAE(**(options | changes))  # type: ignore[arg-type]


def test_the_vae_scores_and_draws_with_a_context() -> None:
    vae = small_vae().eval()
    x: Tensor = 2.0 * (torch.rand(4, 1, 16, 16) < 0.3) - 1.0
    output = vae(x, rng=torch.Generator().manual_seed(0))
    assert isinstance(output.likelihood, AutoregressiveBernoulli)
    terms = elbo(vae, output, x)
    direct = vae.context(output.likelihood.features, x)[..., 2:-2, 2:-2]
    target = (x[..., 2:-2, 2:-2] + 1) / 2
    loss = torch.nn.functional.binary_cross_entropy_with_logits(direct, target, reduction="none")
    torch.testing.assert_close(terms.reconstruction, loss.flatten(1).sum(1))
    rows = [vae.sample(n, RowGenerators.of(5, range(n))) for n in (1, 3)]
    torch.testing.assert_close(rows[0], rows[1][:1])  # does not depend on the batch


def test_scored_images_are_draws_of_the_decoder_itself() -> None:
    """Under the convention ``draws`` pixels are drawn in order, not anew from one draw's means."""
    spec = DataSpec("digits", 1, 12, 2, binary=True, num_classes=10, flip=False, affine=False)
    vae = small_vae().eval()
    model = VAEModel(vae, spec, VAEConfig())
    eps = [torch.randn(3, 3, 8, 8) for _ in range(2)]
    with _pixels(model, spec, "draws"):
        drawn = model.decode(eps, torch.Generator().manual_seed(0))
    exact = vae.decode(eps).sample(torch.Generator().manual_seed(0))
    assert torch.equal(drawn, (exact[..., 2:-2, 2:-2] + 1) / 2)
    assert torch.equal(scored_images(drawn, spec, "draws", 0), drawn)
    with _pixels(model, spec, "means"):
        pictures = model.decode(eps, torch.Generator().manual_seed(0))
    assert not torch.equal(pictures, drawn)
    # The same uniforms made both: a pixel is on where it lies below its conditional mean.
    uniform = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal((uniform[..., 2:-2, 2:-2] < pictures).float(), drawn)


def test_without_a_context_nothing_changes() -> None:
    plain = small_vae(context_size=0)
    assert not [name for name in plain.state_dict() if "context" in name]


def test_a_context_needs_binary_pixels() -> None:
    with pytest.raises(ValueError, match="decoder_dist bin"):
        small_vae(decoder_dist="dml")
    with pytest.raises(ValueError, match="odd"):
        CausalConv2d(1, 1, 4, include_centre=False)
