"""The hierarchical VAE: shapes and order of the latents, densities, published sizes, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vae import HierarchicalVAE, ShardedGenerator, elbo
from vae.layers import BatchNorm, WeightNormConv2d
from vae.objective import bounds
from vae.random import rand, randn
from vae.regularization import SpectralNormRegularizer, norm_regularizer

SMALL: dict[str, Any] = {
    "image_channels": 3,
    "image_size": 16,
    "num_channels_enc": 8,
    "num_channels_dec": 8,
    "channel_mult": (1, 1, 2),
    "num_preprocess_blocks": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_cells": 2,
    "num_latent_scales": 2,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 3,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "decoder_dist": "dml",
}


def small(**changes: Any) -> HierarchicalVAE:
    torch.manual_seed(0)
    return HierarchicalVAE(**(SMALL | changes))


def images(batch: int = 3, channels: int = 3, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, size, size), generator=generator) / 127.5 - 1


@pytest.mark.parametrize("cell", ["res_mbconv", "res_bnswish", "res_bnswish2"])
@pytest.mark.parametrize("changes", [{}, {"num_nf": 2, "input_skip": True, "use_se": False}])
def test_a_pass_and_its_gradient(cell: str, changes: dict[str, Any]) -> None:
    vae = small(cell=cell, **changes)
    x = images()
    output = vae(x, rng=torch.Generator().manual_seed(0))
    shapes = [tuple(eps.shape[1:]) for eps in output.posterior.eps]
    assert shapes == list(vae.latent_shapes) == [(3, 4, 4)] * 2 + [(3, 8, 8)] * 2
    elbo(vae, output, x).nelbo.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def test_log_q_is_the_density_of_the_draw_before_the_flow() -> None:
    vae = small(num_nf=2).eval()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(3, *shape, generator=generator) for shape in vae.latent_shapes]
    with torch.no_grad():
        posterior = vae.encode(images(), noise=noise)
    groups = [g for scale in vae.decoder.latent_scales() for g in scale.latent_groups()]
    for k, group in enumerate(groups):
        mu, log_sigma = posterior.mu[k], posterior.log_sigma[k]
        before = mu + log_sigma.exp() * noise[k]
        eps = before
        for flow in group.flows:
            eps = flow(eps)
        torch.testing.assert_close(posterior.eps[k], eps)
        expected = torch.distributions.Normal(mu, log_sigma.exp()).log_prob(before)
        torch.testing.assert_close(posterior.log_q[k], expected, rtol=1e-4, atol=1e-4)


def test_encode_and_decode_are_the_two_halves_of_forward() -> None:
    vae = small(input_skip=True).eval()
    x = images()
    noise = [torch.randn(3, *shape) for shape in vae.latent_shapes]
    with torch.no_grad():
        output = vae(x, noise=noise)
        posterior = vae.encode(x, noise=noise)
        for mine, its in zip(posterior.eps, output.posterior.eps, strict=True):
            assert torch.equal(mine, its)
        assert torch.equal(vae.decode(posterior.eps).mean, output.likelihood.mean)
        picture = vae.sample(3, eps=posterior.eps)
    torch.testing.assert_close(picture, (output.likelihood.mean + 1) / 2)


def test_a_group_sees_the_latents_before_it_and_no_other() -> None:
    vae = small().eval()
    x = images()
    noise = [torch.zeros(3, *shape) for shape in vae.latent_shapes]
    moved = [n.clone() for n in noise]
    moved[1] += 1.0
    with torch.no_grad():
        a, b = vae.encode(x, noise=noise), vae.encode(x, noise=moved)
    changed = [not torch.equal(p, q) for p, q in zip(a.mu, b.mu, strict=True)]
    assert changed == [False, False, True, True]


def test_top_scale() -> None:
    vae = small()
    assert vae.top_shape == (6, 4, 4)
    eps = [torch.randn(2, *shape) for shape in vae.latent_shapes]
    top = vae.concat_top(eps)
    assert top.shape == (2, 6, 4, 4)
    for mine, its in zip(vae.split_top(top), eps, strict=False):
        assert torch.equal(mine, its)


def test_padding_does_not_count() -> None:
    vae = small(image_channels=1, decoder_dist="bin", crop=2).eval()
    assert vae.data_dimensions == 144
    x = images(channels=1).sign()
    other = x.clone()
    other[..., :2, :] *= -1
    other[..., -2:] *= -1
    with torch.no_grad():
        output = vae(x)
        assert torch.equal(vae.reconstruction(output, x), vae.reconstruction(output, other))
        inner = output.likelihood.log_prob(x)[..., 2:14, 2:14].sum((1, 2, 3))
    torch.testing.assert_close(vae.reconstruction(output, x), -inner)


def test_temperature_of_samples() -> None:
    vae = small().eval()
    with torch.no_grad():
        cold = vae.sample(2, torch.Generator().manual_seed(0), temperature=0.0)
        warm = vae.sample(2, torch.Generator().manual_seed(0))
    assert torch.equal(cold[0], cold[1])
    assert not torch.equal(warm[0], warm[1])
    assert cold.shape == (2, 3, 16, 16)
    assert warm.min() >= 0 and warm.max() <= 1


def test_bounds_share_one_encoder_pass() -> None:
    vae = small().eval()
    x = images()
    result = bounds(vae, x, 5, torch.Generator().manual_seed(0))
    assert (result.importance_weighted <= result.nelbo + 1e-2).all()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        first = elbo(vae, vae(x, rng=generator), x)
    torch.testing.assert_close(result.log_weights[0], first.log_weight)


def test_bfloat16_agrees_with_float32() -> None:
    vae = small(cell="res_mbconv", num_nf=1)
    x = images(8)
    noise = [torch.randn(8, *shape) for shape in vae.latent_shapes]
    exact = elbo(vae, vae(x, noise=noise), x).nelbo.mean()
    with torch.autocast("cpu", torch.bfloat16):
        output = vae(x, noise=noise)
        rough = elbo(vae, output, x).nelbo.mean()
    assert all(
        e.dtype == q.dtype == torch.float32
        for e, q in zip(output.posterior.eps, output.posterior.log_q, strict=True)
    )
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=0)
    rough.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_extreme_weights_give_finite_gradients(scale: float) -> None:
    """Posterior parameters and logits far out, in half precision: the soft clamps hold."""
    vae = small()
    groups = [g for s in vae.decoder.latent_scales() for g in s.latent_groups()]
    for layer in [*(g.posterior for g in groups), vae.decoder.head]:
        assert isinstance(layer, WeightNormConv2d)
        layer.log_weight_norm.data += torch.tensor(scale).log()
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        output = vae(x)
        loss = elbo(vae, output, x).nelbo.mean()
    loss.backward()
    assert loss.isfinite()
    assert all(ls.abs().max() <= 5 for ls in output.posterior.log_sigma)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def test_activation_checkpointing_changes_nothing() -> None:
    x = images()
    results = []
    for checkpointing in (False, True):
        vae = small(cell="res_mbconv", activation_checkpointing=checkpointing)
        elbo(vae, vae(x, rng=torch.Generator().manual_seed(0)), x).nelbo.mean().backward()
        results.append(([p.grad for p in vae.parameters()], list(vae.buffers())))
    for mine, its in zip(*results, strict=True):
        for a, b in zip(mine, its, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# Published models: arguments; then parameters, tensors, convolutions, batch norms, kernel shapes.
CIFAR = {"image_size": 32, "num_latent_scales": 1, "channel_mult": (1, 2), "cell": "res_bnswish"}
GREY = {"image_size": 32, "image_channels": 1, "num_latent_scales": 1, "decoder_dist": "bin"}
FACES = {"image_size": 256, "num_x_bits": 5, "input_skip": True, "num_nf": 2}


def cells(blocks: int, groups: int) -> dict[str, int]:
    return {
        "num_preprocess_cells": blocks,
        "num_postprocess_cells": blocks,
        "num_cell_per_cond_enc": groups,
        "num_cell_per_cond_dec": groups,
    }


def sizes(width: int, groups: int, latents: int) -> dict[str, int]:
    return {
        "num_channels_enc": width,
        "num_channels_dec": width,
        "num_groups_per_scale": groups,
        "num_latent_per_group": latents,
    }


BIG: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int]]] = {
    "cifar10": (
        CIFAR | cells(2, 2) | sizes(128, 20, 9),
        (100_867_740, 1434, 254, 168, 12),
    ),
    "cifar10_likelihood": (
        CIFAR | cells(3, 3) | sizes(256, 4, 45) | {"num_nf": 2},
        (130_622_772, 598, 130, 60, 15),
    ),
    "mnist": (
        GREY
        | cells(3, 1)
        | sizes(64, 2, 20)
        | {"channel_mult": (1, 2, 2), "num_preprocess_blocks": 2},
        (3_005_822, 288, 59, 48, 22),
    ),
    "omniglot": (
        GREY | cells(2, 3) | sizes(64, 3, 20) | {"channel_mult": (1, 2)},
        (5_384_190, 373, 73, 66, 20),
    ),
    "celebahq_quantitative": (
        FACES
        | cells(2, 2)
        | sizes(64, 8, 20)
        | {"channel_mult": (1, 1, 2, 4), "num_latent_scales": 3},
        (51_296_572, 2524, 662, 314, 38),
    ),
    "celebahq_qualitative": (
        FACES | cells(2, 2) | sizes(64, 10, 20) | {"channel_mult": (1, 1, 2)},
        (17_789_540, 2084, 547, 259, 28),
    ),
}


@pytest.mark.parametrize("name", BIG)
def test_published_sizes(name: str) -> None:
    changes, expected = BIG[name]
    with torch.device("meta"):
        vae = HierarchicalVAE(**(SMALL | changes))
        regularizer = SpectralNormRegularizer(vae)
    found = (
        sum(p.numel() for p in vae.parameters()),
        len(list(vae.parameters())),
        regularizer.num_layers,
        sum(isinstance(m, BatchNorm) for m in vae.modules()),
        len(regularizer.stacks),
    )
    assert found == expected


def test_regularizers_reach_the_whole_model() -> None:
    vae = small(num_nf=1)
    (SpectralNormRegularizer(vae)() + norm_regularizer(vae)).backward()
    kernels = [m for m in vae.modules() if hasattr(m, "kernel")]
    assert all(m.weight.grad is not None for m in kernels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mult": (1, 2)}, "channel_mult"),
        ({"image_size": 18}, "halved"),
        ({"cell": "res_wide"}, "cell"),
        ({"decoder_dist": "dl", "num_x_bits": 5}, "num_x_bits"),
        ({"decoder_dist": "beta"}, "decoder_dist"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_numbers_of_groups_are_checked() -> None:
    vae = small()
    with pytest.raises(ValueError, match="4 groups"):
        vae.decode([torch.zeros(1, 3, 4, 4)])
    with pytest.raises(ValueError, match="4 groups"):
        vae(images(), noise=[])


def test_two_shards_draw_the_noise_of_one_process() -> None:
    for draw in (randn, rand):
        whole = draw((6, 2, 3), torch.Generator().manual_seed(3), device="cpu")
        shards = [
            draw(
                (3, 2, 3), ShardedGenerator(torch.Generator().manual_seed(3), rank, 2), device="cpu"
            )
            for rank in range(2)
        ]
        assert torch.equal(torch.cat(shards), whole)
    with pytest.raises(ValueError, match="rank"):
        ShardedGenerator(torch.Generator(), 2, 2)
