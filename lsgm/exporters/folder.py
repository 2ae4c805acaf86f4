"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from lsgm.errors import UserError
from lsgm.system.files import atomic_write, atomic_write_json
from lsgm.system.safetensors import write_safetensors

__all__ = ["new_folder", "write_part"]


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write into, which is at ``out`` when the block ends without an error.

    Raises:
        UserError: There is something at ``out`` already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and not empty; give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        folder.chmod(0o755)
        yield folder
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_part(
    folder: Path,
    config: tuple[str, Mapping[str, object]],
    weights: tuple[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a part of a model, by file name its configuration and its weights."""
    folder.mkdir(exist_ok=True)
    atomic_write_json(folder / config[0], dict(config[1]))
    if weights is not None:
        with atomic_write(folder / weights[0]) as file:
            write_safetensors(file, weights[1])
