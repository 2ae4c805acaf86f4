"""A small convolutional classifier of a dataset's own labels, for features of images such as
characters and digits, on which networks trained on photographs say little.

It is trained on the training split alone, repeats for a seed, and is kept on disk under the hash of
what it was made from.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lsgm.data import Datasets, DataSpec, ImageDataset, binarise, epoch_order
from lsgm.errors import UserError
from lsgm.system.files import atomic_write, json_text

__all__ = [
    "CharacterClassifier",
    "ClassifierSettings",
    "TrainedClassifier",
    "data_hash",
    "tensors_hash",
    "train_classifier",
    "unpadded",
]

VERSION = 1  # of the architecture and its training: a change makes older files unused


@dataclass(frozen=True)
class ClassifierSettings:
    """How the classifier is built and trained; under a minute on one CPU core."""

    width: int = 24
    """Channels after the first convolution; doubled by each of the next two."""
    features: int = 64
    """Dimension of the penultimate layer."""
    steps: int = 2000
    """Training steps."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; it rises over the first tenth and falls to 0 as a cosine."""
    seed: int = 0
    """Seed of initial weights, order and binarisation."""


class CharacterClassifier(nn.Module):
    """Three strided convolutions with group norm, a mean over positions, a penultimate layer."""

    def __init__(self, channels: int, classes: int, width: int, features: int) -> None:
        super().__init__()
        sizes = (channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.penultimate = nn.Linear(sizes[-1], features)
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, D)`` and logits ``(B, K)`` of images ``(B, C, H, W)`` in [0, 1]."""
        images = images.to(self.head.weight.device)
        hidden = self.body(2 * images.float() - 1).mean((2, 3))
        features = nn.functional.silu(self.penultimate(hidden))
        return features, self.head(features)


@dataclass(frozen=True)
class TrainedClassifier:
    """``network`` in eval mode, ``labels`` in words, ``sha256`` of the weights, and the share of
    test images (grey, as they are) that it gets right.
    """

    network: CharacterClassifier
    labels: str
    sha256: str
    test_accuracy: float


def unpadded(dataset: ImageDataset, spec: DataSpec, index: Tensor) -> Tensor:
    """Images ``(b, C, H, W)`` in [0, 1] at ``index``, without the network's padding."""
    return spec.unpad(dataset.batch(index))


def data_hash(dataset: ImageDataset, limit: int | None = None) -> str:
    """sha256 of the first ``limit`` images as 8-bit values, in order, and of their labels."""
    digest = hashlib.sha256()
    num = len(dataset) if limit is None else min(limit, len(dataset))
    for index in torch.arange(num).split(1000):
        levels = (dataset.batch(index) * 255).round().to(torch.uint8)
        digest.update(struct.pack(f"<{levels.ndim}q", *levels.shape))
        digest.update(levels.contiguous().numpy().tobytes())
    if dataset.labels is not None:
        digest.update(dataset.labels[:num].to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensors_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 of named tensors, independent of the device and the file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def train_classifier(
    datasets: Datasets,
    settings: ClassifierSettings,
    cache: Path,
    device: torch.device | str = "cpu",
) -> TrainedClassifier:
    """The classifier of the labels of ``datasets.train``, from ``cache`` if it is there.

    Raises:
        UserError: The training images have no labels.
    """
    labels = datasets.train.labels
    if labels is None or int(labels.max()) < 1:
        raise UserError(
            f"--quality.extractor: {datasets.spec.name} has no labels to train a classifier on; "
            "use efficientnet_lite0 or inception"
        )
    made_from = {
        "version": VERSION,
        "settings": asdict(settings),
        "binary": datasets.spec.binary,
        "padding": datasets.spec.padding,
        "train": data_hash(datasets.train),
        "test": data_hash(datasets.test),
    }
    key = hashlib.sha256(json_text(made_from, sort_keys=True).encode()).hexdigest()
    path = cache / f"classifier-{datasets.spec.name}-{key[:16]}.safetensors"
    network = _build(datasets, settings)
    accuracy = _read(path, network)
    if accuracy is None:
        network.to(device)
        _fit(network, datasets, settings)
        accuracy = _accuracy(network, datasets)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
            notes = {"made_from": json_text(made_from), "test_accuracy": repr(accuracy)}
            file.write(to_safetensors(state, metadata=notes))
    network.to(device).eval().requires_grad_(False)
    words = {"omniglot": "alphabets", "mnist": "digits", "digits": "digits"}
    return TrainedClassifier(
        network,
        words.get(datasets.spec.name, "labels"),
        tensors_hash(network.state_dict()),
        accuracy,
    )


def _build(datasets: Datasets, settings: ClassifierSettings) -> CharacterClassifier:
    labels = datasets.train.labels
    assert labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return CharacterClassifier(
            datasets.spec.channels, int(labels.max()) + 1, settings.width, settings.features
        )


def _read(path: Path, network: CharacterClassifier) -> float | None:
    """Load ``path`` into ``network`` and return the accuracy it notes; None if it is no use."""
    try:
        with safe_open(path, "pt") as file:
            network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
            return float((file.metadata() or {})["test_accuracy"])
    except (OSError, safetensors.SafetensorError, RuntimeError, KeyError, ValueError):
        return None


def _fit(network: CharacterClassifier, datasets: Datasets, settings: ClassifierSettings) -> None:
    train, spec = datasets.train, datasets.spec
    assert train.labels is not None
    device = network.head.weight.device
    rng = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=settings.steps, pct_start=0.1
    )
    batch_size = min(settings.batch_size, len(train))
    per_epoch = len(train) // batch_size
    order = torch.empty(0, dtype=torch.int64)
    network.train()
    for step in range(settings.steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = epoch_order(len(train), settings.seed, epoch)
        index = order[place * batch_size : (place + 1) * batch_size]
        images = unpadded(train, spec, index)
        if spec.binary:  # samples come as means or as draws: it has to know both
            half = len(images) // 2
            images = torch.cat([binarise(images[:half], rng), images[half:]])
        loss = cross_entropy(network(images.to(device))[1], train.labels[index].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _accuracy(network: CharacterClassifier, datasets: Datasets) -> float:
    test, labels = datasets.test, datasets.test.labels
    if labels is None or not len(test):
        return float("nan")
    network.eval()
    right = sum(
        int((network(unpadded(test, datasets.spec, i))[1].argmax(1).cpu() == labels[i]).sum())
        for i in torch.arange(len(test)).split(1000)
    )
    return right / len(test)
