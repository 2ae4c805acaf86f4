"""The order of images in an epoch, and each process's share of every batch.

Both are functions of (seed, epoch, step) with no hidden state, so a run continues after any step
exactly where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsgm.data.spec import ImageDataset, LabelledImages

__all__ = ["Batches", "epoch_order", "fitting_batch_size", "random_subset"]

SUBSET_SEED = 0
"""Of the images that an evaluation on a part of the data takes: the same in all runs, so that their
numbers compare in pairs."""


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of 0..n-1 in which epoch number `epoch` visits the images; shape (n,),
    int64.
    """
    # Hashing the pair keeps epochs of neighbouring seeds unrelated (seed + epoch would not).
    state = int(
        np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )
    return torch.randperm(n, generator=torch.Generator().manual_seed(state))


def random_subset(n: int, limit: int | None, seed: int = SUBSET_SEED) -> Tensor:
    """Return `limit` of the indices 0..n-1, drawn without replacement and in rising order, or all
    if `limit` is None or not less; int64. A smaller subset of a seed is part of a larger one.
    """
    if limit is None or limit >= n:
        return torch.arange(n)
    return epoch_order(n, seed, 0)[:limit].sort().values


def fitting_batch_size(batch_size: int, num_images: int, parts: int = 1) -> int:
    """Return `batch_size`, or the largest multiple of `parts` that `num_images` can fill if that is
    less; 0 if there is none.
    """
    return batch_size if batch_size <= num_images else num_images - num_images % parts


class Batches:
    """This process's part of every global batch.

    Args:
        dataset: The images.
        batch_size: Images per batch over all processes.
        train: Shuffle by :func:`epoch_order` and drop the last incomplete batch; otherwise keep the
            dataset's order and every image.
        seed: Seed of the order.
        rank: Index of this process.
        world_size: Number of processes. In training it has to divide the batch, and rank r takes
            the r-th part of it. In evaluation parts differ by one image at most, and a rank left
            without any image skips the batch.
        limit: Use so many images only (evaluation on a part): :func:`random_subset`.
        labels: Give each batch as :class:`LabelledImages`, in place of the images alone.

    Raises:
        ValueError: If the batch does not divide over the processes, training has fewer images than
            one batch, or labels are asked for and the dataset has none.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        limit: int | None = None,
        labels: bool = False,
    ) -> None:
        self.dataset = dataset
        self.labels = labels
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._images = random_subset(len(dataset), limit)
        self.num_images = len(self._images)
        if train and batch_size % world_size:
            raise ValueError(
                f"a batch of {batch_size} images does not divide over {world_size} processes"
            )
        if train and batch_size > self.num_images:
            raise ValueError(
                f"a batch of {batch_size} images is more than the {self.num_images} training images"
            )
        if labels and dataset.labels is None:
            raise ValueError("the images have no labels")

    @property
    def steps_per_epoch(self) -> int:
        """Number of global batches in an epoch."""
        full = self.num_images // self.batch_size
        return full if self.train else -(-self.num_images // self.batch_size)

    def index(self, epoch: int, step: int, order: Tensor | None = None) -> Tensor:
        """Return the dataset indices of this process's part of a batch; shape (b,), int64."""
        order = self._order(epoch) if order is None else order
        whole = order[step * self.batch_size : (step + 1) * self.batch_size]
        return whole.tensor_split(self.world_size)[self.rank]

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[int, Any]]:
        """Yield (step in the epoch, images) from step `start` on.

        Images are float32 in [0, 1] with shape (b, C, R, R), with their labels if asked for.
        """
        order = self._order(epoch)
        jobs = (
            (step, self.index(epoch, step, order)) for step in range(start, self.steps_per_epoch)
        )
        jobs = ((step, index) for step, index in jobs if len(index))
        if not self.dataset.gather_ahead:
            for step, index in jobs:
                yield step, self._gather(index)
            return
        with ThreadPoolExecutor(max_workers=1) as pool:
            waiting = None
            for step, index in jobs:
                coming = step, pool.submit(self._gather, index)
                if waiting is not None:
                    yield waiting[0], waiting[1].result()
                waiting = coming
            if waiting is not None:
                yield waiting[0], waiting[1].result()

    def _gather(self, index: Tensor) -> Tensor | LabelledImages:
        images = self.dataset.batch(index)
        if not self.labels:
            return images
        assert self.dataset.labels is not None
        return LabelledImages(images, self.dataset.labels[index])

    def _order(self, epoch: int) -> Tensor:
        if not self.train:
            return self._images
        return self._images[epoch_order(self.num_images, self.seed, epoch)]
