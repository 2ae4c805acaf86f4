"""Speed and memory of training steps, as medians measured in one go."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lsgm.benchmark.accounting import peak_memory
from lsgm.config.command_line import CommandLine, load_config, parse_command_line
from lsgm.config.overrides import Option
from lsgm.config.training import (
    DataConfig,
    LSGMTrainConfig,
    OptimConfig,
    TrainConfig,
    VAETrainConfig,
)
from lsgm.data import Datasets, build_datasets
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.system.allocator import keep_freed_memory
from lsgm.system.device import choose_device
from lsgm.system.processes import in_fresh_process
from lsgm.training.optimizers import make_optimizer
from lsgm.training.precision import autocast, caches_casts, make_scaler
from lsgm.training.stages.latent import LSGMStage, VAEStage
from lsgm.training.state import Stage, StepContext

__all__ = [
    "REPEATS_OPTION",
    "StepCost",
    "measure_lsgm_step",
    "measure_vae_step",
    "positive_number",
    "prepare",
    "second_stage_config",
    "time_steps",
    "train_command",
    "training_step",
    "vae_stage",
]

WARMUP_STEPS = 2
"""In the first the optimizers take their state, in the second the heap finds its size."""


@dataclass(frozen=True)
class StepCost:
    """Cost of one optimizer step.

    Attributes:
        name: What the step is of.
        batch_size: Images.
        parameters: Number of them.
        seconds: Median.
        images_per_second: Batch size over it.
        peak_memory: MiB that tensors take beyond weights and data.
        repeats: Number of timed steps.
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


def training_step(
    stage: Stage, optims: dict[str, OptimConfig], data: torch.Tensor, precision: str
) -> Callable[[int], None]:
    """One optimizer step on the images ``data``, as a function of its number; it returns when the
    device is done.
    """
    device = data.device
    optimizers = [
        make_optimizer(module.parameters(), optims[key])
        for key, module in stage.trainables().items()
    ]
    scaler = make_scaler(device, precision)
    cache = caches_casts(stage)

    def step(number: int) -> None:
        rng = torch.Generator().manual_seed(number)
        with autocast(device, precision, cache=cache):
            loss = stage(data, StepContext(step=number, total_steps=1000, rng=rng)).loss
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return step


def time_steps(
    name: str,
    stage: Stage,
    step: Callable[[int], None],
    data: torch.Tensor,
    repeats: int,
) -> StepCost:
    """Median cost of ``step`` on the images ``data``, after two steps to warm up."""
    peak = peak_memory(step, WARMUP_STEPS, data.device)
    seconds = []
    for number in range(WARMUP_STEPS, WARMUP_STEPS + repeats):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    size = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    return StepCost(name, len(data), size, median, len(data) / median, peak, repeats)


def prepare(train: TrainConfig, data: DataConfig) -> tuple[torch.Tensor, DataSpec]:
    """Set allocator, threads and seed as the scripts do; return the first batch, on its device, and
    the facts about the data.
    """
    keep_freed_memory()
    if train.num_threads:
        torch.set_num_threads(train.num_threads)
    torch.manual_seed(train.seed)
    datasets: Datasets = build_datasets(data)
    index = torch.arange(train.batch_size) % len(datasets.train)
    images = datasets.train.batch(index).to(choose_device(train.device))
    return images.contiguous(memory_format=_layout(train)), datasets.spec


def _layout(train: TrainConfig) -> torch.memory_format:
    return torch.channels_last if train.channels_last else torch.contiguous_format


def vae_stage(config: VAETrainConfig, spec: DataSpec, device: torch.device) -> VAEStage:
    """The first stage of ``config`` as the training loop prepares it."""
    model = VAEModel(build_vae(config.vae, spec), spec, config.vae)
    model.to(device).to(memory_format=_layout(config.train))  # type: ignore[call-overload]
    return VAEStage(model, config.objective).train()


def _vae_job(config: VAETrainConfig, repeats: int) -> StepCost:
    data, spec = prepare(config.train, config.data)
    stage = vae_stage(config, spec, data.device)
    step = training_step(stage, {"vae": config.optim_vae}, data, config.train.precision)
    return time_steps("VAE", stage, step, data, repeats)


def _lsgm_job(vae: VAETrainConfig, config: LSGMTrainConfig, repeats: int) -> StepCost:
    data, spec = prepare(config.train, vae.data)
    network = build_vae(vae.vae, spec)
    model = LSGM(network, build_prior(config.prior, network), spec, vae.vae, config.prior)
    model.to(data.device).to(memory_format=_layout(config.train))  # type: ignore[call-overload]
    stage = LSGMStage(model, config.objective, config.prior).train()
    optims = {"vae": config.optim_vae, "prior": config.optim_prior}
    step = training_step(stage, optims, data, config.train.precision)
    return time_steps(f"LSGM {config.prior.training}", stage, step, data, repeats)


def measure_vae_step(config: VAETrainConfig, repeats: int = 7) -> StepCost:
    """Cost of a first-stage step of ``config``: median of ``repeats`` after two to warm up."""
    return in_fresh_process(_vae_job, config, repeats)


def measure_lsgm_step(vae: VAETrainConfig, config: LSGMTrainConfig, repeats: int = 7) -> StepCost:
    """Cost of a second-stage step of ``config`` over the VAE of ``vae``."""
    return in_fresh_process(_lsgm_job, vae, config, repeats)


LSGM_OPTION = Option(
    "lsgm",
    "second-stage configuration; default: the file beside --config with lsgm for vae in its name",
    "FILE",
)
REPEATS_OPTION = Option("repeats", "timed steps, of which the median counts", "N", "7")


def positive_number(options: Mapping[str, str | None], option: Option) -> int:
    """Value of a plain option that counts something.

    Raises:
        UserError: If it is not a positive whole number.
    """
    text = options[option.name] or option.default or ""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--{option.name}: must be a positive whole number, not {text}")
    return int(text)


def train_command(argv: Sequence[str], prog: str = "train") -> None:
    """``benchmark train [--config VAE_CONFIG] [--lsgm LSGM_CONFIG] [--repeats N] [--section.key
    value ...]``.
    """
    line = parse_command_line(
        VAETrainConfig,
        argv,
        extra=(LSGM_OPTION, REPEATS_OPTION),
        default_config="digits/vae",
        prog=prog,
        description="Cost of a step of both stages: median seconds, images/s, peak memory.",
    )
    repeats = positive_number(line.options, REPEATS_OPTION)
    print(StepCost.header())
    print(measure_vae_step(line.config, repeats).row(), flush=True)
    second = second_stage_config(line)
    if second is not None:
        print(measure_lsgm_step(line.config, second, repeats).row(), flush=True)


def second_stage_config(line: CommandLine[VAETrainConfig]) -> LSGMTrainConfig | None:
    """The configuration of ``--lsgm``, or of the file beside ``--config``; None without either."""
    path = line.options["lsgm"]
    if path is None and line.config_path is not None:
        sibling = line.config_path.with_name(line.config_path.name.replace("vae", "lsgm", 1))
        path = sibling if sibling != line.config_path and sibling.is_file() else None
    return None if path is None else load_config(LSGMTrainConfig, path)
