"""What the training of every kind of model does around the loop: data, run folder, batches."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lsgm.config.training import DataConfig, OptimConfig, TrainConfig
from lsgm.data import Batches, Datasets, build_datasets, fitting_batch_size
from lsgm.errors import UserError
from lsgm.models.release import Described
from lsgm.system.files import RunFolder, atomic_write_json
from lsgm.system.locks import FolderLock
from lsgm.training.best import BestWeights, Release
from lsgm.training.distributed import World, on_main
from lsgm.training.loop import EvalContext, fit
from lsgm.training.runs.resume import Plan, Resume, plan, record_changes, release_notes
from lsgm.training.state import Stage

__all__ = [
    "OpenRun",
    "RunConfig",
    "fit_run",
    "open_run",
]


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


@dataclass(frozen=True)
class OpenRun:
    """A run folder that this run alone may write.

    Args:
        folder: The folder.
        plan: Whether the run starts, goes on or is finished.
        data: Which images.
        world: The processes.
    """

    folder: RunFolder
    plan: Plan
    data: DataConfig
    world: World

    @functools.cached_property
    def datasets(self) -> Datasets:
        """The images.

        Raises:
            UserError: They are missing.
        """
        built: list[Datasets] = []

        def build() -> None:
            built.append(build_datasets(self.data))
            print(built[0].summary(), flush=True)

        # The main process downloads what is missing before the others look.
        on_main(self.world, build)
        return built[0] if built else build_datasets(self.data)

    def begun_with(self) -> dict[str, Any] | None:
        """The description of the model that a run which goes on was begun with; None for a new run
        and for those of older versions, which kept none.
        """
        if not self.plan.resume or not self.folder.start.exists():
            return None
        return self.folder.read_start()["model"]


@contextlib.contextmanager
def open_run(
    config: RunConfig, data: DataConfig, out: str | None, resume: Resume, world: World
) -> Iterator[OpenRun]:
    """The run's folder ``out`` (default ``runs/NAME``), locked until the block ends and checked to
    be free (or to hold a run, in a resume). Nothing is written there yet.

    Raises:
        UserError: The folder is not free, is in use by another process, or holds a run that the
            configuration does not fit.
    """
    run = RunFolder(Path(out or Path("runs") / config.name))
    lock = FolderLock(run.path)

    def begin() -> Plan:
        lock.acquire()
        run.sweep()
        chosen = plan(run, config, resume)
        if chosen.finished:
            print(f"{run.path}: the run is finished; give more --train.epochs to train on")
        for line in chosen.lines():
            print(line, file=sys.stderr, flush=True)
        return chosen

    try:
        yield OpenRun(run, on_main(world, begin), data, world)
    finally:
        lock.release()


def fit_run(
    stage: Stage,
    model: Described,
    config: RunConfig,
    optims: Mapping[str, OptimConfig],
    run: OpenRun,
    *,
    evaluate: Callable[[EvalContext], Mapping[str, float | None]],
    release: Release,
    draw_curves: Callable[[RunFolder], None] | None = None,
    labels: bool = False,
) -> None:
    """Train ``stage`` in the run's folder. A batch that is larger than the data becomes as large as
    they are.

    Args:
        stage: What is trained.
        model: The model in it.
        config: The configuration.
        optims: Optimizer of each side.
        run: The folder.
        evaluate: See :func:`lsgm.training.loop.fit`.
        release: Writes the trained model, with notes for its ``run.json``.
        draw_curves: Called on the main process after every evaluation is in the log.
        labels: Train on images with their classes.

    Raises:
        UserError: The batch does not divide, or what :func:`lsgm.training.loop.fit` raises.
    """
    world, folder, datasets = run.world, run.folder, run.datasets
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

    if run.plan.resume and folder.start.exists():
        _check_images(folder, len(datasets.train))
    on_main(world, datasets.read_all)

    def on_start(step: int) -> None:
        # Only now that data and model have been built: a mistake leaves no folder in the way.
        folder.make()
        if not run.plan.resume:
            start = {
                "model": {"kind": model.kind, **model.describe()},
                "train_images": len(datasets.train),
            }
            atomic_write_json(folder.start, start)
        record_changes(folder, config, run.plan, step)

    if train.release == "best":
        best = BestWeights(folder, world)
        evaluate, release = best.watch(evaluate), best.releasing(release)
    fit(
        stage,
        batches,
        train,
        optims,
        folder,
        evaluate=evaluate,
        resume=run.plan.resume,
        world=world,
        release=lambda state: release(state, release_notes(train, state.step)),
        draw_curves=draw_curves,
        on_start=on_start,
    )


def _check_images(run: RunFolder, now: int) -> None:
    begun_with = run.read_start()["train_images"]
    if begun_with != now:
        raise UserError(
            f"data: {run.path} was begun with {begun_with} training images, there are {now} now; "
            "an epoch cannot go on with others"
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
