"""From images in [0, 1] to the values that a diffusion of the images themselves sees, and back.

Unlike :mod:`lsgm.data.preprocess`, which serves the VAE, nothing is binarised, and the padding is
cut off: every value that is diffused is a pixel that the likelihood counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from lsgm.data.preprocess import random_affine, random_flip
from lsgm.data.spec import DataSpec
from vae.random import Rng, rand

__all__ = ["DEQUANTISATION", "Pixels"]

DEQUANTISATION = "uniform: v = k + u, u ~ U[0, 1), of k = 255 x in 0..255"


@dataclass(frozen=True)
class Pixels:
    """The map between 8-bit images ``x = k / 255`` and the diffusion's values ``y``.

    With dequantisation ``y`` is an affine function of ``v = k + u``, ``u ~ U[0, 1)``: ``v / 256``
    in [0, 1], or ``v / 128 - 1`` in [-1, 1] (arXiv 1511.01844 section 3.1). Without it ``y`` is
    ``x``, or ``2 x - 1``.

    Attributes:
        spec: What ``y`` is: not binary and without padding.
        symmetric: Values in [-1, 1] rather than [0, 1].
        dequantise: Whether noise below one grey level is added.
    """

    spec: DataSpec
    symmetric: bool
    dequantise: bool

    @classmethod
    def of(cls, spec: DataSpec, data_range: str, dequantise: bool) -> Pixels:
        """For a dataset, whose padding is cut off and whose grey values stay grey."""
        return cls(replace(spec, padding=0, binary=False), data_range == "symmetric", dequantise)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        return self.spec.shape

    @property
    def limits(self) -> tuple[float, float]:
        """Least and largest value of ``y``."""
        return (-1.0 if self.symmetric else 0.0), 1.0

    @property
    def log_det_v(self) -> float:
        """``ln |dy / dv|`` of an image in nats: ``ln p_v(v) = ln p_y(y) + log_det_v``."""
        return self.spec.num_dims * math.log((2 if self.symmetric else 1) / 256)

    def augment(self, images: Tensor, rng: Rng = None) -> Tensor:
        """Cut off the padding and apply the dataset's augmentation: ``(B, C, H, W)`` in [0, 1]."""
        images = self.spec.unpad(images)
        if self.spec.affine:
            images = random_affine(images, 0, rng, self.spec.affine_padding)
        return random_flip(images, rng) if self.spec.flip else images

    def to_network(self, images: Tensor, rng: Rng = None, *, noise: bool = False) -> Tensor:
        """Images ``(B, C, R, R)`` in [0, 1], padded or not, to ``y (B, C, H, W)``.

        ``noise``: draw ``u`` from ``rng``; otherwise ``u = 1/2``, its mean.
        """
        x = self.spec.unpad(images)
        if self.dequantise:
            u = rand(x.shape, rng, device=x.device, dtype=x.dtype) if noise else 0.5
            x = (255.0 * x + u) / 256.0
        return 2.0 * x - 1.0 if self.symmetric else x

    def to_images(self, y: Tensor) -> Tensor:
        """The inverse at ``u = 1/2``: ``y (B, C, H, W)`` to images, in [0, 1] up to the model's
        own error.
        """
        x = (y + 1.0) / 2.0 if self.symmetric else y
        return (256.0 * x - 0.5) / 255.0 if self.dequantise else x
