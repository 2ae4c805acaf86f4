"""Scores of a model's samples against held-out images, each with what it is and how sure it is.

A score is named by what it is: "FID" is the Frechet distance of Inception features alone. Its
standard error covers the samples; the held-out images and the extractor are fixed, as they are for
every sampler that is compared with them.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lsgm.config.training import DataConfig
from lsgm.data import (
    Datasets,
    DataSpec,
    ImageDataset,
    binarise,
    epoch_order,
    fixed_binarisation,
)
from lsgm.evaluation.quality.distances import (
    Moments,
    frechet_distance,
    inception_score,
    inside_support,
    jackknife,
    jackknife_error,
    kernel_distance,
    kernel_distance_replicates,
    precision_recall,
    small_sample_notes,
)
from lsgm.evaluation.quality.feature_classifier import data_hash, unpadded
from lsgm.evaluation.quality.features import (
    Activations,
    FeatureExtractor,
    cache_root,
    extract,
    make_extractor,
)
from lsgm.evaluation.quality.options import QualityOptions
from lsgm.models.base import Model
from lsgm.models.results import Samples
from lsgm.sampling.draw import draw_samples
from lsgm.sampling.sampler import SolverOptions
from lsgm.solvers import make_solver
from lsgm.system.files import atomic_write, json_text
from vae.random import RowGenerators

__all__ = [
    "QualityPoint",
    "SampleQualityReport",
    "Score",
    "difference",
    "quality_of_images",
    "real_activations",
    "sample_quality",
]

INCEPTION = "inception"


DRAWS = "draws"


@dataclass(frozen=True)
class Score:
    """One number about a set of samples.

    Attributes:
        name: What it is, in words.
        value: The number.
        standard_error: Over the draw of the samples (jackknife of ten groups); for the kernel
            distance with the error from the choice of subsets.
        better: "lower" or "higher".
        replicates: Values with one group of samples left out, ``(G,)``.
    """

    name: str
    value: float
    standard_error: float
    better: str
    replicates: Tensor = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "standard_error": self.standard_error,
            "better": self.better,
        }


def difference(first: Score, second: Score) -> tuple[float, float]:
    """``first - second`` and its standard error, paired by groups of samples: samples that share
    their noise (the same seed and indices) differ by less than their own errors say.

    Raises:
        ValueError: If they are not the same kind of score.
    """
    if first.name != second.name or len(first.replicates) != len(second.replicates):
        raise ValueError(f"{first.name} cannot be compared with {second.name}")
    return (
        first.value - second.value,
        jackknife_error(first.replicates - second.replicates),
    )


@dataclass(frozen=True)
class QualityPoint:
    """Scores of one set of samples; ``label`` says which, ``nfe`` the network evaluations a
    batch (None: not sampled from a model).
    """

    label: str
    nfe: float | None
    num: int
    scores: dict[str, Score]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "label": self.label,
            "nfe": self.nfe,
            "num": self.num,
            "scores": {key: score.as_dict() for key, score in self.scores.items()},
        }


@dataclass(frozen=True)
class SampleQualityReport:
    """Scores of samples, and everything that they depend on.

    Attributes:
        samples: With the sampler as it was given.
        by_nfe: With other numbers of evaluations, the same noise otherwise; beside an adaptive
            sampler, those of the model's own.
        floor: As many training images in place of samples: what a perfect model would be likely to
            score. None where there are too few.
        extractor: Name of the features; ``preprocessing`` and ``weights_sha256`` go with it.
        images: How samples and real images were made comparable.
        real: What they are compared with; ``real_sha256`` is the hash of those images.
        notes: What a reader has to know before using a number.
        settings: Solver, seed and sizes.
        seconds: Time taken; not part of the result.
    """

    samples: QualityPoint
    by_nfe: tuple[QualityPoint, ...]
    floor: QualityPoint | None
    extractor: str
    preprocessing: str
    weights_sha256: str
    num_features: int
    images: str
    real: str
    num_real: int
    real_sha256: str
    notes: tuple[str, ...]
    settings: dict[str, Any]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the time; ``by_nfe`` is the key ``ladder`` there."""
        names = {"by_nfe": "ladder"}
        values = {names.get(k, k): v for k, v in self.__dict__.items() if k != "seconds"}
        values["samples"] = self.samples.as_dict()
        values["ladder"] = [point.as_dict() for point in self.by_nfe]
        values["floor"] = self.floor.as_dict() if self.floor else None
        values["notes"] = list(self.notes)
        return values


def quality_of_images(
    found: Activations,
    real: Activations,
    *,
    label: str,
    extractor: str,
    features: str,
    nfe: float | None = None,
    k: int = 3,
    subsets: int = 100,
    seed: int = 0,
) -> QualityPoint:
    """Scores of images with activations ``found`` against ``real``.

    Args:
        found: Of the samples.
        real: Of the real images.
        label: What the samples are.
        extractor: Key of the extractor: ``inception`` has names of its own.
        features: Its name in words.
        nfe: Network evaluations a batch.
        k: Neighbour of precision and recall.
        subsets: Of the kernel distance.
        seed: Of the subsets and the groups.
    """
    a, b = found.features, real.features
    num, inception = len(a), extractor == INCEPTION
    moments = Moments.of(b)
    scores: dict[str, Score] = {}

    def add(
        key: str, name: str, value: float, better: str, replicates: Tensor, extra: float = 0.0
    ) -> None:
        error = (jackknife_error(replicates) ** 2 + extra**2) ** 0.5
        scores[key] = Score(name, value, error, better, replicates)

    def again(statistic: Callable[[Tensor], float]) -> Tensor:
        with warnings.catch_warnings():  # said once, in the notes
            warnings.simplefilter("ignore")
            return jackknife(statistic, num, seed=seed)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distance = frechet_distance(a, moments)
    add(
        "frechet",
        "FID" if inception else f"Frechet distance, {features}",
        distance,
        "lower",
        again(lambda kept: frechet_distance(a[kept], moments)),
    )
    kernel = kernel_distance(a, b, subsets=subsets, seed=seed)
    add(
        "kernel",
        f"{'KID' if inception else f'kernel distance, {features}'}"
        f" ({kernel.subsets} subsets of {kernel.subset_size})",
        kernel.mean,
        "lower",
        kernel_distance_replicates(a, b, seed=seed),
        kernel.draw_error,
    )
    if min(num * 9 // 10, len(b)) > k:
        covered = precision_recall(a, b, k=k)
        inside = inside_support(a, b, k).double()
        words = f"k = {k}, {'Inception features' if inception else features}"
        add(
            "precision",
            f"precision ({words})",
            covered.precision,
            "higher",
            again(lambda kept: inside[kept].mean().item()),
        )
        add(
            "recall",
            f"recall ({words})",
            covered.recall,
            "higher",
            again(lambda kept: inside_support(b, a[kept], k).double().mean().item()),
        )
    add(
        "inception_score",
        "Inception score (one split)" if inception else f"exp E KL(p(y|x) || p(y)), {features}",
        inception_score(found.logits, splits=1, seed=seed).mean,
        "higher",
        again(lambda kept: inception_score(found.logits[kept], splits=1, seed=seed).mean),
    )
    return QualityPoint(label, nfe, num, scores)


def scored_images(images: Tensor, spec: DataSpec, convention: str, seed: int) -> Tensor:
    """Samples ``(N, C, H, W)`` in [0, 1] as they are scored: of binary data one Bernoulli draw a
    pixel under the convention ``draws``, the image's own index and ``seed`` deciding it.
    """
    if spec.binary and convention == DRAWS:
        return binarise(images, RowGenerators.of(seed + 1, range(len(images))))
    return images


def _pixels(model: Model, spec: DataSpec, convention: str) -> AbstractContextManager[None]:
    """Under the convention ``draws``, an autoregressive decoder draws its pixels itself."""
    return model.drawn_pixels() if spec.binary and convention == DRAWS else nullcontext()


def _convention_in_words(spec: DataSpec, convention: str, seed: int) -> str:
    if not spec.binary:
        return "images in [0, 1] as the model gives them; real images in 8 bits"
    if convention == DRAWS:
        return (
            "one Bernoulli draw per pixel of the decoder means; real images one fixed Bernoulli "
            f"draw per pixel of their grey values, seed {seed}, the draw that likelihoods use"
        )
    return "decoder means, not drawn; real images grey, not drawn"


def _images_of(dataset: ImageDataset, spec: DataSpec, index: Tensor) -> Tensor:
    return torch.cat([unpadded(dataset, spec, part) for part in index.split(1000)])


def real_activations(
    dataset: ImageDataset,
    spec: DataSpec,
    extractor: FeatureExtractor,
    *,
    convention: str,
    seed: int,
    index: Tensor | None = None,
    batch_size: int = 250,
    cache: Path | None = None,
    data_sha256: str | None = None,
) -> Activations:
    """Activations of real images, kept in ``cache`` under the hash of the data, the extractor's
    weights and the convention; ``index`` picks some of the images.
    """
    chosen = torch.arange(len(dataset)) if index is None else index
    made_from = {
        "data": data_sha256 or data_hash(dataset),
        "index": hashlib.sha256(chosen.numpy().tobytes()).hexdigest(),
        "extractor": [extractor.name, extractor.preprocessing, extractor.weights_sha256],
        "convention": [convention, seed] if spec.binary else [],
    }
    key = hashlib.sha256(json_text(made_from, sort_keys=True).encode()).hexdigest()
    path = (cache or cache_root()) / f"activations-{spec.name}-{key[:16]}.safetensors"
    try:
        stored = load_file(path)
        return Activations(stored["features"], stored["logits"])
    except (OSError, safetensors.SafetensorError, KeyError):
        pass
    drawn = spec.binary and convention == DRAWS
    source = fixed_binarisation(dataset, seed) if drawn else dataset
    found = extract(extractor, _images_of(source, spec, chosen), batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(to_safetensors(asdict(found), metadata={"made_from": json_text(made_from)}))
    return found


def _with_fixed_steps(sampling: SolverOptions) -> SolverOptions:
    """The sampler that can be given a number of evaluations: the model's own in place of an
    adaptive one, so that both are compared from the same noise.
    """
    if sampling.solver is None or make_solver(sampling.solver).evaluations(1) is not None:
        return sampling
    none: dict[str, Any] = {"tolerance": None}
    return replace(sampling, solver=None, **none)


def sample_quality(
    model: Model,
    datasets: Datasets,
    options: QualityOptions,
    sampling: SolverOptions,
    data: DataConfig | None = None,
    *,
    draw: Callable[[Model, int, SolverOptions], Samples] = draw_samples,
) -> SampleQualityReport:
    """Draw ``options.num`` images from ``model`` and score them against the test images.

    Args:
        model: A run's model (:func:`lsgm.load`).
        datasets: Of the run.
        options: Extractor, number of samples, other numbers of evaluations.
        sampling: Solver, evaluations and seed.
        data: The run's data section, for the seed of the fixed binarisation (0 without it).
        draw: How images are drawn.

    Raises:
        UserError: The extractor is unknown or not available, or the sampler is.
    """
    start = time.perf_counter()
    # A model of grey images gives grey images, whatever a model with latents would see.
    spec = replace(datasets.spec, binary=datasets.spec.binary and model.spec.binary)
    cache = cache_root(options.cache)
    extractor = make_extractor(
        options.extractor or "classifier", datasets, cache=cache, device=model.device
    )
    seed = data.eval_binarisation_seed if data else 0
    shared: dict[str, Any] = {"convention": options.images, "seed": seed, "cache": cache}
    real_sha256 = data_hash(datasets.test)
    real = real_activations(datasets.test, spec, extractor, data_sha256=real_sha256, **shared)

    def score(found: Activations, label: str, nfe: float | None) -> QualityPoint:
        return quality_of_images(
            found,
            real,
            label=label,
            extractor=options.extractor or "classifier",
            features=extractor.name,
            nfe=nfe,
            k=options.neighbours,
            subsets=options.subsets,
            seed=options.seed,
        )

    def point(chosen: SolverOptions) -> QualityPoint:
        with _pixels(model, spec, options.images):
            drawn = draw(model, options.num, chosen)
        images = scored_images(drawn.images, spec, options.images, chosen.seed)
        label = f"{drawn.solver}, NFE {drawn.nfe:g}" if drawn.nfe else drawn.solver
        return score(extract(extractor, images), label, drawn.nfe)

    samples = point(sampling)
    by_nfe: tuple[QualityPoint, ...] = ()
    if samples.nfe:  # a VAE under N(0, I) evaluates no network that a solver would call
        steps = _with_fixed_steps(sampling)
        by_nfe = tuple(point(replace(steps, nfe=nfe)) for nfe in options.nfe)
    floor = None
    if len(datasets.train) >= options.num:
        index = epoch_order(len(datasets.train), options.seed, 0)[: options.num]
        train = real_activations(datasets.train, spec, extractor, index=index, **shared)
        floor = score(train, "training images", None)
    num_features = real.features.shape[1]
    notes = list(small_sample_notes(options.num, len(datasets.test), num_features))
    if options.extractor != INCEPTION:
        notes.append(
            f"These are {extractor.name}: the numbers are not FID or KID and compare only with "
            "numbers of the same weights."
        )
    if floor is None:
        notes.append(f"Fewer than {options.num} training images: no floor.")
    return SampleQualityReport(
        samples=samples,
        by_nfe=by_nfe,
        floor=floor,
        extractor=extractor.name,
        preprocessing=extractor.preprocessing,
        weights_sha256=extractor.weights_sha256,
        num_features=num_features,
        images=_convention_in_words(spec, options.images, seed),
        real=f"all {len(datasets.test)} test images of {spec.name}",
        num_real=len(datasets.test),
        real_sha256=real_sha256,
        notes=tuple(notes),
        settings={"num": options.num, "seed": options.seed, "sampling": asdict(sampling)},
        seconds=time.perf_counter() - start,
    )
