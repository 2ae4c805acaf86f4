"""What runs of every kind measure on test images and show, between their training steps.

All processes share the work: each takes its part of the images, and the numbers of all images are
gathered in the order of the data set. Every image has its own noise, so what comes out does not
depend on the number of processes or the batch (but for the rounding of sums). No batch is larger
than that of a training step, and the networks compute in the precision of the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lsgm.config.training import DataConfig, ScoreObjectiveConfig
from lsgm.data import Batches, Datasets
from lsgm.data.spec import DataSpec
from lsgm.errors import NonFiniteError
from lsgm.evaluation.likelihood.bounds import (
    Estimate,
    evaluation_batches,
    nelbo_values,
    with_generators,
)
from lsgm.models.classifier import ImageClassifier
from lsgm.models.images import DataSGM
from lsgm.models.latent import VAEModel
from lsgm.sampling.draw import row_sampler
from lsgm.sampling.sampler import SolverOptions
from lsgm.system.pictures import image_grid, reconstruction_grid, save_grid
from lsgm.training.context import EvalContext
from lsgm.training.distributed import gather_rows, on_main
from lsgm.training.precision import autocast
from lsgm.training.stages.classifier import ClassifierStage
from lsgm.training.stages.score import ScoreStage
from vae.objective import bits_per_dim
from vae.random import RowGenerators

__all__ = ["evaluate_classifier", "evaluate_score_model", "evaluate_vae"]

Numbers = dict[str, float | None]

MONITOR = SolverOptions()
"""How sample grids of models with latents are drawn."""

SAMPLES, RECONSTRUCTIONS, DATA_SAMPLES = 64, 32, 36
"""Images of the grids; the last of score models in data space."""

MOST_IMAGES = 250
"""Images at a time on one process, at most."""


def _batch_size(context: EvalContext) -> int:
    """Images at a time over all processes: those of a backward pass of the training, at most."""
    train, processes = context.config, context.world.size
    return min(train.batch_size // train.accumulate, MOST_IMAGES * processes)


def evaluate_vae(
    model: VAEModel, datasets: Datasets, data: DataConfig, context: EvalContext
) -> Numbers:
    """NELBO on test images, nats an image, and bits/dim of grey and colour data; writes grids of
    samples and reconstructions.
    """
    train, world, spec = context.config, context.world, model.spec
    shared: dict[str, Any] = {
        "num_bits": model.num_bits,
        "batch_size": _batch_size(context),
        "binarisation_seed": data.eval_binarisation_seed,
        "device": world.device,
        "rank": world.rank,
        "world_size": world.size,
    }
    images = evaluation_batches(datasets.test, spec, limit=train.eval_images, **shared)
    shown = evaluation_batches(datasets.test, spec, limit=RECONSTRUCTIONS, **shared)
    with autocast(world.device, train.precision):
        with context.bar("test images", len(images.index)) as done:
            values = nelbo_values(model, images, seed=train.seed, callback=done)
        draw = row_sampler(model, MONITOR)
        samples = _share(context, SAMPLES, spec, lambda rows: draw(rows).images)
        pairs = [
            (model.to_images(x), model.reconstruct(x, rng))
            for x, rng in with_generators(shown, train.seed)
        ]
    order = gather_rows(shown.index, world).argsort()
    before, after = (
        gather_rows(torch.cat([torch.empty(0), *(side.cpu() for side in sides)]), world)[order]
        for sides in (zip(*pairs, strict=True) if pairs else ((), ()))
    )
    _show_samples(context, samples)
    _show(context, "reconstructions", reconstruction_grid(before, after))
    order = gather_rows(images.index, world).argsort()

    def estimate(parts: Sequence[Tensor]) -> Estimate:
        own = torch.cat([torch.empty(0, dtype=torch.float64), *parts])
        return Estimate.of(gather_rows(own, world)[order])

    total = estimate(values.total)
    bits = {} if spec.binary else {"bits_per_dim": float(bits_per_dim(total.mean, spec.num_dims))}
    return {
        **bits,
        "nelbo": total.mean,
        "nelbo_standard_error": total.standard_error,
        "reconstruction": estimate(values.reconstruction).mean,
        "kl": estimate(values.kl).mean,
    }


def evaluate_score_model(
    model: DataSGM, objective: ScoreObjectiveConfig, datasets: Datasets, context: EvalContext
) -> Numbers:
    """The objective on test images, a value of the image; writes a grid of samples."""
    stage = ScoreStage(model, **asdict(objective))
    classes = model.num_classes
    train, world = context.config, context.world
    batches = _test_batches(datasets, context, labels=classes is not None)
    sums = torch.zeros(1, 2, dtype=torch.float64)
    with autocast(world.device, train.precision):
        with context.bar("test images", _own_images(batches)) as done:
            for step, batch in batches.epoch():
                images, labels = batch if classes is not None else (batch, None)
                rng = RowGenerators.of(train.seed, batches.index(0, step).tolist())
                x = model.pixels.to_network(images.to(world.device), rng, noise=True)
                labels = None if labels is None else labels.to(world.device)
                loss = stage.loss(x, labels, rng).loss.item()
                sums += torch.tensor([[loss * len(x), len(x)]], dtype=torch.float64)
                done(len(x))
        _show_samples(context, _data_samples(model, context))
    total, count = gather_rows(sums, world).sum(0).tolist()
    return {"loss": total / count / model.spec.num_dims}


def _data_samples(model: DataSGM, context: EvalContext) -> Tensor:
    """Images ``(N, C, H, W)`` by the recommended sampler, of all classes in turn."""
    sampler = model.default_sampler()

    def draw(rows: Sequence[int], done: Callable[[int], None]) -> Tensor:
        classes = model.num_classes
        labels = None if classes is None else torch.tensor(rows) % classes
        rng = RowGenerators.of(context.config.seed, rows)
        return model.draw(len(rows), rng, sampler, labels=labels, callback=lambda _: done(1)).images

    parts, times = _own_parts(context, DATA_SAMPLES), sampler.times_for(model.sde)
    with context.bar("steps of samples", len(parts) * (len(times) - 1)) as done:
        images = [_or_nan(lambda part: draw(part, done), rows, model.spec) for rows in parts]
    return gather_rows(torch.cat([torch.empty(0), *images]), context.world)


def evaluate_classifier(
    model: ImageClassifier, datasets: Datasets, context: EvalContext
) -> Numbers:
    """Cross-entropy (nats) and accuracy on test images, noised as in training."""
    stage = ClassifierStage(model)
    train, world = context.config, context.world
    batches = _test_batches(datasets, context, labels=True)
    sums = torch.zeros(1, 3, dtype=torch.float64)
    with (
        autocast(world.device, train.precision),
        context.bar("test images", _own_images(batches)) as done,
    ):
        for step, (images, labels) in batches.epoch():
            rng = RowGenerators.of(train.seed, batches.index(0, step).tolist())
            x = model.pixels.to_network(images.to(world.device), rng, noise=True)
            logits = stage.logits(x, rng).float().cpu()
            loss = cross_entropy(logits, labels, reduction="sum").item()
            right = int((logits.argmax(1) == labels).sum())
            sums += torch.tensor([[loss, right, len(labels)]], dtype=torch.float64)
            done(len(labels))
    loss, right, count = gather_rows(sums, world).sum(0).tolist()
    return {"loss": loss / count, "accuracy": right / count}


# Shares of the processes


def _test_batches(datasets: Datasets, context: EvalContext, labels: bool) -> Batches:
    world = context.world
    return Batches(
        datasets.test,
        _batch_size(context),
        train=False,
        limit=context.config.eval_images,
        labels=labels,
        rank=world.rank,
        world_size=world.size,
    )


def _own_images(batches: Batches) -> int:
    return sum(len(batches.index(0, step)) for step in range(batches.steps_per_epoch))


def _own_parts(context: EvalContext, num: int) -> list[list[int]]:
    """This process's part of the numbers below ``num``, in batches."""
    world = context.world
    own = torch.arange(num).tensor_split(world.size)[world.rank]
    parts = own.split(max(1, _batch_size(context) // world.size))
    return [part.tolist() for part in parts if len(part)]


def _share(
    context: EvalContext, num: int, spec: DataSpec, draw: Callable[[Sequence[int]], Tensor]
) -> Tensor:
    """Images ``(num, C, H, W)`` made by ``draw``, given their numbers, on all processes."""
    parts, images = _own_parts(context, num), []
    with context.bar("samples", sum(map(len, parts))) as done:
        for rows in parts:
            images.append(_or_nan(draw, rows, spec))
            done(len(rows))
    return gather_rows(torch.cat([torch.empty(0), *images]), context.world)


def _or_nan(draw: Callable[[Sequence[int]], Tensor], rows: Sequence[int], spec: DataSpec) -> Tensor:
    """Images ``(len(rows), C, H, W)`` made by ``draw``, or NaN where its sampler failed: all
    processes have to go on to where the images are gathered.
    """
    try:
        return draw(rows).float().cpu()
    except NonFiniteError:
        return torch.full((len(rows), *spec.shape), math.nan)


def _show_samples(context: EvalContext, images: Tensor) -> None:
    """Show a grid of samples, unless some are not finite (early weights, say): the run goes on."""
    bad = int((~images.flatten(1).isfinite().all(1)).sum())
    if not bad:
        _show(context, "samples", image_grid(images))
    elif context.world.is_main:
        print(
            f"warning: step {context.step}: no sample grid: {bad} of {len(images)} samples are not "
            "finite",
            flush=True,
        )


def _show(context: EvalContext, name: str, grid: Tensor) -> None:
    """Put a grid into TensorBoard and the run's samples."""
    context.log_image(name, grid)
    path = context.run.samples / f"{name}_{context.step:08d}.png"
    on_main(context.world, lambda: save_grid(grid, path))
