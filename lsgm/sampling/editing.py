"""Changing images with a model: inpainting, colourisation, classes. Each function takes a model and
tensors, and gives images in [0, 1].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lsgm.conditioning import (
    ProjectionInpainting,
    Projector,
    grey_projector,
    mask_projector,
)
from lsgm.models.base import DiffusionModel
from lsgm.models.classifier import ImageClassifier
from lsgm.sampling.masks import state_mask
from lsgm.solvers.sampler import Sampler
from vae.random import RowGenerators, randn

__all__ = [
    "class_conditional",
    "colourise",
    "inpaint",
]


def _replace_known(
    model: DiffusionModel,
    x: Tensor,
    projector: Projector,
    sampler: Sampler,
    rng: RowGenerators,
) -> tuple[Tensor, list[Tensor]]:
    """A fresh state with the known part of that of ``x``; and the finer latents of ``x``."""
    state, *finer = model.encode(x, mean=True)
    hook = ProjectionInpainting(model.sde, state, projector)
    start = model.prior_start(len(state), rng, sampler.temperature, sampler.method)
    conditioned = replace(sampler, hooks=[*sampler.hooks, hook])
    return conditioned.solve(model.sde, model.score, start, rng).x, finer


@torch.no_grad()
def inpaint(
    model: DiffusionModel,
    x: Tensor,
    known: Tensor,
    sampler: Sampler,
    rng: RowGenerators,
) -> Tensor:
    """Images that agree with ``x`` where pixels are known: exactly for a model of images; for a
    latent model, in the latents (of every scale) all of whose pixels are known.

    Args:
        model: A model with a diffusion.
        x: ``(B, C, R, R)`` in [-1, 1].
        known: bool ``(H, W)``, without padding.
        sampler: Should draw noise (see :mod:`lsgm.conditioning`); its temperature is that of fresh
            finer latents too.
        rng: Source of all noise.
    """
    padding, temperature = model.spec.padding, sampler.temperature
    mask = state_mask(known, padding, model.state_shape).to(x.device)
    state, finer = _replace_known(model, x, mask_projector(mask), sampler, rng)
    fresh = []
    for z in finer:
        keep = state_mask(known, padding, z.shape).to(x.device)
        fresh.append(torch.where(keep, z, temperature * randn(z.shape, rng, device=z.device)))
    return model.decode([state, *fresh])


@torch.no_grad()
def colourise(
    model: DiffusionModel,
    x: Tensor,
    sampler: Sampler,
    rng: RowGenerators,
) -> Tensor:
    """Images whose mean over the channels is that of ``x (B, 3, R, R)`` in [-1, 1], up to the clamp
    to [0, 1]; for models of colour images (arXiv 2011.13456 appendix I.3).
    """
    state, finer = _replace_known(model, x, grey_projector(), sampler, rng)
    return model.decode([state, *finer])


@torch.no_grad()
def class_conditional(
    model: DiffusionModel,
    labels: Tensor,
    guidance: float,
    sampler: Sampler,
    rng: RowGenerators,
    classifier: ImageClassifier | None = None,
) -> Tensor:
    """One image of each class ``labels (B,)``, int64: by a model that knows the classes, or guided
    by a noise-conditional ``classifier`` (:class:`lsgm.models.classifier.ImageClassifier`).

    Raises:
        UserError: The model takes no classes, has no such class, or does not fit the classifier.
    """
    if classifier is None:
        return model.draw(len(labels), rng, sampler, labels=labels, guidance=guidance).images
    hook = classifier.guide(model, labels, guidance)
    return model.draw(len(labels), rng, replace(sampler, hooks=[*sampler.hooks, hook])).images
