"""Hierarchical variational autoencoder with residual latents (NVAE as LSGM uses it)."""

from __future__ import annotations

from vae.distributions import Distribution
from vae.hierarchical import HierarchicalVAE, Posterior, VAEOutput
from vae.objective import ELBO, elbo, importance_weighted_bound, kl_per_group
from vae.random import Rng, ShardedGenerator

__all__ = [
    "ELBO",
    "Distribution",
    "HierarchicalVAE",
    "Posterior",
    "Rng",
    "ShardedGenerator",
    "VAEOutput",
    "elbo",
    "importance_weighted_bound",
    "kl_per_group",
]
