"""Changing images with a trained run: inpainting, colourisation, classes, interpolation,
reconstruction and resampling of latent groups. ``COMMANDS`` are those of ``scripts/edit.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsgm.conditioning import (
    ProjectionInpainting,
    Projector,
    grey_projector,
    mask_projector,
)
from lsgm.models.base import DiffusionModel
from lsgm.sampling.draw import draw_batch
from lsgm.sampling.masks import state_mask
from lsgm.solvers import Solver
from vae.random import RowGenerators, randn

__all__ = [
    "class_conditional",
    "colourise",
    "inpaint",
]


# Library: each takes a model and tensors, and gives images in [0, 1]
def _replace_known(
    model: DiffusionModel,
    x: Tensor,
    projector: Projector,
    solver: Solver,
    times: Tensor,
    rng: RowGenerators,
    temperature: float,
) -> tuple[Tensor, list[Tensor]]:
    """A fresh state with the known part of that of ``x``; and the finer latents of ``x``."""
    state, finer = model.encode_state(x, mean=True)
    hook = ProjectionInpainting(model.sde, state, projector)
    start = model.prior_start(len(state), rng, temperature, solver)
    return solver.solve(model.sde, model.score, start, times, rng, [hook]).x, finer


@torch.no_grad()
def inpaint(
    model: DiffusionModel,
    x: Tensor,
    known: Tensor,
    padding: int,
    solver: Solver,
    times: Tensor,
    rng: RowGenerators,
    temperature: float = 1.0,
) -> Tensor:
    """Images that agree with ``x`` where pixels are known: exactly for a model of images; for a
    latent model, in the latents (of every scale) all of whose pixels are known.

    Args:
        model: A model with a diffusion.
        x: ``(B, C, R, R)`` in [-1, 1].
        known: bool ``(H, W)``, without padding.
        padding: Of the images that the model sees.
        solver: Should draw noise (see :mod:`lsgm.conditioning`).
        times: Its times, decreasing.
        rng: Source of all noise.
        temperature: Of the starting noise and of fresh finer latents.
    """
    mask = state_mask(known, padding, model.state_shape[-1]).to(x.device)
    state, finer = _replace_known(model, x, mask_projector(mask), solver, times, rng, temperature)
    fresh = []
    for z in finer:
        keep = state_mask(known, padding, z.shape[-1]).to(x.device)
        fresh.append(torch.where(keep, z, temperature * randn(z.shape, rng, device=z.device)))
    return model.decode_state(state, fresh)


@torch.no_grad()
def colourise(
    model: DiffusionModel,
    x: Tensor,
    solver: Solver,
    times: Tensor,
    rng: RowGenerators,
    temperature: float = 1.0,
) -> Tensor:
    """Images whose mean over the channels is that of ``x (B, 3, R, R)`` in [-1, 1], up to the clamp
    to [0, 1]; for models of colour images (arXiv 2011.13456 appendix I.3).
    """
    state, finer = _replace_known(model, x, grey_projector(), solver, times, rng, temperature)
    return model.decode_state(state, finer)


@torch.no_grad()
def class_conditional(
    model: Any,
    labels: Tensor,
    guidance: float,
    solver: Solver,
    times: Tensor,
    rng: RowGenerators,
    temperature: float = 1.0,
    classifier: Any = None,
) -> Tensor:
    """One image of each class ``labels (B,)``, int64: by a model that knows the classes, or guided
    by a noise-conditional ``classifier`` (:class:`lsgm.models.classifier.ImageClassifier`).

    Raises:
        UserError: The model takes no classes, has no such class, or does not fit the classifier.
    """
    hooks = [] if classifier is None else [classifier.guide(model, labels, guidance)]
    score = model.eps_fn(labels, guidance) if classifier is None else None
    return draw_batch(model, len(labels), rng, solver, times, temperature, hooks, score).images
