"""Packing: decode, crop, resize and store, in parallel, resumable, in bounded memory.

The work is cut into chunks of about :data:`CHUNK_BYTES`. Workers write a chunk straight to its
place in the array; the main process then adds a line to the log of finished chunks, by which a
killed run goes on. The index appears last: without it a folder is no packed one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from lsgm.data.images import is_grey, read_pixels
from lsgm.data.packed import INDEX, PackedSplit, PackIndex, write_index
from lsgm.data.packing.settings import PackSettings
from lsgm.data.readers.base import Label, Pictures, Source
from lsgm.errors import UserError
from lsgm.system.files import atomic_write_json, log_line, read_log_line
from lsgm.system.locks import FolderLock
from lsgm.system.progress import progress_bar

__all__ = ["CHUNK_BYTES", "Chunk", "Done", "Job", "chunks_of", "in_parallel", "pack", "worker_pool"]

CHUNK_BYTES = 1 << 24
"""Of finished pictures in a chunk; a worker holds one chunk and one decoded picture."""
WORK = ".prepare"
"""Subfolder of an unfinished pack."""
LISTED = 100
"""Broken pictures beyond the limit after which the rest is not tried."""
SMALL_SET = 1000
"""Fewer pictures are packed before other processes would have started."""
SPARE_BYTES = 1 << 26
"""That stay free on the disk."""


@dataclass(frozen=True)
class Chunk:
    """Pictures ``start`` to ``stop`` of a split."""

    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Done:
    """A finished chunk: height and width of each picture, or why it could not be read."""

    chunk: Chunk
    sizes: list[list[int] | str]


def pack(
    source: Source,
    splits: Mapping[str, Pictures],
    out: Path,
    settings: PackSettings,
    *,
    how: str,
    workers: int | None = None,
) -> PackIndex:
    """Pack pictures into the folder ``out`` and return its index. A second call goes on where a
    killed one was.

    Args:
        source: What they come from, for the index.
        splits: The pictures to pack, by split.
        out: The folder; empty, new, or that of an unfinished pack of the same settings.
        settings: Size, crop, limits.
        how: How the splits were made, in words, for the index.
        workers: Processes; None: one a core.

    Raises:
        UserError: The folder holds something else, too many pictures are broken, or the disk is
            full.
    """
    lock = FolderLock(out)
    lock.acquire()
    try:
        if (out / INDEX).exists():
            raise UserError(f"{out}: is packed already; choose another folder or delete it")
        channels = settings.channels or _channels(splits)
        made = {
            "source": str(source.path), "form": source.form, "fingerprint": source.fingerprint,
            "splits": how, "channels": channels, **settings.as_dict(),
        }  # fmt: skip
        work = _begin(out, made, splits)
        counts = {split: len(pictures) for split, pictures in splits.items()}
        shape = (*settings.shape, channels)
        _check_space(out, counts, int(np.prod(shape)))
        offsets = {
            split: _array(work / f"{split}.npy", (count, *shape))
            for split, count in counts.items()
            if not (out / f"{split}.npy").exists()  # else it was finished before the end
        }
        sizes = _run(splits, work, settings, channels, offsets, workers)
        index = _index(splits, sizes, made, settings, channels, source)
        for split in offsets:
            _finish(work / f"{split}.npy", out / f"{split}.npy", sizes[split])
        write_index(out, index)
        shutil.rmtree(work)
        return index
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{out}: the disk is full; the same command goes on from here"
            ) from error
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from error
    finally:
        lock.release()


def _channels(splits: Mapping[str, Pictures]) -> int:
    """1 if all pictures are grey by their headers."""
    for pictures in splits.values():
        for i, name in enumerate(pictures.names):
            try:
                if not is_grey(pictures.read(i), name):
                    return 3
            except UserError:  # a broken one decides nothing
                continue
    return 1


def _begin(out: Path, made: Mapping[str, Any], splits: Iterable[str]) -> Path:
    """The folder of the unfinished pack."""
    work, settings = out / WORK, out / WORK / "settings.json"
    ours = {WORK, ".lock"}
    if settings.exists():
        ours.update(f"{split}.npy" for split in splits)
    others = [p.name for p in out.iterdir() if p.name not in ours]
    if others:
        raise UserError(f"{out}: is not empty ({sorted(others)[0]}); choose another folder")
    if work.exists() and not settings.exists():
        shutil.rmtree(work)  # killed before it began
    if not work.exists():
        work.mkdir()
        atomic_write_json(settings, made)
        return work
    before = _settings(settings)
    changed = sorted(key for key in made if before.get(key) != made[key])
    if changed:
        raise UserError(
            f"{out}: holds an unfinished pack with another {' and '.join(changed)}; delete it, or "
            "repeat its command"
        )
    return work


def _settings(path: Path) -> dict[str, Any]:
    """What an unfinished pack was begun with; nothing if the file is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _array(path: Path, shape: tuple[int, ...]) -> int:
    """Make an NPY file of uint8 zeros, if it is not there; the offset of its values in bytes."""
    if not path.exists():
        temporary = path.with_suffix(".new")
        with temporary.open("wb") as file:
            npy.write_array_header_1_0(file, _header(shape))
            file.truncate(file.tell() + int(np.prod(shape)))
        os.replace(temporary, path)
    with path.open("rb") as file:
        npy.read_magic(file)
        npy.read_array_header_1_0(file)
        return file.tell()


def _header(shape: Sequence[int]) -> dict[str, Any]:
    return {"shape": tuple(shape), "fortran_order": False, "descr": "|u1"}


def _check_space(out: Path, counts: Mapping[str, int], picture: int) -> None:
    there = sum(p.stat().st_blocks * 512 for p in (*out.glob("*.npy"), *out.glob(f"{WORK}/*.npy")))
    needed = sum(counts.values()) * picture - there + SPARE_BYTES
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: the pack needs {needed / 1e9:.1f} GB more and the disk has "
            f"{free / 1e9:.1f} GB free"
        )


def chunks_of(splits: Mapping[str, Pictures], settings: PackSettings, channels: int) -> list[Chunk]:
    """The parts of the work."""
    step = max(1, CHUNK_BYTES // (math.prod(settings.shape) * channels))
    return [
        Chunk(split, start, min(start + step, len(pictures)))
        for split, pictures in splits.items()
        for start in range(0, len(pictures), step)
    ]


Sizes = dict[str, list[list[int] | str]]


def _run(
    splits: Mapping[str, Pictures],
    work: Path,
    settings: PackSettings,
    channels: int,
    offsets: Mapping[str, int],
    workers: int | None,
) -> Sizes:
    """Write every chunk that is not in the log; what became of each picture."""
    chunks = chunks_of(splits, settings, channels)
    sizes: Sizes = {split: [[]] * len(pictures) for split, pictures in splits.items()}
    total = sum(map(len, splits.values()))
    limit = int(settings.max_broken * total)
    log = work / "chunks.jsonl"
    broken: list[str] = []

    def note(done: Done) -> None:
        chunk = done.chunk
        sizes[chunk.split][chunk.start : chunk.stop] = done.sizes
        broken.extend(reason for reason in done.sizes if isinstance(reason, str))
        if len(broken) > limit + LISTED:
            raise _too_many(broken, total, limit)

    finished = set()
    for done in _logged(log, chunks):
        note(done)
        finished.add(done.chunk)
    waiting = [chunk for chunk in chunks if chunk not in finished]
    ready = total - sum(chunk.stop - chunk.start for chunk in waiting)
    job = Job(splits, work, settings, channels, offsets)
    bar = progress_bar(total=total, initial=ready, desc="packing", unit="img", leave=False)
    with bar, log.open("ab") as file, worker_pool(job, workers, len(waiting)) as pool:
        for done in in_parallel(pool, waiting, job):
            note(done)
            chunk = done.chunk
            record = {"split": chunk.split, "start": chunk.start, "sizes": done.sizes}
            file.write(log_line(record))
            file.flush()
            bar.update(chunk.stop - chunk.start)
    if len(broken) > limit:
        raise _too_many(broken, total, limit)
    return sizes


def _too_many(broken: Sequence[str], total: int, limit: int) -> UserError:
    line = broken[0]
    if len(broken) > 1:
        line += f"; and {len(broken) - 1} more of {total} pictures"
    return UserError(f"{line}; at most {limit} may be unreadable (max_broken)" if limit else line)


def _logged(log: Path, chunks: Sequence[Chunk]) -> Iterator[Done]:
    if not log.exists():
        return
    expected = {(chunk.split, chunk.start): chunk for chunk in chunks}
    whole = 0
    with log.open("rb") as file:
        for line in file:
            record = read_log_line(line)
            if record is None:  # torn by the end of the process: all that follows is done again
                break
            whole += len(line)
            chunk = expected.get((record["split"], record["start"]))
            if chunk is not None and len(record["sizes"]) == chunk.stop - chunk.start:
                yield Done(chunk, record["sizes"])
    os.truncate(log, whole)


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs, sent to it once; called with a chunk, it does the work."""

    splits: Mapping[str, Pictures]
    work: Path
    settings: PackSettings
    channels: int
    offsets: Mapping[str, int]

    def __call__(self, chunk: Chunk) -> Done:
        """Decode a chunk and write it to its place."""
        pictures, count = self.splits[chunk.split], chunk.stop - chunk.start
        rows = np.zeros((count, *self.settings.shape, self.channels), np.uint8)
        sizes: list[list[int] | str] = []
        for k in range(count):
            try:
                sizes.append(self._read(pictures, chunk.start + k, rows[k]))
            except UserError as error:
                sizes.append(str(error))
        offset = self.offsets[chunk.split] + chunk.start * rows[0].nbytes
        with (self.work / f"{chunk.split}.npy").open("r+b") as file:
            file.seek(offset)
            file.write(rows.data)
            file.flush()
            _to_disk(file.fileno(), offset, rows.nbytes)
        return Done(chunk, sizes)

    def _read(self, pictures: Pictures, index: int, row: np.ndarray) -> list[int]:
        size: list[int] = []
        stored = pictures.read(index)
        row[:] = read_pixels(
            stored, self.settings.shape, self.channels,
            name=None if isinstance(stored, Path) else pictures.names[index],
            size_of=size, **self.settings.reading(),
        )  # fmt: skip
        return size


def _to_disk(handle: int, offset: int, size: int) -> None:
    """Wait until what was written is on the disk, and give its memory back.

    So what the log calls finished is there after a power cut too, and the next chunk goes to memory
    that is in use already: in a virtual machine fresh pages cost more than the disk.
    """
    os.fsync(handle)
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(handle, offset, size, os.POSIX_FADV_DONTNEED)


_job: Job | None = None


def _start(job: Job) -> None:
    global _job
    _job = job


def _do(chunk: Chunk) -> Done:
    assert _job is not None
    return _job(chunk)


@contextlib.contextmanager
def worker_pool(job: Job, workers: int | None, chunks: int) -> Iterator[Executor]:
    """Processes; one thread of this process where they would not pay, or the pictures are in
    memory.
    """
    number = min(workers or os.cpu_count() or 1, max(chunks, 1))
    few = sum(map(len, job.splits.values())) < SMALL_SET and workers is None
    pool: Executor
    if number == 1 or few or any(pictures.in_memory for pictures in job.splits.values()):
        pool = ThreadPoolExecutor(1)
    else:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(number, context, _start, (job,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_parallel(pool: Executor, chunks: Sequence[Chunk], job: Job) -> Iterator[Done]:
    """Results as they come; few chunks wait at a time."""
    do = _do if isinstance(pool, ProcessPoolExecutor) else job
    queue, running = iter(chunks), set[Future[Done]]()
    try:
        while True:
            for chunk in queue:
                running.add(pool.submit(do, chunk))
                if len(running) >= 4 * (os.cpu_count() or 1):
                    break
            if not running:
                return
            ready, running = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(ready, key=lambda done: done.exception() is not None):
                yield future.result()  # what is finished is noted before an error ends the work
    except BrokenProcessPool as error:
        raise UserError(
            "a worker ended by itself (killed, or out of memory); the same command goes on from "
            "here, with fewer --workers if memory is short"
        ) from error


def _finish(array: Path, target: Path, sizes: Sequence[list[int] | str]) -> None:
    """Put a split's array in its place, without the rows of broken pictures."""
    whole = [i for i, size in enumerate(sizes) if not isinstance(size, str)]
    finished = array
    if len(whole) < len(sizes):
        source = np.load(array, mmap_mode="r")
        finished = array.with_suffix(".whole")
        with finished.open("wb") as file:
            npy.write_array_header_1_0(file, _header((len(whole), *source.shape[1:])))
            for i in whole:
                file.write(source[i].tobytes())
    with finished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(finished, target)


def _index(
    splits: Mapping[str, Pictures],
    sizes: Sizes,
    made: Mapping[str, Any],
    settings: PackSettings,
    channels: int,
    source: Source,
) -> PackIndex:
    classes = _classes(splits)
    packed, broken = {}, []
    for split, pictures in splits.items():
        whole = [i for i, size in enumerate(sizes[split]) if not isinstance(size, str)]
        if not whole:
            raise UserError(f"{source.path} ({split}): no picture can be read")
        labels = None
        if classes is not None and pictures.labels is not None:
            labels = [classes.index(pictures.labels[i]) for i in whole]
        packed[split] = PackedSplit(
            [pictures.names[i] for i in whole],
            [list(sizes[split][i]) for i in whole],  # type: ignore[arg-type]
            labels,
        )
        broken += [
            [split, pictures.names[i], size]
            for i, size in enumerate(sizes[split])
            if isinstance(size, str)
        ]
    names = None if classes is None else [str(label) for label in classes]
    height, width = settings.shape
    return PackIndex(
        height, width, channels, packed, names, dict(made), broken, dict(source.ignored)
    )


def _classes(splits: Mapping[str, Pictures]) -> list[Label] | None:
    """The classes of all splits in order; None unless each picture has one, and there are two."""
    found: set[Label] = set()
    for pictures in splits.values():
        if pictures.labels is None or None in pictures.labels:
            return None
        found.update(pictures.labels)
    if len(found) < 2:
        return None
    return sorted(found, key=lambda label: (isinstance(label, str), label))
