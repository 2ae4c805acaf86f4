"""Where samples go: a grid as PNG, one PNG an image in a folder, or the arrays of an NPZ.

Every process of a job adds the batches that it has drawn; the main one finishes the file, from
the blocks of all in the order of the images. Memory holds a batch at a time, and the images of a
grid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from lsgm.errors import UserError
from lsgm.models.results import Batch
from lsgm.system.files import atomic_write, check_output
from lsgm.system.npz import Block, Shard, open_shard, read_block, write_npz
from lsgm.system.pictures import image_grid, save_grid

__all__ = ["Output", "check_samples", "open_output"]


class Output(Protocol):
    """Something that takes batches of samples."""

    def add(self, batch: Batch) -> Block | None:
        """Keep a batch; where it lies, for :meth:`finish`."""

    def finish(self, blocks: Sequence[Block]) -> None:
        """Write, on one process, the file of all blocks, given in the order of the images."""


def check_samples(out: Path, indices: Sequence[int]) -> None:
    """Make sure that samples with these indices can be written to ``out``.

    Raises:
        UserError: They cannot, or pictures of that name are there.
    """
    check_output(out if out.suffix else _picture(out, 0), "--out")
    if not out.suffix:
        for path in (_picture(out, k) for k in indices):
            if path.exists():
                raise UserError(f"--out: {path} exists already; choose another folder")


@contextlib.contextmanager
def open_output(out: Path, dtype: str = "float32", latents: bool = False) -> Iterator[Output]:
    """The output that the ending of ``out`` means: ``.npz``, ``.png``, or a folder. If the block
    ends with an error, nothing of it stays.

    Args:
        out: File or folder.
        dtype: Of images in an NPZ: float32 or float16 in [0, 1], or uint8.
        latents: Write the latents to the NPZ as well.
    """
    if not out.suffix:
        folder = _Folder(out)
        try:
            yield folder
        except BaseException:
            folder.remove()
            raise
        return
    with open_shard(out) as shard:
        yield _Grid(out, shard) if out.suffix == ".png" else _Npz(out, shard, dtype, latents)


class _Folder:
    """One PNG an image, named by its index, pixel for pixel."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._written: list[int] = []

    def add(self, batch: Batch) -> None:
        for index, image in zip(batch.index, batch.images, strict=True):
            self._written.append(index)
            _save_image(image, _picture(self._out, index))

    def finish(self, blocks: Sequence[Block]) -> None:
        pass

    def remove(self) -> None:
        for index in self._written:
            _picture(self._out, index).unlink(missing_ok=True)


class _Grid:
    """A grid of the images, or a single one as it is."""

    def __init__(self, out: Path, shard: Shard) -> None:
        self._out = out
        self._shard = shard

    def add(self, batch: Batch) -> Block:
        return self._shard.append(batch.images.float().numpy())

    def finish(self, blocks: Sequence[Block]) -> None:
        images = torch.cat([torch.from_numpy(read_block(block)[0]) for block in blocks])
        if len(images) == 1:
            _save_image(images[0], self._out)
        else:
            save_grid(image_grid(images), self._out)


class _Npz:
    """The array ``images``, and ``latents_0``, ... if asked for."""

    def __init__(self, out: Path, shard: Shard, dtype: str, latents: bool) -> None:
        self._out = out
        self._shard = shard
        self._dtype = dtype
        self._latents = latents

    def add(self, batch: Batch) -> Block:
        images = batch.images
        uint8 = self._dtype == "uint8"
        images = _to_bytes(images) if uint8 else images.to(getattr(torch, self._dtype))
        latents = batch.latents if self._latents else ()
        return self._shard.append(*(values.numpy() for values in (images, *latents)))

    def finish(self, blocks: Sequence[Block]) -> None:
        names = [f"latents_{i}" for i in range(len(blocks[0].arrays) - 1)]
        with atomic_write(self._out) as file:
            write_npz(file, ["images", *names], blocks)


def _picture(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _save_image(image: Tensor, path: Path) -> None:
    """Write an image ``(C, H, W)`` in [0, 1] as PNG, pixel for pixel."""
    with atomic_write(path) as file:
        pixels = _to_bytes(image).movedim(0, -1).squeeze(-1).numpy()
        Image.fromarray(pixels).save(file, format="png")


def _to_bytes(images: Tensor) -> Tensor:
    """Grey levels, uint8, of images in [0, 1]."""
    return images.mul(255).round().to(torch.uint8)
