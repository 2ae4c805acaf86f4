"""Whole training runs of score models in data space, and of classifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch

from lsgm.classifier import ImageClassifier, build_classifier
from lsgm.config_data import NCSNTrainConfig, ScoreModelConfig
from lsgm.data import Batches, Datasets
from lsgm.data.pixels import Pixels
from lsgm.datasgm import DataSGM, build_data_model
from lsgm.evaluation.figures import image_grid, learning_curves, read_metrics, save_grid
from lsgm.models import save
from lsgm.networks.classifier import Classifier
from lsgm.noise_ladder import NoiseLadder
from lsgm.sde import largest_squared_distance
from lsgm.training.classifier_stage import ClassifierStage
from lsgm.training.distributed import distributed, on_main
from lsgm.training.launch import OpenRun, fit_run, open_run
from lsgm.training.loop import EvalContext
from lsgm.training.resume import Resume, release_notes
from lsgm.training.score_stage import ScoreStage
from lsgm.training.state import TrainState

__all__ = ["fit_noise", "train_ncsn"]

GRID_IMAGES = 36
"""Images of the sample grids drawn during training."""

MAX_SCAN_IMAGES = 10_000
"""Training images among which the largest distance is sought."""


def train_ncsn(config: NCSNTrainConfig, out: str | None = None, *, resume: Resume = False) -> Path:
    """Train what ``config.kind`` names into the folder ``out`` (default ``runs/NAME``) and return
    it.

    Raises:
        UserError: The configuration does not fit the data, or the folder holds another run.
    """
    with (
        distributed(config.train.device) as world,
        open_run(config, config.data, out, resume, world) as run,
    ):
        if not run.plan.finished:
            train = _train_classifier if config.kind == "classifier" else _train_score
            torch.manual_seed(config.train.seed)
            train(config, run)
    return run.folder.path


def _train_score(config: NCSNTrainConfig, run: OpenRun) -> None:
    datasets, world = run.datasets, run.world
    score = fit_noise(config.kind, config.score, datasets)
    model = build_data_model(config.kind, score, config.sampler, datasets.spec)
    model.default_solver()  # a mistake in the section shows before the training
    stage = ScoreStage(model, config.objective)
    if world.is_main:
        print(_summary(model, config), flush=True)

    def evaluate(context: EvalContext) -> Mapping[str, float]:
        averaged = model.with_score(context.models["score"]).eval()
        return on_main(world, lambda: _evaluate(averaged, datasets, config, context))

    def release(state: TrainState) -> None:
        averaged = model.with_score(state.evaluation_models()["score"])
        notes = release_notes(config.train, state.step)
        save(averaged, run.folder.path, config.data, notes)

    fit_run(
        stage,
        model,
        config,
        {"score": config.optim},
        run,
        evaluate=evaluate,
        release=release,
        labels=config.score.class_conditional,
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
        f"{config.kind} ({config.objective.estimator}) on {spec.name}, {spec.channels} x "
        f"{spec.image_size} x {spec.image_size} in {config.score.data_range} range, {given}; "
        f"{noise}; {config.score.network} with {parameters / 1e6:.2f} M parameters; sampler "
        f"{model.defaults.solver}, {model.defaults.nfe} evaluations"
    )


def _evaluate(
    model: DataSGM, datasets: Datasets, config: NCSNTrainConfig, context: EvalContext
) -> dict[str, float]:
    """The objective on test images; writes a sample grid and the learning curve."""
    stage = ScoreStage(model, config.objective)
    rng = torch.Generator().manual_seed(config.train.seed)
    classes = model.num_classes
    total, count = 0.0, 0
    batches = Batches(
        datasets.test, 250, train=False, limit=config.train.eval_images, labels=classes is not None
    )
    for _, batch in batches.epoch():
        images, labels = batch if classes is not None else (batch, None)
        images = images.to(context.world.device)
        labels = None if labels is None else labels.to(images.device)
        x = model.pixels.to_network(images, rng, noise=True)
        total += stage.loss(x, labels, rng).loss.item() * len(x)
        count += len(x)
    labels = None if classes is None else torch.arange(GRID_IMAGES) % classes
    samples = model.decode_state(model.sample(GRID_IMAGES, rng, labels=labels).x).cpu()
    grid = image_grid(samples)
    context.log_image("samples", grid)
    save_grid(grid, context.run.samples / f"samples_{context.step:08d}.png")
    _curves(context, "score matching loss, a value of the image")
    return {"loss": total / count / model.spec.num_dims}


def _train_classifier(config: NCSNTrainConfig, run: OpenRun) -> None:
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

    def evaluate(context: EvalContext) -> Mapping[str, float]:
        averaged = model.with_network(cast(Classifier, context.models["classifier"])).eval()
        return on_main(world, lambda: _test_classifier(averaged, datasets, config, context))

    def release(state: TrainState) -> None:
        network = cast(Classifier, state.evaluation_models()["classifier"])
        notes = release_notes(config.train, state.step)
        save(model.with_network(network), run.folder.path, config.data, notes)

    fit_run(
        ClassifierStage(model, config.classifier.label_smoothing),
        model,
        config,
        {"classifier": config.optim},
        run,
        evaluate=evaluate,
        release=release,
        labels=True,
    )


def _test_classifier(
    model: ImageClassifier, datasets: Datasets, config: NCSNTrainConfig, context: EvalContext
) -> dict[str, float]:
    """Cross-entropy (nats) and accuracy on test images, noised as in training; writes the learning
    curve.
    """
    stage = ClassifierStage(model)
    rng = torch.Generator().manual_seed(config.train.seed)
    loss, right, count = 0.0, 0, 0
    batches = Batches(datasets.test, 250, train=False, limit=config.train.eval_images, labels=True)
    for _, (images, labels) in batches.epoch():
        x = model.pixels.to_network(images.to(context.world.device), rng, noise=True)
        logits = stage.logits(x, rng).cpu()
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    _curves(context, "cross-entropy of the label, nats")
    return {"loss": loss / count, "accuracy": right / count}


def _curves(context: EvalContext, ylabel: str) -> None:
    learning_curves(
        {context.run.path.name: read_metrics(context.run.metrics)},
        context.run.path / "curves.png",
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
    """
    ladder, sde = score.ladder, score.sde
    if kind != "ncsn" and score.fit_sigma_max:
        largest = _largest_squared_distance(score, datasets)
        return replace(score, sde=replace(sde, sigma2_max=largest))
    if kind != "ncsn":
        return score
    if ladder.sigma_max is None:
        ladder = replace(ladder, sigma_max=math.sqrt(_largest_squared_distance(score, datasets)))
    if ladder.levels is None:
        assert ladder.sigma_max is not None
        found = NoiseLadder.for_data(ladder.sigma_max, ladder.sigma_min, datasets.spec.num_dims)
        ladder = replace(ladder, levels=found.num_levels)
    return replace(score, ladder=ladder)


def _largest_squared_distance(score: ScoreModelConfig, datasets: Datasets) -> float:
    pixels = Pixels.of(datasets.spec, score.data_range, score.dequantise)
    size = min(1000, len(datasets.train))
    batches = Batches(datasets.train, size, train=True)
    last = MAX_SCAN_IMAGES // size
    images = (pixels.to_network(batch) for _, batch in islice(batches.epoch(), last))
    return float(largest_squared_distance(images))
