"""One optimizer step.

For each part of the batch one forward pass of the stage and one backward pass; then the gradients
of all sides are checked together, clipped each, and applied. All noise of a step comes from
generators seeded by (seed, step, part), torch's global generators (which dropout uses) included, so
a step is a function of the state and its number.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lsgm.data.spec import LabelledImages, map_batch
from lsgm.training.distributed import World, all_max
from lsgm.training.graphs import GraphedParts, graphable_parts
from lsgm.training.interrupt import StopSignal
from lsgm.training.precision import autocast, caches_casts
from lsgm.training.state import StepContext, StepOutput, TrainState
from vae.random import Rng, ShardedGenerator

__all__ = ["Step", "StepResult", "step_seed"]


@dataclass(frozen=True)
class StepResult:
    """What happened in a step.

    Args:
        applied: Whether the weights moved: no loss and no gradient was NaN or infinite anywhere.
        stop: Whether any process was told to stop.
        rates: Learning rate of each side.
        metrics: Scalars to log, one mapping for each part of the batch and one for the gradients.
        fault: What was NaN or infinite first in this process, in words; empty if nothing was.
    """

    applied: bool
    stop: bool
    rates: Mapping[str, float]
    metrics: tuple[Mapping[str, Tensor], ...]
    fault: str = ""


def step_seed(*numbers: int) -> int:
    """Hash numbers (seed, step, ...) to a seed in [0, 2**63), so that neighbours are unrelated."""
    # The count goes in because a SeedSequence ignores trailing zeros.
    sequence = np.random.SeedSequence((len(numbers), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class Step:
    """The step, as a callable.

    Args:
        state: What is trained.
        forward: The stage, or the wrapper around it that averages gradients over the processes.
        world: The processes.
        seed: Of all noise.
        accumulate: Parts of a batch, each with a backward pass.
        precision: Of the networks: float32, bf16 or fp16.
        shared_noise: Same noise however many processes share the batch.
        channels_last: Memory layout of images.
        cuda_graphs: Replay the parts of the networks as CUDA graphs, captured at the first step.
    """

    def __init__(
        self,
        state: TrainState,
        forward: nn.Module,
        world: World,
        *,
        seed: int = 0,
        accumulate: int = 1,
        precision: str = "float32",
        shared_noise: bool = True,
        channels_last: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.state = state
        self.forward = forward
        self.world = world
        self.seed = seed
        self.accumulate = accumulate
        self.precision = precision
        self.shared_noise = shared_noise
        self.buffers = _BufferCopy(state.stage)
        self.generator = torch.Generator(world.device)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.cache = caches_casts(state.stage)
        self.cuda_graphs = cuda_graphs
        self.graphs: GraphedParts | None = None

    def __call__(
        self, images: Tensor | LabelledImages, stop: StopSignal | None = None
    ) -> StepResult:
        """Train on this process's ``images (b, C, R, R)``; `stop` is looked at near the end."""
        state = self.state
        step = state.step
        self._seed_global(step)
        self.buffers.keep()
        rates = state.set_learning_rates()
        images = map_batch(self._to_device, images)
        if self.cuda_graphs and self.graphs is None:
            self.graphs = self._capture(images)
        with self.graphs.installed() if self.graphs is not None else contextlib.nullcontext():
            outputs = [self._backward(images, part) for part in range(self.accumulate)]
        applied, stop_anywhere, norms = self._check(outputs, stop)
        fault = ""
        if applied:
            self._apply(norms)
        else:
            fault = self._fault(outputs, norms)
            self.buffers.restore()
            state.counters.skipped += 1
        if state.scaler.is_enabled():
            state.scaler.update()  # once for all sides
        for side in state.sides.values():
            side.optimizer.zero_grad(set_to_none=True)
        state.counters.step = step + 1
        if applied:
            state.stage.after_step(state.step)
        gradients = {f"grad_norm/{name}": norm for name, norm in norms.items()}
        name = state.stage.loss_name
        metrics = (*({name: o.loss, **o.metrics} for o in outputs), gradients)
        return StepResult(applied, stop_anywhere, rates, metrics, fault)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.world.device.type == "cuda":
            x = x.pin_memory()
        return x.to(self.world.device, non_blocking=True)

    def _part(self, images: Tensor | LabelledImages, part: int) -> Tensor | LabelledImages:
        def take(x: Tensor) -> Tensor:
            # Every so-manyth image, so that a part is the same whatever the number of processes.
            layout = self.layout if x.ndim == 4 else torch.contiguous_format
            return x[part :: self.accumulate].contiguous(memory_format=layout)

        return map_batch(take, images)

    def _capture(self, images: Tensor | LabelledImages) -> GraphedParts:
        """Capture graphs for batches like this one; statistics and random states stay as they were
        at the start of the step.
        """
        state = self.state

        def forward() -> None:
            context = StepContext(state.position, state.end, self._rng(0))
            with autocast(self.world.device, self.precision):
                state.stage(self._part(images, 0), context)

        parts = graphable_parts(state.stage.trainables(), forward)
        with autocast(self.world.device, self.precision, cache=False):
            graphs = GraphedParts(parts)
        self.buffers.restore()
        self._seed_global(state.step)
        return graphs

    def _backward(self, images: Tensor | LabelledImages, part: int) -> StepOutput:
        parts, state = self.accumulate, self.state
        images = self._part(images, part)
        sharing = self.forward is not state.stage
        with contextlib.ExitStack() as stack:
            if sharing and part < parts - 1:
                stack.enter_context(self.forward.no_sync())  # type: ignore[operator]
            with autocast(self.world.device, self.precision, cache=self.cache):
                scale = state.scaler.scale(torch.ones((), device=self.world.device))
                context = StepContext(state.position, state.end, self._rng(part), scale)
                output: StepOutput = self.forward(images, context)
            state.scaler.scale(output.loss / parts).backward()
        return output

    def _check(
        self, outputs: list[StepOutput], stop: StopSignal | None
    ) -> tuple[bool, bool, dict[str, Tensor]]:
        """Unscale, and find the norm of each side; wait once for the device and the processes."""
        norms = {}
        for name, side in self.state.sides.items():
            gradients = [p.grad for p in side.parameters if p.grad is not None]
            if self.state.scaler.is_enabled() and gradients:
                self.state.scaler.unscale_(side.optimizer)
            norms[name] = torch.nn.utils.get_total_norm(gradients).to(self.world.device)
        losses = (output.loss.detach().float() for output in outputs)
        bad = ~torch.isfinite(torch.stack([*norms.values(), *losses])).all()
        flags = torch.stack([bad, torch.full_like(bad, bool(stop))]).float()
        bad_anywhere, stop_anywhere = all_max(flags, self.world).tolist()
        return not bad_anywhere, bool(stop_anywhere), norms

    def _fault(self, outputs: list[StepOutput], norms: Mapping[str, Tensor]) -> str:
        """Name the loss's term and the side and parameter that were not finite, each the first."""
        parts = []
        for output in outputs:
            terms = {**output.metrics, "loss": output.loss}
            bad = [name for name, value in terms.items() if not torch.isfinite(value).all()]
            if bad:
                parts.append(f"term {bad[0]}")
                break
        for name, side in self.state.sides.items():
            if torch.isfinite(norms[name]):
                continue
            bad = [
                key
                for key, p in side.module.named_parameters()
                if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            where = f"parameter {bad[0]}" if bad else "the norm alone"
            parts.append(f"gradient of {name}: {where}")
            break
        return ", ".join(parts) or "in another process"

    def _apply(self, norms: Mapping[str, Tensor]) -> None:
        # The scaler's own step() would judge each optimizer alone; they move all or none.
        for name, side in self.state.sides.items():
            limit = side.config.clip_norm
            if limit > 0:
                torch.nn.utils.clip_grads_with_norm_(side.parameters, limit, norms[name])
            side.optimizer.step()
            if side.ema is not None:
                side.ema.update(side.module)

    def _rng(self, part: int) -> Rng:
        counters, world = self.state.counters, self.world
        numbers = (self.seed, counters.returns, counters.step, part)
        if not self.shared_noise:
            return self.generator.manual_seed(step_seed(*numbers, 1 + world.rank))
        self.generator.manual_seed(step_seed(*numbers))
        return ShardedGenerator(self.generator, world.rank, world.size)

    def _seed_global(self, step: int) -> None:
        returns, rank = self.state.counters.returns, self.world.rank
        seed = step_seed(self.seed, returns, step, 0, 0, 1 + rank)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - other people's code may draw from it
        random.seed(seed)


class _BufferCopy:
    """A copy of the stage's buffers, to undo a skipped step's effect on running statistics.

    NaN would stay in them for ever.
    """

    def __init__(self, stage: nn.Module) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for buffer in stage.buffers():
            groups.setdefault((buffer.device, buffer.dtype), []).append(buffer)
        self.live = list(groups.values())
        self.copies = [[torch.empty_like(b) for b in group] for group in self.live]

    @torch.no_grad()
    def keep(self) -> None:
        for copies, live in zip(self.copies, self.live, strict=True):
            torch._foreach_copy_(copies, live)

    @torch.no_grad()
    def restore(self) -> None:
        for copies, live in zip(self.copies, self.live, strict=True):
            torch._foreach_copy_(live, copies)
