"""Images that fit in memory: stored without padding, gathered by one indexing operation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lsgm.data.spec import ImageDataset

__all__ = ["ArrayDataset"]


class ArrayDataset(ImageDataset):
    """Images held as one tensor.

    Args:
        images: Shape (N, C, H, W), unpadded; uint8 in [0, 255] or float32 in [0, 1].
        labels: Shape (N,), int64, at least 0, or None.
        padding: Zero pixels that :meth:`batch` adds on each side.

    Raises:
        ValueError: If shapes or dtypes are not these.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, padding: int = 0) -> None:
        if images.ndim != 4:
            raise ValueError(f"images must have shape (N, C, H, W), not {tuple(images.shape)}")
        if images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"images must be uint8 or float32, not {images.dtype}")
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images but labels of shape {tuple(labels.shape)}")
        if labels is not None and (labels.dtype != torch.int64 or (labels < 0).any()):
            raise ValueError("labels must be int64 and at least 0")
        self.images = images
        self.labels = labels
        self.padding = padding

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> Tensor:
        images = self.images[index]
        if images.dtype == torch.uint8:
            images = images.float() / 255.0
        return pad(images, (self.padding,) * 4) if self.padding else images
