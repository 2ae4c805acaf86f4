"""Score parameterisations: networks that predict the noise ``eps`` of ``z_t``.

``score = -eps / sqrt(var(t))``.

Before training, with a network that predicts zero, the score is nearly that of N(0, I):

>>> from lsgm.score import MixedNormalScore
>>> from lsgm.sde import VPSDE
>>> class Zero(nn.Module):
...     def forward(self, x_t, t):
...         return torch.zeros_like(x_t)
>>> sde, z, t = VPSDE(), torch.ones(2, 3, 4, 4), torch.tensor([0.1, 0.9])
>>> score = MixedNormalScore(Zero(), sde, channels=3, mixing_init=-6.0)
>>> torch.allclose(score(z, t), sde.normal_component(z, t), rtol=3e-3)
True
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lsgm.sde import LinearSDE
from lsgm.tensors import expand_like

__all__ = ["EpsFn", "MixedNormalScore", "NetworkScore", "Prediction"]

Prediction: TypeAlias = Literal["noise", "correction"]
"""What the network of a mixed-Normal score predicts."""

INACTIVE_LOGIT = -15.0
"""Mixing logit at which published inactive channels start: a weight of 3e-7."""


class EpsFn(Protocol):
    """Predicts the noise: ``x_t (B, *shape)``, ``t (B,)`` or a scalar -> ``eps (B, *shape)``."""

    def __call__(self, x_t: Tensor, t: Tensor, /) -> Tensor: ...


class MixedNormalScore(nn.Module):
    """Score of the prior as a correction to N(0, I).

    ``eps = (1 - a) normal(x_t, t) + a network(x_t, t)``.

    ``a = sigmoid(mixing_logit)`` is trained, one number a channel (arXiv 2106.05931 section 3.2).
    The same family of functions, written as

    ``eps = normal(x_t, t) + a network(x_t, t)``

    (``predict="correction"``), needs no small ``a`` to start at N(0, I), because the network starts
    at zero; a small ``a`` slows down all that the network learns.

    The Normal component and the mix are computed outside autocast, in float32 or in the dtype of
    ``x_t`` if that is wider.

    Args:
        network: maps ``(B, C, H, W), t (B,)`` to ``(B, C, H, W)``; it runs in its own precision.
        sde: gives the Normal component.
        channels: ``C``.
        mixing_init: initial mixing logit.
        mixed: if false the network alone predicts the noise (``a = 1``, nothing to train).
        predict: what the network stands for: ``noise``, or its ``correction`` to the Normal
            component.
        mask_mixing: whether inactive channels have no mixing, so that they are Normal exactly. If
            not (as published), their mixing is a trained number that starts near zero.

    A network that knows classes is given them too; since the mix is affine in what the network
    says, guidance of the mixed prediction is that of the network's share.

    Raises:
        ValueError: unknown ``predict``, or a correction without the mix.

    The buffer ``channel_mask (1, C, 1, 1)`` holds 1 for active channels; the network sees zeros in
    the others. It is saved with the weights.
    """

    channel_mask: Tensor

    def __init__(
        self,
        network: nn.Module,
        sde: LinearSDE,
        channels: int,
        mixing_init: float = -6.0,
        mixed: bool = True,
        predict: Prediction = "noise",
        mask_mixing: bool = True,
    ) -> None:
        super().__init__()
        if predict not in get_args(Prediction):
            raise ValueError(f"predict must be one of {get_args(Prediction)}, got {predict!r}")
        if predict == "correction" and not mixed:
            raise ValueError("predict correction needs a mixed-Normal score")
        self.predict = predict
        self.mask_mixing = mask_mixing
        self.sde = sde
        self.channels = channels
        self.mixing_logit = (
            nn.Parameter(torch.full((1, channels, 1, 1), float(mixing_init))) if mixed else None
        )
        self.register_buffer("channel_mask", torch.ones(1, channels, 1, 1))
        self.network = network

    @property
    def mixing(self) -> Tensor:
        """Weight ``a`` of the network, ``(1, C, 1, 1)`` in ``[0, 1)``, 0 in inactive channels
        (``mask_mixing``); ones if not mixed.
        """
        if self.mixing_logit is None:
            return torch.ones_like(self.channel_mask)
        mixing = torch.sigmoid(self.mixing_logit)
        return mixing * self.channel_mask if self.mask_mixing else mixing

    @property
    def non_normal(self) -> Tensor:
        """One less the coefficient of the Normal component, ``(1, C, 1, 1)`` in [0, 1]: what is
        left for an integrator that treats this component exactly.
        """
        if self.predict == "correction":
            return torch.zeros_like(self.channel_mask)
        return self.mixing

    @torch.no_grad()
    def deactivate(self, inactive: Tensor) -> None:
        """Hide channels ``inactive (C,)`` (bool) from the network and give them a Normal prior: for
        good, or without ``mask_mixing`` by a mixing logit of -15 that goes on being trained.

        Raises:
            ValueError: ``inactive`` has another shape or dtype.
        """
        if inactive.shape != (self.channels,) or inactive.dtype != torch.bool:
            raise ValueError(
                f"expected a bool mask ({self.channels},), "
                f"got {inactive.dtype} {tuple(inactive.shape)}"
            )
        inactive = inactive.to(self.channel_mask.device).view(1, -1, 1, 1)
        self.channel_mask.masked_fill_(inactive, 0.0)
        if not self.mask_mixing and self.mixing_logit is not None:
            self.mixing_logit.masked_fill_(inactive, INACTIVE_LOGIT)

    def residual(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The network alone, at the masked input: ``(B, C, H, W)`` in its own dtype."""
        dtype = self.channel_mask.dtype
        given = () if labels is None else (labels,)
        return self.network(x_t.to(dtype) * self.channel_mask, t.to(dtype), *given)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicted noise.

        Args:
            x_t: ``(B, C, H, W)``.
            t: ``(B,)`` or a scalar; float64 keeps the Normal component exact near ``t = 0``.
            labels: ``(B,)`` int64, for a network that knows classes, where their number stands for
                no class.

        Returns:
            ``(B, C, H, W)`` in float32, or in the dtype of ``x_t`` if that is wider.
        """
        residual = self.residual(x_t, t, labels)
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        if self.mixing_logit is None:
            return residual.to(dtype)
        with torch.autocast(x_t.device.type, enabled=False):
            normal = self.sde.normal_component(x_t.to(dtype), t)
            mixing = self.mixing.to(dtype)
            if self.predict == "correction":
                return torch.addcmul(normal, mixing, residual.to(dtype))
            return torch.lerp(normal, residual.to(dtype), mixing)


class NetworkScore(nn.Module):
    """Any network ``(x, t)`` as a noise prediction under any linear SDE.

    ``eps = normal(x_t, t) + network(x_t / sqrt(total_var(t)), t)``, where the Normal component
    (:meth:`lsgm.sde.LinearSDE.normal_component`) is there if asked for: what the network sees has
    unit variance at every time if the data have (arXiv 2206.00364 section 5).

    Args:
        network: maps ``(B, *shape)``, ``t (B,)`` to ``(B, *shape)``.
        sde: the diffusion.
        normal: whether the network corrects the prediction for N(0, I) data (arXiv 2106.05931
            section 3.2), rather than making all of it.
    """

    def __init__(self, network: nn.Module, sde: LinearSDE, normal: bool = False) -> None:
        super().__init__()
        self.network = network
        self.sde = sde
        self.normal = normal

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicted noise ``(B, *shape)`` in float32, or in the dtype of ``x_t`` if wider.

        ``x_t``: ``(B, *shape)``; ``t``: ``(B,)`` or a scalar.
        """
        dtype = next(self.network.parameters(), x_t).dtype
        wide = torch.promote_types(x_t.dtype, torch.float32)
        with torch.autocast(x_t.device.type, enabled=False):
            t = t.to(x_t.device).reshape(-1).expand(len(x_t))
            x = x_t * expand_like(self.sde.total_var(t).rsqrt(), x_t)
        eps = self.network(x.to(dtype), t.to(dtype)).to(wide)
        if not self.normal:
            return eps
        with torch.autocast(x_t.device.type, enabled=False):
            return eps + self.sde.normal_component(x_t.to(wide), t)
