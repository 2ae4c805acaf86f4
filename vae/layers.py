"""Convolutions, normalisation and gating that the residual cells are made of.

All of it runs under autocast with float32 parameters: effective kernels and batch statistics are
float32, whatever the activations are. On a CPU ``channels_last`` activations make every layer here
1.5 to 3 times faster, the depth-wise convolution most of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BatchNorm",
    "BatchNormSwish",
    "Conv2d",
    "DepthwiseConv2d",
    "SqueezeExcitation",
    "WeightNormConv2d",
    "frozen_statistics",
    "normalize_kernel",
    "soft_clamp",
    "upsample_nearest",
]


def soft_clamp(x: Tensor, limit: float) -> Tensor:
    """``limit * tanh(x / limit)``, in float32 at least."""
    return torch.tanh(at_least_float32(x) / limit) * limit


def at_least_float32(x: Tensor) -> Tensor:
    """``x``, with half-precision formats raised to float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def upsample_nearest(x: Tensor) -> Tensor:
    """Repeat each pixel of (B, C, H, W) 2x2 times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def normalize_kernel(direction: Tensor, log_norm: Tensor) -> Tensor:
    """Kernel of norm about ``exp(log_norm)`` along ``direction``, per output channel.

    ``W_o = exp(g_o) V_o / (|V_o| + 1e-5)`` (weight normalisation, arXiv 1602.07868).

    Args:
        direction: ``V`` (C_out, C_in / groups, k, k).
        log_norm: ``g`` (C_out, 1, 1, 1).
    """
    norm = torch.linalg.vector_norm(direction, dim=(1, 2, 3), keepdim=True)
    return direction * (log_norm.exp() / (norm + 1e-5))


class Conv2d(nn.Conv2d):
    """A convolution that tells the spectral regulariser its effective kernel."""

    def kernel(self) -> Tensor:
        """Effective kernel (C_out, C_in / groups, k, k)."""
        return self.weight


class DepthwiseConv2d(Conv2d):
    """A k x k convolution of each channel on its own, size-preserving, without bias.

    On a CPU the backward pass over contiguous activations is 2 to 3 times slower than over
    ``channels_last`` ones (92 against 33 ms for 16 x 192 x 32 x 32 on one core), so the activations
    are brought into that layout first.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight)


class _DepthwiseBFloat16(torch.autograd.Function):
    """Depth-wise convolution on a CPU in bfloat16, each pass in the format in which it is quick.

    The library's backward pass in bfloat16 takes four times as long as in float32, nearly all of it
    for the kernel's gradient. The input's gradient is a depth-wise convolution itself, with the
    mirrored kernel, and stays in bfloat16; the kernel's is taken in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return F.conv2d(x, kernel.to(x.dtype), padding=kernel.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        padding, groups = kernel.shape[-1] // 2, x.shape[1]
        grad_x = grad_kernel = None
        if ctx.needs_input_grad[0]:
            mirrored = kernel.flip(2, 3).to(grad.dtype)
            grad_x = F.conv2d(grad, mirrored, padding=padding, groups=groups)
        if ctx.needs_input_grad[1]:
            grad_kernel = torch.ops.aten.convolution_backward(
                grad.float(),
                x.float(),
                kernel.float(),
                None,
                (1, 1),
                (padding, padding),
                (1, 1),
                False,
                (0, 0),
                groups,
                (False, True, False),
            )[1].to(kernel.dtype)
        return grad_x, grad_kernel


def depthwise_conv2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each channel of (B, C, H, W) with its own kernel, (C, 1, k, k); keeps the size."""
    padding, groups = kernel.shape[-1] // 2, x.shape[1]
    if x.device.type != "cpu":
        return F.conv2d(x, kernel, padding=padding, groups=groups)
    if x.dtype == torch.bfloat16:
        return _DepthwiseBFloat16.apply(x.contiguous(memory_format=torch.channels_last), kernel)
    with torch.autocast("cpu", enabled=False):
        x = at_least_float32(x).contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, kernel.to(x.dtype), padding=padding, groups=groups)


class WeightNormConv2d(nn.Module):
    """Weight-normalised convolution whose kernel norm is a parameter in log scale (see
    :func:`normalize_kernel`).

    Args:
        in_channels: ``C_in``.
        out_channels: ``C_out``.
        kernel_size: ``k``; the padding is ``k // 2``.
        stride: Of the convolution.
        bias: Whether to add a bias.
        groups: Number of channel groups.
        mask: Optional constant (C_out, C_in / groups, k, k) multiplied onto the direction before it
            is normalised.
    """

    mask: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        bias: bool = True,
        groups: int = 1,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        plain = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups, bias=bias)
        self.stride, self.groups, self.padding = stride, groups, kernel_size // 2
        self.weight = plain.weight
        self.bias = plain.bias
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self._direction(), dim=(1, 2, 3), keepdim=True)
        self.log_weight_norm = nn.Parameter(torch.log(norm + 1e-2))

    def _direction(self) -> Tensor:
        return self.weight if self.mask is None else self.weight * self.mask

    def kernel(self) -> Tensor:
        """Effective kernel (C_out, C_in / groups, k, k), float32."""
        return normalize_kernel(self._direction(), self.log_weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        if self.groups > 1 and self.groups == x.shape[1]:
            out = depthwise_conv2d(x, kernel)
            return out if self.bias is None else out + self.bias.view(1, -1, 1, 1)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, groups=self.groups)

    def extra_repr(self) -> str:
        out_channels, in_channels, size, _ = self.weight.shape
        return (
            f"{in_channels * self.groups}, {out_channels}, kernel_size={size}, stride={self.stride}"
        )


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation (arXiv 1502.03167) over (B, H, W), synchronised over all processes on any
    device.

    Running statistics move by 5% a step; the running variance takes the unbiased batch variance.
    With several processes, mean and variance are those of the union of their batches, and the
    gradients after averaging over processes are those of one process that holds them all.
    ``torch.nn.SyncBatchNorm`` does this on GPUs only.

    Args:
        channels: ``C``.
        multiplicity: Each value stands for this many equal ones in the running variance's count. A
            layer that precedes a nearest-neighbour up-sampling by 2 sees the statistics of the
            up-sampled map with 4.
    """

    def __init__(self, channels: int, multiplicity: int = 1) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.05)
        self.multiplicity = multiplicity
        self.track_statistics = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if self.track_statistics:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            out, mean, var, count = _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps)
            if self.track_statistics:
                self._update(mean, var, count * self.multiplicity)
            return out
        mean, var = self.running_mean, self.running_var
        assert mean is not None and var is not None and self.momentum is not None
        if not self.track_statistics:
            mean, var = mean.clone(), var.clone()
        elif self.multiplicity > 1:
            # Autograd keeps the one that it is given, so the correction goes elsewhere.
            var = var.clone()
        out = F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)
        if self.track_statistics and self.multiplicity > 1:
            self._correct_variance(var, x.numel() // x.shape[1])
        return out

    @torch.no_grad()
    def _correct_variance(self, updated: Tensor, count: int) -> None:
        """Replace Bessel's correction for ``count`` values by that for all that they stand for."""
        assert self.running_var is not None and self.momentum is not None
        ratio = (count - 1) * self.multiplicity / (count * self.multiplicity - 1)
        self.running_var.mul_((1 - ratio) * (1 - self.momentum)).add_(updated, alpha=ratio)

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert (
            self.running_mean is not None
            and self.running_var is not None
            and self.momentum is not None
        )
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)


class BatchNormSwish(BatchNorm):
    """Batch normalisation followed by ``swish(x) = x sigmoid(x)``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class _SyncBatchNorm(torch.autograd.Function):
    """Batch normalisation with the mean and variance of all processes' batches together."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        # In two passes, as E[x^2] - E[x]^2 loses the variance of a channel whose mean is large.
        local = x.new_tensor([x.numel() // channels], dtype=dtype)
        total = torch.cat([x.sum((0, 2, 3), dtype=dtype), local])
        dist.all_reduce(total)
        count = total[-1]
        mean = total[:-1] / count
        var = (x - mean.view(1, -1, 1, 1)).square().sum((0, 2, 3))
        dist.all_reduce(var)
        var = var / count
        out = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, var, count = ctx.saved_tensors
        inv_std = torch.rsqrt(var + ctx.eps)
        centred = x - mean.view(1, -1, 1, 1)
        grad_bias = grad.sum((0, 2, 3), dtype=mean.dtype)
        grad_weight = (grad * centred).sum((0, 2, 3)) * inv_std
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        mean_grad, mean_product = sums / count
        scale = weight * inv_std
        shift, slope = scale * mean_grad, scale * mean_product * inv_std
        grad_x = grad * scale.view(1, -1, 1, 1)
        grad_x = grad_x - centred * slope.view(1, -1, 1, 1) - shift.view(1, -1, 1, 1)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Leave running statistics alone inside, as for the second pass of activation checkpointing."""
    layers = [m for m in module.modules() if isinstance(m, BatchNorm)]
    for layer in layers:
        layer.track_statistics = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_statistics = True


class SqueezeExcitation(nn.Module):
    """Gates (B, C, 1, 1) of channels from their means (arXiv 1709.01507), always in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            mean = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
            gates = torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))
        return gates[:, :, None, None]
