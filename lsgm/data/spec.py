"""What a model has to know about a dataset, and the interface that all datasets share.

Images of every dataset are float32 in [0, 1] with shape (C, R, R), where the network size R is the
image side plus the zero padding around it. Binarisation and the map to [-1, 1] belong to the batch
(:mod:`lsgm.data.preprocess`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lsgm.config.checks import require_non_negative, require_positive

__all__ = ["DataSpec", "Datasets", "ImageDataset", "LabelledImages", "map_batch"]


class LabelledImages(NamedTuple):
    """A batch with classes: ``images (B, C, R, R)`` in [0, 1] and ``labels (B,)``, int64."""

    images: Tensor
    labels: Tensor


def map_batch(
    function: Callable[[Tensor], Tensor], batch: Tensor | LabelledImages
) -> Tensor | LabelledImages:
    """Apply a function to the images of a batch and, where it has them, to its labels."""
    return function(batch) if isinstance(batch, Tensor) else LabelledImages(*map(function, batch))


@dataclass(frozen=True)
class DataSpec:
    """Facts about a dataset that fix the model's input and its likelihood.

    Attributes:
        name: Dataset name.
        channels: 1 (grey) or 3 (colour).
        image_size: Side of the image in pixels, without padding; its height where it is not square.
        padding: Zero pixels added on each side for the network; they are left out of the
            likelihood.
        binary: Whether images are binarised by one Bernoulli draw per pixel, with the grey value as
            probability.
        num_classes: Number of labels, or None where there are none.
        flip: Whether training images are mirrored at random.
        affine: Whether training images are shifted, rotated, scaled and sheared at random.
        affine_padding: What comes in from outside then: "zeros", for ink on an empty ground, or the
            image's own "reflection".
        image_width: Width in pixels of an image that is not square; None: its side.
    """

    name: str
    channels: int
    image_size: int
    padding: int
    binary: bool
    num_classes: int | None = None
    flip: bool = False
    affine: bool = False
    affine_padding: str = "zeros"
    image_width: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "channels image_size num_classes image_width")
        require_non_negative(self, "padding")

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``, without padding."""
        return self.channels, self.image_size, self.image_width or self.image_size

    @property
    def network_shape(self) -> tuple[int, int]:
        """Height and width of the padded image in pixels."""
        _, height, width = self.shape
        return height + 2 * self.padding, width + 2 * self.padding

    @property
    def units(self) -> tuple[str, ...]:
        """Metrics of a bound, the leading one first: bits/dim of 8-bit images, nats of binary ones,
        whose pixels are counted alone.
        """
        return ("nelbo",) if self.binary else ("bits_per_dim", "nelbo")

    @property
    def size_in_words(self) -> str:
        """``C x H x W``."""
        return " x ".join(map(str, self.shape))

    def unpad(self, images: Tensor) -> Tensor:
        """Cut the padding, if there is any, off images ``(..., C, R, R)``: ``(..., C, H, W)``.

        Raises:
            ValueError: They are of another size than those of the dataset, with or without padding.
        """
        channels, height, width = self.shape
        margin = images.shape[-1] - width
        if margin < 0 or margin % 2 or images.shape[-3:-1] != (channels, height + margin):
            raise ValueError(
                f"expected images (B, {channels}, {height}, {width}), with or without "
                f"padding, not {tuple(images.shape)}"
            )
        p = margin // 2
        return images[..., p : p + height, p : p + width]

    @property
    def num_dims(self) -> int:
        """Number of values per image that the likelihood counts (padding excluded), for
        bits/dim.
        """
        return math.prod(self.shape)


class ImageDataset(Dataset[Tensor], ABC):
    """A finite set of images that are gathered by index.

    Attributes:
        labels: Class of each image with shape (N,), int64, or None.
        gather_ahead: Whether a batch is slow enough to gather that it pays to do so in a second
            thread.
    """

    labels: Tensor | None = None
    gather_ahead: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def batch(self, index: Tensor) -> Tensor:
        """Return the images at `index` (B,), int64, as float32 in [0, 1] with shape (B, C, R,
        R).
        """

    def read_all(self) -> None:
        """Read every image once, so that a damaged one shows before the work starts.

        Raises:
            UserError: Names the first damaged file, and how many there are.
        """

    def __getitem__(self, item: int) -> Tensor:
        """Return one image as float32 in [0, 1] with shape (C, R, R)."""
        size = len(self)
        if not -size <= item < size:
            raise IndexError(f"image {item} of {size}")
        return self.batch(torch.tensor([item % size]))[0]


@dataclass(frozen=True)
class Datasets:
    """The two splits of a dataset and their common facts.

    ``ignored``: for data in files of their own, the number of files that were passed over, by
    reason.
    """

    train: ImageDataset
    test: ImageDataset
    spec: DataSpec
    ignored: Mapping[str, int] | None = None

    def summary(self) -> str:
        """What the data are, in one line."""
        spec = self.spec
        line = (
            f"{spec.name} ({spec.size_in_words}): "
            f"{len(self.train)} training, {len(self.test)} test images, "
            f"{spec.num_classes or 'no'} classes"
        )
        if self.ignored is None:
            return line
        reasons = {reason: count for reason, count in self.ignored.items() if count}
        line += f", {sum(reasons.values())} files ignored"
        return line + (
            f" ({', '.join(f'{n} {why}' for why, n in reasons.items())})" * bool(reasons)
        )

    def read_all(self) -> None:
        """Read every image of both splits once; see :meth:`ImageDataset.read_all`."""
        self.train.read_all()
        self.test.read_all()
