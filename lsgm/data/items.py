"""Data of one's own as batches: arrays, tensors and any ``torch.utils.data.Dataset``."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.dataloader import default_collate

from lsgm.data.spec import ImageDataset

__all__ = ["DataLike", "Items", "as_dataset"]

DataLike: TypeAlias = "Tensor | np.ndarray[Any, Any] | Dataset[Any]"


class Items(ImageDataset):
    """Values of any shape, gathered by index.

    Args:
        data: a tensor or array ``(N, *shape)``, or a dataset with a length whose items are ``x`` or
            tuples that begin with ``x``, tensors or arrays ``(*shape)``. Whole numbers of 8 bits
            are divided by 255; floating-point numbers become float32.

    Raises:
        ValueError: there are no items, or they hold other numbers.
    """

    def __init__(self, data: DataLike) -> None:
        if isinstance(data, np.ndarray):
            data = torch.from_numpy(np.ascontiguousarray(data))
        if not hasattr(data, "__len__"):
            raise ValueError("data: a dataset needs a length; an iterable one cannot be shuffled")
        self.data = data
        # a dataset may read files; a tensor is there already
        self.gather_ahead = not isinstance(data, Tensor)
        if len(self) == 0:
            raise ValueError("data: there are no items")
        self.item_shape = tuple(self.batch(torch.zeros(1, dtype=torch.int64)).shape[1:])

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def batch(self, index: Tensor) -> Tensor:
        """The items at ``index (B,)``: ``(B, *shape)`` float32."""
        if isinstance(self.data, Tensor):
            x = self.data[index]
        else:
            x = default_collate([self._first(self.data[i]) for i in index.tolist()])
        if x.dtype == torch.uint8:
            return x.float() / 255.0
        if not x.is_floating_point():
            raise ValueError(f"data: {x.dtype} is neither floating point nor 8 bits")
        return x.float()

    @staticmethod
    def _first(item: Any) -> Any:
        return item[0] if isinstance(item, (tuple, list)) else item


def as_dataset(data: DataLike) -> ImageDataset:
    """``data`` as a dataset that batches are gathered from; one of the library's stays as it is."""
    return data if isinstance(data, ImageDataset) else Items(data)
