"""Whether a run starts, goes on or is finished, and with which configuration.

``config.yaml`` is the configuration in force. Each line of ``config_history.jsonl`` says what a
resume has changed in it, and from which step on.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lsgm.config.command_line import load_config, save_config
from lsgm.config.training import TrainConfig
from lsgm.errors import UserError
from lsgm.system.files import RunFolder, atomic_write_text, json_text

__all__ = [
    "Plan",
    "Resume",
    "configuration_changes",
    "plan",
    "record_changes",
    "release_notes",
]

Resume = bool | Literal["auto"]
"""False: start a new run; True: continue one; "auto": whichever applies."""


FIXED = (
    "kind",
    "data.*",
    "vae.*",
    "prior.network.*",
    "prior.sde.*",
    "prior.mixed",
    "prior.mixing_init",
    "prior.predict",
    "prior.training",
    "prior.drop_inactive",
    "prior.class_conditional",
    "score.*",
    "classifier.*",
    "add_context_blocks",
    "vae_run",
    "lsgm_run",
    "optim*.optimizer",
    "optim*.impl",
    "train.seed",
)
"""What a run cannot change once it has begun: the model, its start, the data, the kind of optimizer
(whose state goes on) and the seed (an epoch has one order)."""


FREE = ("data.root", "data.cache", "data.num_workers", "classifier.label_smoothing")
"""Exceptions to FIXED."""


@dataclass(frozen=True)
class Plan:
    """What to do in a run folder.

    Args:
        resume: Continue from its last checkpoint, if it has one.
        finished: There is nothing to do.
        changes: Key of the configuration -> (value so far, value from now on).
    """

    resume: bool = False
    finished: bool = False
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The changes in words."""
        return [
            f"{key}: {old} until now, {new} from here" for key, (old, new) in self.changes.items()
        ]


def plan(run: RunFolder, config: Any, resume: Resume) -> Plan:
    """Decide what a call with this configuration has to do in a folder.

    Raises:
        UserError: The folder holds a run and none is to be continued, or the other way round; the
            configuration changes what cannot change; or weights are there that a new start would
            overwrite.
    """
    if resume != "auto" or not run.occupied:
        run.check(bool(resume) and resume != "auto")
    has_checkpoints = any(run.checkpoints.glob("*.pt"))
    if not (has_checkpoints or run.weights.exists()):
        return Plan()  # nothing, or what a run stopped before its first checkpoint left
    recorded = _recorded(run, type(config))
    changes = {} if recorded is None else configuration_changes(recorded, config)
    _refuse_fixed(run, changes)
    if run.weights.exists():
        length = _length(config.train)
        finished_with = _released_length(run)
        if finished_with is None and not has_checkpoints and recorded is not None:
            finished_with = _length(recorded.train)
        # Where it is being made longer, what the folder records differs from what it released.
        if finished_with == length and not {"train.epochs", "train.max_steps"} & changes.keys():
            if changes:
                raise UserError(
                    f"{run.path}: the run is finished, {', '.join(changes)} would change nothing; "
                    "give more --train.epochs to train on"
                )
            return Plan(resume=True, finished=True)
        if not has_checkpoints:
            raise UserError(
                f"{run.path}: holds trained weights and no checkpoint to continue from; they are "
                "not overwritten: choose another --out"
            )
    return Plan(resume=True, changes=changes)


def configuration_changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Keys in which two configurations differ, with both values.

    Paths of runs are compared as places.
    """
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    keys = list(dict.fromkeys([*before, *after]))
    return {
        key: (before.get(key), after.get(key))
        for key in keys
        if _place(key, before.get(key)) != _place(key, after.get(key))
    }


def record_changes(run: RunFolder, config: Any, decided: Plan, step: int) -> None:
    """Make ``config`` the run's configuration from ``step`` on, with a line of history if it
    changes something.
    """
    if not decided.resume:
        run.history.unlink(missing_ok=True)
    elif decided.changes:
        lines = run.history.read_text().splitlines() if run.history.exists() else []
        entry = {
            "step": step,
            "time": round(time.time(), 3),
            "changes": {key: list(pair) for key, pair in decided.changes.items()},
        }
        # One killed before the configuration below was written has left its line already.
        if not lines or _untimed(lines[-1]) != _untimed(json_text(entry)):
            lines.append(json_text(entry))
        atomic_write_text(run.history, "\n".join(lines) + "\n")
    if decided.changes or not run.config.exists() or not decided.resume:
        save_config(config, run.config)


def release_notes(train: TrainConfig, step: int) -> dict[str, Any]:
    """What ``run.json`` says of the training that made the weights."""
    return {"steps": step, "length": _length(train)}


def _recorded(run: RunFolder, config_class: type) -> Any:
    return load_config(config_class, run.config) if run.config.exists() else None


def _length(train: TrainConfig) -> dict[str, int | None]:
    return {"epochs": train.epochs, "max_steps": train.max_steps}


def _released_length(run: RunFolder) -> object:
    """The length that a finished run was trained to; None where it is not known."""
    return run.read_info().get("length") if run.info.exists() else None


def _refuse_fixed(run: RunFolder, changes: Mapping[str, tuple[Any, Any]]) -> None:
    for key, (old, new) in changes.items():
        fixed = _matches(key, FIXED) and not _matches(key, FREE)
        switched = key.endswith(".ema_decay") and (old == 0) != (new == 0)
        if fixed or switched:
            raise UserError(
                f"{key}: {run.path} was begun with {old}, which cannot become {new} on the way; "
                "leave it out, or choose another --out"
            )


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _place(key: str, value: Any) -> Any:
    if key in ("vae_run", "lsgm_run", "data.root") and value is not None:
        return str(Path(value).resolve())
    return value


def _untimed(line: str) -> Any:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return {k: v for k, v in entry.items() if k != "time"} if isinstance(entry, dict) else None
