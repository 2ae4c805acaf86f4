"""A stage with two sides, dropout, batch norm and noise, and its data, for the tests of training.

As a program it trains in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lsgm.config.training import OptimConfig, TrainConfig
from lsgm.training import (
    FitResult,
    RunFolder,
    Stage,
    StepContext,
    StepOutput,
    TrainingInterrupted,
    World,
    distributed,
)
from lsgm.training.loop import fit
from vae.random import randn

STEPS_PER_EPOCH = 5
BATCH = 8

TRAIN = TrainConfig(
    seed=3,
    epochs=3,
    batch_size=BATCH,
    accumulate=2,
    device="cpu",
    log_every=4,
    eval_every=1,
    checkpoint_every=3,
    keep_checkpoints=2,
)
OPTIMS = {
    "front": OptimConfig(lr=1e-2, lr_min=1e-3, warmup_steps=2, ema_decay=0.9, clip_norm=0.5),
    "back": OptimConfig(optimizer="adamw", lr=3e-3, lr_min=1e-3, ema_decay=0.8),
}


class Crash(Exception):
    """What a test throws into a run."""


class ToyStage(Stage):
    def __init__(self, width: int = 4, dropout: float = 0.2, norm: bool = True) -> None:
        super().__init__()
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(1)
        self.front = nn.Sequential(
            nn.Conv2d(1, width, 3),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(dropout),
        )
        self.back = nn.Linear(width, 1)
        torch.random.set_rng_state(generator_state)
        self.calls = 0
        self.vector = torch.zeros(2)
        self.on_step = lambda step: None
        self.poison = lambda step, loss: loss

    def trainables(self) -> dict[str, nn.Module]:
        return {"front": self.front, "back": self.back}

    def extra_state(self) -> dict[str, Tensor]:
        return {"vector": self.vector}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.vector = state["vector"]

    def after_step(self, step: int) -> None:
        self.vector = self.vector + step

    def forward(self, images: Tensor, context: StepContext) -> StepOutput:
        self.calls += 1
        self.on_step(context.step)
        features = self.front(images).mean((2, 3)).float()
        features = features + 0.1 * randn(features.shape, context.rng, device=features.device)
        target = images.mean((1, 2, 3))[:, None]
        loss = (self.back(features).float() - target).square().mean()
        loss = self.poison(context.step, loss)
        metrics = {"feature": features.detach().mean(), "constant": torch.tensor(2.0)}
        return StepOutput(loss, metrics)


class ToyBatches:
    steps_per_epoch = STEPS_PER_EPOCH

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[int, Tensor]]:
        for step in range(start, STEPS_PER_EPOCH):
            generator = torch.Generator().manual_seed(epoch * STEPS_PER_EPOCH + step)
            images = torch.rand(BATCH, 1, 6, 6, generator=generator)
            yield step, images.tensor_split(self.world_size)[self.rank]


def train(
    out: Path,
    stage: ToyStage | None = None,
    *,
    resume: bool = False,
    world: World | None = None,
    optims: dict[str, OptimConfig] | None = None,
    evaluate: object = lambda context: {"score": float(context.step)},
    batches: object = None,
    release: object = None,
    **changes: object,
) -> FitResult:
    run = RunFolder.resume(out) if resume else RunFolder.create(out)
    world = World(torch.device("cpu")) if world is None else world
    return fit(
        ToyStage() if stage is None else stage,
        ToyBatches(world.rank, world.size) if batches is None else batches,
        replace(TRAIN, **changes),
        OPTIMS if optims is None else optims,
        run,
        evaluate=evaluate,
        resume=resume,
        world=world,
        release=release,
    )


def everything(result: FitResult) -> dict[str, object]:
    """All that a run leaves behind and that a resumed run has to reproduce bit for bit."""
    state = result.state.state_dict()
    state["counters"].pop("train_seconds")
    return state


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--nan-at", type=int, help="on the last process only")
    parser.add_argument("--stop-at", type=int, help="SIGTERM to the last process only")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stage = ToyStage(dropout=0.0, norm=False) if args.plain else ToyStage()

    def on_step(step: int) -> None:
        if step == args.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == args.stop_at and last and stage.calls % 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stage.on_step = on_step
    with distributed("cpu") as world:
        last = world.rank == world.size - 1
        if last:
            stage.poison = lambda step, loss: loss * math.nan if step == args.nan_at else loss
        if world.is_main and not args.resume:
            RunFolder.create(args.out)
        run = RunFolder(args.out)
        batches = ToyBatches(world.rank, world.size)
        try:
            result = fit(stage, batches, TRAIN, OPTIMS, run, resume=args.resume, world=world)
        except TrainingInterrupted as stopped:
            print(stopped)
            return
        if args.save is not None and world.is_main:
            torch.save(result.state.state_dict(), args.save)
        del result


if __name__ == "__main__":
    sys.exit(main())
