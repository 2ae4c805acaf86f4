"""The run folder, and writing files so that a crash leaves either the old file or the new one.

Every file is written beside its target, flushed to disk and moved over it in one step.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from lsgm.errors import UserError

__all__ = [
    "RunFolder",
    "atomic_save",
    "atomic_write",
    "atomic_write_json",
    "atomic_write_text",
    "json_text",
]


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears at `path`, complete, when the block ends without an error.

    Raises:
        OSError: If the file cannot be written (disk full, say). What was at `path` before is
            untouched and nothing partial stays behind.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError) and error.filename in (None, name):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    _sync_folder(path.parent)


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
    path: str | Path, value: object, save: Callable[[object, Any], None] = torch.save
) -> None:
    """Write `value` by ``save(value, file)`` (default ``torch.save``); see :func:`atomic_write`."""
    with atomic_write(path) as file:
        writer = _ErrorKeeper(file)
        try:
            save(value, writer)
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

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def occupied(self) -> bool:
        """Whether the folder already holds (a part of) a run."""
        files = (self.config, self.metrics, self.info, self.weights)
        return any(file.exists() for file in files) or any(self.checkpoints.glob("*.pt"))

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Make the folder of a new run.

        Raises:
            UserError: If it already holds a run, or cannot be made.
        """
        run = cls(path)
        run.check(resume=False)
        run._make_folders()
        return run

    @classmethod
    def resume(cls, path: str | Path) -> RunFolder:
        """Return the folder of a run to continue.

        Raises:
            UserError: If there is no run.
        """
        run = cls(path)
        run.check(resume=True)
        run._make_folders()
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

    def write_info(self, info: Mapping[str, object]) -> None:
        """Write ``run.json``: what kind of run this is and which versions made it."""
        atomic_write_json(self.info, dict(info))

    def read_info(self) -> dict[str, Any]:
        """Read ``run.json``.

        Raises:
            UserError: If it is missing or is not a JSON object.
        """
        try:
            info = json.loads(self.info.read_text())
        except FileNotFoundError:
            raise UserError(
                f"{self.path} is not a run folder: it has no {self.info.name}"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{self.info}: not a JSON file ({error})") from None
        if not isinstance(info, dict):
            raise UserError(f"{self.info}: expected a JSON object")
        return info

    def _make_folders(self) -> None:
        try:
            for folder in (self.path, self.samples, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"{self.path}: cannot make the run folder, a file is in the way"
            ) from None
        except PermissionError as error:
            raise UserError(f"{self.path}: cannot make the run folder ({error.strerror})") from None
