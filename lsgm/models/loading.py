"""Opening a run folder: the model of its kind, rebuilt from its description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsgm.config.architecture import VAEConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import MALFORMED, UserError
from lsgm.models.base import Model
from lsgm.models.classifier import ImageClassifier, classifier_of
from lsgm.models.generic import (
    AutoencoderModel,
    LatentScoreModel,
    ScoreModel,
    generic_of,
)
from lsgm.models.images import DATA_KINDS, data_model_of
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae, prior_config_from
from lsgm.models.release import (
    DESCRIPTION,
    check_weights,
    description_error,
    load_weights,
    read_description,
    require_given,
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


def load(folder: str | Path, device: str | torch.device = "cpu", **modules: Any) -> Model:
    """Rebuild the model of a finished run, in eval mode, by its kind: a :class:`LSGM`, a plain
    :class:`VAEModel` or a :class:`~lsgm.models.images.DataSGM`; or one of
    :mod:`lsgm.models.generic`, which needs the modules that are not the library's:
    ``lsgm.load(run, network=MyNetwork())``, built as in training; their weights are read.

    Raises:
        UserError: The folder is not a finished run, its files are damaged or do not fit together,
            or it is the run of a classifier.
    """
    model = _opened(Path(folder), device, modules)
    if not isinstance(model, Model):
        raise UserError(f"{folder}: a classifier, which makes no images; use load_classifier")
    return model


def load_classifier(folder: str | Path, device: str | torch.device = "cpu") -> ImageClassifier:
    """Rebuild the classifier of a finished run, in eval mode.

    Raises:
        UserError: As :func:`load`, or the run is no classifier's.
    """
    model = _opened(Path(folder), device, {})
    if not isinstance(model, ImageClassifier):
        raise UserError(f"{folder}: is not a classifier")
    return model


def _opened(folder: Path, device: str | torch.device, modules: Mapping[str, Any]) -> nn.Module:
    description = read_description(folder)
    check_weights(folder, description)
    model = build_described(description, folder / DESCRIPTION, modules)
    load_weights(model, folder)
    return model.to(device).eval()


def build_described(
    description: dict[str, Any], source: Path, modules: Mapping[str, Any] | None = None
) -> nn.Module:
    """The model that a description stands for, with weights still to be read; ``modules`` are
    those that are not the library's.

    Raises:
        UserError: There is no such model; the line names ``source``, the description's file.
    """
    try:
        kind = description["kind"]
        if not isinstance(kind, str) or kind not in (*BUILDERS, *GENERIC_KINDS):
            known = ", ".join((*BUILDERS, *GENERIC_KINDS))
            raise ValueError(f"unknown kind {kind!r}; known are {known}")
        given = require_given(description, modules or {})
        if kind in GENERIC_KINDS:
            return generic_of(description, given)
        spec = section(DataSpec, description["spec"])
        if kind == LSGM.kind:
            return _lsgm_of(description, spec, given.get("network"))
        return BUILDERS[kind](description, spec)
    except (*MALFORMED, UserError) as error:
        raise description_error(source, error) from error


def _vae_of(description: dict[str, Any], spec: DataSpec) -> VAEModel:
    config = section(VAEConfig, description["vae"])
    return VAEModel(build_vae(config, spec), spec, config)


def _lsgm_of(description: dict[str, Any], spec: DataSpec, network: nn.Module | None = None) -> LSGM:
    config = section(VAEConfig, description["vae"])
    vae, prior = build_vae(config, spec), prior_config_from(description["prior"])
    score = build_prior(prior, vae, network, num_classes=spec.num_classes)
    return LSGM(vae, score, spec, config, prior)


GENERIC_KINDS = (ScoreModel.kind, LatentScoreModel.kind, AutoencoderModel.kind)

BUILDERS: dict[str, Callable[[dict[str, Any], DataSpec], nn.Module]] = {
    VAEModel.kind: _vae_of,
    LSGM.kind: _lsgm_of,
    **dict.fromkeys(DATA_KINDS, data_model_of),
    ImageClassifier.kind: classifier_of,
}
"""How a model is built from its description, by kind."""
