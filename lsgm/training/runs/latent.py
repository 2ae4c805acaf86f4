"""Whole training runs: from a configuration to a run folder that :func:`lsgm.load` opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lsgm.config.training import DataConfig, LSGMTrainConfig, OptimConfig, VAETrainConfig
from lsgm.data import Datasets, build_datasets
from lsgm.errors import UserError
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.models.loading import build_described, load
from lsgm.models.release import save
from lsgm.system.curves import learning_curves, read_metrics
from lsgm.system.files import RunFolder
from lsgm.training.context import EvalContext
from lsgm.training.evaluation import evaluate_vae
from lsgm.training.runs.launch import OpenRun, Training, started
from lsgm.training.runs.resume import Resume
from lsgm.training.runs.scan import LatentScan
from lsgm.training.stages.latent import LSGMStage, VAEStage
from lsgm.training.state import Stage, TrainState

__all__ = [
    "train_lsgm",
    "train_vae",
]


def train_vae(config: VAETrainConfig, out: str | None = None, *, resume: Resume = False) -> Path:
    """Train the first stage into the folder ``out`` (default ``runs/NAME``) and return it.

    Raises:
        UserError: The configuration does not fit the data, or the folder holds another run.
    """
    with started(config, partial(build_datasets, config.data), out, resume) as (
        config,
        run,
    ):
        if not run.plan.finished:
            torch.manual_seed(config.train.seed)
            spec = run.datasets.spec
            model = VAEModel(build_vae(config.vae, spec), spec, config.vae)
            stage = VAEStage(model, config.objective)
            _fit(stage, model, config.data, {"vae": config.optim_vae}, run)
    return run.folder.path


def train_lsgm(config: LSGMTrainConfig, out: str | None = None, *, resume: Resume = False) -> Path:
    """Train the second stage into ``out`` (default ``runs/NAME``) and return the folder: over the
    VAE of ``config.vae_run``, or from the LSGM of ``config.lsgm_run`` on. A resume needs neither.

    Raises:
        UserError: There is no finished run to start from, it does not fit the data or the
            configuration, or the folder holds another run.
    """
    data = config.data
    if data is None or (config.vae_run or config.lsgm_run) is None:
        raise UserError("--vae: give the folder of a finished VAE run, for example --vae runs/vae")
    with started(config, partial(build_datasets, data), out, resume) as (
        config,
        run,
    ):
        if not run.plan.finished:
            described = run.begun_with()
            if described is None:
                model = _begin(config, run)
            else:
                model = _begun(described, config, run.folder)
            stage = LSGMStage(model, config.objective, model.prior_config)
            optims = {"prior": config.optim_prior}
            if stage.trains_vae:
                optims["vae"] = config.optim_vae
            _fit(stage, model, data, optims, run)
    return run.folder.path


def _begin(config: LSGMTrainConfig, run: OpenRun[Datasets]) -> LSGM:
    """The model before its first step."""
    first, datasets = _first_stage(config), run.datasets
    if not _same_images(first, datasets):
        source = config.lsgm_run or config.vae_run
        raise UserError(f"{source}: it is not a model of {datasets.spec.name} images of this size")
    torch.manual_seed(config.train.seed)
    if config.lsgm_run is not None:
        return _continued(first, config)
    return _with_new_prior(first, config, run)


def _begun(description: dict[str, Any], config: LSGMTrainConfig, run: RunFolder) -> LSGM:
    """The model of a run to go on with, as it was built; its weights are in the checkpoint."""
    model = build_described(description, run.start)
    if not isinstance(model, LSGM):
        raise UserError(f"{run.start}: it describes no LSGM")
    prior = replace(config.prior, sde=model.prior_config.sde)
    return LSGM(model.vae, model.score, model.spec, model.vae_config, prior)


def _first_stage(config: LSGMTrainConfig) -> VAEModel:
    """The model that the second stage starts from."""
    first: Any = load(config.lsgm_run or config.vae_run or "")
    if config.lsgm_run is not None:
        if not isinstance(first, LSGM):
            raise UserError(f"--lsgm: {config.lsgm_run} is not the run of an LSGM")
        _check_prior(first, config)
    elif not isinstance(first, VAEModel):
        raise UserError(f"--vae: {config.vae_run} is not the run of a VAE")
    elif isinstance(first, LSGM) and config.prior.training != "frozen":
        raise UserError(
            f"--vae: {config.vae_run} is the run of an LSGM, not of a VAE: give it as --lsgm to go "
            "on from it; only a frozen VAE (prior.training frozen) is taken from one"
        )
    return first


def _check_prior(first: LSGM, config: LSGMTrainConfig) -> None:
    """The prior of the run and of the configuration are one network for one diffusion."""
    own = first.prior_config
    if own.sde.kind == "vesde":  # its range was fitted to the latents
        own = replace(own, sde=replace(own.sde, sigma2_max=config.prior.sde.sigma2_max))
    fixed = "network sde mixed predict drop_inactive inactive_mask class_conditional"
    for name in fixed.split():
        if getattr(config.prior, name) != getattr(own, name):
            raise UserError(
                f"prior.{name}: not that of the run that --lsgm {config.lsgm_run} names"
            )
    if config.add_context_blocks and first.vae.context is None:
        raise UserError(f"add_context_blocks: {config.lsgm_run} has a decoder without a context")


def _with_new_prior(first: VAEModel, config: LSGMTrainConfig, run: OpenRun[Datasets]) -> LSGM:
    """The trained VAE and an untrained prior."""
    prior, world, train = config.prior, run.world, config.train
    scan = LatentScan(
        first,
        run.datasets,
        run.folder.path,
        world,
        batch_size=max(train.batch_size // (world.size * train.accumulate), 1),
        precision=train.precision,
    )
    if prior.sde.kind == "vesde":
        sde = replace(prior.sde, sigma2_max=scan.largest_squared_distance())
        prior = replace(prior, sde=sde)
    score = build_prior(prior, first.vae, num_classes=run.datasets.spec.num_classes)
    model = LSGM(first.vae, score, run.datasets.spec, first.vae_config, prior)
    if prior.drop_inactive:
        augmented = prior.inactive_mask == "training"  # as in training, as published
        score.deactivate(scan.inactive_channels(prior.scan_images, augmented=augmented))
    return model


def _continued(first: VAEModel, config: LSGMTrainConfig) -> LSGM:
    """A trained LSGM, its decoder's context deepened as the configuration asks."""
    assert isinstance(first, LSGM)
    vae_config = first.vae_config
    if config.add_context_blocks:
        assert first.vae.context is not None
        first.vae.context.deepen(config.add_context_blocks)
        blocks = vae_config.context_blocks + config.add_context_blocks
        vae_config = replace(vae_config, context_blocks=blocks)
    prior = replace(config.prior, sde=first.prior_config.sde)
    return LSGM(first.vae, first.score, first.spec, vae_config, prior)


def _same_images(model: VAEModel, datasets: Datasets) -> bool:
    a, b = model.spec, datasets.spec
    return (a.shape, a.padding, a.binary) == (b.shape, b.padding, b.binary)


def _fit(
    stage: Stage,
    model: VAEModel,
    data: DataConfig,
    optims: Mapping[str, OptimConfig],
    run: OpenRun[Datasets],
) -> None:
    datasets = run.datasets

    def evaluate(context: EvalContext) -> Mapping[str, float | None]:
        averaged = model.with_weights(context.models)
        return evaluate_vae(averaged, datasets, data, context)

    def release(state: TrainState, notes: dict[str, Any]) -> None:
        averaged = model.with_weights(state.evaluation_models()).as_released()
        save(averaged, run.folder.path, data, notes)

    def draw_curves(folder: RunFolder) -> None:
        lines = {folder.path.name: read_metrics(folder.metrics)}
        num_dims = None if model.spec.binary else model.spec.num_dims
        learning_curves(lines, folder.path / "curves.png", num_dims=num_dims)

    labels = model.num_classes is not None
    run.train(Training(stage, model, optims, release, evaluate, draw_curves, labels))
