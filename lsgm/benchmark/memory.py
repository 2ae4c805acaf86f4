"""Memory of a training step, counted without taking any.

The step runs on fake tensors, which have a shape and no contents, and every storage that it makes
is added up while it lives. So the count is the same on every machine, and a model that needs 80 GB
is measured on a laptop. It is what tensors take: neither a library's own workspace nor what an
allocator holds on to.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lsgm.benchmark.training import LSGM_OPTION, second_stage_config
from lsgm.config.command_line import parse_command_line
from lsgm.config.overrides import Option
from lsgm.config.training import (
    DataConfig,
    LSGMTrainConfig,
    OptimConfig,
    TrainConfig,
    VAETrainConfig,
)
from lsgm.data import build_datasets
from lsgm.data.spec import DataSpec, LabelledImages
from lsgm.errors import UserError
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.system.markdown import markdown_table
from lsgm.training.distributed import World
from lsgm.training.interrupt import StopSignal
from lsgm.training.precision import make_scaler
from lsgm.training.stages.latent import LSGMStage, VAEStage
from lsgm.training.state import Stage, StepOutput, TrainState
from lsgm.training.step import Step

__all__ = ["StepMemory", "lsgm_step_memory", "memory_command", "vae_step_memory"]

GB = 1e9
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepMemory:
    """What the tensors of a training step take, in bytes.

    Attributes:
        name: What the step is of.
        batch_size: Images.
        precision: Of the networks.
        weights: Parameters and buffers.
        optimizer: The optimizers' state.
        averages: Running averages of the weights.
        peak: The most that all tensors take at once in a step that is not the first.
    """

    name: str
    batch_size: int
    precision: str
    weights: int
    optimizer: int
    averages: int
    peak: int

    @property
    def activations(self) -> int:
        """Activations, gradients and temporaries at the peak."""
        return self.peak - self.weights - self.optimizer - self.averages

    def row(self) -> list[str]:
        sizes = (self.weights, self.optimizer, self.averages, self.activations, self.peak)
        gigabytes = (f"{size / GB:.3g}" for size in sizes)
        return [self.name, self.precision, str(self.batch_size), *gigabytes]

    @staticmethod
    def header() -> list[str]:
        sizes = ("weights", "optimizer", "averages", "activations and gradients", "peak")
        return ["step", "precision", "batch", *(f"{name} (GB)" for name in sizes)]


class _Live(TorchDispatchMode):
    """Adds up the storages of all tensors that operators return, until each is freed.

    A number that the step reads from a tensor is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)


class _FakeStep(Step):
    """A step whose loss and gradients, which have no values, count as finite."""

    def _check(
        self, outputs: list[StepOutput], stop: StopSignal | None
    ) -> tuple[bool, bool, dict[str, Tensor]]:
        _, _, norms = super()._check(outputs, None)
        return True, False, norms


def _copy(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """``deepcopy`` of a fake tensor, which PyTorch cannot."""
    copied: Tensor = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        copied = nn.Parameter(copied, tensor.requires_grad)
    memo[id(tensor)] = copied
    return copied


@contextmanager
def _fake_tensors() -> Iterator[_Live]:
    live = _Live()
    copying = mock.patch.object(FakeTensor, "__deepcopy__", _copy, create=True)
    with copying, FakeTensorMode(allow_non_fake_inputs=True), live:
        yield live


def _measure(
    name: str, stage: Stage, optims: Mapping[str, OptimConfig], train: TrainConfig,
    images: Tensor | LabelledImages, live: _Live,
) -> StepMemory:  # fmt: skip
    state = TrainState(
        stage, optims, make_scaler(CPU, train.precision), total_steps=1000, steps_per_epoch=100
    )
    averages = {side: ema.module for side, ema in state.ema_models().items()}
    stage.use_average(averages)
    step = _FakeStep(
        state, stage, World(CPU), precision=train.precision, channels_last=train.channels_last
    )
    for _ in range(2):  # the first makes the optimizers' state
        live.peak = live.bytes
        step(images)
    averaged = {id(t) for module in averages.values() for t in _tensors(module)}
    moments = (
        value
        for side in state.sides.values()
        for values in side.optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    )
    return StepMemory(
        name,
        train.batch_size,
        train.precision,
        _bytes(t for t in _tensors(stage) if id(t) not in averaged),
        _bytes(moments),
        _bytes(t for module in averages.values() for t in _tensors(module)),
        live.peak,
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _batch(spec: DataSpec, size: int, *, labelled: bool) -> Tensor | LabelledImages:
    images = torch.zeros(size, spec.channels, *spec.network_shape)
    return LabelledImages(images, torch.zeros(size, dtype=torch.int64)) if labelled else images


def _with_batch(train: TrainConfig, size: int) -> TrainConfig:
    return replace(train, batch_size=size, accumulate=1)


def vae_step_memory(config: VAETrainConfig, spec: DataSpec, size: int) -> StepMemory:
    """Memory of a first-stage step of ``size`` images, the optimizer's included."""
    train = _with_batch(config.train, size)
    with _fake_tensors() as live:
        # not vae_stage: Module.to swaps tensors, which the count's references forbid
        model = VAEModel(build_vae(config.vae, spec), spec, config.vae)
        stage = VAEStage(model, config.objective).train()
        images = _batch(spec, size, labelled=False)
        return _measure("VAE", stage, {"vae": config.optim_vae}, train, images, live)


def lsgm_step_memory(
    vae: VAETrainConfig, config: LSGMTrainConfig, spec: DataSpec, size: int
) -> StepMemory:
    """Memory of a second-stage step of ``size`` images over the VAE of ``vae``."""
    train = _with_batch(config.train, size)
    optims = {"vae": config.optim_vae, "prior": config.optim_prior}
    with _fake_tensors() as live:
        network = build_vae(vae.vae, spec)
        model = LSGM(network, build_prior(config.prior, network), spec, vae.vae, config.prior)
        stage = LSGMStage(model, config.objective, config.prior).train()
        sides = {side: optims[side] for side in stage.trainables()}
        images = _batch(spec, size, labelled=config.prior.class_conditional)
        return _measure(f"LSGM {config.prior.training}", stage, sides, train, images, live)


def _spec(data: DataConfig) -> DataSpec:
    """Facts about the data; a folder of pictures need not be there."""
    if data.name != "folder":
        return build_datasets(data).spec
    if data.image_size is None or data.channels is None:
        raise UserError(
            "data: give --data.image_size and --data.channels; memory does not read the folder"
        )
    return DataSpec(
        "folder", data.channels, data.image_size, 0, binary=False, image_width=data.image_width
    )


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--batch: must be positive whole numbers such as 1,2,4, not {text}")
    return [int(part) for part in parts]


BATCHES_OPTION = Option("batch", "images a step, one number or several", "N,N,...", "1,2,4,8,16")


def memory_command(argv: Sequence[str], prog: str = "memory") -> None:
    """``benchmark memory [--config VAE_CONFIG] [--lsgm LSGM_CONFIG] [--batch N,N,...]
    [--section.key value ...]``.
    """
    line = parse_command_line(
        VAETrainConfig,
        argv,
        extra=(LSGM_OPTION, BATCHES_OPTION),
        default_config="digits/vae",
        prog=prog,
        description="What the tensors of a training step of both stages take, on any machine: the "
        "step runs on tensors without contents. GB are 10^9 bytes.",
    )
    vae, second = line.config, second_stage_config(line)
    sizes = _sizes(line.options["batch"] or BATCHES_OPTION.default or "")
    spec = _spec(vae.data)
    rows = [vae_step_memory(vae, spec, size).row() for size in sizes]
    if second is not None:
        rows += [lsgm_step_memory(vae, second, spec, size).row() for size in sizes]
    print(markdown_table(StepMemory.header(), rows))
