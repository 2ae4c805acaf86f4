"""NPZ files of arrays that grow batch by batch, in this process or in several: blocks of rows go to
temporary files, which are put together at the end. Memory holds one batch at a time.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from lsgm.system.files import temporary_file

__all__ = ["Block", "Shard", "open_shard", "read_block", "write_npz"]

COPIED = 1 << 20
"""Bytes that are copied at a time."""


@dataclass(frozen=True)
class Rows:
    """Rows of an array in a file: ``size`` bytes at ``offset``, of ``shape (n, *row)``."""

    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Block:
    """Where the rows of one batch lie: those of each array, in the file of a :class:`Shard`."""

    path: Path
    arrays: tuple[Rows, ...]


class Shard:
    """A temporary file of blocks (:func:`open_shard`)."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path

    def append(self, *arrays: np.ndarray) -> Block:
        """Add rows ``(n, *row)`` of each array, which any process can read as soon as this
        returns.
        """
        rows = []
        for values in arrays:
            offset = self._file.tell()
            size = self._file.write(np.ascontiguousarray(values).tobytes())
            rows.append(Rows(offset, size, values.shape, values.dtype.str))
        self._file.flush()
        return Block(self._path, tuple(rows))


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Shard]:
    """A shard beside ``path``, the file that its blocks are meant for; it is removed at the end of
    the block.
    """
    with temporary_file(path) as file:
        yield Shard(file, Path(file.name))


def read_block(block: Block) -> list[np.ndarray]:
    """The arrays of a block."""
    found = []
    with open(block.path, "rb") as file:
        for rows in block.arrays:
            file.seek(rows.offset)
            content = bytearray(file.read(rows.size))  # which can be written to
            found.append(np.frombuffer(content, rows.dtype).reshape(rows.shape))
    return found


def write_npz(file: IO[bytes], names: Sequence[str], blocks: Sequence[Block]) -> None:
    """Write the rows of all ``blocks``, in this order, to ``file`` as a compressed NPZ.

    Args:
        file: Binary file, open for writing.
        names: Names of the arrays of a block.
        blocks: At least one.

    Raises:
        ValueError: Blocks whose rows differ in shape or type.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for place, name in enumerate(names):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write_array(member, [(block.path, block.arrays[place]) for block in blocks])


def _write_array(target: IO[bytes], parts: Sequence[tuple[Path, Rows]]) -> None:
    """Write rows as .npy."""
    first = parts[0][1]
    for _, rows in parts:
        if (rows.shape[1:], rows.dtype) != (first.shape[1:], first.dtype):
            raise ValueError(
                f"rows are {first.dtype} {first.shape[1:]}, got {rows.dtype} {rows.shape[1:]}"
            )
    header = {
        "descr": first.dtype,
        "fortran_order": False,
        "shape": (sum(rows.shape[0] for _, rows in parts), *first.shape[1:]),
    }
    np.lib.format.write_array_header_1_0(target, header)
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(open(path, "rb")) for path in {p for p, _ in parts}}
        for path, rows in parts:
            files[path].seek(rows.offset)
            for start in range(0, rows.size, COPIED):
                target.write(files[path].read(min(COPIED, rows.size - start)))
