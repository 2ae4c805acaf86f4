"""Exact and estimated traces against closed forms, on vectors and on images."""

from __future__ import annotations

import pytest
import torch

from lsgm.divergence import ExactDivergence, HutchinsonDivergence, make_divergence

SHAPES = [(6, 5), (3, 2, 3, 2)]
on_shapes = pytest.mark.parametrize("shape", SHAPES, ids=["vectors", "images"])


def linear_field(shape):
    """x -> A x + sin(x), whose Jacobian A + diag(cos x) is full, with its exact divergence."""
    dims = torch.Size(shape[1:]).numel()
    matrix = torch.randn(
        dims, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def field(x):
        flat = x.flatten(1)
        return (flat @ matrix.T + flat.sin()).reshape(x.shape)

    return field, lambda x: matrix.trace() + x.flatten(1).cos().sum(1), matrix


@on_shapes
def test_exact_divergence(shape):
    field, exact, _ = linear_field(shape)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    divergence = ExactDivergence()
    with torch.no_grad():
        value, trace = divergence(field, x, divergence.probe(x))
    torch.testing.assert_close(value, field(x))
    torch.testing.assert_close(trace, exact(x))
    assert trace.shape == (shape[0],)
    assert not value.requires_grad
    assert not trace.requires_grad


@on_shapes
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_its_known_variance(shape, distribution):
    field, exact, matrix = linear_field(shape)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))[:1]
    x = x.expand(4000, *shape[1:])
    divergence = HutchinsonDivergence(distribution)
    probe = divergence.probe(x, torch.Generator().manual_seed(2))
    value, estimates = divergence(field, x, probe)
    torch.testing.assert_close(value, field(x))
    jacobian = matrix + torch.diag(x[0].flatten().cos())
    symmetric = 0.5 * (jacobian + jacobian.T)
    variance = 2 * symmetric.square().sum()  # of a Gaussian probe's quadratic form
    if distribution == "rademacher":
        variance = variance - 2 * symmetric.diag().square().sum()
    error = (variance / len(x)).sqrt()
    assert (estimates.mean() - exact(x)[0]).abs() < 4 * error
    assert estimates.var() == pytest.approx(variance.item(), rel=0.15)


def test_rademacher_is_exact_for_a_diagonal_jacobian():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    divergence = make_divergence("hutchinson")
    probe = divergence.probe(x, torch.Generator().manual_seed(0))
    assert set(probe.unique().tolist()) == {-1.0, 1.0}
    _, estimate = divergence(torch.sin, x, probe)
    torch.testing.assert_close(estimate, x.cos().flatten(1).sum(1))


def test_more_probes_average():
    field, exact, _ = linear_field((1, 5))
    x = torch.zeros(500, 5, dtype=torch.float64)
    spread = []
    for num_probes in (1, 16):
        divergence = HutchinsonDivergence("gaussian", num_probes)
        probe = divergence.probe(x, torch.Generator().manual_seed(0))
        assert probe.shape == (num_probes, 500, 5)
        spread.append((divergence(field, x, probe)[1] - exact(x)).std().item())
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.2)


def test_a_field_that_ignores_its_input_has_no_divergence():
    x = torch.randn(2, 3)
    for divergence in (ExactDivergence(), HutchinsonDivergence()):
        _, trace = divergence(torch.zeros_like, x, divergence.probe(x))
        assert torch.equal(trace, torch.zeros(2))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="unknown divergence 'trace'.*exact"):
        make_divergence("trace")
    with pytest.raises(ValueError, match="distribution"):
        HutchinsonDivergence("uniform")
    with pytest.raises(ValueError, match="num_probes"):
        HutchinsonDivergence(num_probes=0)
