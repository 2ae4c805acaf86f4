"""Who may write where: one training a run folder, and files whose writer has died.

Both use the system's advisory locks, which end with the process that holds them however it ends, so
nothing has to be cleaned up after a kill. A folder's lock is a POSIX record lock (``lockf``): it is
not inherited by forked children, and network file systems (NFS 3 and 4; Lustre mounted with
``flock``) carry it to other machines. Where a file system knows no locks, a warning says so.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

from lsgm.errors import UserError

__all__ = [
    "FolderLock",
    "is_abandoned",
    "make_folder",
    "mark_in_use",
]

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None


_REFUSED = (errno.EACCES, errno.EAGAIN)


_held: set[tuple[int, int, int]] = set()
"""(process, device, inode) of the locks that this process holds: record locks do not exclude their
own process, and closing any handle of the file would let them go."""


class InUseError(UserError):
    """Another process has the lock."""


class FolderLock:
    """The right to write the run in a folder, until :meth:`release` or the end of the process.

    The file ``.lock`` says who has it; :meth:`release` removes the file.

    Args:
        folder: It is made, with those above it, if it is missing, and removed again by
            :meth:`release` if nothing has been put there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / ".lock"
        self._handle: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            InUseError: Another process has it (named, with its machine).
            UserError: The folder cannot be written.
        """
        try:
            self._made = make_folder(self.folder)
            self._handle = self._locked_file()
            os.truncate(self._handle, 0)
            os.write(self._handle, _me())
        except OSError as error:
            self._remove_made()
            raise UserError(f"{self.folder}: cannot be written ({error.strerror})") from None
        except UserError:
            self._remove_made()
            raise

    def release(self) -> None:
        """Give the lock back; nothing is done if it is not held."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                os.unlink(self.path)
        _held.discard(_key(handle))
        os.close(handle)
        self._remove_made()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # one that is not empty, and those above it, stay
            for folder in self._made:
                folder.rmdir()
        self._made.clear()

    def _locked_file(self) -> int:
        """Handle of the lock file, locked."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self.path)
                if (os.getpid(), found.st_dev, found.st_ino) in _held:
                    raise self._in_use(_me())
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._lock(handle)
            except BaseException:
                os.close(handle)
                raise
            with contextlib.suppress(FileNotFoundError):
                # The last holder may have removed the file in between.
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    _held.add(_key(handle))
                    return handle
            os.close(handle)

    def _lock(self, handle: int) -> None:
        if fcntl is None:
            return
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _REFUSED:
                raise self._in_use(os.pread(handle, 4096, 0)) from None
            warnings.warn(
                f"{self.folder}: this file system has no locks ({error.strerror}); make sure that "
                "no other process writes there",
                stacklevel=2,
            )

    def _in_use(self, holder: bytes) -> InUseError:
        try:
            who = "process {pid} on {host} since {since} ({command})".format(**json.loads(holder))
        except (ValueError, KeyError, TypeError):  # it has not written it yet
            who = "another process"
        return InUseError(f"{self.folder} is in use by {who}: wait until it ends, or stop it first")


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; return those that were missing, the innermost first.

    Raises:
        UserError: It cannot be made: a file is in the way, the name is too long, the disk is
            read-only, ...
    """
    missing: list[Path] = []
    try:
        above = folder
        while not above.exists():
            missing.append(above)
            above = above.parent
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: cannot make the folder, a file is in the way") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot make the folder ({error.strerror})") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{str(folder)!r}: cannot make the folder ({error})") from None
    return missing


def mark_in_use(handle: int) -> None:
    """Lock an open file for as long as it stays open, where the system can."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_abandoned(path: Path) -> bool:
    """Whether nobody has the file marked by :func:`mark_in_use` any more; False if in doubt."""
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _key(handle: int) -> tuple[int, int, int]:
    found = os.fstat(handle)
    return os.getpid(), found.st_dev, found.st_ino


def _me() -> bytes:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:200],
    }
    return json.dumps(holder).encode()
