"""Packed data: pictures of one size as memory-mapped arrays, with a JSON index.

A packed folder has ``index.json`` and, for each split, ``SPLIT.npy``: uint8 ``(N, H, W, C)``. A
training reads it without decoding anything; processes share its pages.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsgm.config.training import DataConfig
from lsgm.data.spec import Datasets, DataSpec, ImageDataset
from lsgm.errors import UserError, one_line
from lsgm.system.files import atomic_write_text, json_text

__all__ = [
    "INDEX",
    "PackIndex",
    "crop_note",
    "PackedDataset",
    "PackedSplit",
    "is_packed",
    "load_packed",
    "pictures_spec",
    "read_index",
    "write_index",
]

INDEX = "index.json"
FORMAT, VERSION = "lsgm-packed", 1


@dataclass(frozen=True)
class PackedSplit:
    """One split.

    Attributes:
        names: Of the pictures, in order.
        sizes: Their height and width before cropping and resizing.
        labels: Number of their classes, or None.
    """

    names: Sequence[str]
    sizes: Sequence[Sequence[int]]
    labels: Sequence[int] | None = None


@dataclass(frozen=True)
class PackIndex:
    """What a packed folder holds.

    Attributes:
        image_size: Height in pixels.
        image_width: Width in pixels.
        channels: 1 or 3.
        splits: By name: train, and test or validation or both.
        classes: Names of the classes by number, or None.
        made: How: source, its form and fingerprint, crop, resizing, how the splits were made.
        broken: Pictures of the source that could not be read, ``[split, name, reason]``.
        ignored: Number of files that were passed over, by reason.
    """

    image_size: int
    image_width: int
    channels: int
    splits: Mapping[str, PackedSplit]
    classes: Sequence[str] | None
    made: Mapping[str, Any]
    broken: Sequence[Sequence[str]] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)

    def shape(self, split: str) -> tuple[int, int, int, int]:
        """``(N, H, W, C)`` of a split's array."""
        return len(self.splits[split].names), self.image_size, self.image_width, self.channels

    @property
    def cropped(self) -> float:
        """Share of the pictures' area, on average, that was cut away to make them of one shape."""
        lost, count = 0.0, 0
        for split in self.splits.values():
            for height, width in split.sizes:
                scale = max(self.image_size / height, self.image_width / width)
                lost += 1 - self.image_size * self.image_width / (scale**2 * height * width)
                count += 1
        return lost / count

    @property
    def held_out(self) -> str:
        """The split that evaluation uses: test, or else validation."""
        return "test" if "test" in self.splits else "validation"


CROP_WORTH_SAYING = 0.1


def crop_note(index: PackIndex) -> str | None:
    """A line for the user where much of the pictures was cut away."""
    if index.cropped < CROP_WORTH_SAYING:
        return None
    return (
        f"note: to fit {index.image_size} x {index.image_width}, {index.cropped:.0%} of the "
        "pictures' area is cut away on average; image_width keeps pictures that are not square"
    )


def write_index(folder: Path, index: PackIndex) -> None:
    """Write the index, which makes the folder a packed one."""
    # vars, not asdict, which copies every name and size
    values = {**vars(index), "splits": {name: vars(s) for name, s in index.splits.items()}}
    text = json_text({"format": FORMAT, "version": VERSION, **values})  # no indent: much faster
    atomic_write_text(folder / INDEX, text + "\n")


def is_packed(folder: Path) -> bool:
    """Whether a folder is a finished packed one, or claims to be."""
    return (folder / INDEX).is_file() and (folder / "train.npy").exists()


def read_index(folder: Path) -> PackIndex:
    """The index of a packed folder, with its arrays checked against it.

    Raises:
        UserError: The index or an array is damaged or missing, or of a later version.
    """
    path = folder / INDEX
    try:
        values = json.loads(path.read_bytes())
        if values.pop("format") != FORMAT:
            raise ValueError("it is not the index of packed data")
        if values.pop("version") != VERSION:
            raise ValueError("it was written by a later version of lsgm")
        values["splits"] = {name: PackedSplit(**s) for name, s in values["splits"].items()}
        index = PackIndex(**values)
        if "train" not in index.splits or index.held_out not in index.splits:
            raise ValueError("it has no train and test split")
        _check(index)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not a readable index of packed data ({one_line(error)}); "
            "run lsgm prepare again"
        ) from error
    for split in index.splits:
        _array(folder, index, split)
    return index


def _check(index: PackIndex) -> None:
    sides = (index.image_size, index.image_width)
    if index.channels not in (1, 3) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError("image_size or channels are wrong")
    for name, split in index.splits.items():
        if not split.names or len(split.sizes) != len(split.names):
            raise ValueError(f"{name}: names and sizes do not fit together")
        labels = split.labels
        if (labels is None) != (index.classes is None):
            raise ValueError(f"{name}: labels and classes do not fit together")
        if labels is not None and (
            len(labels) != len(split.names)
            or not all(type(n) is int and 0 <= n < len(index.classes or ()) for n in labels)
        ):
            raise ValueError(f"{name}: labels are wrong")


def _array(folder: Path, index: PackIndex, split: str) -> np.ndarray:
    path = folder / f"{split}.npy"
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); run lsgm prepare again") from error
    if array.shape != index.shape(split) or array.dtype != np.uint8:
        raise UserError(
            f"{path}: {array.dtype} of shape {array.shape}, where {INDEX} says uint8 of "
            f"{index.shape(split)}; run lsgm prepare again"
        )
    return array


class PackedDataset(ImageDataset):
    """A split of a packed folder, memory-mapped.

    Args:
        array: uint8 ``(N, H, W, C)``.
        labels: ``(N,)`` int64, or None.
    """

    gather_ahead = True

    def __init__(self, array: np.ndarray, labels: Tensor | None = None) -> None:
        self.array = array
        self.labels = labels

    def __len__(self) -> int:
        return len(self.array)

    def batch(self, index: Tensor) -> Tensor:
        rows = index.numpy()
        _read_ahead(self.array, rows)
        images = torch.from_numpy(self.array[rows])
        return images.permute(0, 3, 1, 2).contiguous().float().div_(255.0)


def _read_ahead(array: np.ndarray, rows: np.ndarray) -> None:
    """Ask the system for all of ``rows`` at once, where they are not in memory yet: touched one
    after the other they come page by page.
    """
    file: Any = array.base
    if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
        for start, size in _page_ranges(array, rows):
            file.madvise(mmap.MADV_WILLNEED, start, size)


def _page_ranges(array: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where each of ``rows`` lies in the map of a :class:`numpy.memmap`, in order: the start of its
    first page, and the bytes from there to the row's end.
    """
    assert isinstance(array, np.memmap)
    first, size = array.offset % mmap.ALLOCATIONGRANULARITY, array.strides[0]
    for row in np.sort(rows).tolist():
        start = first + row * size
        page = start - start % mmap.PAGESIZE
        yield page, start + size - page


def pictures_spec(
    cfg: DataConfig, channels: int, size: tuple[int, int], num_classes: int | None
) -> DataSpec:
    """Facts about pictures of one's own, of height and width ``size``."""
    height, width = size
    return DataSpec(
        name=cfg.name,
        channels=channels,
        image_size=height,
        image_width=None if width == height else width,
        padding=0,
        binary=False,
        num_classes=num_classes,
        flip=True if cfg.flip is None else cfg.flip,
        affine=cfg.augment == "affine",
        affine_padding="reflection",
    )


def load_packed(root: Path, cfg: DataConfig, ignored: Mapping[str, int] | None = None) -> Datasets:
    """Train and test sets of a packed folder.

    Args:
        root: The folder.
        cfg: Its ``image_size`` and ``channels``, where given, have to be those of the pack.
        ignored: Counts to report in place of the index's.

    Raises:
        UserError: The folder is damaged, or has other pictures than ``cfg`` asks for.
    """
    index = read_index(root)
    height, width = index.image_size, index.image_width
    asked_width = width if cfg.image_size is None else cfg.image_width or cfg.image_size
    for key, found in (("image_size", height), ("channels", index.channels)):
        asked = getattr(cfg, key)
        if asked not in (None, found):
            raise UserError(
                f"data.{key}: {root} is packed with {found}, not {asked}; leave it out, or run "
                "lsgm prepare again"
            )
    if asked_width != width:
        raise UserError(
            f"data.image_width: {root} is packed with {height} x {width}, not {asked_width} wide; "
            "leave both out, or run lsgm prepare again"
        )
    classes = None if index.classes is None else len(index.classes)
    spec = pictures_spec(cfg, index.channels, (height, width), classes)
    sets = []
    for split in ("train", index.held_out):
        labels = index.splits[split].labels
        known = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        sets.append(PackedDataset(_array(root, index, split), known))
    return Datasets(sets[0], sets[1], spec, dict(index.ignored if ignored is None else ignored))
