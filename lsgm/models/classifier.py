"""Trained classifiers: of noisy images, to guide a sampler, or of clean ones, to judge images."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.conditioning import ClassifierGuidance
from lsgm.config.architecture import ClassifierConfig, ScoreModelConfig
from lsgm.data.pixels import Pixels
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.models.base import DiffusionModel
from lsgm.models.images import build_sde
from lsgm.models.release import section
from lsgm.networks.classifier import Classifier
from lsgm.networks.layers import resolution
from lsgm.sde import LinearSDE
from lsgm.system.memory import build_within_memory

__all__ = [
    "ImageClassifier",
    "build_classifier",
    "classifier_of",
]


class ImageClassifier(nn.Module):
    """A classifier of images as a diffusion sees them.

    Args:
        network: logits of ``x_t (B, C, H, W)`` and, if it is noise-conditional, ``t (B,)``.
        sde: the noise that it knows.
        pixels: the map between images and what is diffused.
        score: the configuration of noise and pixels; ``config``: the architecture.
    """

    kind = "classifier"

    def __init__(
        self,
        network: Classifier,
        sde: LinearSDE,
        pixels: Pixels,
        score: ScoreModelConfig,
        config: ClassifierConfig,
    ) -> None:
        super().__init__()
        self.network = network
        self.sde = sde
        self.pixels = pixels
        self.score = score
        self.config = config

    def describe(self) -> dict[str, Any]:
        """What :func:`lsgm.load` needs to rebuild the architecture."""
        return {
            "score": asdict(self.score),
            "classifier": asdict(self.config),
            "spec": asdict(self.spec),
        }

    def with_network(self, network: Classifier) -> ImageClassifier:
        """The same classifier with other weights (the running average, say)."""
        return ImageClassifier(network, self.sde, self.pixels, self.score, self.config)

    @property
    def spec(self) -> DataSpec:
        return self.pixels.spec

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, K)`` of clean ``images (B, C, R, R)`` in [0, 1], padded or not."""
        x = self.pixels.to_network(images)
        if not self.config.noise_conditional:
            return self.network(x)
        start = torch.full((len(x),), self.sde.time_eps, dtype=x.dtype, device=x.device)
        return self.network(x, start)

    def guide(
        self, model: DiffusionModel, labels: Tensor, scale: float = 1.0
    ) -> ClassifierGuidance:
        """The hook that steers a sampler of ``model`` to the classes ``labels (B,)``.

        Raises:
            UserError: The classifier does not know this model's noise or range, or has no such
                class.
        """
        if not self.config.noise_conditional:
            raise UserError(
                "this classifier knows clean images only (classifier.noise_conditional)"
            )
        if model.sde != self.sde or model.state_limits != self.pixels.limits:
            raise UserError(
                f"the classifier was trained under {self.sde} of values in {self.pixels.limits}, "
                f"the model under {model.sde} of values in {model.state_limits}"
            )
        if labels.numel() and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise UserError(f"this classifier has the classes 0 to {self.num_classes - 1}")
        wanted = labels.to(self.device)
        return ClassifierGuidance(
            self.sde, lambda x_t, t: self.network.log_prob(wanted, x_t.float(), t.float()), scale
        )


def build_classifier(
    config: ClassifierConfig, score: ScoreModelConfig, spec: DataSpec
) -> ImageClassifier:
    """The classifier of ``config`` for the images of ``spec``, under the noise of ``score``.

    Raises:
        UserError: The images have no classes, or sizes do not fit.
    """
    if not spec.num_classes or spec.num_classes < 2:
        raise UserError(f"kind: classifier needs at least two classes, and {spec.name} has none")
    pixels = Pixels.of(spec, score.data_range, score.dequantise)
    sde, _ = build_sde("score_sde", score)
    channels, *sides = pixels.shape
    size = resolution(sides)
    num_classes = spec.num_classes
    options = asdict(config)
    options.pop("label_smoothing")
    try:
        network = build_within_memory(
            lambda: Classifier(channels, size, num_classes, **options), "classifier"
        )
    except ValueError as error:
        raise UserError(f"classifier: {error}") from error
    return ImageClassifier(network, sde, pixels, score, config)


def classifier_of(description: dict[str, Any], spec: DataSpec) -> ImageClassifier:
    """The classifier of a run's description.

    Raises:
        TypeError, KeyError, ValueError: It does not fit.
    """
    config = section(ClassifierConfig, description["classifier"])
    return build_classifier(config, section(ScoreModelConfig, description["score"]), spec)
