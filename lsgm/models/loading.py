"""Opening a run folder: the model of its kind, rebuilt from its description."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsgm.config.architecture import VAEConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import MALFORMED, UserError
from lsgm.models.base import Model
from lsgm.models.classifier import ImageClassifier, classifier_of
from lsgm.models.images import DATA_KINDS, data_model_of
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae, prior_config_from
from lsgm.models.release import (
    DESCRIPTION,
    check_weights,
    description_error,
    load_weights,
    read_description,
    section,
)

__all__ = [
    "build_described",
    "load",
    "load_classifier",
    "require_run",
]


def require_run(run: str | None) -> str:
    if not run:
        raise UserError("--run: give the folder of a trained run, for example --run runs/lsgm")
    return run


def load(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """Rebuild the model of a finished run, in eval mode, by its kind: a :class:`LSGM`, a plain
    :class:`VAEModel` or a :class:`~lsgm.models.images.DataSGM`.

    Raises:
        UserError: The folder is not a finished run, its files are damaged or do not fit together,
            or it is the run of a classifier.
    """
    model = _opened(Path(folder), device)
    if not isinstance(model, Model):
        raise UserError(f"{folder}: a classifier, which makes no images; use load_classifier")
    return model


def load_classifier(folder: str | Path, device: str | torch.device = "cpu") -> ImageClassifier:
    """Rebuild the classifier of a finished run, in eval mode.

    Raises:
        UserError: As :func:`load`, or the run is no classifier's.
    """
    model = _opened(Path(folder), device)
    if not isinstance(model, ImageClassifier):
        raise UserError(f"{folder}: is not a classifier")
    return model


def _opened(folder: Path, device: str | torch.device) -> nn.Module:
    description = read_description(folder)
    check_weights(folder, description)
    model = build_described(description, folder / DESCRIPTION)
    load_weights(model, folder)
    return model.to(device).eval()


def build_described(description: dict[str, Any], source: Path) -> nn.Module:
    """The model that a description stands for, with weights still to be read.

    Raises:
        UserError: There is no such model; the line names ``source``, the description's file.
    """
    try:
        kind = description["kind"]
        if not isinstance(kind, str) or kind not in BUILDERS:
            raise ValueError(f"unknown kind {kind!r}; known are {', '.join(BUILDERS)}")
        return BUILDERS[kind](description, section(DataSpec, description["spec"]))
    except (*MALFORMED, UserError) as error:
        raise description_error(source, error) from error


def _vae_of(description: dict[str, Any], spec: DataSpec) -> VAEModel:
    config = section(VAEConfig, description["vae"])
    return VAEModel(build_vae(config, spec), spec, config)


def _lsgm_of(description: dict[str, Any], spec: DataSpec) -> LSGM:
    config = section(VAEConfig, description["vae"])
    vae, prior = build_vae(config, spec), prior_config_from(description["prior"])
    return LSGM(vae, build_prior(prior, vae), spec, config, prior)


BUILDERS: dict[str, Callable[[dict[str, Any], DataSpec], nn.Module]] = {
    VAEModel.kind: _vae_of,
    LSGM.kind: _lsgm_of,
    **dict.fromkeys(DATA_KINDS, data_model_of),
    ImageClassifier.kind: classifier_of,
}
"""How a model is built from its description, by kind."""
