"""What all readers give: splits of stored pictures, read one at a time and in any order."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from lsgm.data.images import Stored
from lsgm.errors import UserError

__all__ = [
    "ALL",
    "Label",
    "Pictures",
    "SPLITS",
    "SlicedPictures",
    "Source",
    "fingerprint",
    "optional_library",
    "split_of",
]

ALL = "all"
"""The split of a source that has none."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Names of the splits, each with those under which it is found, in any case."""

Label = int | str | None
"""A class as the source has it: a number or a name."""

SAMPLED_BYTES, SAMPLES = 1 << 16, 32


class Pictures(ABC):
    """One split of a source: stored pictures by number. It is pickled without open files; each
    process opens its own.

    Attributes:
        names: Name of each picture, unique within the split.
        labels: Class of each picture, or None where the source has no classes.
        in_memory: The pictures are in memory, too many to send to other processes.
    """

    in_memory: bool = False
    names: Sequence[str]
    labels: Sequence[Label] | None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> Stored:
        """The picture with this number, as it is stored.

        Raises:
            UserError: It cannot be read.
        """

    @property
    def handle(self) -> Any:
        """What :meth:`_open` has returned in this process."""
        opened = self.__dict__.get("_opened")
        if opened is None or opened[0] != os.getpid():
            opened = self.__dict__["_opened"] = (os.getpid(), self._open())
        return opened[1]

    def _open(self) -> Any:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}


class SlicedPictures(Pictures):
    """Pictures that are parts of files.

    Attributes:
        files: The files.
        places: File, offset and length in bytes of each picture.
    """

    files: Sequence[Path]
    places: Sequence[Sequence[int]]

    def _open(self) -> dict[int, BinaryIO]:
        return {}

    def slice(self, index: int, extra: int = 0) -> bytes:
        """The bytes of a picture, and ``extra`` ones after it.

        Raises:
            UserError: The file ends before.
        """
        file, offset, length = self.places[index]
        if file not in self.handle:
            self.handle[file] = self.files[file].open("rb")
        self.handle[file].seek(offset)
        data: bytes = self.handle[file].read(length + extra)
        if len(data) < length + extra:
            raise UserError(f"{self.files[file]}: {self.names[index]}: the file ends early")
        return data


@dataclass(frozen=True)
class Source:
    """Pictures that a user has.

    Attributes:
        path: Where.
        form: What they are kept in: a name of :data:`lsgm.data.readers.detect.FORMS`.
        splits: By name: train, validation, test; ``all`` where the source has none.
        ignored: Number of files that were passed over, by reason.
        fingerprint: Hash of what tells one state of the source from another.
    """

    path: Path
    form: str
    splits: Mapping[str, Pictures]
    fingerprint: str
    ignored: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.splits) > 1 and "train" not in self.splits:
            raise UserError(
                f"{self.path}: {', '.join(sorted(self.splits))}, and no train among them"
            )
        for split, pictures in self.splits.items():
            where = str(self.path) if split == ALL else f"{self.path} ({split})"
            if not len(pictures):
                raise UserError(f"{where}: there is no picture in it")
            if len(set(pictures.names)) != len(pictures):
                seen: set[str] = set()
                twice = next(n for n in pictures.names if n in seen or seen.add(n))  # type: ignore[func-returns-value]
                raise UserError(f"{where}: two pictures have the name {twice!r}")
            if pictures.labels is not None and len(pictures.labels) != len(pictures):
                raise UserError(
                    f"{where}: {len(pictures.labels)} labels for {len(pictures)} pictures"
                )


def split_of(name: str) -> str | None:
    """The split that a name stands for, or None."""
    lower = name.lower()
    return next((split for split, names in SPLITS.items() if lower in names), None)


def optional_library(name: str, what: str) -> ModuleType:
    """A library that reads a form of data.

    Raises:
        UserError: It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{what} needs {name.split('.')[0]}: pip install 'lsgm[data]'") from error


def fingerprint(files: Iterable[Path]) -> str:
    """Hash of files by their names, sizes and, sampled evenly, contents: it tells an edited file
    from the first one without reading gigabytes.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for part in range(SAMPLES if size > SAMPLES * SAMPLED_BYTES else 1):
                file.seek(size * part // SAMPLES)
                digest.update(file.read(SAMPLED_BYTES if size > SAMPLED_BYTES * SAMPLES else -1))
    return digest.hexdigest()
