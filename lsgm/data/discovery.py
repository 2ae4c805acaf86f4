"""Which files below a folder are pictures to learn from, and why the others are not.

Nothing vanishes in silence: every file is either found, or counted under a reason, or an error.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lsgm.data.images import EXTENSIONS
from lsgm.errors import UserError

__all__ = ["Found", "count_files", "find_images", "subfolders"]

HIDDEN = "hidden"
OURS = "of a run"
NOT_IMAGES = "not images"
MASKS = "masks"
TWICE = "linked folders read already"

# What file systems, archives and network drives put beside a user's own files.
SYSTEM_NAMES = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
# The segmentations that come with the faces of CelebAMask-HQ.
MASK_FOLDERS = frozenset({"CelebAMask-HQ-mask-anno"})
# Each set of files marks a folder that training or evaluation wrote.
RUN_MARKS = (
    ("config.yaml", "metrics.jsonl"),
    ("config.yaml", "checkpoints"),
    ("run.json", "model.safetensors"),
    ("report.json", "report.md"),
)
# What a run writes into its folder; skipped where the data's folder is itself that of a run.
RUN_OUTPUTS = frozenset({"samples", "checkpoints", "evaluation", "curves.png"})


@dataclass(frozen=True)
class Found:
    """Picture files, sorted by path, and the number of files that were passed over, by reason."""

    files: list[Path] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def find_images(folder: Path) -> Found:
    """Return all pictures below ``folder``, judged by the endings of their names.

    Links are followed. A folder that several links lead to is read once, by its own path if it has
    one below ``folder``.

    Raises:
        UserError: A folder cannot be read, or a link leads nowhere.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    linked = deque([folder])
    while linked:  # links wait until all folders have been read by their own path
        waiting = [linked.popleft()]
        while waiting:
            current = waiting.pop()
            identity = _identity(current)
            if identity in seen:
                found.ignored[TWICE] += 1
                continue
            seen.add(identity)
            for entry in _entries(current, found.ignored):
                path = Path(entry.path)
                if entry.is_dir():
                    (linked if entry.is_symlink() else waiting).append(path)
                elif path.suffix.lower() in EXTENSIONS and entry.is_file():
                    found.files.append(path)
                else:
                    found.ignored[NOT_IMAGES] += 1
    found.files.sort()
    return found


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in ``folder`` that may hold data, sorted.

    Raises:
        UserError: As :func:`find_images`.
    """
    return [Path(entry.path) for entry in _entries(folder, Counter()) if entry.is_dir()]


def _entries(folder: Path, ignored: Counter[str]) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, sorted by name, but for what is hidden or ours, which is counted."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    in_run = _is_run(folder)
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith(".") or entry.name in SYSTEM_NAMES:
            ignored[HIDDEN] += count_files(path)
            continue
        try:
            is_dir = entry.is_dir()
            if entry.is_symlink():
                path.stat()  # a link that leads nowhere would count as neither file nor folder
        except OSError as error:
            raise _unreadable(path, error) from error
        if is_dir and entry.name in MASK_FOLDERS:
            ignored[MASKS] += count_files(path)
        elif (in_run and entry.name in RUN_OUTPUTS) or (is_dir and _is_run(path)):
            ignored[OURS] += count_files(path)
        else:
            yield entry


def _identity(folder: Path) -> tuple[int, int]:
    """What two paths to the same folder have in common."""
    try:
        status = folder.stat()
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"data.root: {path}: cannot be read ({error.strerror})")


def _is_run(folder: Path) -> bool:
    return any(all(os.path.exists(folder / name) for name in mark) for mark in RUN_MARKS)


def count_files(path: Path) -> int:
    """Number of files at or below ``path``; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(files) for _, _, files in os.walk(path))
