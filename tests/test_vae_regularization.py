"""Spectral and batch-norm regularisers against linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vae.layers import BatchNorm, BatchNormSwish, Conv2d, WeightNormConv2d
from vae.regularization import SpectralNormRegularizer, norm_regularizer


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        WeightNormConv2d(4, 6, 3),
        BatchNormSwish(6),
        Conv2d(6, 6, 1, bias=False),
        BatchNorm(6),
        Conv2d(6, 6, 1, bias=False),
        WeightNormConv2d(6, 6, 1, groups=6),
    )


def largest(module: nn.Module) -> torch.Tensor:
    kernels = [m.kernel() for m in module.modules() if hasattr(m, "kernel")]
    return torch.stack([torch.linalg.matrix_norm(k.flatten(1), ord=2) for k in kernels]).sum()


def test_power_iteration_finds_the_largest_singular_values() -> None:
    net = model()
    regularizer = SpectralNormRegularizer(net)
    exact = largest(net)
    first = regularizer()
    assert first <= exact + 1e-5
    torch.testing.assert_close(regularizer(500), exact, rtol=1e-4, atol=1e-4)


def test_gradient_is_that_of_the_singular_values() -> None:
    net = model().double()
    regularizer = SpectralNormRegularizer(net)
    regularizer(2000)
    (by_iteration,) = torch.autograd.grad(regularizer(), net[0].weight)
    (exact,) = torch.autograd.grad(largest(net), net[0].weight)
    torch.testing.assert_close(by_iteration, exact, rtol=1e-3, atol=1e-4)


def test_equal_shapes_are_stacked() -> None:
    regularizer = SpectralNormRegularizer(model())
    assert {shape: len(layers) for shape, layers in regularizer.stacks.items()} == {
        (6, 36): 1,
        (6, 6): 2,
        (6, 1): 1,
    }
    assert regularizer.num_layers == 4


def test_state_survives() -> None:
    net = model()
    first, second = SpectralNormRegularizer(net), SpectralNormRegularizer(net, seed=1)
    first()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(), second())
    with pytest.raises(ValueError, match="another model"):
        second.load_state_dict({"u": {}, "fresh": False})


def test_precision_is_full_under_autocast() -> None:
    net = model()
    first, second = SpectralNormRegularizer(net), SpectralNormRegularizer(net)
    expected = first()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(second(), expected)


def test_norm_regularizer() -> None:
    net = model()
    net[1].weight.data = torch.tensor([0.1, -2.0, 0.5, 1.0, 0.0, 1.5])
    assert norm_regularizer(net).item() == 3.0
    assert float(norm_regularizer(nn.Conv2d(1, 1, 1))) == 0


def test_norm_regularizer_counts_group_norms_with_a_gain() -> None:
    net = nn.Sequential(nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False), BatchNorm(4))
    net[0].weight.data = torch.tensor([0.5, -3.0, 1.0, 2.0])
    assert norm_regularizer(net).item() == 4.0


def test_named_layers_may_be_plain_convolutions() -> None:
    """Their matrix is the kernel itself; only those named count."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3), "c": nn.Conv2d(3, 4, 3)})
    regularizer = SpectralNormRegularizer({name: net[name] for name in ("a", "c")})
    assert regularizer.names == {(4, 27): ["a", "c"]}
    exact = sum(torch.linalg.matrix_norm(net[k].weight.flatten(1), ord=2).item() for k in "ac")
    assert regularizer(500).item() == pytest.approx(exact, rel=1e-4)
    regularizer().backward()
    assert net["b"].weight.grad is None and net["a"].weight.grad.abs().max() > 0


def test_keeps_no_copy_of_the_kernels_for_the_backward_pass() -> None:
    """The gradient of ``u^T W v`` to ``W`` needs the vectors alone."""
    net = nn.ModuleDict({"a": nn.Conv2d(8, 16, 3), "b": nn.Conv2d(8, 16, 3)})
    regularizer = SpectralNormRegularizer(dict(net.items()))
    regularizer()  # has more iterations
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = regularizer()
    assert kept and max(kept) < net["a"].weight.nbytes
    total.backward()
    for i, layer in enumerate(net.values()):
        u = regularizer.u[(16, 72)][i]
        v = layer.weight.detach().flatten(1).T @ u
        found = layer.weight.grad.flatten(1)
        expected = torch.outer(u, v / v.norm())
        assert torch.allclose(found, expected, atol=0.02)  # few iterations: v is one step behind u
