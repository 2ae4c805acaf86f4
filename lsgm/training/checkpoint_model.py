"""The model of a training checkpoint: of a run that goes on, or of an earlier step.

Only tensors and plain values are read (:mod:`lsgm.training.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.errors import UserError
from lsgm.models.base import Model
from lsgm.models.loading import build_described
from lsgm.system.files import RunFolder
from lsgm.training.checkpoint import CheckpointError, Checkpoints
from lsgm.training.state import architecture_mismatch

__all__ = ["load_checkpoint"]

LATEST = "latest"
SIDES = {"vae": "vae", "prior": "score", "score": "score"}
"""Trained side -> submodule of the model."""


def load_checkpoint(
    folder: str | Path, step: str = LATEST, device: str | torch.device = "cpu"
) -> Model:
    """Rebuild the model of a run with the weights of a checkpoint, in eval mode: the running
    averages where there are some, as in the released weights.

    Args:
        folder: The run's folder; the run may be finished or not.
        step: Number of an optimizer step that has a checkpoint, or ``latest``.
        device: Where the model goes.

    Raises:
        UserError: There is no such checkpoint, it is damaged, or it does not fit the run's
            configuration.
    """
    run = RunFolder(folder)
    number, state = _read(run, step)
    model = _architecture(run)
    source = f"{run.path}, checkpoint of step {number}"
    _fill(model, _part(state["weights"], "model."), source)
    for side, averages in state["ema"].items():
        _fill(getattr(model, SIDES[side]), _part(averages, "module."), source)
    return model.to(device).eval()


def _read(run: RunFolder, step: str) -> tuple[int, dict[str, Any]]:
    """The step and the content of a checkpoint."""
    if not run.path.is_dir():
        raise UserError(f"{run.path}: no such run folder")
    checkpoints = Checkpoints(run.checkpoints)
    known = checkpoints.steps()
    if not known:
        raise UserError(f"--checkpoint: {run.path} has no checkpoints")
    if step == LATEST:
        found = checkpoints.latest(lambda line: print(line, flush=True))
        assert found is not None
        return found
    if not step.isdecimal() or int(step) not in known:
        raise UserError(
            f"--checkpoint: {run.path} has no step {step}; give {LATEST} or one of "
            f"{', '.join(map(str, known))}"
        )
    try:
        return int(step), checkpoints.load(int(step))
    except CheckpointError as error:
        raise UserError(f"--checkpoint: {error}") from None


def _architecture(run: RunFolder) -> Model:
    """The model of the run with weights still to be read, by what a finished run says of it, or by
    what was written when the training began.
    """
    if run.info.is_file():
        file, description = run.info, run.read_info()
    elif run.start.is_file():
        file, description = run.start, run.read_start()["model"]
    else:
        names = f"{run.info.name} nor {run.start.name}"
        raise UserError(f"--checkpoint: {run.path} has neither {names}")
    model = build_described(description, file)
    if not isinstance(model, Model):
        raise UserError(f"--run: {run.path} is a classifier, which makes no images")
    return model


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def _fill(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    if mismatch := architecture_mismatch(weights, module.state_dict()):
        raise UserError(f"{source}: it holds another architecture than the run's: {mismatch}")
    module.load_state_dict(weights)
