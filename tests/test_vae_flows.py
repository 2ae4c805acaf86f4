"""Flows: masks, triangular Jacobians, inverses."""

from __future__ import annotations

import pytest
import torch

from vae.flows import FlowCell, MaskedShift, causal_mask


def excite(cell: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Make the shifts large, so that a leak through the masks would show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in cell.named_parameters():
        if "log_weight_norm" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + 0.5
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return cell.double()


def jacobian(cell: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    """d out / d in of one image, in raster order with channels fastest."""
    size = z.numel()
    raw = torch.autograd.functional.jacobian(cell, z).reshape(*z.shape[1:], *z.shape[1:])
    return raw.permute(1, 2, 0, 4, 5, 3).reshape(size, size)


def test_shift_is_triangular_in_raster_order() -> None:
    z = torch.randn(1, 2, 4, 5, dtype=torch.float64)
    matrix = jacobian(excite(MaskedShift(2, mirrored=False)), z)
    assert torch.equal(matrix.triu(1), torch.zeros_like(matrix))
    assert torch.allclose(matrix.diagonal(), torch.ones(matrix.shape[0], dtype=torch.float64))
    assert (matrix.tril(-1) != 0).float().mean() > 0.2  # and it does depend on what came before


def test_mirrored_shift_is_triangular_with_space_reversed_and_channels_not() -> None:
    z = torch.randn(1, 3, 3, 4, dtype=torch.float64)
    cell = excite(MaskedShift(3, mirrored=True))
    matrix = jacobian(lambda v: cell(v.flip(2, 3)).flip(2, 3), z)
    assert torch.equal(matrix.triu(1), torch.zeros_like(matrix))
    assert torch.allclose(matrix.diagonal(), torch.ones(matrix.shape[0], dtype=torch.float64))


def test_volume_is_preserved() -> None:
    z = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    matrix = jacobian(excite(FlowCell(2)), z)
    sign, log_det = torch.linalg.slogdet(matrix)
    assert sign == 1
    assert abs(float(log_det)) < 1e-9
    assert torch.linalg.matrix_norm(matrix - torch.eye(32, dtype=torch.float64)) > 0.1


def test_inverse() -> None:
    cell = excite(FlowCell(3))
    z = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(cell.inverse(cell(z)), z, atol=1e-9, rtol=0)


def test_starts_near_the_identity() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 4, 8, 8)
    shift = FlowCell(4)(z) - z
    assert (shift - shift.mean((0, 2, 3), keepdim=True)).std() < 0.1


def test_centre_tap_between_blocks_of_channels() -> None:
    widen = causal_mask(2, 4, 3, strict=True)[:, :, 1, 1]
    assert widen.tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]
    narrow = causal_mask(4, 2, 3)[:, :, 1, 1]
    assert narrow.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_channels_that_do_not_fall_into_blocks() -> None:
    with pytest.raises(ValueError, match="equal blocks"):
        causal_mask(3, 4, 3)
    with pytest.raises(ValueError, match="groups"):
        causal_mask(4, 4, 3, groups=2)
