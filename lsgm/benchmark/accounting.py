"""What a training step consists of: its floating-point operations, its memory, and where its time
goes.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lsgm.training.precision import AUTOCAST_DTYPES

__all__ = ["TimeShare", "count_flops", "matrix_peak", "peak_memory", "time_shares"]

DEPTHWISE = "depth-wise convolution"
OTHER = "other"
GROUPS = {
    "convolution": r"conv",
    "batch norm": r"batch_norm",
    "resampling": r"upsample",
    "matrix product": r"mm$|matmul|linear|einsum|addmv|mv$",
    "optimizer": r"^_foreach|^_fused|^Optimizer",
    "copies and layout": r"copy|clone|contiguous|^to$|cat$|stack|pad|index|fill_|zero|empty|slice",
    "reduction": r"sum|mean|max$|norm$|norm_backward",
    "elementwise": r"add|mul|sub|div|silu|sigmoid|tanh|exp|log|sqrt|relu|elu|softplus|where|clamp|"
    r"threshold|neg|abs|pow|square|lerp|rand|normal|uniform|floor|reciprocal|^(lt|le|gt|ge|eq|ne)_?$",
}
"""Kind of operation -> pattern of the names of its operators; the first that matches counts."""


def count_flops(step: Callable[[int], None], number: int) -> int:
    """Multiplications and additions of one training step, in matrix products and convolutions."""
    # PyTorch's own formula for the backward pass takes every convolution for a dense one.
    formulas = {torch.ops.aten.convolution_backward: _backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.compiler.set_stance("force_eager"), counter:
        step(number)
    return counter.get_total_flops()


def _backward_flops(
    grad_out: Sequence[int], x: Sequence[int], weight: Sequence[int], *args: Any, **_: Any
) -> int:
    """Each wanted gradient, of the input or the kernel, costs what the forward pass did."""
    output_mask = args[-1]
    forward = 2 * grad_out[0] * math.prod(grad_out[2:]) * math.prod(weight)
    return forward * sum(map(bool, output_mask[:2]))


def peak_memory(step: Callable[[int], None], count: int, device: torch.device) -> float:
    """Largest memory that tensors take during steps 0 to ``count - 1`` beyond those that were
    there, in MiB: what PyTorch asked for, not what the C library holds on to.
    """
    if device.type == "cpu":
        return _allocated_peak(step, count)
    torch.accelerator.reset_peak_memory_stats(device)
    base = torch.accelerator.memory_allocated(device)
    for number in range(count):
        step(number)
    return (torch.accelerator.max_memory_allocated(device) - base) / 2**20


def _allocated_peak(step: Callable[[int], None], count: int) -> float:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for number in range(count):
            step(number)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def matrix_peak(device: torch.device, precision: str, repeats: int = 5) -> float:
    """Measured operations a second of a large square matrix product in ``precision``."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = AUTOCAST_DTYPES[precision] or torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest = math.inf
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


@dataclass(frozen=True)
class TimeShare:
    """Share of the time of a step.

    Attributes:
        kind: Kind of operation.
        share: Of all time spent in operators, in [0, 1].
        calls: Operator calls.
        slowest: The operators of this kind that take the most, with their shares.
    """

    kind: str
    share: float
    calls: int
    slowest: tuple[tuple[str, float], ...]

    def row(self) -> str:
        names = ", ".join(f"{name} {share:.0%}" for name, share in self.slowest)
        return f"{self.kind:<24}{self.share:>7.1%}{self.calls:>8}  {names}"

    @staticmethod
    def header() -> str:
        return f"{'where the time goes':<24}{'share':>7}{'calls':>8}  slowest operators"


def time_shares(step: Callable[[int], None], number: int, device: torch.device) -> list[TimeShare]:
    """Profile one training step; the time of every operator itself, grouped, largest first."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        step(number)
    field = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    microseconds: dict[str, Counter[str]] = {}
    calls: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        if not event.key.startswith("aten::") and device.type != "cpu":
            continue  # a kernel; its operator has its time already
        kind = operator_kind(event.key, event.input_shapes)
        microseconds.setdefault(kind, Counter())[event.key] += getattr(event, field)
        calls[kind] += event.count
    total = sum(sum(times.values()) for times in microseconds.values()) or 1
    shares = [
        TimeShare(
            kind,
            sum(times.values()) / total,
            calls[kind],
            tuple((n.rsplit("::", 1)[-1], t / total) for n, t in times.most_common(3)),
        )
        for kind, times in microseconds.items()
    ]
    return sorted(shares, key=lambda share: share.share, reverse=True)


def operator_kind(name: str, shapes: Sequence[Sequence[int]]) -> str:
    """The kind in :data:`GROUPS`, or depth-wise convolution, of an operator with these inputs."""
    if not name.startswith(("aten::", "Optimizer")):
        return OTHER  # the engine between the operators
    short = name.removeprefix("aten::")
    kind = next((kind for kind, pattern in GROUPS.items() if re.search(pattern, short)), OTHER)
    if kind == "convolution" and "depthwise" not in short:
        first = 1 if "backward" in short else 0  # the gradient comes before input and kernel
        operands = [list(shape) for shape in shapes[first : first + 2]]
        if len(operands) == 2 and all(len(shape) == 4 for shape in operands):
            x, weight = operands
            return DEPTHWISE if weight[1] == 1 and weight[0] == x[1] > 1 else kind
        return kind
    return DEPTHWISE if kind == "convolution" else kind
