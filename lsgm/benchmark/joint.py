"""A joint step of both stages against a step of the VAE and one of the prior, taken in turns.

The claim behind arXiv 2106.05931, Alg. 3: with one draw of noise and time for both sides, training
VAE and prior together costs no more than training each by itself.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lsgm.benchmark.accounting import peak_memory
from lsgm.benchmark.training import (
    LSGM_OPTION,
    WARMUP_STEPS,
    StepCost,
    positive_number,
    prepare,
    second_stage_config,
    training_step,
)
from lsgm.config.command_line import parse_command_line
from lsgm.config.overrides import Option
from lsgm.config.training import LSGMTrainConfig, OptimConfig, VAETrainConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.objectives import prior_losses
from lsgm.system.device import choose_device
from lsgm.system.processes import in_fresh_process
from lsgm.system.progress import progress_bar
from lsgm.training.stages.latent import LSGMStage, VAEStage
from lsgm.training.state import Stage, StepContext, StepOutput
from vae.random import randn
from vae.regularization import norm_regularizer

__all__ = ["JointCost", "PriorStage", "joint_command", "measure_joint", "phases"]

VAE, PRIOR, FROZEN, JOINT = "VAE", "prior", "frozen VAE", "joint"
NAMES = (VAE, PRIOR, JOINT, FROZEN)


class PriorStage(Stage):
    """The prior's own gradient step on given latents ``(B, C, H, W)``: neither VAE nor data.

    Args:
        stage: A second stage, whose score network, weighting, times and regularisers of the prior
            it uses.
    """

    def __init__(self, stage: LSGMStage) -> None:
        super().__init__()
        self.score = stage.model.score
        self.weighting = stage.weighting_p
        self.proposal = stage.proposal_p
        self.likelihood = stage.likelihood
        self.stratified = stage.stratified
        self.spectral = stage.regularizers.get("prior_spectral")
        self.spectral_weight, self.norm_weight = stage.spectral_weight, stage.norm_weight

    def trainables(self) -> dict[str, nn.Module]:
        return {"prior": self.score}

    def forward(self, latents: Tensor, context: StepContext) -> StepOutput:
        losses = prior_losses(
            self.score.sde,
            self.score,
            latents,
            weighting_p=self.weighting,
            proposal_p=self.proposal,
            likelihood=self.likelihood,
            stratified=self.stratified,
            rng=context.rng,
        )
        loss = losses.surrogate
        if self.spectral is not None:
            loss = loss + self.spectral_weight * self.spectral()
        if self.norm_weight > 0:
            loss = loss + self.norm_weight * norm_regularizer(self.score)
        return StepOutput(loss)


@dataclass(frozen=True)
class Phase:
    """A stage, the optimizers of its sides, and what it is fed with."""

    stage: Stage
    optims: dict[str, OptimConfig]
    data: Tensor

    def step(self, precision: str) -> Callable[[int], None]:
        return training_step(self.stage, self.optims, self.data, precision)


def phases(
    vae: VAETrainConfig, config: LSGMTrainConfig, names: Sequence[str] = NAMES
) -> dict[str, Phase]:
    """The steps of these names; all share the batch, and all but the frozen one the VAE.

    The latents of the prior's step are N(0, I): their values cost nothing.
    """
    images, spec = prepare(config.train, vae.data)
    model = _model(vae, config, spec, images)
    optims = {"vae": config.optim_vae, "prior": config.optim_prior}
    prior = {"prior": config.optim_prior}

    def second(training: Literal["joint", "disjoint", "frozen"], model: LSGM) -> LSGMStage:
        return LSGMStage(model, config.objective, replace(config.prior, training=training))

    def first_stage() -> Phase:
        first = VAEStage(VAEModel(model.vae, spec, vae.vae), vae.objective)
        return Phase(first, {"vae": vae.optim_vae}, images)

    def prior_only() -> Phase:
        shape = (len(images), *model.vae.top_shape)
        latents = randn(shape, torch.Generator().manual_seed(0), device=images.device)
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        return Phase(PriorStage(second("joint", model)), prior, latents.to(memory_format=layout))

    def frozen() -> Phase:
        alone = LSGM(copy.deepcopy(model.vae), model.score, spec, vae.vae, config.prior)
        return Phase(second("frozen", alone.to(images.device)), prior, images)

    makers: dict[str, Callable[[], Phase]] = {
        VAE: first_stage,
        PRIOR: prior_only,
        JOINT: lambda: Phase(second(config.prior.training, model), optims, images),
        FROZEN: frozen,
    }
    made = {name: makers[name]() for name in names}
    for phase in made.values():
        phase.stage.train()
    if config.train.compile:
        for network in {n for phase in made.values() for n in phase.stage.networks()}:
            network.compile()
    return made


def _model(vae: VAETrainConfig, config: LSGMTrainConfig, spec: DataSpec, images: Tensor) -> LSGM:
    network = build_vae(vae.vae, spec)
    model = LSGM(network, build_prior(config.prior, network), spec, vae.vae, config.prior)
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    return model.to(images.device).to(memory_format=layout)  # type: ignore[call-overload]


Times = list[list[tuple[float, float]]]
"""Seconds by the clock and of the process's CPU, ``[round][NAMES]``."""


def _times_job(vae: VAETrainConfig, config: LSGMTrainConfig, repeats: int) -> Times:
    """Every step in turn, in a random order of its own in each round: what ran before a step
    leaves its traces in caches and in the allocator.
    """
    made = phases(vae, config)
    steps = {name: phase.step(config.train.precision) for name, phase in made.items()}
    rounds: Times = []
    shuffled = random.Random(0)
    for number in progress_bar(range(WARMUP_STEPS + repeats), "rounds", leave=False):
        spent = dict.fromkeys(NAMES, (0.0, 0.0))
        for name in shuffled.sample(NAMES, len(NAMES)):
            start, cpu_start = time.perf_counter(), time.process_time()
            steps[name](number)
            spent[name] = (time.perf_counter() - start, time.process_time() - cpu_start)
        rounds.append([spent[name] for name in NAMES])
    return rounds[WARMUP_STEPS:]


def _memory_job(vae: VAETrainConfig, config: LSGMTrainConfig, name: str) -> tuple[float, int]:
    """Peak memory of two steps beyond the weights, in MiB, and the number of trained parameters."""
    phase = phases(vae, config, [name])[name]
    trained = sum(
        p.numel() for side in phase.stage.trainables().values() for p in side.parameters()
    )
    step = phase.step(config.train.precision)
    return peak_memory(step, WARMUP_STEPS, phase.data.device), trained


@dataclass(frozen=True)
class JointCost:
    """What the steps cost.

    Attributes:
        batch_size: Images.
        rounds: Seconds by the clock, ``(repeats, steps)`` in the order of ``NAMES``.
        cpu_rounds: The same of the process's CPU, which other work on the machine changes less.
        memory: Peak of each step beyond the weights, MiB.
        parameters: Number that each trains.
    """

    batch_size: int
    rounds: tuple[tuple[float, ...], ...]
    cpu_rounds: tuple[tuple[float, ...], ...]
    memory: dict[str, float]
    parameters: dict[str, int]

    def lines(self) -> list[str]:
        repeats = len(self.rounds)
        costs = [
            StepCost(
                name,
                self.batch_size,
                self.parameters[name],
                seconds := _median(self.rounds, name),
                self.batch_size / seconds,
                self.memory[name],
                repeats,
            )
            for name in NAMES
        ]
        apart = self.memory[VAE] + self.memory[PRIOR]
        lines = [StepCost.header(), *(cost.row() for cost in costs)]
        lines.append(f"memory: joint {self.memory[JOINT]:.0f} MiB, VAE + prior {apart:.0f} MiB")
        if apart > 0:
            lines[-1] += f", ratio {self.memory[JOINT] / apart:.3f}"
        return lines


def _median(rounds: Sequence[Sequence[float]], name: str) -> float:
    return statistics.median(row[NAMES.index(name)] for row in rounds)


def _comparison(what: str, rounds: Sequence[Sequence[float]]) -> str:
    """The joint step against the sum of the two others, of medians and round by round."""
    ratios = joint_ratios(rounds)
    vae, prior, joint, frozen = (_median(rounds, name) for name in (VAE, PRIOR, JOINT, FROZEN))
    spread = f"{min(ratios):.3f} to {max(ratios):.3f} in a round"
    if len(ratios) > 1:
        error = statistics.stdev(ratios) / math.sqrt(len(ratios))
        spread += f", mean {statistics.fmean(ratios):.3f} +- {error:.3f} (standard error)"
    return (
        f"{what}: VAE {vae:.3f} s + prior {prior:.3f} s = {vae + prior:.3f} s, joint {joint:.3f} s "
        f"(frozen {frozen:.3f} s); joint / (VAE + prior) {joint / (vae + prior):.3f}, {spread}"
    )


def joint_ratios(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Joint step over the sum of the VAE's and the prior's, of every round."""
    vae, prior, joint = (NAMES.index(name) for name in (VAE, PRIOR, JOINT))
    return [row[joint] / (row[vae] + row[prior]) for row in rounds]


def measure_joint(
    vae: VAETrainConfig,
    config: LSGMTrainConfig,
    repeats: int = 7,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> JointCost:
    """Measure all steps at the batch size, precision and device of ``config``'s ``train`` section.

    The times come from one process that takes the steps in turns, so that a machine that becomes
    slower changes all of them; the memory from a process for each. ``progress`` gets the first as
    soon as they are there.

    Raises:
        UserError: The prior of ``config`` is trained over a frozen VAE, so it has no joint step.
    """
    if config.prior.training == "frozen":
        raise UserError(
            "prior.training: frozen has no joint step to measure; use joint or disjoint"
        )
    times = in_fresh_process(_times_job, vae, config, repeats)
    clock, cpu = (tuple(tuple(pair[i] for pair in row) for row in times) for i in (0, 1))
    progress(_comparison("by the clock", clock))
    if choose_device(config.train.device).type == "cpu":
        progress(_comparison("CPU time", cpu))
    memory, parameters = {}, {}
    for name in NAMES:
        memory[name], parameters[name] = in_fresh_process(_memory_job, vae, config, name)
    return JointCost(config.train.batch_size, clock, cpu, memory, parameters)


BATCH_OPTION = Option("batch", "images a step; default: the second stage's", "N")
ROUNDS_OPTION = Option("repeats", "timed rounds of all steps, of which the median counts", "N", "7")


def joint_command(argv: Sequence[str], prog: str = "joint") -> None:
    """``benchmark joint [--config VAE_CONFIG] [--lsgm LSGM_CONFIG] [--batch N] [--repeats N]
    [--section.key value ...]``.
    """
    line = parse_command_line(
        VAETrainConfig,
        argv,
        extra=(LSGM_OPTION, BATCH_OPTION, ROUNDS_OPTION),
        default_config="digits/vae",
        prog=prog,
        description="Cost of a joint step against a step of the VAE and one of the prior on given "
        "latents, taken in turns; a step of the prior over the frozen VAE for comparison.",
    )
    config = second_stage_config(line)
    if config is None:
        raise UserError("--lsgm: give the second stage's configuration")
    if line.options["batch"] is not None:
        size = positive_number(line.options, BATCH_OPTION)
        config = replace(config, train=replace(config.train, batch_size=size, accumulate=1))
    train = config.train
    threads = train.num_threads or torch.get_num_threads()
    print(
        f"device {choose_device(train.device)}, {train.precision}, {threads} CPU threads, batch "
        f"{train.batch_size}",
        flush=True,
    )
    repeats = positive_number(line.options, ROUNDS_OPTION)
    cost = measure_joint(
        line.config, config, repeats, progress=lambda text: print(text, flush=True)
    )
    print("\n".join(cost.lines()))
