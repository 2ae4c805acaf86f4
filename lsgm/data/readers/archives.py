"""Pictures in zip and tar archives: those of StyleGAN2-ADA and EDM, WebDataset shards, and any
other.

Nothing is unpacked: a member is read into memory, and only if it is small enough for a picture.
"""

from __future__ import annotations

import json
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from lsgm.data.discovery import MASK_FOLDERS, MASKS, NOT_IMAGES, SYSTEM_NAMES
from lsgm.data.images import EXTENSIONS, MAX_PIXELS
from lsgm.data.readers.base import (
    ALL,
    Label,
    Pictures,
    SlicedPictures,
    Source,
    fingerprint,
    split_of,
)
from lsgm.errors import UserError

__all__ = ["TarPictures", "ZipPictures", "open_tars", "open_zip"]

MAX_BYTES = 4 * MAX_PIXELS
"""Of one member: the largest picture that is decoded, without compression."""
MAX_LABEL_BYTES = 1 << 26
LABELS = "dataset.json"
BLOCK = tarfile.BLOCKSIZE


class ZipPictures(Pictures):
    """Members of a zip archive."""

    def __init__(
        self, path: Path, names: Sequence[str], labels: Sequence[Label] | None = None
    ) -> None:
        self.path, self.names, self.labels = path, list(names), labels

    def _open(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def read(self, index: int) -> bytes:
        return _zip_member(self.handle, self.path, self.names[index], MAX_BYTES)


def open_zip(path: Path) -> Source:
    """A zip archive of pictures: splits by folders train, validation and test at the top, labels
    by the ``dataset.json`` of StyleGAN2-ADA and EDM, or else by the top folders.

    Raises:
        UserError: The archive or its ``dataset.json`` is damaged, or there is no picture.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a readable zip archive ({error})") from error
    ignored: Counter[str] = Counter()
    with archive:
        members = {info.filename for info in archive.infolist() if not info.is_dir()}
        names = sorted(_pictures(members - {LABELS}, ignored))
        given = _dataset_json(archive, path) if LABELS in members else None
    if given is not None:
        unknown = next((name for name in names if name not in given), None)
        if unknown is not None:
            raise UserError(f"{path}: {LABELS} has no label of {unknown}")
    splits = {
        split: ZipPictures(path, part, [given[n] for n in part] if given else labels)
        for split, part, labels in _split(names)
    }
    return Source(path, "zip", splits, fingerprint([path]), dict(+ignored))


def _zip_member(archive: zipfile.ZipFile, path: Path, name: str, limit: int) -> bytes:
    try:
        with archive.open(name) as member:
            data = member.read(limit + 1)  # whatever size the header claims
    except (
        zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError,
        ValueError,
    ) as error:  # fmt: skip
        raise UserError(f"{path}: {name}: cannot be read ({error})") from error
    if len(data) > limit:
        raise UserError(f"{path}: {name}: larger than {limit} bytes")
    return data


def _dataset_json(archive: zipfile.ZipFile, path: Path) -> dict[str, int] | None:
    """Classes by member; None where the file says that there are none."""
    try:
        labels = json.loads(_zip_member(archive, path, LABELS, MAX_LABEL_BYTES))["labels"]
        if labels is None:
            return None
        found = {name: number for name, number in labels}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{path}: {LABELS} is not {{"labels": [[file, class], ...]}} or {{"labels": null}}'
        ) from error
    wrong = next((v for v in found.values() if type(v) is not int or v < 0), None)
    if wrong is not None:
        raise UserError(f"{path}: {LABELS}: a class is a number from 0 on, not {str(wrong)[:40]}")
    return found


def _pictures(members: Iterable[str], ignored: Counter[str]) -> list[str]:
    """Those of the names that are pictures."""
    found = []
    for name in members:
        parts = PurePosixPath(name).parts
        if any(part in SYSTEM_NAMES or part.startswith(".") for part in parts):
            ignored["hidden"] += 1
        elif MASK_FOLDERS & set(parts):
            ignored[MASKS] += 1
        elif name.lower().endswith(EXTENSIONS):
            found.append(name)
        else:
            ignored[NOT_IMAGES] += 1
    return found


def _split(names: Sequence[str]) -> list[tuple[str, list[str], list[Label] | None]]:
    """Names of files by split, with the labels that their folders give."""
    parts = {name: PurePosixPath(name).parts for name in names}
    top = {p[0]: split_of(p[0]) if len(p) > 1 else None for p in parts.values()}
    splits = set(top.values())
    if None in splits or len(splits) < 2 or "train" not in splits:
        return [(ALL, list(names), _folders([parts[name] for name in names]))]
    found = []
    for split in sorted(filter(None, splits)):
        chosen = [name for name in names if top[parts[name][0]] == split]
        found.append((split, chosen, _folders([parts[name][1:] for name in chosen])))
    return found


def _folders(paths: Sequence[Sequence[str]]) -> list[Label] | None:
    labels: list[Label] = [path[0] for path in paths if len(path) > 1]
    return labels if len(labels) == len(paths) and len(set(labels)) > 1 else None


class TarPictures(SlicedPictures):
    """Members of tar shards, found by their offsets."""

    def __init__(
        self,
        shards: Sequence[Path],
        members: Sequence[tuple[str, int, int, int]],
        labels: Sequence[Label] | None,
    ) -> None:
        self.files = list(shards)
        self.names = [name for name, *_ in members]
        self.places = [place for _, *place in members]
        self.labels = labels

    def read(self, index: int) -> bytes:
        return self.slice(index)


def open_tars(paths: Sequence[Path], root: Path) -> Source:
    """Tar archives, WebDataset shards among them: members are grouped by their name up to the
    first dot; ``.cls`` and a number ``label`` (or ``cls``) in ``.json`` are classes.

    Raises:
        UserError: An archive is damaged or compressed, or there is no picture.
    """
    ignored: Counter[str] = Counter()
    by_split: dict[str, tuple[list[tuple[str, int, int, int]], list[Label]]] = {}
    for number, path in enumerate(paths):
        split = next(
            filter(None, (split_of(word) for word in path.stem.replace("_", "-").split("-"))), ALL
        )
        members, labels = by_split.setdefault(split, ([], []))
        for name, offset, size, label in _tar_members(path, ignored):
            unique = f"{path.name}/{name}" if len(paths) > 1 else name
            members.append((unique, number, offset, size))
            labels.append(label)
    splits = {
        split: TarPictures(paths, members, None if None in labels else labels)
        for split, (members, labels) in by_split.items()
    }
    return Source(root, "tar", splits, fingerprint(paths), dict(+ignored))


def _tar_members(path: Path, ignored: Counter[str]) -> list[tuple[str, int, int, Label]]:
    """Name, offset, size and class of each picture."""
    found: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, Label] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK * member.isreg()
                if not member.isreg():
                    ignored[NOT_IMAGES] += not member.isdir()
                    continue
                folder, _, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                key = f"{folder}/{key}"
                if kind.lower() in ("cls", "json") and member.size <= MAX_LABEL_BYTES:
                    data = archive.extractfile(member)
                    label = _label(data.read() if data else b"", kind.lower())
                    if label is not None:
                        labels[key] = label
                elif _pictures([member.name], ignored) and member.size <= MAX_BYTES:
                    if key in found:
                        raise UserError(f"{path}: {member.name} and {found[key][0]} are one sample")
                    found[key] = (member.name, member.offset_data, member.size)
        with path.open("rb") as file:  # tarfile does not say that an archive ends early
            file.seek(end)
            if file.read(BLOCK) != bytes(BLOCK):
                raise UserError(f"{path}: is damaged at byte {end}, or ends early")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: not a readable tar archive ({error}); compressed ones have to be unpacked"
        ) from error
    return [(*place, labels.get(key)) for key, place in found.items()]


def _label(data: bytes, kind: str) -> Label:
    try:
        if kind == "cls":
            return int(data.decode())
        found = json.loads(data)
        found = found.get("label", found.get("cls")) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None
    return found if type(found) is int else None
