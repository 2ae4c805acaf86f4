"""What a report says beyond the table: where the nats are, how bounds tighten, how good samples
are, what they resemble, and everything that is needed to repeat the numbers.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import lsgm
from lsgm.config.training import DataConfig
from lsgm.data import Datasets, DataSpec, ImageDataset, random_subset
from lsgm.evaluation.likelihood.bounds import ImageBatches, evaluation_batches
from lsgm.evaluation.likelihood.decomposition import (
    BoundCurve,
    Decomposition,
    bound_curves,
    decompose,
)
from lsgm.evaluation.quality.distances import Neighbours, nearest_neighbours
from lsgm.evaluation.quality.feature_classifier import data_hash, unpadded
from lsgm.evaluation.quality.scores import SampleQualityReport, sample_quality
from lsgm.evaluation.report.options import EvaluateOptions
from lsgm.evaluation.report.published import PublishedTable, published_for
from lsgm.models.base import Model
from lsgm.models.latent import VAEModel
from lsgm.models.release import WEIGHTS

__all__ = [
    "Details",
    "NeighbourSummary",
    "examine",
    "how_to_repeat",
    "neighbours_of",
]

QUERIES = 50


BLOCK = 2000


@dataclass(frozen=True)
class NeighbourSummary:
    """Nearest training images of samples, by Euclidean distance of grey or colour values in [0, 1].

    Attributes:
        samples: ``(N, C, H, W)``, decoder means.
        found: Indices into the training set and distances, ``(N, k)``.
        images: The training images, ``(N, k, C, H, W)``.
        median_distance: Of the samples to their nearest training image.
        test_median_distance: Of as many test images to theirs: samples that are copies lie far
            below it.
    """

    samples: Tensor
    found: Neighbours
    images: Tensor
    median_distance: float
    test_median_distance: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "distance": "Euclidean, pixel values in [0, 1]; decoder means against training images",
            "samples": len(self.samples),
            "median_distance": self.median_distance,
            "test_median_distance": self.test_median_distance,
            "indices": self.found.indices.tolist(),
            "distances": self.found.distances.tolist(),
        }


@dataclass(frozen=True)
class Details:
    """Parts of a report; None or empty where they do not apply to the run or were not asked for."""

    decomposition: Decomposition | None
    curves: tuple[BoundCurve, ...]
    quality: SampleQualityReport | None
    neighbours: NeighbourSummary
    published: PublishedTable | None
    num_test: int
    repeat: dict[str, Any]
    model: str


def examine(
    model: Model,
    folder: Path,
    data: DataConfig,
    datasets: Datasets,
    samples: Tensor,
    options: EvaluateOptions,
) -> Details:
    """Work out the details of a run; ``samples`` ``(N, C, H, W)`` in [0, 1] are some of its images.

    Raises:
        UserError: The extractor or the sampler of ``options`` is not available.
    """
    decomposition: Decomposition | None = None
    curves: tuple[BoundCurve, ...] = ()
    if model.has_latents:
        dataset = datasets.test if options.split == "test" else datasets.train

        def batches(limit: int | None) -> ImageBatches:
            return evaluation_batches(
                dataset,
                model.spec,
                num_bits=model.num_bits,
                batch_size=options.batch_size,
                limit=limit,
                binarisation_seed=data.eval_binarisation_seed,
                device=model.device,
            )

        latent = cast(VAEModel, model)
        decomposition = decompose(latent, batches(options.limit), seed=options.seed)
        if options.iw:
            fewest = min(options.iw_images, options.limit or options.iw_images)
            curves = bound_curves(latent, batches(fewest), k=options.iw, seed=options.seed)
    quality = None
    if options.quality.extractor:
        quality = sample_quality(model, datasets, options.quality, options.sampling, data)
    return Details(
        decomposition,
        curves,
        quality,
        neighbours_of(samples[:QUERIES], datasets, k=5),
        published_for(datasets.spec.name),
        len(datasets.test),
        how_to_repeat(model, folder, data, datasets, options),
        model.in_words(),
    )


def neighbours_of(samples: Tensor, datasets: Datasets, *, k: int = 5) -> NeighbourSummary:
    """The ``k`` nearest training images of ``samples`` ``(N, C, H, W)`` in [0, 1]."""
    spec, k = datasets.spec, min(k, len(datasets.train))
    found = _nearest(samples, datasets.train, spec, k)
    num = min(len(samples), len(datasets.test))
    test = unpadded(datasets.test, spec, random_subset(len(datasets.test), num))
    images = unpadded(datasets.train, spec, found.indices.flatten())
    return NeighbourSummary(
        samples,
        found,
        images.unflatten(0, found.indices.shape),
        found.distances[:, 0].median().item(),
        _nearest(test, datasets.train, spec, 1).distances.median().item(),
    )


def _nearest(queries: Tensor, train: ImageDataset, spec: DataSpec, k: int) -> Neighbours:
    """:func:`nearest_neighbours`, of which only a block of ``train`` is in memory at a time."""
    index = torch.empty((len(queries), 0), dtype=torch.int64)
    distances = torch.empty((len(queries), 0), dtype=torch.float64)
    for block in torch.arange(len(train)).split(BLOCK):
        part = nearest_neighbours(queries, unpadded(train, spec, block), min(k, len(block)))
        index = torch.cat([index, part.indices + block[0]], dim=1)
        distances = torch.cat([distances, part.distances], dim=1)
        order = distances.argsort(dim=1, stable=True)[:, :k]
        index, distances = index.gather(1, order), distances.gather(1, order)
    return Neighbours(index, distances)


def how_to_repeat(
    model: Model, folder: Path, data: DataConfig, datasets: Datasets, options: EvaluateOptions
) -> dict[str, Any]:
    """Everything that the numbers of a report depend on, as plain values for JSON."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "options": _json(asdict(options)),
        "weights_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        "data": {
            "name": datasets.spec.name,
            "train_images": len(datasets.train),
            "train_sha256": data_hash(datasets.train),
            "test_images": len(datasets.test),
            "test_sha256": data_hash(datasets.test),
            "binarisation_seed": data.eval_binarisation_seed if model.spec.binary else None,
        },
        "versions": {
            "lsgm": lsgm.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "numpy", "scipy", "torch-fidelity")},
        },
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _json(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, tuple | list) else value
