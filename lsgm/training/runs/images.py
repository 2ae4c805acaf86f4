"""Whole training runs of score models in data space, and of classifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from lsgm.config.architecture import ScoreModelConfig
from lsgm.config.training import NCSNTrainConfig
from lsgm.data import Batches, Datasets, build_datasets
from lsgm.data.pixels import Pixels
from lsgm.errors import UserError
from lsgm.models.classifier import build_classifier
from lsgm.models.images import DataSGM, build_data_model
from lsgm.models.release import save
from lsgm.networks.classifier import Classifier
from lsgm.noise_ladder import NoiseLadder
from lsgm.sde import largest_squared_distance
from lsgm.system.curves import learning_curves, read_metrics
from lsgm.system.files import RunFolder
from lsgm.training.context import EvalContext
from lsgm.training.evaluation import evaluate_classifier, evaluate_score_model
from lsgm.training.runs.launch import OpenRun, Training, started
from lsgm.training.runs.resume import Resume
from lsgm.training.stages.classifier import ClassifierStage
from lsgm.training.stages.score import ScoreStage
from lsgm.training.state import TrainState

__all__ = [
    "fit_noise",
    "train_ncsn",
]

MAX_SCAN_IMAGES = 10_000
"""Training images among which the largest distance is sought."""


def train_ncsn(config: NCSNTrainConfig, out: str | None = None, *, resume: Resume = False) -> Path:
    """Train what ``config.kind`` names into the folder ``out`` (default ``runs/NAME``) and return
    it.

    Raises:
        UserError: The configuration does not fit the data, or the folder holds another run.
    """
    with started(config, partial(build_datasets, config.data), out, resume) as (
        config,
        run,
    ):
        if not run.plan.finished:
            train = _train_classifier if config.kind == "classifier" else _train_score
            torch.manual_seed(config.train.seed)
            train(config, run)
    return run.folder.path


def _train_score(config: NCSNTrainConfig, run: OpenRun[Datasets]) -> None:
    datasets, world = run.datasets, run.world
    score = fit_noise(config.kind, config.score, datasets)
    model = build_data_model(config.kind, score, config.sampler, datasets.spec)
    model.default_sampler()  # a mistake in the section shows before the training
    stage = ScoreStage(model, **asdict(config.objective))
    if world.is_main:
        print(_summary(model, config), flush=True)

    def evaluate(context: EvalContext) -> Mapping[str, float | None]:
        averaged = model.with_score(context.models["score"]).eval()
        return evaluate_score_model(averaged, config.objective, datasets, context)

    def release(state: TrainState, notes: dict[str, Any]) -> None:
        averaged = model.with_score(state.evaluation_models()["score"])
        save(averaged, run.folder.path, config.data, notes)

    run.train(
        Training(
            stage,
            model,
            {"score": config.optim},
            release,
            evaluate,
            lambda run: _curves(run, "score matching loss, a value of the image"),
            labels=config.score.class_conditional,
        )
    )


def _summary(model: DataSGM, config: NCSNTrainConfig) -> str:
    """What is about to be trained, in one line."""
    spec, parameters = model.spec, sum(p.numel() for p in model.score.parameters())
    noise = f"{type(model.sde).__name__}, {config.objective.weighting} weighting"
    if model.ladder is not None:
        ladder = model.ladder
        noise = f"{ladder.num_levels} noise levels {ladder.sigma_max:g} to {ladder.sigma_min:g}"
    given = f"{model.num_classes} classes" if model.num_classes else "no classes"
    return (
        f"{config.kind} ({config.objective.estimator}) on {spec.name}, "
        f"{spec.size_in_words} in {config.score.data_range} range, {given}; "
        f"{noise}; {config.score.network} with {parameters / 1e6:.2f} M parameters; sampler "
        f"{model.defaults.solver}, {model.defaults.nfe} evaluations"
    )


def _train_classifier(config: NCSNTrainConfig, run: OpenRun[Datasets]) -> None:
    datasets, world = run.datasets, run.world
    score = fit_noise(config.kind, config.score, datasets)
    model = build_classifier(config.classifier, score, datasets.spec)
    if world.is_main:
        what = f"images noised by {model.sde}" if config.classifier.noise_conditional else "images"
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"classifier of {datasets.spec.name} {what}, {model.num_classes} classes, "
            f"{parameters / 1e6:.2f} M parameters",
            flush=True,
        )

    def evaluate(context: EvalContext) -> Mapping[str, float | None]:
        averaged = model.with_network(cast(Classifier, context.models["classifier"])).eval()
        return evaluate_classifier(averaged, datasets, context)

    def release(state: TrainState, notes: dict[str, Any]) -> None:
        network = cast(Classifier, state.evaluation_models()["classifier"])
        save(model.with_network(network), run.folder.path, config.data, notes)

    run.train(
        Training(
            ClassifierStage(model, config.classifier.label_smoothing),
            model,
            {"classifier": config.optim},
            release,
            evaluate,
            lambda run: _curves(run, "cross-entropy of the label, nats"),
            labels=True,
        )
    )


def _curves(run: RunFolder, ylabel: str) -> None:
    learning_curves(
        {run.path.name: read_metrics(run.metrics)},
        run.path / "curves.png",
        metric="loss",
        ylabel=ylabel,
    )


def fit_noise(kind: str, score: ScoreModelConfig, datasets: Datasets) -> ScoreModelConfig:
    """Fill in what the noise takes from the training images.

    * ``fit_sigma_max``: a vesde's ``sigma2_max`` becomes the largest squared distance between
      images (2011.13456, App. C; 2006.09011, technique 1);
    * ncsn: the same for a ``ladder.sigma_max`` that is None, and the number of levels from the
      number of values for a ``ladder.levels`` that is None (2006.09011, technique 2).

    The distance is sought among the first 10,000 images of a shuffled epoch.

    Raises:
        UserError: The images are (nearly) identical.
    """
    ladder, sde = score.ladder, score.sde
    if kind != "ncsn" and score.fit_sigma_max:
        largest = _largest_squared_distance(score, datasets, sde.sigma2_min)
        return replace(score, sde=replace(sde, sigma2_max=largest))
    if kind != "ncsn":
        return score
    if ladder.sigma_max is None:
        largest = _largest_squared_distance(score, datasets, ladder.sigma_min**2)
        ladder = replace(ladder, sigma_max=math.sqrt(largest))
    if ladder.levels is None:
        assert ladder.sigma_max is not None
        found = NoiseLadder.for_data(ladder.sigma_max, ladder.sigma_min, datasets.spec.num_dims)
        ladder = replace(ladder, levels=found.num_levels)
    return replace(score, ladder=ladder)


def _largest_squared_distance(
    score: ScoreModelConfig, datasets: Datasets, smallest: float
) -> float:
    """Between training images; raises UserError unless it exceeds ``smallest``."""
    pixels = Pixels.of(datasets.spec, score.data_range, score.dequantise)
    size = min(1000, len(datasets.train))
    batches = Batches(datasets.train, size, train=True)
    last = MAX_SCAN_IMAGES // size
    images = (pixels.to_network(batch) for _, batch in islice(batches.epoch(), last))
    largest = float(largest_squared_distance(images)) if len(datasets.train) > 1 else 0.0
    if largest <= smallest:
        raise UserError(
            f"data: all training images of {datasets.spec.name} are alike (largest distance "
            f"{math.sqrt(largest):.3g}): no largest noise level can be taken from them; give it "
            "as score.ladder.sigma_max, or as score.sde.sigma2_max without score.fit_sigma_max"
        )
    return largest
