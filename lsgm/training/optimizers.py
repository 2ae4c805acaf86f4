"""Optimizers from their configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Adam, Adamax, AdamW, Optimizer

from lsgm.config.training import OptimConfig
from lsgm.errors import UserError

__all__ = ["OPTIMIZERS", "make_optimizer"]


def _torch_adam(cls: type[Adam], parameters: list[nn.Parameter], config: OptimConfig) -> Optimizer:
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return cls(
        parameters,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=fused or None,
    )


def _torch_adamax(parameters: list[nn.Parameter], config: OptimConfig) -> Optimizer:
    return Adamax(
        parameters,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def _apex_adam(parameters: list[nn.Parameter], config: OptimConfig) -> Optimizer:
    try:
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        raise UserError(
            "optim.impl apex needs NVIDIA apex, built from its source at github.com/NVIDIA/apex "
            "(the package named apex on PyPI is something else); optim.impl torch needs nothing"
        ) from None
    if any(p.device.type != "cuda" for p in parameters):
        raise UserError("optim.impl apex works on CUDA devices only; use optim.impl torch")
    return fused_adam(
        parameters,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        adam_w_mode=config.optimizer == "adamw",
    )


OPTIMIZERS: dict[tuple[str, str], Callable[[list[nn.Parameter], OptimConfig], Optimizer]] = {
    ("torch", "adam"): lambda parameters, config: _torch_adam(Adam, parameters, config),
    ("torch", "adamw"): lambda parameters, config: _torch_adam(AdamW, parameters, config),
    ("torch", "adamax"): _torch_adamax,
    ("apex", "adam"): _apex_adam,
    ("apex", "adamw"): _apex_adam,
}


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> Optimizer:
    """Build the optimizer of those `parameters` that require a gradient.

    Raises:
        ValueError: If none does, or there is no such optimizer.
        UserError: If apex is asked for and missing, or the parameters are not on a CUDA device.
    """
    chosen = [p for p in parameters if p.requires_grad]
    if not chosen:
        raise ValueError("no parameter requires a gradient")
    key = (config.impl, config.optimizer)
    if key not in OPTIMIZERS:
        known = ", ".join(f"{impl} {name}" for impl, name in OPTIMIZERS)
        raise ValueError(f"no optimizer {config.impl} {config.optimizer}; there are {known}")
    return OPTIMIZERS[key](chosen, config)
