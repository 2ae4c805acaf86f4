"""CUDA graphs of the parts of the networks.

A small network's step is hundreds of kernels of a few microseconds, each of which the CPU takes
longer to start than the GPU to run. As a CUDA graph a part of the network is one start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["GraphedParts", "Part", "graphable_parts"]


class Part(NamedTuple):
    """A module that a step calls once, with tensors alone: its inputs are examples of their shapes,
    dtypes, layouts and need of gradients.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]


def graphable_parts(
    sides: Mapping[str, nn.Module], forward: Callable[[], object]
) -> tuple[Part, ...]:
    """The largest modules inside ``sides`` that can each become one graph, in the order in which
    ``forward`` calls them: once, in training mode, with tensors by position, tensors as result. The
    sides themselves are left out: Python decides in them. Modules that recompute their activations
    (``checkpointing``) stay as they are.
    """
    calls: dict[nn.Module, list[tuple[Tensor, ...] | None]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = args and not kwargs and all(isinstance(a, Tensor) for a in args)
        results = all(isinstance(leaf, Tensor) for leaf in tree_leaves(output))
        inputs = None
        if tensors and results and module.training:
            inputs = tuple(
                a.detach()
                .clone(memory_format=torch.preserve_format)
                .requires_grad_(a.requires_grad)
                for a in args
            )
        calls.setdefault(module, []).append(inputs)

    inside = {m for side in sides.values() for m in side.modules()} - set(sides.values())
    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in inside]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()

    def fits(module: nn.Module) -> bool:
        seen = calls.get(module, [])
        recomputes = any(getattr(m, "checkpointing", False) for m in module.modules())
        return len(seen) == 1 and seen[0] is not None and not recomputes

    chosen: set[nn.Module] = set()

    def descend(module: nn.Module) -> None:
        for child in module.children():
            if fits(child):
                chosen.add(child)
            else:
                descend(child)

    for side in sides.values():
        descend(side)
    # Hooks run when a call ends, so the order of ``calls`` is that of execution.
    return tuple(Part(m, inputs[0]) for m, inputs in calls.items() if m in chosen and inputs[0])


class GraphedParts:
    """Parts of networks whose forward and backward passes are CUDA graphs while :meth:`installed`.

    The graphs read and write the parameters, gradients and running statistics where they lie: those
    may change in place, not move. Capturing runs each part a few times, which moves running
    statistics and random states; the caller puts them back. Gradients lie in the graphs' own memory
    until the next replay: they cannot be summed over several backward passes.

    Args:
        parts: From :func:`graphable_parts`, for the same batch size and precision (capture under
            the autocast of the step, without its cache).
    """

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}
        modules, inputs = tuple(p.module for p in parts), tuple(p.inputs for p in parts)
        if not parts:
            return
        # the capture's stream is another; the engine orders the two
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        torch.cuda.make_graphed_callables(modules, inputs, allow_unused_input=True)
        for module in modules:
            self._forwards[module] = module.__dict__.pop("forward")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run the graphs in place of the modules' own code, for batches of the captured size."""
        for module, forward in self._forwards.items():
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module in self._forwards:
                module.__dict__.pop("forward", None)
