"""Checkpoints of score-SDE's PyTorch implementation (arXiv 2011.13456) as run folders.

A file holds weights, their average without names and the optimizer, but no configuration: that is
one of ours, named or found by the shapes of the weights (:mod:`lsgm.importers.score_sde_configs`).
Tensors stay in the file until they are written, so that an import needs the memory of one set of
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lsgm.config.training import NCSNTrainConfig
from lsgm.errors import UserError
from lsgm.importers.official_prior import network_weights
from lsgm.importers.reading import read_checkpoint
from lsgm.importers.refinenet_names import refinenet_weights
from lsgm.importers.runs import ImportedRun, Weights
from lsgm.importers.score_runs import (
    check_weights,
    few,
    meta_model,
    put_weights,
    size_of,
    write_run,
)
from lsgm.importers.score_sde_configs import choose_config
from lsgm.models.images import DataSGM
from lsgm.networks.data_score import DataScore
from lsgm.networks.ncsn import NCSN
from lsgm.sde import VESDE

__all__ = [
    "ScoreSDECheckpoint",
    "import_score_sde",
    "is_score_sde",
    "load_score_sde",
    "read_score_sde",
]

PREFIX = "module."
LADDER = "sigmas"
FREQUENCIES = "all_modules.0.W"


@dataclass(frozen=True)
class ScoreSDECheckpoint:
    """A checkpoint in published names, without the prefix of data-parallel training.

    Attributes:
        path: The file.
        state: Parameters, in order; the frozen Fourier frequencies are the first if there are any.
        ema: The same with averages; None if the file has none.
        sigmas: ``(N,)`` float64, decreasing noise levels, which mean something for VE models only.
        steps: Optimizer steps, or None where the file does not say.
    """

    path: Path
    state: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    sigmas: Tensor | None
    steps: int | None


def is_score_sde(contents: Any) -> bool:
    """Whether what a PyTorch file holds looks like one of these checkpoints."""
    return (
        isinstance(contents, dict)
        and isinstance(contents.get("model"), Mapping)
        and any(
            name.removeprefix(PREFIX).startswith(("all_modules.", "begin_conv."))
            for name in contents["model"]
            if isinstance(name, str)
        )
    )


def read_score_sde(path: str | Path) -> ScoreSDECheckpoint:
    """Read a checkpoint, memory mapped.

    Raises:
        UserError: It is not one, or its parts do not fit each other.
    """
    path = Path(path)
    raw = read_checkpoint(path)
    if not isinstance(raw, dict):
        raise UserError(
            f"checkpoint {path}: holds a {type(raw).__name__}, where score-SDE has a dictionary; "
            "FORMAT auto finds out what it is"
        )
    if not isinstance(raw.get("model"), Mapping):
        raise UserError(
            f"checkpoint {path}: has no 'model'; its keys are {few(map(str, raw))}. FORMAT auto "
            "finds out what it is"
        )
    named = {str(name): value for name, value in raw["model"].items()}
    if not is_score_sde(raw):
        raise UserError(
            f"checkpoint {path}: its weights are no network of score-SDE; they begin with "
            f"{few(named)}"
        )
    prefixed = [name.startswith(PREFIX) for name in named]
    if any(prefixed) and not all(prefixed):
        odd = next(name for name in named if not name.startswith(PREFIX))
        raise UserError(
            f"checkpoint {path}: some of its weights are named {PREFIX}..., but {odd} is not; it "
            "was put together from two files"
        )
    state = {name.removeprefix(PREFIX): value for name, value in named.items()}
    if bad := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"checkpoint {path}: {bad[0]} is no tensor")
    sigmas = state.pop(LADDER, None)
    steps = raw.get("step")
    return ScoreSDECheckpoint(
        path=path,
        state=state,
        ema=_averaged(path, state, raw.get("ema")),
        sigmas=None if sigmas is None else sigmas.double(),
        steps=int(steps) if isinstance(steps, int | Tensor) else None,
    )


def _averaged(path: Path, state: Mapping[str, Tensor], ema: Any) -> dict[str, Tensor] | None:
    """Averages by name. The file has a list of the trained parameters' only, in their order."""
    if not isinstance(ema, Mapping) or "shadow_params" not in ema:
        return None
    shadow = list(ema["shadow_params"])
    trained = [name for name in state if name != FREQUENCIES]
    if len(shadow) != len(trained):
        raise UserError(
            f"checkpoint {path}: holds {len(shadow)} averages of {len(trained)} trained "
            "parameters; import the last weights with --weights raw"
        )
    for name, average in zip(trained, shadow, strict=True):
        if average.shape != state[name].shape:
            raise UserError(
                f"checkpoint {path}: the average of {name} is {size_of(average)}, not "
                f"{size_of(state[name])}; import the last weights with --weights raw"
            )
    return dict(state) | dict(zip(trained, shadow, strict=True))


def load_score_sde(
    checkpoint: ScoreSDECheckpoint, config: NCSNTrainConfig, weights: Weights = "ema"
) -> DataSGM:
    """The model of ``config`` with the weights of a checkpoint; the tensors are those of the file
    where nothing has to be done to them.

    Raises:
        UserError: The file does not hold the weights asked for, or they do not fit ``config``.
    """
    path = checkpoint.path
    if weights == "ema" and checkpoint.ema is None:
        raise UserError(
            f"checkpoint {path}: holds no averaged weights (ema); import the last with "
            "--weights raw"
        )
    model, state = _fitted(checkpoint, config, (checkpoint.ema or {}) if weights == "ema" else None)
    return put_weights(model, state, path)


def _fitted(
    checkpoint: ScoreSDECheckpoint,
    config: NCSNTrainConfig,
    published: Mapping[str, Tensor] | None = None,
) -> tuple[DataSGM, dict[str, Tensor]]:
    """The model of ``config`` without memory, and the weights for it (None: the last ones).

    Raises:
        UserError: They do not fit each other.
    """
    model = meta_model(config)
    _check_levels(checkpoint, model)
    left = dict(checkpoint.state if published is None else published)
    said = f"checkpoint {checkpoint.path}: does not fit {config.name}"
    try:
        state = _our_weights(model, left)
    except ValueError as error:
        raise UserError(f"{said}: {error}") from error
    hint = "without --config the right one is looked for"
    check_weights(model, state, left, said, hint)
    return model, state


def _our_weights(model: DataSGM, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names; what is left in ``published`` belongs nowhere."""
    if isinstance(model.score, NCSN):
        return refinenet_weights(model.score, published)
    assert isinstance(model.score, DataScore)
    network: Any = model.score.network
    state = {}
    fourier = hasattr(network.embedding.features, "frequencies")
    if fourier:
        if FREQUENCIES not in published:
            raise ValueError(f"{FREQUENCIES}, the Fourier frequencies, is missing")
        state["embedding.features.frequencies"] = published.pop(FREQUENCIES)
    state |= network_weights(network, published, first=1 if fourier else 0)
    if isinstance(model.sde, VESDE):
        # Divided by sigma the published network is the score, ours is the noise.
        last = [n for n in state if n.endswith(("head.conv.weight", "head.conv.bias"))]
        state |= {name: -state[name] for name in last}
    return {f"network.{name}": value for name, value in state.items()}


def _check_levels(checkpoint: ScoreSDECheckpoint, model: DataSGM) -> None:
    """The noise levels of a VE model have to be those of the file."""
    if checkpoint.sigmas is None or not isinstance(model.sde, VESDE):
        return
    found = checkpoint.sigmas[0].item(), checkpoint.sigmas[-1].item()
    wanted = model.sde.sigma2_max**0.5, model.sde.sigma2_min**0.5
    if any(abs(a / b - 1) > 1e-6 for a, b in zip(found, wanted, strict=True)):
        raise UserError(
            f"checkpoint {checkpoint.path}: its noise goes from {found[0]:g} to {found[1]:g}, that "
            f"of the configuration from {wanted[0]:g} to {wanted[1]:g}; choose another --config"
        )
    levels = model.levels
    if levels is not None and levels.num_levels != len(checkpoint.sigmas):
        raise UserError(
            f"checkpoint {checkpoint.path}: has {len(checkpoint.sigmas)} noise levels, the "
            f"configuration {levels.num_levels}; choose another --config"
        )


def import_score_sde(
    file: str | Path,
    out: str | Path,
    weights: Weights | None = None,
    config: str | Path | None = None,
) -> ImportedRun:
    """Turn a checkpoint into the run folder ``out``.

    Args:
        file: The checkpoint. Nothing in it is executed.
        out: Folder of the run to write.
        weights: Averaged (``"ema"``, also None) or last (``"raw"``) weights.
        config: YAML file of the model, or None: the one of ours whose network it is.

    Raises:
        UserError: The file is not such a checkpoint, no configuration fits or several do, or
            ``out`` already holds a run.
    """
    checkpoint = read_score_sde(file)
    shapes = {name: value.to("meta") for name, value in checkpoint.state.items()}

    def fits(candidate: NCSNTrainConfig) -> bool:
        try:
            _fitted(checkpoint, candidate, shapes)
        except UserError:
            return False
        return True

    choice = choose_config(checkpoint.path, checkpoint.state, fits, config)
    chosen: Weights = weights or "ema"
    model = load_score_sde(checkpoint, choice.config, chosen)
    return write_run(
        model,
        choice.config,
        out,
        checkpoint.path,
        chosen,
        checkpoint.steps,
        choice.said,
        named=choice.name,
    )
