"""A first-stage training step: as we run it, and as a straightforward implementation would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lsgm.benchmark.accounting import TimeShare, count_flops, matrix_peak, time_shares
from lsgm.benchmark.plain import make_plain
from lsgm.benchmark.training import (
    REPEATS_OPTION,
    StepCost,
    positive_number,
    prepare,
    time_steps,
    training_step,
    vae_stage,
)
from lsgm.config.command_line import parse_command_line
from lsgm.config.overrides import Option
from lsgm.config.training import VAETrainConfig
from lsgm.system.processes import in_fresh_process

__all__ = ["VAECost", "measure_vae", "plain_config", "vae_command"]

BATCH_OPTION = Option("batch", "images a step; default: the configuration's", "N")


@dataclass(frozen=True)
class VAECost:
    """Cost of a step, and what it is made of.

    Attributes:
        step: Its time and memory.
        device: Where it ran.
        threads: CPU threads.
        precision: Of the network.
        flops: Floating-point operations of a step in convolutions and matrix products, forward and
            backward.
        peak_flops: Operations per second that a large matrix product reaches in the same precision
            on the same machine, with as many threads.
        shares: Where the time goes.
    """

    step: StepCost
    device: str
    threads: int
    precision: str
    flops: int
    peak_flops: float
    shares: tuple[TimeShare, ...]

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.step.seconds

    def lines(self) -> list[str]:
        share = self.flops_per_second / self.peak_flops
        return [
            StepCost.header(),
            self.step.row(),
            f"{self.flops / 1e9:.2f} GFLOP a step, {self.flops_per_second / 1e9:.2f} GFLOP/s: "
            f"{share:.1%} of the {self.peak_flops / 1e9:.1f} GFLOP/s of a matrix product "
            f"({self.precision}, {self.device}, {self.threads} threads)",
            TimeShare.header(),
            *(part.row() for part in self.shares),
        ]


def plain_config(config: VAETrainConfig) -> VAETrainConfig:
    """``config`` in float32, channels-first, not compiled."""
    train = replace(config.train, precision="float32", channels_last=False, compile=False)
    return replace(config, train=train)


def _job(config: VAETrainConfig, repeats: int, plain: bool) -> VAECost:
    train = config.train
    data, spec = prepare(train, config.data)
    stage = vae_stage(config, spec, data.device)
    if plain:
        make_plain(stage.model.vae)
    step = training_step(stage, {"vae": config.optim_vae}, data, train.precision)
    if train.compile:
        stage.compile()
    # First of all: the optimizer's state belongs to the memory of the steps.
    cost = time_steps("VAE plain" if plain else "VAE", stage, step, data, repeats)
    flops = count_flops(step, repeats)
    shares = time_shares(step, repeats, data.device)
    peak = matrix_peak(data.device, train.precision)
    threads = torch.get_num_threads()
    return VAECost(cost, str(data.device), threads, train.precision, flops, peak, tuple(shares))


def measure_vae(config: VAETrainConfig, repeats: int = 7, *, plain: bool = False) -> VAECost:
    """Measure a step of ``config``, in a process of its own.

    Args:
        config: Of the first stage.
        repeats: Timed steps, of which the median counts.
        plain: The same network without what the layers do for speed
            (:mod:`lsgm.benchmark.plain`), in float32 and channels-first.
    """
    return in_fresh_process(_job, plain_config(config) if plain else config, repeats, plain)


def vae_command(argv: Sequence[str], prog: str = "vae") -> None:
    """``benchmark vae [--config FILE] [--batch N] [--repeats N] [--section.key value ...]``."""
    line = parse_command_line(
        VAETrainConfig,
        argv,
        extra=(BATCH_OPTION, REPEATS_OPTION),
        prog=prog,
        description="Cost of a first-stage step, against the same network without our fast paths "
        "in float32 and channels-first, and where the time goes.",
    )
    config = line.config
    if line.options["batch"] is not None:
        size = positive_number(line.options, BATCH_OPTION)
        config = replace(config, train=replace(config.train, batch_size=size, accumulate=1))
    repeats = positive_number(line.options, REPEATS_OPTION)
    ours = measure_vae(config, repeats)
    print("\n".join(ours.lines()), flush=True)
    plain = measure_vae(config, repeats, plain=True)
    print("\n".join(["", *plain.lines()]))
    ratio = plain.step.seconds / ours.step.seconds
    print(f"\nspeed-up over the plain build: {ratio:.2f} x")
