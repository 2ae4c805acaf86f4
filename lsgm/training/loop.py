"""The training loop: steps, and between them logs, checkpoints and evaluations.

A resumed run continues as if it had never stopped: a step depends on the state and its number only
(see :mod:`lsgm.training.step`), and so does the order of the images.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lsgm.config.training import OptimConfig, TrainConfig
from lsgm.errors import MALFORMED, UserError, malformed
from lsgm.system.device import choose_device
from lsgm.system.files import RunFolder
from lsgm.training.checkpoint import Checkpoints
from lsgm.training.context import BatchSource, DrawCurves, EvalContext, Evaluate, FitResult
from lsgm.training.distributed import World, on_main, wrap
from lsgm.training.interrupt import StopNow, StopSignal, TrainingInterrupted, resume_command
from lsgm.training.logging import MeanMetrics, RunLogger
from lsgm.training.precision import make_scaler
from lsgm.training.state import Stage, TrainState
from lsgm.training.step import Step, StepResult

__all__ = ["MAX_RETURNS", "PATIENCE", "fit"]

PATIENCE = 10
"""Skipped steps in a row after which the run returns to its last checkpoint."""

MAX_RETURNS = 5
"""Returns after which the run gives up."""


def fit(
    stage: Stage,
    batches: BatchSource,
    config: TrainConfig,
    optims: Mapping[str, OptimConfig],
    run: RunFolder,
    *,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    world: World | None = None,
    release: Callable[[TrainState], None] | None = None,
    draw_curves: DrawCurves | None = None,
    on_start: Callable[[int], None] | None = None,
) -> FitResult:
    """Train a stage to the end.

    Args:
        stage: The stage; it is moved to the device.
        batches: The training images.
        config: Length, batch, precision, what is written when.
        optims: Optimizer of each side, by the names of ``stage.trainables()``.
        run: Folder that exists.
        evaluate: Called on every process every ``eval_every`` epochs and at the end; returns
            numbers that are the same on every process, or None where one is not known.
        resume: Continue from the folder's last good checkpoint, if it has one.
        world: The processes, from :func:`lsgm.training.distributed.distributed`; by default this
            one alone.
        release: Called on the main process after the last checkpoint.
        draw_curves: Called on the main process after every evaluation is in the log.
        on_start: Called on the main process with the step that the run starts from or goes on
            from, when it is sure to do so and before anything is written.

    Raises:
        TrainingInterrupted: After Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, with a checkpoint saved.
        UserError: If the batch does not divide, a checkpoint does not fit or is beyond the end of
            the run, or training keeps producing NaN.
        OSError: If a file cannot be written.
    """
    world = World(choose_device(config.device)) if world is None else world
    trainer = _Trainer(stage, batches, config, optims, run, world, evaluate, draw_curves)
    try:
        with StopSignal(world.is_main) as stop:
            trainer.begin(resume, on_start or (lambda step: None))
            trainer.train(stop)
        if release is not None and world.is_main:
            release(trainer.state)
    except BaseException:
        # On a full disk the logs cannot be flushed either; what stopped the run says more.
        with contextlib.suppress(OSError):
            trainer.close()
        raise
    trainer.close()
    seconds = trainer.state.counters.train_seconds
    return FitResult(trainer.state, seconds, trainer.last_evaluation)


class _Trainer:
    def __init__(
        self,
        stage: Stage,
        batches: BatchSource,
        config: TrainConfig,
        optims: Mapping[str, OptimConfig],
        run: RunFolder,
        world: World,
        evaluate: Evaluate | None,
        draw_curves: DrawCurves | None,
    ) -> None:
        if config.batch_size % (world.size * config.accumulate):
            raise UserError(
                f"train.batch_size: {config.batch_size} is not a multiple of {world.size} "
                f"process(es) x train.accumulate {config.accumulate}"
            )
        if config.cuda_graphs and (world.device.type != "cuda" or world.size > 1):
            raise UserError(
                f"train.cuda_graphs: needs one process on a CUDA device, not {world.size} on "
                f"{world.device.type}"
            )
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.batches = batches
        self.config = config
        self.run = run
        self.world = world
        self.evaluate = evaluate
        self.draw_curves = draw_curves
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.stage = stage.to(world.device).train()
        stage.to(memory_format=layout)  # type: ignore[call-overload]
        self.state = TrainState(
            stage,
            optims,
            make_scaler(world.device, config.precision),
            total_steps=_total_steps(config, batches),
            steps_per_epoch=batches.steps_per_epoch,
        )
        stage.use_average({name: ema.module for name, ema in self.state.ema_models().items()})
        if config.compile:
            for network in stage.networks():
                network.compile()
        if world.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # batches have one shape
        unused = stage.find_unused_parameters
        self.step: Step | None = Step(
            self.state,
            wrap(stage, world, find_unused_parameters=unused),
            world,
            seed=config.seed,
            accumulate=config.accumulate,
            precision=config.precision,
            shared_noise=config.shared_noise,
            channels_last=config.channels_last,
            cuda_graphs=config.cuda_graphs,
        )
        self.checkpoints = Checkpoints(run.checkpoints, config.keep_checkpoints)
        self.logger = RunLogger(run, self.state.total_steps, enabled=world.is_main)
        self.means = MeanMetrics(world.device)
        self.rates: Mapping[str, float] = {}
        self.skipped_in_a_row = 0
        self.first_fault = ""
        self.saved_step = -1
        self.save_due = False
        self.last_evaluation: Mapping[str, float | None] = {}
        self.clock: float | None = None
        self.steps_since_log = 0
        self.seconds_since_log = 0.0

    # Beginning and end

    def begin(self, resume: bool, on_start: Callable[[int], None]) -> None:
        """Start at step 0 or at the last good checkpoint."""
        if resume and self.load(on_start):
            self.logger.say(f"resumed at step {self.state.step} of {self.state.total_steps}")
            return
        on_main(self.world, lambda: on_start(0))
        self.logger.open(0)
        if resume:
            self.logger.say("no checkpoint yet: starting from the beginning")
        fault = self.state.non_finite()
        if fault is not None:
            raise UserError(f"training cannot start: {fault}")
        self.save()  # so that there is always one to return to

    def close(self) -> None:
        """Let go of files and of the gradient reducers."""
        self.logger.close()
        self.step = None

    # The loop

    def train(self, stop: StopSignal) -> None:
        """Run to the last step."""
        self.evaluate_if_due(stop)
        self.start_clock()
        while self.state.step < self.state.total_steps:
            for images in self.rest_of_epoch():
                assert self.step is not None
                result = self.step(images, stop)
                self.record(result)
                if self.skipped_in_a_row >= PATIENCE:
                    self.return_to_checkpoint(
                        f"{PATIENCE} steps in a row gave NaN or infinity (first {self.first_fault})"
                    )
                    break
                step, last = self.state.step, self.state.step == self.state.total_steps
                if step % self.config.log_every == 0 or last:
                    self.log()
                self.save_due |= step % self.config.checkpoint_every == 0
                # Not amid bad steps: the checkpoint is what a return would go back to.
                saved = True
                if last or result.stop or (self.save_due and result.applied):
                    saved = self.save()
                if result.stop and not (last and saved):
                    raise self.interrupted(stop.number)
                if not saved:
                    break
                self.evaluate_if_due(stop)

    def rest_of_epoch(self) -> Iterator[Tensor]:
        """This process's batches from the present step to the end of the epoch or the run."""
        epoch, start = divmod(self.state.position, self.batches.steps_per_epoch)
        left = self.state.total_steps - self.state.step
        for done, (_, images) in enumerate(self.batches.epoch(epoch, start), start=1):
            yield images
            if done == left:
                return

    def record(self, result: StepResult) -> None:
        """Count a step and take in its metrics."""
        self.rates = result.rates
        self.steps_since_log += 1
        if self.skipped_in_a_row == 0 and not result.applied:
            self.first_fault = f"at step {self.state.step}: {result.fault}"
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        if result.applied:
            for metrics in result.metrics:
                self.means.add(metrics)
        self.logger.advance()

    # Checkpoints

    def save(self, means: list[dict[str, Any]] | None = None) -> bool:
        """Write a checkpoint; or, if weights, averages or optimizers are no longer finite, go back
        to the last one and return False.

        Args:
            means: The running means over all processes, if they have been taken already.
        """
        self.read_clock()
        state = self.state.state_dict()
        fault = on_main(self.world, lambda: self.state.non_finite(state))
        if fault is not None:
            self.return_to_checkpoint(f"after step {self.state.step} {fault}")
            return False
        self.write_checkpoint(state, self.means.state_dict(self.world) if means is None else means)
        return True

    def write_checkpoint(self, state: dict[str, Any], means: list[dict[str, Any]]) -> None:
        """Write a checkpoint of finite weights; needs no other process."""
        state["means"] = means
        state["since_log"] = [self.steps_since_log, self.seconds_since_log]
        state["metrics_length"] = self.logger.length
        state["batch_size"] = self.config.batch_size
        if self.world.is_main:
            self.checkpoints.save(self.state.step, state)
        self.saved_step = self.state.step
        self.save_due = False
        self.start_clock()

    def interrupted(self, number: int) -> TrainingInterrupted:
        """What to raise, after saying it, once a checkpoint of the present step is written."""
        message = f"stopped at step {self.state.step}; continue with: {resume_command()}"
        self.logger.say(message)
        return TrainingInterrupted(message, number or signal.SIGINT)

    def load(self, on_start: Callable[[int], None] = lambda step: None) -> bool:
        """Go to the last good checkpoint, log included; False if there is none."""
        found: list[tuple[int, dict[str, Any]]] = []

        def find() -> int | None:
            latest = self.checkpoints.latest(self.logger.say, self.state.non_finite)
            if latest is not None:
                found.append(latest)
            return None if latest is None else latest[0]

        step = on_main(self.world, find)
        if step is None:
            return False
        state = found[0][1] if found else self.checkpoints.load(step)
        path = self.checkpoints.path(step)
        batch_size = state.get("batch_size", self.config.batch_size)
        try:
            self.state.load_state_dict(
                state, str(path), another_batch=batch_size != self.config.batch_size
            )
            self.means.load_state_dict(state["means"])
            self.steps_since_log, self.seconds_since_log = state["since_log"]
            length = int(state["metrics_length"])
        except MALFORMED as error:
            raise malformed(path, "a checkpoint of this run", error) from error
        self.state.total_steps = _total_steps(self.config, self.batches, self.state.counters.offset)
        if step > self.state.total_steps:
            raise UserError(
                f"train.epochs, train.max_steps: the run is at step {step} already, they end it at "
                f"step {self.state.total_steps}"
            )
        self.saved_step = step
        on_main(self.world, lambda: on_start(step))
        self.logger.total_steps = self.state.total_steps
        self.logger.open(self.state.step, length)
        return True

    def return_to_checkpoint(self, reason: str) -> None:
        """Go back to the last checkpoint, with half the learning rates and other noise.

        Args:
            reason: What went wrong, in words.

        Raises:
            UserError: After several returns.
        """
        counters = self.state.counters
        failed_at, returns = counters.step, counters.returns + 1
        multiplier, seconds = counters.lr_multiplier / 2, counters.train_seconds
        skipped = counters.skipped
        if returns > MAX_RETURNS:
            raise UserError(
                f"{reason}, after {MAX_RETURNS} returns to a checkpoint: training diverges; try a "
                "lower learning rate, clip_norm, a longer warm-up, or train.precision float32"
            )
        if not self.load():
            raise UserError(f"{reason}, and {self.run.checkpoints} holds no checkpoint any more")
        counters = self.state.counters
        counters.returns, counters.lr_multiplier = returns, multiplier
        counters.train_seconds, counters.skipped = seconds, skipped
        self.skipped_in_a_row = 0
        self.logger.say(
            f"{reason}: back to step {counters.step}, learning rates x {multiplier:g} "
            f"(return {returns} of {MAX_RETURNS})"
        )
        values = {"failed_at": failed_at, "returns": returns, "lr_multiplier": multiplier}
        self.logger.write("return", counters.step, values)
        self.save()  # so that a resumed run knows of the return

    # Log and evaluation

    def log(self) -> None:
        """Write the means since the last line."""
        self.read_clock()
        counters = self.state.counters
        epoch = self.state.position / self.batches.steps_per_epoch
        means = self.means.mean(self.world)
        seconds_per_step = self.seconds_since_log / max(1, self.steps_since_log)
        speed = self.config.batch_size / seconds_per_step if seconds_per_step > 0 else 0.0
        values = {
            "epoch": epoch,
            "train_seconds": counters.train_seconds,
            "images_per_second": speed,
            "skipped": counters.skipped,
            **{f"lr/{name}": rate for name, rate in self.rates.items()},
            **means,
        }
        if self.state.scaler.is_enabled():
            values["loss_scale"] = self.state.scaler.get_scale()
        self.logger.write("train", counters.step, values)
        shown = {name: means.get(name, float("nan")) for name in self.stage.headline}
        shown["images/s"] = speed
        self.logger.progress(counters.step, int(epoch), shown, seconds_per_step)
        self.means.reset()
        self.steps_since_log, self.seconds_since_log = 0, 0.0

    def evaluate_if_due(self, stop: StopSignal) -> None:
        """Evaluate the averaged models (live ones where there is no average) if it is time.

        Raises:
            TrainingInterrupted: By a signal meanwhile, with a checkpoint of this step saved.
        """
        step, spacing = self.state.step, self.config.eval_every * self.batches.steps_per_epoch
        last = step == self.state.total_steps
        due = step > 0 and (self.state.position % spacing == 0 or last)
        if self.evaluate is None or not due or self.state.counters.evaluated >= step:
            return
        self.read_clock()
        means = self.means.state_dict(self.world)  # while the other processes are here
        models = self.state.evaluation_models()
        self.stage.eval()
        for model in models.values():
            model.eval()
        context = EvalContext(
            stage=self.stage,
            models=models,
            step=step,
            epoch=self.state.position // self.batches.steps_per_epoch,
            total_steps=self.state.total_steps,
            config=self.config,
            run=self.run,
            world=self.world,
            log_image=lambda name, image: self.logger.image(name, image, step),
            bar=self.logger.bar,
        )
        start = time.perf_counter()
        try:
            with torch.no_grad(), stop.at_once():
                results = dict(self.evaluate(context))
        except StopNow as signalled:
            # The other processes may be anywhere: no more waiting for them.
            if self.saved_step != step:
                self.write_checkpoint(self.state.state_dict(), means)
            raise self.interrupted(signalled.number) from None
        cost = time.perf_counter() - start
        self.stage.train()
        self.state.counters.evaluated = step
        self.last_evaluation = results
        seconds = self.state.counters.train_seconds
        clocks = {"train_seconds": seconds, "eval_seconds": cost}
        self.logger.write("eval", step, {"epoch": context.epoch, **clocks, **results})
        shown = "  ".join(
            f"{name} {'n/a' if value is None else f'{value:.5g}'}"
            for name, value in results.items()
        )
        self.logger.say(f"evaluation at step {step}: {shown}  ({cost:.1f} s)")
        if self.draw_curves is not None:
            draw = self.draw_curves
            on_main(self.world, lambda: draw(self.run))
        self.start_clock()

    # Time

    def start_clock(self) -> None:
        """Count training time from now on."""
        self.clock = time.perf_counter()

    def read_clock(self) -> None:
        """Add the time since the clock was last started or read to the training time."""
        if self.clock is None:
            return
        now = time.perf_counter()
        self.state.counters.train_seconds += now - self.clock
        self.seconds_since_log += now - self.clock
        self.clock = now


def _total_steps(config: TrainConfig, batches: BatchSource, offset: int = 0) -> int:
    """Optimizer steps of the run whose position is ``offset`` ahead of its steps."""
    total = config.epochs * batches.steps_per_epoch - offset
    return total if config.max_steps is None else min(total, config.max_steps)
