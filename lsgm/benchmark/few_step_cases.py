"""What few-step samplers are measured on: a mixture in closed form, or a trained LSGM's prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsgm.data import build_datasets, random_subset
from lsgm.data.spec import ImageDataset
from lsgm.errors import UserError
from lsgm.evaluation.quality.distances import frechet_distance, nearest_neighbours
from lsgm.evaluation.quality.features import FeatureExtractor, make_extractor
from lsgm.models.loading import load
from lsgm.models.release import load_data_config
from lsgm.sde import VPSDE, LinearSDE
from lsgm.solvers.base import EpsFn
from lsgm.tensors import expand_like
from vae.random import randn

__all__ = ["Case", "RingMixture", "energy_distance", "mixture_case", "run_case"]

START_SEED, PILOT_SEED, FINER_SEED, DATA_SEED = 1, 2, 3, 4
QUALITY_IMAGES = 2000


@dataclass(frozen=True)
class RingMixture:
    """Data from ``components`` equally likely isotropic Gaussians evenly on a circle in the plane,
    with variance 1 in each coordinate: the exact noise prediction of a linear SDE.
    """

    sde: LinearSDE
    components: int = 8
    std: float = 0.4

    @property
    def means(self) -> Tensor:
        """``(components, 2)``, float64."""
        angle = 2 * math.pi * torch.arange(self.components, dtype=torch.float64) / self.components
        radius = math.sqrt(2 * (1 - self.std**2))
        return radius * torch.stack([angle.cos(), angle.sin()], 1)

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        """``-sigma_t grad log q(x_t)``: ``x (B, 2)``, ``t (B,)`` to ``(B, 2)``."""
        m, var = (expand_like(c(t.to(x)), x) for c in (self.sde.mean_coef, self.sde.var))
        total = (m * self.std).square() + var
        difference = x[:, None] - m[..., None] * self.means.to(x)
        share = (-0.5 * difference.square().sum(-1) / total).softmax(1)
        return var.sqrt() / total * (share[..., None] * difference).sum(1)

    def sample(self, num: int, t: float, rng: torch.Generator) -> Tensor:
        """Draws of ``z_t``, ``(num, 2)`` float64."""
        index = torch.randint(self.components, (num,), generator=rng)
        options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float64}
        data = self.means[index] + self.std * randn((num, 2), rng, **options)
        times = torch.full((num,), t, dtype=torch.float64)
        return self.sde.perturb(data, times, randn((num, 2), rng, **options))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """``2 E|A - B| - E|A - A'| - E|B - B'|`` of points ``(N, D)`` and ``(M, D)``, unbiased; 0 for
    equal laws.
    """
    a, b = a.flatten(1).double(), b.flatten(1).double()
    within = [torch.pdist(points).mean() for points in (a, b)]
    return (2 * torch.cdist(a, b).mean() - sum(within)).item()


@dataclass(frozen=True)
class Case:
    """A problem for samplers.

    Attributes:
        name: In words.
        start: Noise at time 1 that the errors are measured from, ``(S, *shape)``.
        pilots: Other noise, for the pilots, ``(P, *shape)``.
        t_end: Where the samplers end.
        alpha: The model's own mixing coefficients, if it has any.
        quality: From end states ``(S, *shape)`` to quality figures by name, lower is better.
        pixels: From end states to images in [0, 1], if there are any.
    """

    name: str
    sde: LinearSDE
    eps_fn: EpsFn
    start: Tensor
    pilots: Tensor
    t_end: float
    alpha: Tensor | None
    quality: Callable[[Tensor], dict[str, float]]
    pixels: Callable[[Tensor], Tensor] | None = None


def _noise(sde: LinearSDE, shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return sde.prior_sample(shape, rng, device=like.device, dtype=like.dtype)


def mixture_case(samples: int, pilots: int, t_end: float) -> Case:
    """The 8-component mixture in the plane, component std 0.4, under the default VP SDE."""
    mixture = RingMixture(VPSDE())
    data = mixture.sample(4000, t_end, torch.Generator().manual_seed(DATA_SEED))
    zero = torch.zeros((), dtype=torch.float64)
    return Case(
        "8-component mixture in 2-D, std 0.4, VPSDE 0.1..20, closed-form score",
        mixture.sde,
        mixture.eps,
        _noise(mixture.sde, (samples, 2), START_SEED, zero),
        _noise(mixture.sde, (pilots, 2), PILOT_SEED, zero),
        t_end,
        None,
        lambda x: {"energy distance": energy_distance(x, data)},
    )


@dataclass(frozen=True)
class _ImageQuality:
    """Figures of images against held-out data: the Frechet distance of features, if there is an
    extractor, and the mean pixel distance to the nearest training image.
    """

    pixels: Callable[[Tensor], Tensor]
    extractor: FeatureExtractor | None
    held_out: Tensor
    train: Tensor

    def __call__(self, state: Tensor) -> dict[str, float]:
        images = self.pixels(state)
        near = nearest_neighbours(images, self.train).distances.mean().item()
        figures = {"nearest training image": near}
        if self.extractor is not None:
            name = f"Frechet distance, {self.extractor.name}"
            figures = {
                name: frechet_distance(self.extractor(images), self.extractor(self.held_out)),
                **figures,
            }
        return figures


def run_case(
    folder: Path,
    samples: int,
    pilots: int,
    t_end: float,
    extractor: str,
    device: torch.device,
    data_root: str | None = None,
) -> Case:
    """The prior of the LSGM (or the images of the data-space model) in ``folder``.

    Raises:
        UserError: The run has no score, its data are missing, or there is no such extractor.
    """
    model = load(folder, device).diffusion
    if model is None:
        raise UserError(f"{folder}: has no score-based prior, which few-step samplers need")
    zero = torch.zeros((), device=model.device)
    finer = model.sample_finer(samples, torch.Generator().manual_seed(FINER_SEED))

    @torch.no_grad()
    def pixels(state: Tensor) -> Tensor:
        state = state.to(zero)
        parts = [
            model.decode([state[i], *(part[i] for part in finer)])
            for i in torch.arange(len(state)).split(64)
        ]
        return torch.cat(parts).cpu()

    datasets = build_datasets(load_data_config(folder, root=data_root))
    network = None
    if extractor != "none":
        network = make_extractor(extractor, datasets, device=device)

    def images(dataset: ImageDataset) -> Tensor:
        return datasets.spec.unpad(dataset.batch(random_subset(len(dataset), QUALITY_IMAGES)))

    shape = tuple(model.state_shape)
    mixing = model.mixing
    return Case(
        f"{folder.name}, states of {'x'.join(map(str, shape))}",
        model.sde,
        model.score,
        _noise(model.sde, (samples, *shape), START_SEED, zero),
        _noise(model.sde, (pilots, *shape), PILOT_SEED, zero),
        t_end,
        None if mixing is None else mixing.detach().cpu(),
        _ImageQuality(pixels, network, images(datasets.test), images(datasets.train)),
        pixels,
    )
