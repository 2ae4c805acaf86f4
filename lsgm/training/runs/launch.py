"""What the training of every kind of model does around the loop: data, run folder, batches."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from lsgm.config.training import OptimConfig, TrainConfig
from lsgm.data import Batches, fitting_batch_size
from lsgm.data.spec import ImageDataset
from lsgm.errors import UserError
from lsgm.models.release import Described
from lsgm.system.files import RunFolder, atomic_write_json
from lsgm.system.locks import FolderLock
from lsgm.system.memory import physical_memory
from lsgm.training.best import BestWeights, Release
from lsgm.training.context import DrawCurves, Evaluate, FitResult
from lsgm.training.distributed import World, distributed, on_main
from lsgm.training.loop import fit
from lsgm.training.precision import usable_precision
from lsgm.training.runs.resume import Plan, Resume, plan, record_changes, release_notes
from lsgm.training.state import Stage

__all__ = [
    "OpenRun",
    "RunConfig",
    "Training",
    "TrainingData",
    "closing",
    "open_run",
    "opening",
    "started",
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


class TrainingData(Protocol):
    """What a run trains on, :class:`lsgm.data.Datasets` for example."""

    @property
    def train(self) -> ImageDataset: ...

    def summary(self) -> str:
        """What the data are, in one line."""
        ...

    def read_all(self) -> None:
        """Read every item once, so that a damaged one shows before the training."""
        ...


C = TypeVar("C", bound=RunConfig)
D = TypeVar("D", bound=TrainingData)


@dataclass(frozen=True)
class Training:
    """What a run trains.

    Attributes:
        stage: What is trained.
        model: The model in it.
        optims: Optimizer of each side of the stage.
        release: Writes the trained model, with notes for its ``run.json``.
        evaluate: See :func:`lsgm.training.loop.fit`.
        draw_curves: Called on the main process after every evaluation is in the log.
        labels: Train on images with their classes.
    """

    stage: Stage
    model: Described
    optims: Mapping[str, OptimConfig]
    release: Release
    evaluate: Evaluate | None = None
    draw_curves: DrawCurves | None = None
    labels: bool = False


@dataclass(frozen=True)
class OpenRun(Generic[D]):
    """A run folder that this run alone may write.

    Attributes:
        folder: The folder.
        plan: Whether the run starts, goes on or is finished.
        config: The configuration.
        build: Finds the data.
        world: The processes.
    """

    folder: RunFolder
    plan: Plan
    config: RunConfig
    build: Callable[[], D]
    world: World

    @functools.cached_property
    def datasets(self) -> D:
        """The data.

        Raises:
            UserError: They are missing.
        """
        built: list[D] = []

        def build() -> None:
            built.append(self.build())
            print(built[0].summary(), flush=True)

        # The main process downloads what is missing before the others look.
        on_main(self.world, build)
        return built[0] if built else self.build()

    def begun_with(self) -> dict[str, Any] | None:
        """The description of the model that a run which goes on was begun with; None for a new run
        and for those of older versions, which kept none.
        """
        if not self.plan.resume or not self.folder.start.exists():
            return None
        return self.folder.read_start()["model"]

    def train(self, training: Training) -> None:
        """Train in the run's folder. A batch that is larger than the data becomes as large as they
        are.

        Raises:
            UserError: The batch does not divide, or what :func:`lsgm.training.loop.fit` raises.
        """
        world, folder, datasets = self.world, self.folder, self.datasets
        settings = _fitted(self.config.train, len(datasets.train), world)
        try:
            batches = Batches(
                datasets.train,
                settings.batch_size,
                train=True,
                seed=settings.seed,
                rank=world.rank,
                world_size=world.size,
                labels=training.labels,
            )
        except ValueError as error:
            raise UserError(f"train.batch_size: {error}") from None

        if self.plan.resume and folder.start.exists():
            _check_images(folder, len(datasets.train))
        on_main(world, datasets.read_all)
        evaluate, release = training.evaluate, training.release
        if settings.release == "best" and evaluate is not None:
            best = BestWeights(folder, world)
            evaluate, release = best.watch(evaluate), best.releasing(release)
        if world.is_main:
            print(opening(training.model, settings, batches.steps_per_epoch, self), flush=True)
        result = fit(
            training.stage,
            batches,
            settings,
            training.optims,
            folder,
            evaluate=evaluate,
            resume=self.plan.resume,
            world=world,
            release=lambda state: release(state, release_notes(settings, state.step)),
            draw_curves=training.draw_curves,
            on_start=lambda step: self._write_start(training.model, step),
        )
        if world.is_main:
            print(closing(training.model, result, folder), flush=True)

    def _write_start(self, model: Described, step: int) -> None:
        # Only now that data and model have been built: a mistake leaves no folder in the way.
        self.folder.make()
        if not self.plan.resume:
            start = {
                "model": {"kind": model.kind, **model.describe()},
                "train_images": len(self.datasets.train),
            }
            atomic_write_json(self.folder.start, start)
        record_changes(self.folder, self.config, self.plan, step)


def opening(model: Any, train: TrainConfig, steps_per_epoch: int, run: OpenRun[Any]) -> str:
    """What a training is about to do: model, device, length, where it writes."""
    words = model.in_words() if hasattr(model, "in_words") else _parameters(model)
    prior = getattr(model, "score", None) if hasattr(model, "vae") else None
    if isinstance(prior, torch.nn.Module):
        words += f"; prior of {_parameters(prior)}"
    device, size = run.world.device, run.world.size
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        where = f"{size} x {torch.cuda.get_device_name(device)}, {memory / 2**30:.0f} GiB"
    else:
        threads = train.num_threads or torch.get_num_threads()
        memory = physical_memory()
        where = f"{size} x {device.type} with {threads} threads, {memory / 2**30:.0f} GiB"
    steps = train.epochs * steps_per_epoch
    steps = steps if train.max_steps is None else min(steps, train.max_steps)
    return (
        f"model: {words}\n"
        f"device: {where}; {train.precision}\n"
        f"training: {steps} steps of {train.batch_size} images, {steps_per_epoch} an epoch -> "
        f"{run.folder.path}"
    )


def _parameters(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


SAMPLE = ("lsgm sample --run {run}", "lsgm evaluate --run {run}")
NEXT = {
    "vae": ("lsgm train-lsgm --vae {run}",),
    **dict.fromkeys(("lsgm", "ncsn", "score_sde"), SAMPLE),
    "classifier": ("lsgm edit class-conditional --run RUN --judge {run}",),
}
"""Commands that take a trained model of that kind; models of one's own are opened in Python."""


def closing(model: Described, result: FitResult, run: RunFolder) -> str:
    """Where the trained model is, its last numbers, and what to type next."""
    numbers = [f"{name} {value:.4g}" for name, value in result.metrics.items() if value is not None]
    seconds = result.train_seconds
    took = f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"
    lines = [f"{run.path}: trained for {took}; {', '.join(numbers[:3]) or 'not evaluated'}"]
    lines += [f"next: {line.format(run=run.path)}" for line in NEXT.get(model.kind, ())]
    return "\n".join(lines)


@contextlib.contextmanager
def open_run(
    config: RunConfig, build: Callable[[], D], out: str | None, resume: Resume, world: World
) -> Iterator[OpenRun[D]]:
    """The run's folder ``out`` (default ``runs/NAME``), locked until the block ends and checked to
    be free (or to hold a run, in a resume). Nothing is written there yet; ``build`` finds the data
    when they are needed.

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
        yield OpenRun(run, on_main(world, begin), config, build, world)
    finally:
        lock.release()


@contextlib.contextmanager
def started(
    config: C, build: Callable[[], D], out: str | None, resume: Resume
) -> Iterator[tuple[C, OpenRun[D]]]:
    """The configuration with a precision that the device computes
    (:func:`lsgm.training.precision.usable_precision`; the main process says what has changed), and
    the run among its processes, its folder as :func:`open_run` has it.

    Raises:
        UserError: As :func:`open_run`, or there is no such device.
    """
    asked = config.train
    with distributed(asked.device, asked.timeout_minutes) as world:
        precision = usable_precision(asked.precision, world.device)
        if precision != asked.precision:
            train = replace(asked, precision=precision)
            config = replace(config, train=train)  # type: ignore[type-var]
            if world.is_main:
                print(
                    f"train.precision: this CPU has no instructions for {asked.precision}, in "
                    f"which it would take many times longer; taking {precision}",
                    flush=True,
                )
        with open_run(config, build, out, resume, world) as run:
            yield config, run


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
