"""Which form of data a path holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lsgm.data.discovery import find_images
from lsgm.data.readers.archives import open_tars, open_zip
from lsgm.data.readers.arrays import open_hdf5, open_npy, open_npz
from lsgm.data.readers.base import Source
from lsgm.data.readers.folders import open_folder
from lsgm.data.readers.lmdbs import is_lmdb, open_lmdb
from lsgm.data.readers.tables import open_parquet
from lsgm.data.readers.tfrecords import open_tfrecords, record_files
from lsgm.errors import UserError

__all__ = ["FORMS", "open_source"]


def _shards(path: Path, *endings: str) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.name.lower().endswith(endings) and p.is_file())


FORMS: dict[str, Callable[[Path], Source]] = {
    "folder": open_folder,
    "zip": open_zip,
    "tar": lambda path: open_tars(_shards(path, ".tar"), path),
    "lmdb": open_lmdb,
    "tfrecord": open_tfrecords,
    "parquet": lambda path: open_parquet(_shards(path, ".parquet"), path),
    "hdf5": open_hdf5,
    "npz": open_npz,
    "npy": open_npy,
}
"""Readers by the form that they read; a new one is a function and its line here."""

_MAGIC = (
    (0, b"PK\x03\x04", "zip"),
    (0, b"PK\x05\x06", "zip"),
    (257, b"ustar", "tar"),
    (0, b"PAR1", "parquet"),
    (0, b"\x89HDF\r\n\x1a\n", "hdf5"),
    (0, b"\x93NUMPY", "npy"),
    (16, b"\xde\xc0\xef\xbe", "lmdb"),
)


def open_source(path: str | Path, form: str | None = None) -> Source:
    """Open what a user has: a file, or a folder of pictures, of shards or of environments.

    Args:
        path: Where it is.
        form: A name of :data:`FORMS`; None: told from the contents.

    Raises:
        UserError: There is nothing, it is damaged, or it is in no known form.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{root}: there is no such file or folder")
    if form is not None and form not in FORMS:
        raise UserError(f"--form: there is no {form}; there are {', '.join(FORMS)}")
    if root.is_dir() and form in ("zip", "hdf5", "npz", "npy"):
        raise UserError(f"{root}: is a folder, and {form} is one file")
    if root.is_file() and form == "folder":
        raise UserError(f"{root}: is a file and no folder")
    chosen = form or (_form_of_folder(root) if root.is_dir() else _form_of_file(root))
    try:
        source = FORMS[chosen](root)
    except OSError as error:
        raise UserError(f"{root}: cannot be read ({error.strerror or error})") from error
    if not source.splits:
        raise UserError(f"{root}: there is no {chosen} file in it")
    return source


def _form_of_file(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    for offset, magic, form in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return "npz" if form == "zip" and path.suffix.lower() == ".npz" else form
    if ".tfrecord" in path.name:
        return "tfrecord"
    raise UserError(
        f"{path}: is in none of the forms {', '.join(FORMS)}" if head else f"{path}: is empty"
    )


def _form_of_folder(path: Path) -> str:
    """Pictures make a folder a folder of pictures; shards count where there is none."""
    if is_lmdb(path) or any(is_lmdb(p) for p in path.iterdir()):
        return "lmdb"
    if _shards(path, ".parquet"):
        return "parquet"
    if record_files(path):
        return "tfrecord"
    if _shards(path, ".tar"):
        return "tar"
    if not find_images(path).files:
        raise UserError(f"{path}: holds no picture, and nothing in the forms {', '.join(FORMS)}")
    return "folder"
