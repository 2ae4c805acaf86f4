"""Regularisers that keep the KL of deep towers bounded (NVAE, arXiv 2007.03898, Sec. 3.2).

>>> from vae.layers import Conv2d
>>> from vae.regularization import SpectralNormRegularizer
>>> layer = Conv2d(4, 8, 1)
>>> found = SpectralNormRegularizer(nn.Sequential(layer))(iterations=100)
>>> exact = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)  # largest singular value
>>> torch.allclose(found, exact, rtol=1e-2)
True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vae.layers import BatchNorm, Conv2d, WeightNormConv2d

__all__ = ["SpectralNormRegularizer", "norm_regularizer"]

FIRST_ITERATIONS = 40
ITERATIONS = 4
Shape = tuple[int, int]
Convolution = nn.Conv2d | WeightNormConv2d


class SpectralNormRegularizer:
    """Sum of the largest singular values of all convolution kernels, by power iteration.

    The matrix of a convolution is its effective kernel reshaped to (C_out, rest). Matrices of one
    shape are stacked and iterated together; their left vectors persist between calls, so that few
    iterations suffice. The first call of a fresh one takes 40 iterations, each later one 4.

    The vectors are drawn from a fixed seed: all processes have the same.

    Args:
        layers: The convolutions to count, by name; or a model, of which the
            :class:`vae.layers.Conv2d` and :class:`WeightNormConv2d` layers are counted.
        seed: Of the initial vectors.
    """

    def __init__(self, layers: nn.Module | Mapping[str, Convolution], seed: int = 0) -> None:
        self.stacks: dict[Shape, list[Convolution]] = {}
        self.names: dict[Shape, list[str]] = {}
        if isinstance(layers, nn.Module):
            layers = {
                name: layer
                for name, layer in layers.named_modules()
                if isinstance(layer, (Conv2d, WeightNormConv2d))
            }
        for name, layer in layers.items():
            shape = (layer.weight.shape[0], layer.weight[0].numel())
            self.stacks.setdefault(shape, []).append(layer)
            self.names.setdefault(shape, []).append(name)
        generator = torch.Generator().manual_seed(seed)
        self.u: dict[Shape, Tensor] = {
            shape: _normalize(torch.randn(len(layers), shape[0], generator=generator))
            for shape, layers in self.stacks.items()
        }
        self.fresh = True

    @property
    def num_layers(self) -> int:
        """Number of convolutions counted."""
        return sum(len(layers) for layers in self.stacks.values())

    def __call__(self, iterations: int | None = None) -> Tensor:
        """The sum, a scalar in float32 with gradient to the kernels; moves the stored vectors.

        Args:
            iterations: Power iterations; by default 40 on the first call and 4 later.
        """
        count = iterations or (FIRST_ITERATIONS if self.fresh else ITERATIONS)
        self.fresh = False
        values = []
        for shape, layers in self.stacks.items():
            # Half precision would spoil the vectors.
            with torch.autocast(layers[0].weight.device.type, enabled=False):
                kernels = [_kernel(layer).flatten(1) for layer in layers]
                u, v = _power_iteration(self.u[shape].to(kernels[0]), kernels, count)
                self.u[shape] = u
                # One by one: the stack of all kernels would be kept for the backward pass.
                values += [torch.dot(u[i], kernel @ v[i]) for i, kernel in enumerate(kernels)]
        return torch.stack(values).sum() if values else torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The vectors: ``"u"`` maps ``"rows x columns"`` to (n, rows)."""
        u = {f"{r}x{c}": vectors.cpu().clone() for (r, c), vectors in self.u.items()}
        return {"u": u, "fresh": self.fresh}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over vectors of a model with the same convolutions.

        Raises:
            ValueError: If the shapes do not fit this model.
        """
        loaded = {key: torch.as_tensor(value).float() for key, value in state["u"].items()}
        have = {f"{r}x{c}": tuple(v.shape) for (r, c), v in self.u.items()}
        if {key: tuple(value.shape) for key, value in loaded.items()} != have:
            raise ValueError("the power-iteration vectors belong to another model")
        self.u = {(r, c): loaded[f"{r}x{c}"] for r, c in self.u}
        self.fresh = bool(state["fresh"])


def _kernel(layer: Convolution) -> Tensor:
    return layer.kernel() if isinstance(layer, (Conv2d, WeightNormConv2d)) else layer.weight


@torch.no_grad()
def _power_iteration(u: Tensor, kernels: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    matrices, v = torch.stack(kernels), u
    for _ in range(count):
        v = _normalize(torch.bmm(u[:, None], matrices)[:, 0])
        u = _normalize(torch.bmm(matrices, v[:, :, None])[:, :, 0])
    return u, v


def norm_regularizer(model: nn.Module) -> Tensor:
    """Sum over all batch and group norms of the largest |gamma| of their channels, a scalar."""
    gains = [
        layer.weight.abs().amax()
        for layer in model.modules()
        if isinstance(layer, (BatchNorm, nn.GroupNorm)) and layer.affine
    ]
    if not gains:
        return torch.zeros(())
    return torch.stack(gains).sum()


def _normalize(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-3)
