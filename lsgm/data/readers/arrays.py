"""Pictures in arrays: NPY, NPZ (MedMNIST's layout and others) and HDF5."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsgm.data.readers.base import (
    ALL,
    Label,
    Pictures,
    Source,
    fingerprint,
    optional_library,
    split_of,
)
from lsgm.errors import UserError, one_line

__all__ = ["ArrayPictures", "HDF5Pictures", "open_hdf5", "open_npy", "open_npz"]

_DAMAGE = (
    zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError, NotImplementedError,
    MemoryError,
)  # fmt: skip
MEMORY_LIMIT = 1 << 33
"""Bytes of a compressed array, which can only be read whole."""


class ArrayPictures(Pictures):
    """Rows ``(H, W)`` or ``(H, W, C)`` of an array of uint8, memory-mapped where it can be."""

    def __init__(
        self, path: Path, array: np.ndarray | None, count: int, labels: list[Label] | None
    ) -> None:
        self.path, self.array, self.labels = path, array, labels
        self.in_memory = array is not None
        self.names = [f"{i:08d}" for i in range(count)]

    def _open(self) -> np.ndarray:
        return _mapped(self.path) if self.array is None else self.array

    def read(self, index: int) -> np.ndarray:
        return np.asarray(self.handle[index])


def open_npy(path: Path) -> Source:
    """An array of uint8 ``(N, H, W)`` or ``(N, H, W, C)``.

    Raises:
        UserError: It is damaged or another array.
    """
    array = _mapped(path)
    _check_shape(path, "the array", array.shape, array.dtype)
    pictures = ArrayPictures(path, None, len(array), None)
    return Source(path, "npy", {ALL: pictures}, fingerprint([path]))


def open_npz(path: Path) -> Source:
    """Arrays ``train_images``, ``val_images``, ``test_images`` with ``*_labels``, as MedMNIST has
    them, or one array of pictures (``images``, ``data``, ``arr_0``, ...) with ``labels``.

    Raises:
        UserError: The file is damaged, holds objects, or has no array of pictures.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: _header(path, file, name) for name in file.files}
            plan = _plan(path, arrays)
            splits = {}
            for split, (images, labels) in plan.items():
                size = int(np.prod(arrays[images][0], dtype=np.int64))
                if size > MEMORY_LIMIT:
                    raise UserError(f"{path}: {images} has {size} bytes; save it as .npy")
                array = file[images]
                known = None if labels is None else _labels(path, labels, file[labels], len(array))
                splits[split] = ArrayPictures(path, array, len(array), known)
    except UserError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        ValueError,
        EOFError,
        KeyError,
        NotImplementedError,
        MemoryError,
    ) as error:
        raise UserError(f"{path}: not a readable NPZ file ({one_line(error)})") from error
    return Source(path, "npz", splits, fingerprint([path]))


class HDF5Pictures(Pictures):
    """Rows of a dataset of uint8."""

    def __init__(self, path: Path, key: str, count: int, labels: list[Label] | None) -> None:
        self.path, self.key, self.labels = path, key, labels
        self.names = [f"{key}/{i:08d}" for i in range(count)]

    def _open(self) -> Any:
        return optional_library("h5py", "reading HDF5").File(self.path, "r")

    def read(self, index: int) -> np.ndarray:
        try:
            return np.asarray(self.handle[self.key][index])
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path}: {self.names[index]}: {one_line(error)}") from error


def open_hdf5(path: Path) -> Source:
    """Datasets of uint8 by the names that NPZ arrays have.

    Raises:
        UserError: The file is damaged or has no dataset of pictures.
    """
    h5py = optional_library("h5py", "reading HDF5")
    arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.external is None and not item.is_virtual:
            arrays[name] = (item.shape or (), item.dtype)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(note)  # does not follow links to other files
            splits = {}
            for split, (images, labels) in _plan(path, arrays).items():
                count = arrays[images][0][0]
                known = None if labels is None else _labels(path, labels, file[labels][()], count)
                splits[split] = HDF5Pictures(path, images, count, known)
    except UserError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable HDF5 file ({one_line(error)})") from error
    return Source(path, "hdf5", splits, fingerprint([path]))


Arrays = Mapping[str, tuple[tuple[int, ...], Any]]
"""Shape and type of arrays by name."""


def _plan(path: Path, arrays: Arrays) -> dict[str, tuple[str, str | None]]:
    """By split the names of pictures and of labels."""
    pictures = {
        name: shape
        for name, (shape, kind) in arrays.items()
        if kind == np.uint8 and _is_pictures(shape)
    }
    found: dict[str, tuple[str, str | None]] = {}
    for name in pictures:
        word = name.replace("/", "_").split("_")[0]
        split = split_of(word)
        if split is None:
            continue
        if split in found:
            raise UserError(f"{path}: {found[split][0]} and {name} are both the split {split}")
        labels = next(
            (n for n in arrays if n.startswith(word) and n.endswith(("label", "labels"))), None
        )
        found[split] = (name, labels)
    if "train" in found:
        return found
    if len(pictures) != 1:
        there = ", ".join(f"{n} {s} {k}" for n, (s, k) in list(arrays.items())[:8]) or "nothing"
        raise UserError(
            f"{path}: one array of pictures, uint8 (N, H, W) or (N, H, W, C), or train_images and "
            f"others are needed; there is {there}"
        )
    labels = next((n for n in ("labels", "label", "y") if n in arrays), None)
    return {ALL: (next(iter(pictures)), labels)}


def _is_pictures(shape: tuple[int, ...]) -> bool:
    return (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4))) and min(shape) > 0


def _check_shape(path: Path, name: str, shape: tuple[int, ...], kind: Any) -> None:
    if kind != np.uint8 or not _is_pictures(shape):
        raise UserError(
            f"{path}: {name} is {kind} of shape {shape}; uint8 (N, H, W) or (N, H, W, C) is needed"
        )


def _labels(path: Path, name: str, array: np.ndarray, count: int) -> list[Label]:
    flat = array.reshape(-1)
    if array.dtype.kind not in "iu" or len(flat) != count:
        raise UserError(
            f"{path}: {name} is {array.dtype} of shape {array.shape}; {count} whole numbers, one a "
            "picture, are needed"
        )
    found: list[Label] = flat.tolist()
    return found


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable NPY file ({one_line(error)})") from error


def _header(path: Path, file: Any, name: str) -> tuple[tuple[int, ...], Any]:
    """Shape and type of a member of an NPZ file, without its values."""
    with file.zip.open(name if name in file.zip.namelist() else f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise UserError(f"{path}: {name}: NPY format {version} is not read")
        shape, _, kind = read(member)
    return shape, kind
