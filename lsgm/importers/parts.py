"""The parts that :mod:`lsgm.exporters.parts` writes, as a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import nn

from lsgm.config.architecture import VAEConfig
from lsgm.config.command_line import save_config
from lsgm.config.training import DataConfig, LSGMTrainConfig, VAETrainConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.importers.reading import first_line, read_json
from lsgm.importers.runs import ImportedRun, Weights
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae, prior_config_from
from lsgm.models.release import save, section
from lsgm.system.files import RunFolder

__all__ = ["CLASS", "CONFIG", "INDEX", "WEIGHTS", "import_parts", "is_parts"]

CLASS = "LSGM"
INDEX, CONFIG, WEIGHTS = "model_index.json", "config.json", "model.safetensors"


def is_parts(contents: Any) -> bool:
    """Whether a path is a folder of such parts."""
    if not isinstance(contents, Path) or not (contents / INDEX).is_file():
        return False
    try:
        return read_json(contents / INDEX).get("_class_name") == CLASS
    except UserError:
        return False


def import_parts(
    folder: str | Path, out: str | Path, weights: Weights | None = None
) -> ImportedRun:
    """Turn exported parts into the run folder ``out``, which computes what the exported run did.

    Raises:
        UserError: A part is missing, damaged or of another model, or ``out`` already holds a run.
    """
    folder = Path(folder)
    if not is_parts(folder):
        raise UserError(f"{folder}: no folder that export_checkpoint.py has written of an LSGM")
    if weights is not None:
        raise UserError(f"{folder}: exported parts have one set of weights; leave --weights out")
    index = read_json(folder / INDEX)
    try:
        spec, data = DataSpec(**index["spec"]), section(DataConfig, index["data"])
        vae_config = section(VAEConfig, read_json(folder / "autoencoder" / CONFIG))
        vae = build_vae(vae_config, spec)
        model = VAEModel(vae, spec, vae_config)
        config: Any = VAETrainConfig(name=Path(out).name, data=data, vae=vae_config)
        _fill(model.vae, folder / "autoencoder")
        if "prior" in index:
            prior = prior_config_from(read_json(folder / "prior" / CONFIG))
            score = build_prior(prior, vae, num_classes=spec.num_classes)
            model = LSGM(vae, score, spec, vae_config, prior)
            config = LSGMTrainConfig(name=Path(out).name, data=data, prior=prior)
            _fill(model.score, folder / "prior")
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{folder}: its options do not describe a model ({what})") from error
    run = RunFolder.create(out)
    save_config(config, run.config)
    save(model.eval(), run.path, data, {"imported": {"file": folder.name}})
    size = sum(p.numel() for p in model.parameters())
    return ImportedRun(run.path, model.kind, spec.name, size, "released", None)


def _fill(module: nn.Module, folder: Path) -> None:
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: is missing")
    try:
        module.load_state_dict(load_file(file))
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or truncated ({first_line(error)})") from None
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0]
        raise UserError(f"{file}: weights do not fit {folder / CONFIG}: {reason[:200]}") from None
    with torch.no_grad():
        bad = [name for name, value in module.state_dict().items() if not value.isfinite().all()]
    if bad:
        raise UserError(f"{file}: {bad[0]} holds NaN or infinity")
