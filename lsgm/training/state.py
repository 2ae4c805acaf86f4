"""What a run is made of: the stage that computes the loss, and all that a checkpoint holds."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lsgm.config.training import OptimConfig
from lsgm.errors import UserError
from lsgm.training.ema import EMA, make_average
from lsgm.training.optimizers import make_optimizer
from lsgm.training.schedules import Schedule, learning_rate
from vae.random import Rng

__all__ = [
    "Counters",
    "Stage",
    "StepContext",
    "StepOutput",
    "TrainState",
    "Trainable",
    "architecture_mismatch",
    "first_non_finite",
]


@dataclass(frozen=True)
class StepContext:
    """Where the run stands in a forward pass.

    Args:
        step: Optimizer steps done so far, counted in batches of the present size.
        total_steps: Optimizer steps of the whole run, counted alike.
        rng: Source of all noise of this pass.
        loss_scale: Factor that the loss gets before its backward pass, a scalar; a stage that
            differentiates by itself uses it too.
    """

    step: int
    total_steps: int
    rng: Rng
    loss_scale: Tensor | float = 1.0


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

    headline: tuple[str, ...] = ("loss",)
    """Names of the metrics that a line of progress shows."""

    loss_name: str = "loss"
    """What the log calls the loss."""

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
class Trainable:
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
    offset: int = 0
    """Position in the data minus steps: not 0 after a resume with another batch size."""


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
            name: Trainable(
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
    def position(self) -> int:
        """Steps that would have led here with the present batch size from the start: where the run
        stands in its epochs, schedules and annealing.
        """
        return self.counters.step + self.counters.offset

    @property
    def end(self) -> int:
        """Position at the end of the run."""
        return self.total_steps + self.counters.offset

    @property
    def epoch(self) -> int:
        """Index of the epoch that the next step belongs to."""
        return self.position // self.steps_per_epoch

    def non_finite(self, state: Mapping[str, Any] | None = None) -> str | None:
        """The first NaN or infinity in weights, averages and optimizers: whose it is, in words.

        Args:
            state: What :meth:`state_dict` returned; by default that of now.
        """
        state = self.state_dict() if state is None else state
        path = first_non_finite({key: state.get(key) for key in ("weights", "extra", "ema")})
        path = path or first_non_finite(state.get("optimizers"), ("optimizers",))
        return None if path is None else self._in_words(path)

    def _in_words(self, path: tuple[str, ...]) -> str:
        kind, *rest = path
        if kind == "weights":
            key = rest[0]
            owners = {id(module): name for name, module in self.stage.named_modules()}
            sides = [n for n, s in self.sides.items() if key.startswith(f"{owners[id(s.module)]}.")]
            return f"{key} (weights of {sides[0] if sides else 'no side'}) is NaN or infinite"
        if kind == "ema":
            return f"{rest[1].removeprefix('module.')} (average of {rest[0]}) is NaN or infinite"
        if kind == "optimizers" and rest[1] == "state":
            side = self.sides[rest[0]]
            names = {id(p): name for name, p in side.module.named_parameters()}
            name = names[id(side.parameters[int(rest[2])])]
            return f"{rest[3]} of {name} (optimizer of {rest[0]}) is NaN or infinite"
        return f"{'.'.join(path)} is NaN or infinite"

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
                self.end,
                self.steps_per_epoch,
            )
            # A larger batch does not bring the warm-up back.
            position = max(self.position, min(self.step, config.warmup_steps))
            rates[name] = (
                learning_rate(config.schedule, schedule, position) * self.counters.lr_multiplier
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

    def load_state_dict(
        self, state: Mapping[str, Any], source: str, *, another_batch: bool = False
    ) -> None:
        """Take back what :meth:`state_dict` returned. Nothing changes if it does not fit.

        Args:
            state: The state.
            source: Where it comes from, for messages.
            another_batch: It was saved with another batch size: an epoch may have another number of
                steps, and goes on after the same share of its images.

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
        if state["steps_per_epoch"] != self.steps_per_epoch and not another_batch:
            raise UserError(
                f"{source} was trained with {state['steps_per_epoch']} steps an epoch, this run "
                f"has {self.steps_per_epoch}: the data are not those of the run"
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
        before, now = state["steps_per_epoch"], self.steps_per_epoch
        if before != now:
            epoch, done = divmod(self.position, before)
            self.counters.offset = epoch * now + done * now // before - self.step


def first_non_finite(tree: Any, path: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """Keys that lead to the first tensor with a NaN or an infinity, through mappings and lists."""
    found = [(where, leaf) for where, leaf in _tensors(tree, path) if leaf.numel()]
    if not found:
        return None
    # One wait for the device, not one a tensor.
    place = found[0][1].device
    good = torch.stack([torch.isfinite(leaf).all().to(place) for _, leaf in found]).tolist()
    return next((where for (where, _), fine in zip(found, good, strict=True) if not fine), None)


def _tensors(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield path, tree.detach()
        return
    if isinstance(tree, Mapping):
        items: Iterable[tuple[Any, Any]] = tree.items()
    else:
        items = enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in items:
        yield from _tensors(value, (*path, str(key)))


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


def _check_cover(stage: Stage, sides: Mapping[str, Trainable]) -> None:
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
