"""Checkpoints of NCSN (arXiv 1907.05600) and NCSNv2 (arXiv 2006.09011) as run folders.

A file is a list: the weights, the optimizer, in NCSNv2 also epoch, step and averaged weights. The
run's options lie beside it in ``config.yml`` (:mod:`lsgm.importers.ncsn_options`); without them the
configuration is one of ours, by the shapes of the weights or the name of the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lsgm.config.command_line import load_config
from lsgm.config.training import NCSNTrainConfig
from lsgm.errors import UserError
from lsgm.importers.ncsn_options import PUBLISHED, config_of_options, read_options
from lsgm.importers.reading import read_checkpoint
from lsgm.importers.refinenet_names import refinenet_weights
from lsgm.importers.runs import ImportedRun, Weights
from lsgm.importers.score_runs import check_weights, few, meta_model, put_weights, write_run
from lsgm.models.images import DataSGM

__all__ = [
    "NCSNCheckpoint",
    "import_ncsn",
    "import_ncsnv2",
    "is_ncsn",
    "is_ncsnv2",
    "load_ncsn",
    "read_ncsn",
]

Format = Literal["ncsn", "ncsnv2"]
PREFIX = "module."
LADDER = "sigmas"


@dataclass(frozen=True)
class NCSNCheckpoint:
    """A checkpoint in published names, without the prefix of data-parallel training.

    Attributes:
        path: The file.
        format: ``"ncsn"`` or ``"ncsnv2"``.
        state: Parameters.
        ema: Averaged ones, or None.
        levels: Number of noise levels.
        sigmas: ``(levels,)`` decreasing noise levels for images in [0, 1]; None in ``"ncsn"``.
        steps: Optimizer steps, or None where the file does not say.
    """

    path: Path
    format: Format
    state: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    levels: int
    sigmas: Tensor | None
    steps: int | None

    @property
    def stages(self) -> int:
        """Number of stages of the network."""
        return 4 + ("res5.0.conv1.weight" in self.state) + ("res31.0.conv1.weight" in self.state)


def _weights_of(contents: Any) -> Mapping[str, Any] | None:
    is_list = isinstance(contents, Sequence) and len(contents) >= 2
    first = contents[0] if is_list else None
    if not isinstance(first, Mapping) or not all(isinstance(name, str) for name in first):
        return None
    found = any(name.removeprefix(PREFIX) == "begin_conv.weight" for name in first)
    return first if found else None


def is_ncsn(contents: Any) -> bool:
    """Whether what a PyTorch file holds is a checkpoint of NCSN."""
    weights = _weights_of(contents)
    return weights is not None and any(name.endswith(".embed.weight") for name in weights)


def is_ncsnv2(contents: Any) -> bool:
    """Whether what a PyTorch file holds is a checkpoint of NCSNv2."""
    return _weights_of(contents) is not None and not is_ncsn(contents)


def read_ncsn(path: str | Path, form: Format) -> NCSNCheckpoint:
    """Read a checkpoint of that format.

    Raises:
        UserError: It is not one, or its parts do not fit each other.
    """
    path = Path(path)
    raw = read_checkpoint(path, unchecked=True)  # some are older than checksums
    weights = _weights_of(raw)
    if weights is None:
        raise UserError(f"checkpoint {path}: {_wrong(raw)}; FORMAT auto finds out what it is")
    found: Format = "ncsn" if is_ncsn(raw) else "ncsnv2"
    if found != form:
        raise UserError(f"checkpoint {path}: its network is that of {found}; import it as {found}")
    state = _without_prefix(path, weights)
    if any(name.endswith("_norm.alpha") for name in state):
        raise UserError(
            f"checkpoint {path}: the network without noise levels of NCSN's repository "
            "(RefineNetDilated), which is a baseline and no score model over noise levels"
        )
    sigmas = state.pop(LADDER, None)
    if form == "ncsnv2" and sigmas is None:
        raise UserError(f"checkpoint {path}: holds no noise levels ({PREFIX}{LADDER})")
    table = next((v for n, v in state.items() if n.endswith(".embed.weight")), None)
    levels = len(sigmas) if sigmas is not None else len(table) if table is not None else 0
    steps = raw[3] if len(raw) > 3 else None
    return NCSNCheckpoint(
        path=path,
        format=form,
        state=state,
        ema=_averaged(path, state, raw[-1] if len(raw) > 4 else None),
        levels=levels,
        sigmas=None if sigmas is None else sigmas.double(),
        steps=int(steps) if isinstance(steps, int | Tensor) else None,
    )


def _wrong(raw: Any) -> str:
    if isinstance(raw, Mapping):
        return f"holds a dictionary ({few(map(str, raw))}), where a list of weights is needed"
    if not isinstance(raw, Sequence) or not len(raw):
        return f"holds a {type(raw).__name__}, where a list of weights is needed"
    first = raw[0]
    if not isinstance(first, Mapping):
        return f"the first of its list is a {type(first).__name__}, not weights"
    return f"its weights are no network of NCSN; they begin with {few(map(str, first))}"


def _without_prefix(path: Path, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    prefixed = [name.startswith(PREFIX) for name in weights]
    if any(prefixed) and not all(prefixed):
        odd = next(name for name in weights if not name.startswith(PREFIX))
        raise UserError(
            f"checkpoint {path}: some of its weights are named {PREFIX}..., but {odd} is not; it "
            "was put together from two files"
        )
    if bad := [name for name, value in weights.items() if not isinstance(value, Tensor)]:
        raise UserError(f"checkpoint {path}: {bad[0]} is no tensor")
    return {name.removeprefix(PREFIX): value for name, value in weights.items()}


def _averaged(path: Path, state: Mapping[str, Tensor], ema: Any) -> dict[str, Tensor] | None:
    if not isinstance(ema, Mapping):
        return None
    averages = {str(name).removeprefix(PREFIX): value for name, value in ema.items()}
    missing = [name for name in state if name not in averages]
    if missing or any(averages[name].shape != value.shape for name, value in state.items()):
        odd = missing or [n for n, value in state.items() if averages[n].shape != value.shape]
        raise UserError(
            f"checkpoint {path}: its averages lack {few(odd)} or have them in another size; import "
            "the last weights with --weights raw"
        )
    return {name: averages[name] for name in state}


def load_ncsn(
    checkpoint: NCSNCheckpoint, config: NCSNTrainConfig, weights: Weights | None = None
) -> DataSGM:
    """The model of ``config`` with the weights of a checkpoint; None: its averages, or if it is of
    NCSN, which has none, its last.

    Raises:
        UserError: The file does not hold the weights asked for, or they do not fit ``config``.
    """
    chosen = weights or _default_weights(checkpoint)
    if chosen == "ema" and checkpoint.ema is None:
        raise UserError(
            f"checkpoint {checkpoint.path}: holds no averaged weights; import the last with "
            "--weights raw"
        )
    published = checkpoint.ema if chosen == "ema" else checkpoint.state
    model, state = _fitted(checkpoint, config, published or {})
    return put_weights(model, state, checkpoint.path)


def _default_weights(checkpoint: NCSNCheckpoint) -> Weights:
    return "raw" if checkpoint.format == "ncsn" else "ema"


def _fitted(
    checkpoint: NCSNCheckpoint, config: NCSNTrainConfig, published: Mapping[str, Tensor]
) -> tuple[DataSGM, dict[str, Tensor]]:
    """The model without memory, and the weights for it."""
    path = checkpoint.path
    if config.kind != "ncsn" or config.score.network != "refinenet":
        raise UserError(
            f"checkpoint {path}: {config.name} is no configuration of kind ncsn with network "
            "refinenet; choose another --config"
        )
    if config.score.refinenet.conditional != (checkpoint.format == "ncsn"):
        raise UserError(
            f"checkpoint {path}: of {checkpoint.format}, whose network has refinenet.conditional "
            f"{str(checkpoint.format == 'ncsn').lower()}; {config.name} has the other"
        )
    symmetric = config.score.data_range == "symmetric"
    if not symmetric and not config.score.centre_input:
        raise UserError(
            f"checkpoint {path}: its network sees images in [-1, 1]; {config.name} needs "
            "score.data_range symmetric or score.centre_input"
        )
    model = meta_model(config)
    unit = 2.0 if symmetric else 1.0
    _check_levels(checkpoint, model, unit)
    left = dict(published)
    said = f"checkpoint {path}: does not fit {config.name}"
    try:
        state = refinenet_weights(model.score, left, unit)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{said}: {error}") from error
    hint = "give the run's own config.yml with --config, or download the file again"
    check_weights(model, state, left, said, hint)
    return model, state


def _check_levels(checkpoint: NCSNCheckpoint, model: DataSGM, unit: float) -> None:
    ladder = model.ladder
    assert ladder is not None
    if ladder.num_levels != checkpoint.levels:
        raise UserError(
            f"checkpoint {checkpoint.path}: has {checkpoint.levels} noise levels, the "
            f"configuration {ladder.num_levels}; choose another --config"
        )
    if checkpoint.sigmas is None:
        return
    found = unit * checkpoint.sigmas
    if ((found / ladder.sigmas - 1).abs() > 1e-5).any():
        raise UserError(
            f"checkpoint {checkpoint.path}: its noise goes from {found[0]:g} to {found[-1]:g} "
            f"where images lie in a range of length {unit:g}, that of the configuration "
            f"geometrically from {ladder.sigma_max:g} to {ladder.sigma_min:g}; choose another "
            "--config"
        )


def import_ncsn(
    file: str | Path,
    out: str | Path,
    weights: Weights | None = None,
    config: str | Path | None = None,
) -> ImportedRun:
    """Turn a checkpoint of NCSN into the run folder ``out``; see :func:`import_ncsnv2`."""
    return _import("ncsn", file, out, weights, config)


def import_ncsnv2(
    file: str | Path,
    out: str | Path,
    weights: Weights | None = None,
    config: str | Path | None = None,
) -> ImportedRun:
    """Turn a checkpoint of NCSNv2 into the run folder ``out``.

    Args:
        file: The checkpoint. Nothing in it is executed.
        out: Folder of the run to write.
        weights: Averaged (``"ema"``) or last (``"raw"``) weights. None: averaged, of NCSN last.
        config: The run's ``config.yml``, a YAML file of ours, or the name of a published run. None:
            the ``config.yml`` beside the file, else the one of ours whose network it is.

    Raises:
        UserError: The file is not such a checkpoint, no configuration fits or several do, or
            ``out`` already holds a run.
    """
    return _import("ncsnv2", file, out, weights, config)


def _import(
    form: Format,
    file: str | Path,
    out: str | Path,
    weights: Weights | None,
    given: str | Path | None,
) -> ImportedRun:
    checkpoint = read_ncsn(file, form)
    config, said = choose_config(checkpoint, given)
    model = load_ncsn(checkpoint, config, weights)
    chosen = weights or _default_weights(checkpoint)
    return write_run(model, config, out, checkpoint.path, chosen, checkpoint.steps, said)


def choose_config(
    checkpoint: NCSNCheckpoint, given: str | Path | None = None
) -> tuple[NCSNTrainConfig, str]:
    """The configuration of a checkpoint, and in words how it was found.

    Raises:
        UserError: None fits, or several do, which are named.
    """
    path, known = checkpoint.path, PUBLISHED[checkpoint.format]
    if given is not None and str(given) in known:
        return _ours(known[str(given)]), f"configuration {known[str(given)]}"
    beside = (path.with_name("config.yml"), path.with_suffix(".yml"))
    options = Path(given) if given is not None else next((f for f in beside if f.is_file()), None)
    if options is not None and (given is None or _is_published(options)):
        width = len(checkpoint.state["begin_conv.weight"])
        config = config_of_options(read_options(options), checkpoint.stages, width)
        return config, f"configuration by {options.name}"
    if given is not None:
        return load_config(NCSNTrainConfig, given), f"configuration {given}"
    fitting = [name for name in known if _fits(checkpoint, _ours(known[name]))]
    named = [name for name in fitting if name in path.resolve().parent.parts]
    if len(named) == 1:
        chosen = known[named[0]]
        return _ours(chosen), f"configuration {chosen} by the name of the folder, {named[0]}"
    if len(fitting) == 1:
        chosen = known[fitting[0]]
        return _ours(chosen), f"configuration {chosen} by the shapes of the weights"
    what = f"{checkpoint.levels} noise levels, {checkpoint.stages} stages"
    if not fitting:
        raise UserError(
            f"checkpoint {path}: no published network has its {what} and widths, and no config.yml "
            "lies beside it; give that with --config"
        )
    raise UserError(
        f"checkpoint {path}: the same network is that of {', '.join(fitting)}, and no config.yml "
        "lies beside it; say which with --config"
    )


def _ours(name: str) -> NCSNTrainConfig:
    return load_config(NCSNTrainConfig, name)


def _is_published(file: Path) -> bool:
    """Whether a file holds options of a published run rather than a configuration of ours."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError):
        return False  # reading it as a configuration says what is wrong
    return "argparse.Namespace" in text or "\nmodel:" in f"\n{text}"


def _fits(checkpoint: NCSNCheckpoint, config: NCSNTrainConfig) -> bool:
    try:
        shapes = {name: torch.empty_like(v, device="meta") for name, v in checkpoint.state.items()}
        _fitted(checkpoint, config, shapes)
    except UserError:
        return False
    return True
