"""What the training of every kind of model does around the loop: data, run folder, batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from lsgm.config import DataConfig, OptimConfig, TrainConfig
from lsgm.configio import save_config
from lsgm.data import Batches, Datasets, build_datasets, fitting_batch_size
from lsgm.errors import UserError
from lsgm.files import RunFolder
from lsgm.training.distributed import World, on_main
from lsgm.training.loop import EvalContext, fit
from lsgm.training.state import Stage, TrainState

__all__ = ["RunConfig", "fit_run", "open_run"]


class RunConfig(Protocol):
    """What the configurations of all runs have in common."""

    @property
    def name(self) -> str:
        """Name of the run."""
        ...

    @property
    def train(self) -> TrainConfig:
        """The training loop."""
        ...


def open_run(
    config: RunConfig, data: DataConfig, out: str | None, resume: bool, world: World
) -> tuple[RunFolder, Datasets]:
    """The run's folder ``out`` (default ``runs/NAME``), not yet made but checked to be free (or to
    hold a run, in a resume), and the data.

    Raises:
        UserError: The folder is not free, or the data are missing.
    """
    run = RunFolder(Path(out or Path("runs") / config.name))
    on_main(world, lambda: run.check(resume))
    built: list[Datasets] = []
    # The main process downloads what is missing before the others look.
    on_main(world, lambda: built.append(build_datasets(data)))
    return run, built[0] if built else build_datasets(data)


def fit_run(
    stage: Stage,
    datasets: Datasets,
    config: RunConfig,
    optims: Mapping[str, OptimConfig],
    run: RunFolder,
    resume: bool,
    world: World,
    *,
    evaluate: Callable[[EvalContext], Mapping[str, float | None]],
    release: Callable[[TrainState], None],
    draw_curves: Callable[[RunFolder], None] | None = None,
    labels: bool = False,
) -> None:
    """Train ``stage`` in the run's folder; ``labels``: on images with their classes. A batch that
    is larger than the data becomes as large as they are.

    Raises:
        UserError: The batch does not divide, or what :func:`lsgm.training.loop.fit` raises.
    """
    train = _fitted(config.train, len(datasets.train), world)
    try:
        batches = Batches(
            datasets.train,
            train.batch_size,
            train=True,
            seed=train.seed,
            rank=world.rank,
            world_size=world.size,
            labels=labels,
        )
    except ValueError as error:
        raise UserError(f"train.batch_size: {error}") from None

    def prepare() -> None:
        # Only now that data and model have been built: a mistake leaves no folder in the way.
        (RunFolder.resume if resume else RunFolder.create)(run.path)
        if not run.config.exists():
            save_config(config, run.config)

    on_main(world, prepare)
    fit(
        stage,
        batches,
        train,
        optims,
        run,
        evaluate=evaluate,
        resume=resume,
        world=world,
        release=release,
        draw_curves=draw_curves,
    )


def _fitted(train: TrainConfig, num_images: int, world: World) -> TrainConfig:
    """The settings with a batch that the training images can fill."""
    parts = world.size * train.accumulate
    batch_size = fitting_batch_size(train.batch_size, num_images, parts)
    if not batch_size:
        raise UserError(
            f"train.batch_size: {num_images} training images are too few for {world.size} "
            f"process(es) x train.accumulate {train.accumulate}"
        )
    if batch_size != train.batch_size and world.is_main:
        print(
            f"train.batch_size: {train.batch_size} is more than the {num_images} training images; "
            f"taking {batch_size}",
            flush=True,
        )
    return replace(train, batch_size=batch_size)
