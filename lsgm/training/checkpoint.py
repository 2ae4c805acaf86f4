"""Checkpoints to resume from: one file each, tensors and plain values only."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lsgm.errors import UserError
from lsgm.system.files import atomic_save, sweep
from lsgm.system.integrity import check_records

__all__ = ["CheckpointError", "Checkpoints"]

_FORMAT = 1


class CheckpointError(Exception):
    """A checkpoint file that cannot be read; the message names it."""


class Checkpoints:
    """The files ``step_XXXXXXXX.pt`` of a folder.

    Args:
        folder: It exists.
        keep: How many of the latest files :meth:`save` leaves.

    Raises:
        ValueError: If none would be kept.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"at least one checkpoint has to be kept, not {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def path(self, step: int) -> Path:
        """Name of the file of a step."""
        return self.folder / f"step_{step:08d}.pt"

    def steps(self) -> list[int]:
        """Steps that have a file, earliest first."""
        matches = (
            re.fullmatch(r"step_(\d{8,})\.pt", p.name) for p in self.folder.glob("step_*.pt")
        )
        return sorted(int(m.group(1)) for m in matches if m)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the file of a step, then remove the oldest ones, and later ones: the run has gone
        back to before them because they could not be used.

        Raises:
            OSError: If it cannot be written (disk full, say); the earlier files are untouched.
        """
        path = self.path(step)
        sweep(self.folder, "step_*.pt")  # it would fill the disk in the end
        try:
            atomic_save(path, {"format": _FORMAT, "step": step, **state})
        except OSError as error:
            rest = [s for s in self.steps() if s != step]
            kept = f"{self.path(rest[-1]).name} is intact" if rest else "there is no earlier one"
            raise OSError(
                error.errno, f"{error.strerror} while saving a checkpoint ({kept})", str(path)
            ) from error
        steps = self.steps()
        last = steps.index(step) + 1
        for other in (*steps[: max(0, last - self.keep)], *steps[last:]):
            with contextlib.suppress(OSError):
                self.path(other).unlink()
        return path

    def load(self, step: int) -> dict[str, Any]:
        """Read the file of a step, onto the CPU.

        Raises:
            CheckpointError: If it is missing, incomplete, damaged or of a later format.
        """
        path = self.path(step)
        try:
            check_records(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except PermissionError:
            raise
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(
                f"{path} is damaged or incomplete ({_first_line(error)})"
            ) from None
        if not isinstance(state, dict) or "format" not in state:
            raise CheckpointError(f"{path} is not a checkpoint of this program")
        if state["format"] != _FORMAT:
            raise CheckpointError(
                f"{path} has format {state['format']}, this version reads format {_FORMAT}"
            )
        return state

    def latest(
        self,
        report: Callable[[str], None] = warnings.warn,
        fault: Callable[[dict[str, Any]], str | None] = lambda state: None,
    ) -> tuple[int, dict[str, Any]] | None:
        """Read the latest good checkpoint.

        Args:
            report: Called with a line for each later checkpoint that cannot be used.
            fault: Says what is wrong with the content of one that can be read, if anything is.

        Returns:
            Its step and content, or None if there is no file.

        Raises:
            UserError: If there are files and none is good.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                state = self.load(step)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            wrong = fault(state)
            if wrong is not None:
                problems.append(f"{self.path(step)} cannot be used: {wrong}")
                continue
            for problem in problems:
                report(f"warning: {problem}; using {self.path(step).name} instead")
            return step, state
        if problems:
            raise UserError("no checkpoint can be used: " + "; ".join(problems))
        return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__
