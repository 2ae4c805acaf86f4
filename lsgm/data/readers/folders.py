"""Folders of picture files, in any nesting."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lsgm.data.discovery import count_files, find_images, subfolders
from lsgm.data.images import EXTENSIONS
from lsgm.data.readers.base import ALL, Label, Pictures, Source, split_of
from lsgm.errors import UserError

__all__ = ["FilePictures", "fingerprint_of", "open_folder"]


class FilePictures(Pictures):
    """Picture files below a folder."""

    def __init__(
        self, folder: Path, files: Sequence[Path], labels: Sequence[Label] | None = None
    ) -> None:
        self.files = list(files)
        self.names = [path.relative_to(folder).as_posix() for path in self.files]
        self.labels = labels

    def read(self, index: int) -> Path:
        return self.files[index]


def open_folder(root: Path) -> Source:
    """A folder of pictures. Subfolders train, validation and test (val, ...; in any case) are
    splits where train is among them and no picture lies outside; first-level subfolders are
    classes unless some picture lies beside them or there is one only. Pictures are in the order of
    their file names, whatever folder they lie in.

    Raises:
        UserError: There is no picture, a folder cannot be read, or two folders are the same split.
    """
    ignored: Counter[str] = Counter()
    found: dict[str, Path] = {}
    for folder in subfolders(root):
        split = split_of(folder.name)
        if split and split in found:
            raise UserError(
                f"{root} has {found[split].name}/ and {folder.name}/, both the split {split}; keep "
                "one of them"
            )
        if split:
            found[split] = folder
    if len(found) > 1 and "train" in found:
        outside = (path for path in root.iterdir() if path not in found.values())
        ignored["outside the splits"] += sum(map(count_files, outside))
        splits = {split: _pictures(folder, ignored) for split, folder in found.items()}
    else:
        splits = {ALL: _pictures(root, ignored)}
    return Source(root, "folder", splits, fingerprint_of(splits), dict(ignored))


def _pictures(folder: Path, ignored: Counter[str]) -> FilePictures:
    found = find_images(folder)
    ignored.update(found.ignored)
    if not found.files:
        raise UserError(f"{folder}: no picture in it (accepted: {' '.join(EXTENSIONS)})")
    files = sorted(found.files, key=lambda path: (path.name.lower(), path))
    parts = [path.relative_to(folder).parts for path in files]
    labels = [names[0] for names in parts if len(names) > 1]
    labelled = len(labels) == len(files) and len(set(labels)) > 1
    return FilePictures(folder, files, labels if labelled else None)


def fingerprint_of(splits: Mapping[str, FilePictures]) -> str:
    """Hash of the files' names, sizes and times."""
    digest = hashlib.sha256()
    for split, pictures in splits.items():
        for name, path in zip(pictures.names, pictures.files, strict=True):
            status = path.stat()
            digest.update(f"{split}\0{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
