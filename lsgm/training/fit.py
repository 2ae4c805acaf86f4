"""Training in Python: any of the models on one's own data, with one's own modules."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lsgm.config.training import (
    DataConfig,
    FitConfig,
    LSGMTrainConfig,
    OptimConfig,
    TrainConfig,
)
from lsgm.data import Batches, Datasets, fitting_batch_size
from lsgm.data.items import DataLike, as_dataset
from lsgm.data.spec import ImageDataset
from lsgm.errors import UserError
from lsgm.models.autoencoder import Autoencoder
from lsgm.models.generic import AutoencoderModel, LatentScoreModel, ScoreModel
from lsgm.models.images import DataSGM
from lsgm.models.latent import LSGM, VAEModel
from lsgm.models.release import check_weights, load_weights, read_description, save
from lsgm.system.files import json_text
from lsgm.times import make_proposal
from lsgm.training.context import EvalContext, Evaluate
from lsgm.training.distributed import gather_rows, on_main
from lsgm.training.evaluation import evaluate_score_model, evaluate_vae
from lsgm.training.precision import autocast
from lsgm.training.runs.launch import OpenRun, Training, started
from lsgm.training.runs.resume import Resume
from lsgm.training.stages.generic import AutoencoderStage, GenericScoreStage
from lsgm.training.stages.latent import LSGMStage, VAEStage
from lsgm.training.stages.score import ScoreStage
from lsgm.training.state import Stage, StepContext, TrainState
from lsgm.weighting import make_weighting
from vae.random import RowGenerators

__all__ = ["fit"]

SCAN_BATCHES = 100
"""Training batches from which the scale of an autoencoder's latents is measured, at most."""

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class _Data:
    """The items that a model is trained on and those that it is measured on."""

    train: ImageDataset
    test: ImageDataset | None

    def summary(self) -> str:
        measured = f", {len(self.test)} test items" if self.test is not None else ""
        return f"{len(self.train)} training items{measured}"

    def read_all(self) -> None:
        self.train.read_all()
        if self.test is not None:
            self.test.read_all()


def fit(
    model: M,
    data: DataLike,
    *,
    out: str | Path,
    test: DataLike | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float | None = None,
    seed: int = 0,
    resume: Resume = "auto",
    precision: str = "float32",
    **settings: Any,
) -> M:
    """Train a model into a run folder, as the scripts do, and return it.

    ``model`` is a :class:`~lsgm.models.generic.ScoreModel` or
    :class:`~lsgm.models.generic.LatentScoreModel` (any network, any shape of data, any
    autoencoder), an :class:`~lsgm.models.autoencoder.Autoencoder` (as a VAE under N(0, I)), or one
    of the models of the configurations: :class:`~lsgm.models.images.DataSGM`,
    :class:`~lsgm.models.latent.VAEModel`, :class:`~lsgm.models.latent.LSGM` (whose score may have
    any network; ``prior_config.training`` says whether the VAE is trained too)::

        model = ScoreModel(MyNetwork(), VPSDE(), shape=(2,))
        model = lsgm.fit(model, points, out="runs/points", epochs=50, lr=2e-3)
        model.sample(16).images
        lsgm.load("runs/points", network=MyNetwork())

    The folder has checkpoints, the metrics and the trained weights. The same call after a kill
    goes on to the same bits; after the end it opens the trained model.

    Args:
        model: its own weights are where the training starts (and where it ends).
        data: a tensor or array ``(N, *shape)``, or a ``torch.utils.data.Dataset`` of ``x`` or
            tuples that begin with ``x``. Images of the models of configurations lie in [0, 1] (or
            are uint8) and have the padding of their ``spec``.
        out: the run folder.
        test: data on which the loss or bound is measured every ``eval_every`` epochs.
        epochs: passes over the data.
        batch_size: items a step.
        lr: learning rate after the warm-up; None: 1e-3, LSGM's prior 3e-4, a VAE 1e-2.
        seed: of the order of the data and all noise. (The weights are there already.)
        resume: False: start a new run; True: continue one; "auto": whichever applies.
        precision: of the networks: float32, bf16 (float32 on a CPU without bf16) or fp16.
        **settings: any field of :class:`~lsgm.config.training.TrainConfig` (``max_steps``,
            ``device``, ``checkpoint_every``, ``release``, ...), of
            :class:`~lsgm.config.training.OptimConfig` (``ema_decay``, ``clip_norm``, ...), and of
            what the model is trained by: :class:`~lsgm.config.training.ScoreObjectiveConfig`
            (``weighting``, ``proposal``, ...) or :class:`~lsgm.config.training.ObjectiveConfig`;
            and ``optim_vae``, an ``OptimConfig``, for the VAE of an LSGM.

    Returns:
        The trained model in evaluation mode, with the averaged weights where there is an average.

    Raises:
        ValueError: a setting that does not exist or is out of range.
        UserError: the folder holds another run, or the data do not fit.
        TrainingInterrupted: a signal asked to stop, with a checkpoint saved.
    """
    trained: Any = AutoencoderModel(model) if isinstance(model, Autoencoder) else model
    if _training.dispatch(type(trained)) is _training.dispatch(object):
        raise UserError(f"fit: {type(model).__name__} is none of the models that it trains")
    given = dict(epochs=epochs, batch_size=batch_size, seed=seed, precision=precision, **settings)
    if lr is not None:
        given["lr"] = lr
    config = _configured(trained, Path(out).name, given)
    test_set = None if test is None else as_dataset(test)
    built = _Data(as_dataset(data), test_set)
    with started(config, lambda: built, str(out), resume) as (config, run):
        _check_description(run, trained)
        if not run.plan.finished:
            torch.manual_seed(seed)
            run.train(_training(trained, config, run))
        on_main(run.world, lambda: None)  # which has to have written the weights
    _open(trained, Path(out))
    return model


def _configured(model: Any, name: str, given: dict[str, Any]) -> FitConfig:
    """The settings with the defaults of the kind of model."""
    config = _defaults(model)
    sections: dict[str, Any] = {
        "train": config.train,
        "optim": config.optim,
        **({"elbo": config.elbo} if isinstance(model, VAEModel) else {}),
        **({"objective": config.objective} if isinstance(model, ScoreModel | DataSGM) else {}),
    }
    changes: dict[str, dict[str, Any]] = {key: {} for key in sections}
    whole: dict[str, Any] = {}
    for key, value in given.items():
        owner = next((s for s, values in sections.items() if hasattr(values, key)), None)
        if owner is not None:
            changes[owner][key] = value
        elif key == "optim_vae" and isinstance(model, LSGM):
            whole[key] = value
        else:
            known = sorted({f.name for s in sections.values() for f in dataclasses.fields(s)})
            raise ValueError(
                f"fit has no setting {key!r} for this model; known: {', '.join(known)}"
            )
    optim = changes["optim"]
    if "lr" in optim and config.optim.schedule == "cosine":
        optim.setdefault("lr_min", min(config.optim.lr_min, optim["lr"]))
    elif "lr" in optim:
        optim.setdefault("lr_min", optim["lr"])
    built: dict[str, Any] = {
        key: dataclasses.replace(sections[key], **values) for key, values in changes.items()
    }
    return dataclasses.replace(config, name=name, **built, **whole)


def _defaults(model: Any) -> FitConfig:
    """Settings before anything is given."""
    config = FitConfig(train=TrainConfig(channels_last=False))
    if isinstance(model, LSGM):
        second = LSGMTrainConfig()
        return dataclasses.replace(
            config, elbo=second.objective, optim=second.optim_prior, optim_vae=second.optim_vae
        )
    if isinstance(model, VAEModel):
        return dataclasses.replace(config, optim=OptimConfig())
    if isinstance(model, LatentScoreModel):  # the prior's own objective, arXiv 2106.05931
        objective = dataclasses.replace(
            config.objective, weighting="likelihood", proposal="importance"
        )
        return dataclasses.replace(config, objective=objective)
    return config


def _check_description(run: OpenRun[_Data], model: Any) -> None:
    """A run that goes on was begun with this model."""
    begun = run.begun_with()
    own = json.loads(json_text({"kind": model.kind, **model.describe()}))
    if begun is not None and begun != own:
        raise UserError(f"{run.folder.path}: it was begun with another model; choose another out")


def _open(model: Any, folder: Path) -> None:
    """Give the model the weights that its run has released."""
    check_weights(folder, read_description(folder))
    load_weights(model, folder)
    model.eval()


# What is trained, by the kind of model


@singledispatch
def _training(model: Any, config: FitConfig, run: OpenRun[_Data]) -> Training:
    """The stage of a model with what evaluates and releases it."""
    raise NotImplementedError(type(model).__name__)


@_training.register
def _(model: ScoreModel, config: FitConfig, run: OpenRun[_Data]) -> Training:
    _check_shape(run, model.shape)
    if isinstance(model, LatentScoreModel) and not run.plan.resume:
        train = run.datasets.train
        size = fitting_batch_size(config.train.batch_size, len(train))
        batches = Batches(train, size, train=True, seed=config.train.seed)
        model.to(run.world.device)
        model.fit_scale([x for _, x in islice(batches.epoch(), SCAN_BATCHES)])

    def stage_of(model: ScoreModel) -> Stage:
        objective = config.objective
        try:
            weighting = make_weighting(objective.weighting)
            proposal = make_proposal(objective.proposal, model.sde, weighting)
        except ValueError as error:
            raise UserError(f"objective: {error}") from error
        return GenericScoreStage(
            model,
            weighting,
            proposal,
            estimator=objective.estimator,
            projections=objective.projections,
            stratified=objective.stratified_times,
        )

    return _generic(model, "score", stage_of, config, run)


@_training.register
def _(model: AutoencoderModel, config: FitConfig, run: OpenRun[_Data]) -> Training:
    _check_shape(run, model.shape)
    return _generic(model, "autoencoder", AutoencoderStage, config, run)


@_training.register
def _(model: DataSGM, config: FitConfig, run: OpenRun[_Data]) -> Training:
    def averaged(models: Mapping[str, nn.Module]) -> DataSGM:
        return model.with_score(models["score"]).eval()

    def evaluate(context: EvalContext) -> Mapping[str, float | None]:
        sets = _image_sets(run, model)
        return evaluate_score_model(averaged(context.models), config.objective, sets, context)

    def release(state: TrainState, notes: dict[str, Any]) -> None:
        save(averaged(state.evaluation_models()), run.folder.path, None, notes)

    stage = ScoreStage(model, **dataclasses.asdict(config.objective))
    labels = model.num_classes is not None
    return Training(
        stage, model, {"score": config.optim}, release, _if_tested(run, evaluate), labels=labels
    )


@_training.register
def _(model: VAEModel, config: FitConfig, run: OpenRun[_Data]) -> Training:
    def evaluate(context: EvalContext) -> Mapping[str, float | None]:
        averaged = model.with_weights(context.models)
        return evaluate_vae(averaged, _image_sets(run, model), DataConfig(), context)

    def release(state: TrainState, notes: dict[str, Any]) -> None:
        save(model.with_weights(state.evaluation_models()), run.folder.path, None, notes)

    stage: Stage
    if isinstance(model, LSGM):
        stage = LSGMStage(model, config.elbo, model.prior_config)
        optims = {"prior": config.optim}
        if stage.trains_vae:
            optims["vae"] = config.optim_vae
    else:
        stage, optims = VAEStage(model, config.elbo), {"vae": config.optim}
    labels = model.num_classes is not None
    return Training(stage, model, optims, release, _if_tested(run, evaluate), labels=labels)


def _generic(
    model: Any,
    side: str,
    stage_of: Callable[[Any], Stage],
    config: FitConfig,
    run: OpenRun[_Data],
) -> Training:
    """The training of a model whose submodule ``side`` is all that is trained."""

    def averaged(models: Mapping[str, nn.Module]) -> Any:
        return model.with_trained(models[side])

    def evaluate(context: EvalContext) -> Mapping[str, float | None]:
        test = run.datasets.test
        assert test is not None
        return {"loss": _mean_loss(stage_of(averaged(context.models)), test, context)}

    def release(state: TrainState, notes: dict[str, Any]) -> None:
        save(averaged(state.evaluation_models()), run.folder.path, None, notes)

    return Training(
        stage_of(model), model, {side: config.optim}, release, _if_tested(run, evaluate)
    )


def _mean_loss(stage: Stage, test: ImageDataset, context: EvalContext) -> float:
    """The stage's loss of test items; their noise is the same at every evaluation."""
    train, world = context.config, context.world
    batches = Batches(
        test,
        min(train.batch_size, len(test)),
        train=False,
        limit=train.eval_images,
        rank=world.rank,
        world_size=world.size,
    )
    stage.eval()
    sums = torch.zeros(1, 2, dtype=torch.float64)
    with autocast(world.device, train.precision):
        for step, x in batches.epoch():
            rng = RowGenerators.of(train.seed, batches.index(0, step).tolist())
            loss = stage(x.to(world.device), StepContext(context.step, context.total_steps, rng))
            sums += torch.tensor([[loss.loss.item() * len(x), len(x)]], dtype=torch.float64)
    total, count = gather_rows(sums, world).sum(0).tolist()
    return total / count


def _if_tested(run: OpenRun[_Data], evaluate: Evaluate) -> Evaluate | None:
    return None if run.datasets.test is None else evaluate


def _image_sets(run: OpenRun[_Data], model: VAEModel | DataSGM) -> Datasets:
    test = run.datasets.test
    assert test is not None
    return Datasets(run.datasets.train, test, model.spec)


def _check_shape(run: OpenRun[_Data], shape: tuple[int, ...]) -> None:
    train = run.datasets.train
    found = tuple(train.batch(torch.zeros(1, dtype=torch.int64)).shape[1:])
    if found != tuple(shape):
        raise UserError(f"data: items have the shape {found}, the model wants {tuple(shape)}")
