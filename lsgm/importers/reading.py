"""Reading of PyTorch files that somebody else wrote.

PyTorch's restricted unpickler builds tensors and plain values and nothing else, so that nothing in
a file is executed; tensors stay in the file until they are looked at where its format allows that
(zip archives, of torch 1.6 or later).
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsgm.errors import UserError
from lsgm.system.integrity import check_records

__all__ = ["first_line", "read_checkpoint", "read_json"]


def read_checkpoint(path: str | Path, *, unchecked: bool = False) -> Any:
    """The contents of a PyTorch file, on the CPU, memory mapped; every record is compared with its
    checksum first.

    Files of torch before 1.6 are no archives and carry no checksums: they are read only if
    ``unchecked``, and not memory mapped.

    Raises:
        UserError: If the file is not there, is damaged, or holds anything but data.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path}: a folder, where a file is needed")
    if not path.is_file():
        raise UserError(f"checkpoint {path}: there is no such file")
    archive = not unchecked or zipfile.is_zipfile(path)
    try:
        if archive:
            check_records(path)
        with torch.serialization.safe_globals(_harmless_types()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        detail = next(
            (line.strip() for line in reason if "GLOBAL" in line or "global" in line), reason[0]
        )
        raise UserError(
            f"checkpoint {path}: holds something other than tensors and plain values ({detail})"
        ) from error
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        raise UserError(
            f"checkpoint {path}: damaged, or not a file of torch.save ({first_line(error)}); if it "
            "was downloaded, do so again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file that belongs to a folder of weights.

    Raises:
        UserError: It is missing, damaged or no object.
    """
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; the folder needs it beside the weights") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({first_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object")
    return values


def first_line(error: BaseException) -> str:
    """What an exception says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _harmless_types() -> list[Any]:
    """Plain values beyond PyTorch's own list: options, shapes, NumPy scalars."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    return [
        argparse.Namespace,
        torch.Size,
        np.dtype,
        *dtypes,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]
