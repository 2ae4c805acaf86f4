"""The run folder, and writing files so that a crash leaves either the old file or the new one.

Every file is written beside its target, flushed to disk and moved over it in one step. A link at
the target (symbolic or hard) is replaced, never written through: what it points to stays.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lsgm.errors import UserError
from lsgm.system.integrity import sealed_sha256
from lsgm.system.locks import is_abandoned, make_folder, mark_in_use

__all__ = [
    "RunFolder",
    "atomic_save",
    "atomic_write",
    "atomic_write_json",
    "atomic_write_text",
    "check_output",
    "json_text",
    "log_line",
    "open_log",
    "read_log_line",
    "sweep",
]

_LONGEST_NAME = 200
"""Characters of a file's name that go into the name of its temporary file."""


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears at `path`, complete, when the block ends without an error.

    Raises:
        OSError: If the file cannot be written (disk full, say). What was at `path` before is
            untouched and nothing partial stays behind.
    """
    path = Path(path)
    name: str | None = None
    try:
        handle, name = tempfile.mkstemp(
            prefix=_temporary_prefix(path.name), suffix=".tmp", dir=path.parent
        )
        with os.fdopen(handle, "wb") as file:
            mark_in_use(handle)
            yield file
            file.flush()
            os.fsync(handle)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
    except BaseException as error:
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        if isinstance(error, OSError) and _names_temporary(error.filename, path):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    _sync_folder(path.parent)


def _temporary_prefix(name: str) -> str:
    return f".{name[:_LONGEST_NAME]}."


def _names_temporary(filename: object, path: Path) -> bool:
    # The caller's own errors, about other files, keep the names they have.
    if filename is None:
        return True
    named = Path(os.fsdecode(filename)) if isinstance(filename, (str, bytes)) else Path()
    return named.parent == path.parent and named.name.startswith(_temporary_prefix(path.name))


def sweep(folder: Path, name: str = "*") -> None:
    """Remove the temporary files that killed writers of ``folder/name`` (a pattern) left; one whose
    writer lives stays.
    """
    pattern = f".{name[:_LONGEST_NAME]}.????????.tmp"
    with contextlib.suppress(OSError):
        for stray in folder.glob(pattern):
            if is_abandoned(stray):
                stray.unlink()


def check_output(path: str | Path, option: str) -> None:
    """Make sure, before hours of work, that a file can be written at ``path``: make its folder, and
    remove what killed writers of the same file left there.

    Raises:
        UserError: It cannot be written; the line names the ``option`` that asked for it.
    """
    try:
        _check_output(Path(path))
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def _check_output(path: Path) -> None:
    make_folder(path.parent)
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder, where a file is to be written")
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # finds a name that is too long
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{str(path)!r}: cannot be written ({error})") from None
    sweep(path.parent, glob.escape(path.name))


def open_log(path: Path, length: int, say: Callable[[str], None]) -> IO[bytes]:
    """Open a log of JSON lines to append to, cut to its first ``length`` bytes.

    Lines that are damaged (a torn tail) are dropped; a link is replaced by a copy, so that the log
    of another run which it leads to stays as it is.

    Args:
        path: The log; it may be missing.
        length: What belongs to the run, in bytes.
        say: Called with a line if something is missing or was dropped.
    """
    linked = path.is_symlink()
    try:
        with open(path, "rb") as file:
            content = file.read(length)
            size = file.seek(0, os.SEEK_END)
            linked |= os.fstat(file.fileno()).st_nlink > 1
    except FileNotFoundError:
        content, size = b"", 0
    lines = content.splitlines(keepends=True)
    good = [line for line in lines if read_log_line(line) is not None]
    if len(good) < len(lines):
        say(f"warning: {path}: dropped {len(lines) - len(good)} damaged line(s)")
    if len(content) < length:
        say(f"warning: {path}: {length - len(content)} bytes of the log are missing; it goes on")
    kept = b"".join(good)
    if linked or kept != content:
        with atomic_write(path) as copy:
            copy.write(kept)
    elif size > length:
        os.truncate(path, length)
    return open(path, "ab")


def log_line(record: Mapping[str, Any]) -> bytes:
    """A line of a log, with the CRC-32 of its record as the key ``crc32``."""
    return json_text({**record, "crc32": _crc32(json_text(record))}).encode() + b"\n"


def read_log_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line of a log, without its ``crc32``; None if the line is torn or is not what
    was written. Lines of older logs have no ``crc32``.
    """
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    crc32 = record.pop("crc32", None)
    return record if crc32 is None or crc32 == _crc32(json_text(record)) else None


def _crc32(text: str) -> int:
    return zlib.crc32(text.encode())


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8; see :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def atomic_write_json(path: str | Path, value: object) -> None:
    """Write `value` as indented JSON; see :func:`atomic_write` and :func:`json_text`.

    Numbers that are NaN or infinite are written as null, with a warning that names them.
    """
    lost = list(_non_finite(value))
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        warnings.warn(
            f"{path}: not finite, written as null: {', '.join(lost[:3])}{more}", stacklevel=2
        )
    atomic_write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: object, **options: Any) -> str:
    """``json.dumps``, with null in place of NaN and infinity, which JSON does not know."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _non_finite(value: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the numbers in `value` that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} ({value})"
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _non_finite(item, f"{name}.{key}" if name else str(key))


def atomic_save(
    path: str | Path, value: object, save: Callable[[object, Any], object] | None = None
) -> None:
    """Write a value by ``save(value, file)`` (default ``torch.save``); see :func:`atomic_write`."""
    import torch  # late, so that command lines are read without PyTorch

    write: Callable[[object, Any], object] = torch.save if save is None else save
    with atomic_write(path) as file:
        writer = _ErrorKeeper(file)
        try:
            write(value, writer)
        except Exception:
            # torch's writer turns an OSError of the file into a RuntimeError about positions.
            if writer.error is not None:
                raise writer.error from None
            raise


class _ErrorKeeper:
    """A binary file that remembers the first error that writing raised."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable; not every system lets a folder be opened.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class RunFolder:
    """Paths inside the folder of one run.

    Args:
        path: The folder. It is not touched; :meth:`create` and :meth:`resume` do that.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.info = self.path / "run.json"
        self.weights = self.path / "model.safetensors"
        self.start = self.path / "start.json"
        self.history = self.path / "config_history.jsonl"

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def occupied(self) -> bool:
        """Whether the folder already holds (a part of) a run."""
        files = (self.config, self.metrics, self.info, self.weights)
        return any(file.exists() for file in files) or any(self.checkpoints.glob("*.pt"))

    def make(self) -> None:
        """Make the folder and those in it, where they are missing."""
        for folder in (self.path, self.samples, self.checkpoints):
            make_folder(folder)

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Make the folder of a new run.

        Raises:
            UserError: If it already holds a run, or cannot be made.
        """
        run = cls(path)
        run.check(resume=False)
        run.make()
        return run

    @classmethod
    def resume(cls, path: str | Path) -> RunFolder:
        """Return the folder of a run to continue.

        Raises:
            UserError: If there is no run.
        """
        run = cls(path)
        run.check(resume=True)
        run.make()
        return run

    def check(self, resume: bool) -> None:
        """Do nothing if a run can start here or, with `resume`, continue here.

        Raises:
            UserError: If the folder already holds a run, or holds none to continue.
        """
        if resume and not self.occupied:
            raise UserError(
                f"{self.path} holds no run to continue: leave out --resume to start one there"
            )
        if not resume and self.occupied:
            raise UserError(
                f"{self.path} already holds a run: continue it with --resume or choose another "
                "--out"
            )

    def sweep(self) -> None:
        """Remove what killed writers left in the folder; nobody may be writing the run."""
        for folder in (self.path, self.samples, self.checkpoints):
            sweep(folder)
        with contextlib.suppress(OSError):
            for events in self.path.glob("events.out.tfevents.*"):
                if events.stat().st_size == 0:  # killed before it had anything to say
                    events.unlink()

    def read_start(self) -> dict[str, Any]:
        """Read ``start.json``, what the run was begun with: the description of its ``model`` (as in
        ``run.json``) and the number of ``train_images``. It is there from the first step on.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            start = json.loads(self.start.read_text())
            if isinstance(start["model"], dict) and isinstance(start["train_images"], int):
                return dict(start)
        except FileNotFoundError:
            raise UserError(f"{self.start} is missing") from None
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self.start}: damaged; remove it to go on by the run's configuration")

    def read_info(self) -> dict[str, Any]:
        """Read ``run.json``.

        Raises:
            UserError: If it is missing, is not a JSON object, or not what was written.
        """
        try:
            info = json.loads(self.info.read_text())
            if isinstance(info, dict):
                sealed_sha256(info, self.info.name)
        except FileNotFoundError:
            raise UserError(
                f"{self.path} is not a run folder: it has no {self.info.name}"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.info}: not a JSON file ({error})") from None
        except ValueError as error:
            raise UserError(f"{self.info}: {error}") from None
        if not isinstance(info, dict):
            raise UserError(f"{self.info}: expected a JSON object")
        return info
