"""Pictures in LMDB environments: those of the NVAE and LSGM world, raw or encoded, and of LSUN."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from lsgm.data.images import MAX_PIXELS, Stored
from lsgm.data.readers.base import (
    ALL,
    Pictures,
    Source,
    fingerprint,
    optional_library,
    split_of,
)
from lsgm.errors import UserError

__all__ = ["LMDBPictures", "is_lmdb", "open_lmdb"]

DATA = "data.mdb"
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")
"""How encoded pictures begin; other values are raw pixels."""


class LMDBPictures(Pictures):
    """Values of an environment: files of pictures, or raw uint8 pixels (side, side, 3)."""

    labels = None

    def __init__(self, path: Path, keys: Sequence[bytes]) -> None:
        self.path, self.keys = path, list(keys)
        self.names = [key.decode("ascii", "backslashreplace") for key in keys]

    def _open(self) -> Any:
        return _environment(self.path)

    def read(self, index: int) -> Stored:
        with self.handle.begin(buffers=True) as transaction:
            found = transaction.get(self.keys[index])
            value = None if found is None else bytes(found)
        where = f"{self.path}: {self.names[index]}"
        if value is None:
            raise UserError(f"{where}: is no longer there")
        if value.startswith(MAGIC):
            return value
        side = math.isqrt(len(value) // 3)
        if len(value) != 3 * side * side or not 0 < side * side <= MAX_PIXELS:
            raise UserError(
                f"{where}: {len(value)} bytes are neither a picture file nor the pixels (H, W, 3) "
                "of a square one"
            )
        return np.frombuffer(value, np.uint8).reshape(side, side, 3)


def is_lmdb(path: Path) -> bool:
    """Whether a folder is an environment, or a file its data."""
    return (path / DATA).is_file() or (path.is_file() and path.suffix in (".mdb", ".lmdb"))


def open_lmdb(path: Path) -> Source:
    """One environment, or a folder of some: ``train.lmdb``, ``validation.lmdb``, ``test.lmdb``, or
    LSUN's ``<class>_train_lmdb``, whose classes become labels where there are several. Keys that
    are all decimal numbers are in the order of the numbers, others in that of their bytes.

    Raises:
        UserError: An environment is damaged or empty.
    """
    found = [path] if is_lmdb(path) else sorted(p for p in path.iterdir() if is_lmdb(p))
    by_split: dict[str, list[tuple[str, Path]]] = {}
    for environment in found:
        words = environment.name.removesuffix(".lmdb").removesuffix("_lmdb")
        kind, _, last = words.rpartition("_")
        split = split_of(last) or ALL
        by_split.setdefault(split, []).append((kind if split != ALL else words, environment))
    classes = {kind for parts in by_split.values() for kind, _ in parts}
    splits: dict[str, Pictures] = {}
    for split, parts in by_split.items():
        pictures = [(kind, LMDBPictures(p, _keys(p))) for kind, p in parts]
        splits[split] = pictures[0][1] if len(classes) == 1 else _Joined(pictures)
    files = [p / DATA if p.is_dir() else p for p in found]
    return Source(path, "lmdb", splits, fingerprint(files))


class _Joined(Pictures):
    """Environments one after the other, each a class."""

    def __init__(self, parts: Sequence[tuple[str, LMDBPictures]]) -> None:
        self.parts = [pictures for _, pictures in parts]
        self.places = [(p, i) for p, part in enumerate(self.parts) for i in range(len(part))]
        self.names = [f"{kind}/{name}" for kind, part in parts for name in part.names]
        self.labels = [kind for kind, part in parts for _ in part.names]

    def read(self, index: int) -> Stored:
        part, item = self.places[index]
        return self.parts[part].read(item)


_ENVIRONMENTS: WeakValueDictionary[tuple[int, Path], Any] = WeakValueDictionary()
"""By process and path: a process may open an environment once."""


def _environment(path: Path) -> Any:
    key = (os.getpid(), path.resolve())
    environment = _ENVIRONMENTS.get(key)
    if environment is None:
        lmdb = optional_library("lmdb", "reading LMDB")
        environment = _ENVIRONMENTS[key] = lmdb.open(
            str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False,
            create=False, max_spare_txns=1,
        )  # fmt: skip
    return environment


def _keys(path: Path) -> list[bytes]:
    lmdb = optional_library("lmdb", "reading LMDB")
    data = path / DATA if path.is_dir() else path
    try:
        size = data.stat().st_size
        environment = _environment(path)
        info, page = environment.info(), environment.stat()["psize"]
        # A page beyond the end would end the process with a signal when it is touched.
        if (info["last_pgno"] + 1) * page > size:
            raise UserError(f"{path}: not a readable LMDB environment (the file ends early)")
        with environment.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    except (lmdb.Error, OSError) as error:
        raise UserError(f"{path}: not a readable LMDB environment ({error})") from error
    if all(key.isdigit() for key in keys):
        keys.sort(key=int)
    return keys
