"""Speed and memory of training steps, as medians measured in one go."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lsgm.config import LSGMTrainConfig, OptimConfig, TrainConfig, VAETrainConfig
from lsgm.configio import Option, load_config, parse_command_line
from lsgm.data import build_datasets
from lsgm.errors import UserError
from lsgm.models import LSGM, VAEModel, build_prior, build_vae
from lsgm.training.optimizers import make_optimizer
from lsgm.training.precision import autocast
from lsgm.training.stages import LSGMStage, VAEStage
from lsgm.training.state import StepContext

__all__ = ["COMMANDS", "StepCost", "measure_lsgm_step", "measure_vae_step"]

CONFIGS = Path(__file__).parent.parent / "configs"
MIB = 2**20


@dataclass(frozen=True)
class StepCost:
    """Cost of one optimizer step.

    ``seconds``: median; ``images_per_second``: batch size over it; ``peak_memory``: MiB, on an
    accelerator what its allocator held at most, on a CPU the growth of the process's resident
    memory; ``repeats``: number of timed steps.
    """

    name: str
    batch_size: int
    parameters: int
    seconds: float
    images_per_second: float
    peak_memory: float
    repeats: int

    def row(self) -> str:
        return (
            f"{self.name:<12}{self.parameters / 1e6:>8.2f} M{self.batch_size:>7}"
            f"{self.seconds:>12.3f} s"
            f"{self.images_per_second:>10.1f}{self.peak_memory:>12.0f} MiB{self.repeats:>6}"
        )

    @staticmethod
    def header() -> str:
        names = ("step", "params", "batch", "median", "images/s", "peak memory", "n")
        widths = (12, 10, 7, 14, 10, 16, 6)
        first, *rest = zip(names, widths, strict=True)
        return f"{first[0]:<{first[1]}}" + "".join(f"{name:>{width}}" for name, width in rest)


def _resident_memory() -> float:
    """Largest resident set of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def _time_steps(
    name: str,
    stage: VAEStage | LSGMStage,
    optims: dict[str, OptimConfig],
    data: torch.Tensor,
    train: TrainConfig,
    repeats: int,
) -> StepCost:
    device = data.device
    optimizers = [
        make_optimizer(module.parameters(), optims[key])
        for key, module in stage.trainables().items()
    ]
    on_accelerator = device.type != "cpu"
    seconds, base = [], _resident_memory()
    for step in range(repeats + 2):
        start = time.perf_counter()
        context = StepContext(step=step, total_steps=1000, rng=torch.Generator().manual_seed(step))
        with autocast(device, train.precision):
            loss = stage(data, context).loss
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if on_accelerator:
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = (
        torch.accelerator.max_memory_allocated(device) / MIB
        if on_accelerator
        else _resident_memory() - base
    )
    median = statistics.median(seconds[2:])
    size = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    return StepCost(name, len(data), size, median, len(data) / median, peak, repeats)


def _prepare(train: TrainConfig, data: torch.Tensor) -> torch.Tensor:
    if train.num_threads:
        torch.set_num_threads(train.num_threads)
    torch.manual_seed(train.seed)
    layout = torch.channels_last if train.channels_last else torch.contiguous_format
    return data.contiguous(memory_format=layout)


def _first_batch(config: VAETrainConfig, batch_size: int) -> tuple[torch.Tensor, object]:
    datasets = build_datasets(config.data)
    index = torch.arange(batch_size) % len(datasets.train)
    return datasets.train.batch(index), datasets.spec


def _vae_job(config: VAETrainConfig, repeats: int) -> StepCost:
    data, spec = _first_batch(config, config.train.batch_size)
    data = _prepare(config.train, data)
    model = VAEModel(build_vae(config.vae, spec), spec, config.vae)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    stage = VAEStage(model, config.objective).train()
    return _time_steps("VAE", stage, {"vae": config.optim_vae}, data, config.train, repeats)


def _lsgm_job(vae: VAETrainConfig, config: LSGMTrainConfig, repeats: int) -> StepCost:
    data, spec = _first_batch(vae, config.train.batch_size)
    data = _prepare(config.train, data)
    network = build_vae(vae.vae, spec)
    model = LSGM(network, build_prior(config.prior, network), spec, vae.vae, config.prior)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    stage = LSGMStage(model, config.objective, config.prior).train()
    optims = {"vae": config.optim_vae, "prior": config.optim_prior}
    return _time_steps(f"LSGM {config.prior.training}", stage, optims, data, config.train, repeats)


def _in_fresh_process(job: Callable[..., StepCost], *args: object) -> StepCost:
    """Run ``job`` in a process of its own, so that one measurement's memory does not hide
    another's.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(job, args)


def measure_vae_step(config: VAETrainConfig, repeats: int = 7) -> StepCost:
    """Cost of a first-stage step of ``config``, median of ``repeats`` after two to warm up."""
    return _in_fresh_process(_vae_job, config, repeats)


def measure_lsgm_step(vae: VAETrainConfig, config: LSGMTrainConfig, repeats: int = 7) -> StepCost:
    """Cost of a second-stage step of ``config`` over the VAE of ``vae``."""
    return _in_fresh_process(_lsgm_job, vae, config, repeats)


LSGM_OPTION = Option(
    "lsgm",
    "second-stage configuration; default: the file beside --config with lsgm for vae in its name",
    "FILE",
)
REPEATS_OPTION = Option("repeats", "timed steps, of which the median counts", "N", "7")


def train_command(argv: Sequence[str]) -> None:
    """``benchmark.py train [--config VAE_CONFIG] [--lsgm LSGM_CONFIG] [--repeats N] [--section.key
    value ...]``.
    """
    line = parse_command_line(
        VAETrainConfig,
        argv,
        extra=(LSGM_OPTION, REPEATS_OPTION),
        default_config=CONFIGS / "digits" / "vae.yaml",
        prog="benchmark.py train",
        description="Cost of a step of both stages: median seconds, images/s, peak memory.",
    )
    try:
        repeats = int(line.options["repeats"] or REPEATS_OPTION.default or 0)
    except ValueError:
        repeats = 0
    if repeats < 1:
        raise UserError(
            f"--repeats: must be a positive whole number, not {line.options['repeats']}"
        )
    print(StepCost.header())
    print(measure_vae_step(line.config, repeats).row(), flush=True)
    path = line.options["lsgm"]
    if path is None and line.config_path is not None:
        sibling = line.config_path.with_name(line.config_path.name.replace("vae", "lsgm", 1))
        path = sibling if sibling != line.config_path and sibling.is_file() else None
    if path is not None:
        print(
            measure_lsgm_step(line.config, load_config(LSGMTrainConfig, path), repeats).row(),
            flush=True,
        )


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": train_command}
"""Benchmarks by name; a new one is one function over its arguments and its line here."""
