"""What a run says: ``metrics.jsonl``, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import torch
from tensorboardX import SummaryWriter
from torch import Tensor
from tqdm import tqdm

from lsgm.system.files import RunFolder, log_line, open_log
from lsgm.system.progress import has_terminal
from lsgm.training.distributed import World, all_mean

__all__ = ["MeanMetrics", "RunLogger"]

SILENCE = 20.0
"""Seconds between two lines of an evaluation where there is no terminal."""


class MeanMetrics:
    """Means of scalars over steps and processes, without waiting for the device in each step.

    Args:
        device: Where the sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    @torch.no_grad()
    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Take in the scalars of one step."""
        if not metrics:
            return
        names = tuple(sorted(metrics))
        scalars = (metrics[name].detach().float().reshape(()) for name in names)
        values = torch.stack([scalar.to(self.device, non_blocking=True) for scalar in scalars])
        total = self._sums.get(names)
        self._sums[names] = values if total is None else total + values
        self._counts[names] = self._counts.get(names, 0) + 1

    def mean(self, world: World) -> dict[str, float]:
        """Means over all that came in; waits for the device and the other processes."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for names in sorted(self._sums):
            for name, value in zip(names, all_mean(self._sums[names], world).tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + self._counts[names]
        return {name: sums[name] / counts[name] for name in sums}

    def reset(self) -> None:
        """Forget all."""
        self._sums.clear()
        self._counts.clear()

    def state_dict(self, world: World) -> list[dict[str, Any]]:
        """Return what has come in since the last reset, as a mean over the processes."""
        return [
            {
                "names": list(names),
                "sum": all_mean(self._sums[names], world),
                "count": self._counts[names],
            }
            for names in sorted(self._sums)
        ]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take back what :meth:`state_dict` returned."""
        self.reset()
        for entry in state:
            names = tuple(entry["names"])
            self._sums[names] = entry["sum"].to(self.device)
            self._counts[names] = int(entry["count"])


class RunLogger:
    """The log of a run, written by the main process alone.

    Args:
        run: The run's folder.
        total_steps: Steps of the run.
        enabled: Whether this process writes.
        stream: Where progress goes (default: stderr).
    """

    def __init__(
        self,
        run: RunFolder,
        total_steps: int,
        *,
        enabled: bool = True,
        stream: IO[str] | None = None,
    ) -> None:
        self.run = run
        self.total_steps = total_steps
        self.enabled = enabled
        self.stream = sys.stderr if stream is None else stream
        self._file: IO[bytes] | None = None
        self._writer: SummaryWriter | None = None
        self._bar: tqdm | None = None

    def open(self, step: int, length: int = 0) -> None:
        """Start writing after `step` steps; metrics.jsonl had `length` bytes then and is cut."""
        if not self.enabled:
            return
        self.close()
        self._file = open_log(self.run.metrics, length, self.say)
        self._writer = SummaryWriter(str(self.run.path), purge_step=step + 1 if step else None)
        if has_terminal(self.stream):
            self._bar = tqdm(
                total=self.total_steps,
                initial=step,
                unit="step",
                file=self.stream,
                dynamic_ncols=True,
            )

    @property
    def length(self) -> int:
        """Bytes of metrics.jsonl, all on disk."""
        if self._file is None:
            return 0
        self._file.flush()
        return self._file.seek(0, 2)

    def write(self, phase: str, step: int, values: Mapping[str, float | int | str | None]) -> None:
        """Write a line of metrics.jsonl and, for numbers, TensorBoard scalars phase/name."""
        if self._file is None or self._writer is None:
            return
        record = {"phase": phase, "step": step, "time": round(time.time(), 3), **values}
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{phase}/{name}", value, step)
        self._file.write(log_line(record))
        self._file.flush()

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Show ``image (C, H, W)``, in [0, 1], in TensorBoard."""
        if self._writer is not None:
            self._writer.add_image(name, image.detach().cpu().float().clamp(0, 1).numpy(), step)

    def advance(self, steps: int = 1) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.update(steps)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar below that of the run; without a terminal, a line now and then if it takes long."""
        if not self.enabled:
            yield lambda count: None
            return
        terminal = self.stream.isatty()
        with tqdm(
            total=total, desc=what, file=self.stream, leave=False, disable=not terminal,
            dynamic_ncols=True,
        ) as bar:  # fmt: skip
            done, said = 0, time.monotonic()

            def move(count: int) -> None:
                nonlocal done, said
                done += count
                bar.update(count)
                if not terminal and time.monotonic() - said >= SILENCE:
                    said = time.monotonic()
                    self.say(f"{what}: {done} of {total}")

            yield move

    def progress(
        self, step: int, epoch: int, values: Mapping[str, float], seconds_per_step: float
    ) -> None:
        """Show where the run stands: beside the bar, or as a line where there is no terminal."""
        if not self.enabled:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
            return
        left = _duration(max(0, self.total_steps - step) * seconds_per_step)
        self.say(f"step {step}/{self.total_steps}  epoch {epoch}  {shown}  {left} left")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            tqdm.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Close all files."""
        for part in (self._bar, self._writer, self._file):
            if part is not None:
                part.close()
        self._bar = self._writer = self._file = None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
