"""What a run is made of: the stage that computes the loss, and all that a checkpoint holds."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lsgm.config import OptimConfig
from lsgm.errors import UserError
from lsgm.training.ema import EMA, make_average
from lsgm.training.optimizers import make_optimizer
from lsgm.training.schedules import Schedule, learning_rate
from vae.random import Rng

__all__ = [
    "Counters",
    "Side",
    "Stage",
    "StepContext",
    "StepOutput",
    "TrainState",
    "architecture_mismatch",
]


@dataclass(frozen=True)
class StepContext:
    """Where the run stands in a forward pass.

    Args:
        step: Optimizer steps done so far.
        total_steps: Optimizer steps of the whole run.
        rng: Source of all noise of this pass.
    """

    step: int
    total_steps: int
    rng: Rng


@dataclass(frozen=True)
class StepOutput:
    """Result of a stage's forward pass.

    Args:
        loss: Scalar, a mean over this process's images.
        metrics: Scalars to log, each a mean over this process's images; the same keys always.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Stage(nn.Module, ABC):
    """What the loop trains.

    One backward pass of the one loss gives every side its right gradient; the stage arranges that.
    """

    find_unused_parameters: bool = False
    """Whether some steps' loss leaves out some parameters (costs time with several processes)."""

    @abstractmethod
    def forward(self, images: Any, context: StepContext) -> StepOutput:
        """Compute the loss of ``images (B, C, R, R)``, float32 in [0, 1], or of
        :class:`lsgm.data.LabelledImages` where the batches carry labels.
        """

    @abstractmethod
    def trainables(self) -> dict[str, nn.Module]:
        """Return the sides: submodules with an optimizer, schedule, clipping and average each."""

    def networks(self) -> list[nn.Module]:
        """Return what ``train.compile`` compiles: modules called as functions, here the sides.

        The whole stage would be compiled anew for each value of a Python number in it.
        """
        return list(self.trainables().values())

    def use_average(self, averages: Mapping[str, nn.Module]) -> None:
        """Receive the averaged modules, once, before training. Nothing is done by default."""

    def after_step(self, step: int) -> None:
        """Do what has to follow an optimizer step, the `step`-th. Nothing by default."""

    def extra_state(self) -> dict[str, Any]:
        """Return tensors and plain values that a checkpoint needs besides ``state_dict()``."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`extra_state` returned. Nothing by default."""


@dataclass
class Side:
    """One trainable module with what trains it."""

    module: nn.Module
    config: OptimConfig
    optimizer: Optimizer
    ema: EMA | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer moves."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass
class Counters:
    """Plain numbers that survive a resume."""

    step: int = 0
    """Optimizer steps done (skipped ones count)."""
    skipped: int = 0
    """Steps skipped because a loss or gradient was not finite."""
    returns: int = 0
    """Returns to a checkpoint after many skipped steps in a row."""
    lr_multiplier: float = 1.0
    """Factor on all learning rates; halved by every return."""
    train_seconds: float = 0.0
    """Time spent in training, in seconds, without evaluations."""
    evaluated: int = -1
    """Step of the last evaluation."""


class TrainState:
    """The stage with its optimizers, averages, loss scaler and counters.

    Args:
        stage: On its device.
        optims: Configuration of each side, by the names of ``stage.trainables()``.
        scaler: Loss scaler shared by all sides.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch.

    Raises:
        ValueError: If names do not match, or a parameter belongs to two sides, or needs a gradient
            and belongs to none.
    """

    def __init__(
        self,
        stage: Stage,
        optims: Mapping[str, OptimConfig],
        scaler: GradScaler,
        *,
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        trainables = stage.trainables()
        if set(trainables) != set(optims):
            raise ValueError(
                f"the stage trains {sorted(trainables)}, the configuration has {sorted(optims)}"
            )
        self.stage = stage
        self.scaler = scaler
        self.counters = Counters()
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.sides = {
            name: Side(
                module,
                optims[name],
                make_optimizer(module.parameters(), optims[name]),
                make_average(module, optims[name]),
            )
            for name, module in trainables.items()
        }
        _check_cover(stage, self.sides)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.counters.step

    @property
    def epoch(self) -> int:
        """Index of the epoch that the next step belongs to."""
        return self.counters.step // self.steps_per_epoch

    def ema_models(self) -> dict[str, EMA]:
        """Return the averages by name of their side; ``.module`` is the averaged module."""
        return {name: side.ema for name, side in self.sides.items() if side.ema is not None}

    def evaluation_models(self) -> dict[str, nn.Module]:
        """Return for each side the averaged module where there is one, else the live module."""
        return {
            name: side.module if side.ema is None else side.ema.module
            for name, side in self.sides.items()
        }

    def set_learning_rates(self) -> dict[str, float]:
        """Set and return the learning rates of the coming step."""
        rates = {}
        for name, side in self.sides.items():
            config = side.config
            schedule = Schedule(
                config.lr,
                config.lr_min,
                config.warmup_steps,
                self.total_steps,
                self.steps_per_epoch,
            )
            rates[name] = (
                learning_rate(config.schedule, schedule, self.step) * self.counters.lr_multiplier
            )
            for group in side.optimizer.param_groups:
                group["lr"] = rates[name]
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only, in dictionaries and lists."""
        return {
            "weights": self.stage.state_dict(),
            "extra": self.stage.extra_state(),
            "optimizers": {name: side.optimizer.state_dict() for name, side in self.sides.items()},
            "rules": {
                name: [side.config.impl, side.config.optimizer] for name, side in self.sides.items()
            },
            "ema": {name: ema.state_dict() for name, ema in self.ema_models().items()},
            "scaler": self.scaler.state_dict(),
            "counters": dataclasses.asdict(self.counters),
            "steps_per_epoch": self.steps_per_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Take back what :meth:`state_dict` returned. Nothing changes if it does not fit.

        Args:
            state: The state.
            source: Where it comes from, for messages.

        Raises:
            UserError: If it belongs to another architecture, optimizer or length of epoch.
        """
        mismatch = architecture_mismatch(state["weights"], self.stage.state_dict())
        if mismatch:
            raise UserError(f"{source} holds another architecture: {mismatch}")
        rules = {
            name: [side.config.impl, side.config.optimizer] for name, side in self.sides.items()
        }
        if rules != state["rules"]:
            raise UserError(
                f"{source} was trained with optimizers {state['rules']}, this run asks for {rules}"
            )
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise UserError(
                f"{source} was trained with {state['steps_per_epoch']} steps an epoch, this run "
                f"has {self.steps_per_epoch}: keep the data and train.batch_size of the run"
            )
        self.stage.load_state_dict(state["weights"])
        self.stage.load_extra_state(state["extra"])
        for name, side in self.sides.items():
            _load_optimizer(side.optimizer, state["optimizers"][name])
            if side.ema is not None:
                if name not in state["ema"]:
                    raise UserError(
                        f"{source} holds no average of the weights of {name}: keep the run's "
                        f"ema_decay"
                    )
                side.ema.load_state_dict(state["ema"][name])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.counters = Counters(**state["counters"])


def architecture_mismatch(
    saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor], most: int = 3
) -> str:
    """Say in one line which weights differ in name or shape; empty if none does."""
    parts = []
    missing = [key for key in wanted if key not in saved]
    unknown = [key for key in saved if key not in wanted]
    shapes = [
        f"{key} {tuple(saved[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in saved
        and isinstance(wanted[key], Tensor)
        and saved[key].shape != wanted[key].shape
    ]
    for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)):
        if keys:
            more = f" and {len(keys) - most} more" if len(keys) > most else ""
            parts.append(f"{what}: {', '.join(keys[:most])}{more}")
    return "; ".join(parts)


def _check_cover(stage: Stage, sides: Mapping[str, Side]) -> None:
    owner: dict[int, str] = {}
    for name, side in sides.items():
        for p in side.parameters:
            if owner.setdefault(id(p), name) != name:
                raise ValueError(f"a parameter belongs to two sides, {owner[id(p)]} and {name}")
    for key, p in stage.named_parameters():
        if p.requires_grad and id(p) not in owner:
            raise ValueError(f"parameter {key} requires a gradient and belongs to no side")


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    # The configuration of this run, not the saved one, decides about decay and kernels.
    options = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update({k: v for k, v in own.items() if k not in ("lr", "step")})
