"""NPZ files written as their arrays grow, so that memory holds one batch at a time."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

__all__ = [
    "ArrayStream",
    "write_npz",
]


class ArrayStream:
    """One array that grows along its first axis, kept in a temporary file until it is complete."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.rows = 0
        self.row_shape: tuple[int, ...] | None = None
        self.dtype: np.dtype | None = None

    def append(self, values: np.ndarray) -> None:
        """Add rows ``(n, *shape)``.

        Raises:
            ValueError: Their shape or dtype is not that of the rows before.
        """
        if self.row_shape is None:
            self.row_shape, self.dtype = values.shape[1:], values.dtype
        if (values.shape[1:], values.dtype) != (self.row_shape, self.dtype):
            raise ValueError(
                f"rows are {self.dtype} {self.row_shape}, got {values.dtype} {values.shape[1:]}"
            )
        self.file.write(np.ascontiguousarray(values).tobytes())
        self.rows += len(values)

    def write_to(self, target: IO[bytes]) -> None:
        """Write the array as .npy."""
        if self.row_shape is None or self.dtype is None:
            raise ValueError("an array without rows has no shape")
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self.row_shape),
        }
        np.lib.format.write_array_header_1_0(target, header)
        self.file.seek(0)
        shutil.copyfileobj(self.file, target, 1 << 20)


@contextlib.contextmanager
def write_npz(
    file: IO[bytes], names: Sequence[str], scratch: Path
) -> Iterator[dict[str, ArrayStream]]:
    """Streams by name, written to ``file`` as a compressed NPZ when the block ends without error.

    Args:
        file: Binary file, open for writing.
        names: Names of the arrays.
        scratch: Folder for the temporary files, which leave nothing behind.
    """
    with contextlib.ExitStack() as stack:
        streams = {
            name: ArrayStream(stack.enter_context(tempfile.TemporaryFile(dir=scratch)))
            for name in names
        }
        yield streams
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for name, stream in streams.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    stream.write_to(member)
