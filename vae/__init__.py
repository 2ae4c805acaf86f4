"""Hierarchical variational autoencoder with residual latents (NVAE as LSGM uses it).

>>> import torch
>>> from vae import HierarchicalVAE, elbo
>>> vae = HierarchicalVAE(
...     image_channels=1,
...     image_size=16,
...     num_channels_enc=8,
...     num_channels_dec=8,
...     channel_mult=(1, 2),
...     num_preprocess_blocks=1,
...     num_preprocess_cells=1,
...     num_postprocess_cells=1,
...     num_latent_scales=1,
...     num_groups_per_scale=2,
...     num_latent_per_group=3,
...     num_cell_per_cond_enc=1,
...     num_cell_per_cond_dec=1,
... )
>>> x = torch.ones(4, 1, 16, 16)  # binary images, in [-1, 1]
>>> output = vae(x, rng=torch.Generator().manual_seed(0))
>>> [tuple(eps.shape) for eps in output.posterior.eps]
[(4, 3, 8, 8), (4, 3, 8, 8)]
>>> terms = elbo(vae, output, x)
>>> tuple(terms.nelbo.shape), tuple(vae.sample(5).shape)  # nats per image; images in [0, 1]
((4,), (5, 1, 16, 16))
"""

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
