"""One writer a folder, by a lock that dies with its process; temporary files of the dead."""

import os
import signal
import socket
import subprocess
import sys
import warnings

import pytest

from lsgm.errors import UserError
from lsgm.system import locks
from lsgm.system.files import atomic_write, sweep
from lsgm.system.locks import FolderLock

HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from lsgm.system.locks import FolderLock
FolderLock({folder!r}).acquire()
print("held", flush=True)
time.sleep(60)
"""


def hold(folder):
    """Another process that has the lock."""
    root = os.path.dirname(os.path.dirname(locks.__file__))
    code = HOLDER.format(root=root, folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_holder_is_named_and_a_kill_frees_the_folder(tmp_path):
    folder = tmp_path / "run"
    process = hold(folder)
    try:
        with pytest.raises(UserError) as refused:
            FolderLock(folder).acquire()
        text = str(refused.value)
        assert f"process {process.pid} on {socket.gethostname()} since 20" in text
        assert text.startswith(f"{folder} is in use by ") and "\n" not in text
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    lock = FolderLock(folder)
    lock.acquire()
    lock.release()
    assert list(folder.iterdir()) == []


def test_a_process_excludes_itself(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path).acquire()
    # ... and the try has not let go of the lock.
    root = os.path.dirname(os.path.dirname(locks.__file__))
    code = f"import sys; sys.path.insert(0, {root!r})\n"
    code += f"from lsgm.system.locks import FolderLock\nFolderLock({str(tmp_path)!r}).acquire()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "is in use by" in done.stderr
    lock.release()
    lock.acquire()
    lock.release()


def test_a_folder_that_nothing_was_put_in_goes_again(tmp_path):
    lock = FolderLock(tmp_path / "runs" / "a")
    lock.acquire()
    assert lock.path.exists()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.acquire()
    (lock.folder / "file").touch()
    lock.release()
    assert [p.name for p in lock.folder.iterdir()] == ["file"]


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="has no locks"):
        FolderLock(tmp_path).acquire()


@pytest.mark.parametrize("name", ["file/run", "x" * 300, "a\0b"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot make the folder") as refused:
        FolderLock(tmp_path / name).acquire()
    assert "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_only_temporary_files_of_the_dead_go(tmp_path):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from lsgm.system.files import atomic_write\n"
        "with atomic_write(sys.argv[2]) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
    )
    root = os.path.dirname(os.path.dirname(locks.__file__))
    subprocess.run([sys.executable, "-c", code, root, str(tmp_path / "a.png")])
    (dead,) = tmp_path.iterdir()
    others = [tmp_path / ".b.png.abcdefgh.tmp", tmp_path / "a.tmp"]
    for other in others:
        other.touch()
    with atomic_write(tmp_path / "a.png") as file:
        sweep(tmp_path, "a.png")
        assert not dead.exists()
        file.write(b"whole")
    assert (tmp_path / "a.png").read_bytes() == b"whole"
    assert all(other.exists() for other in others)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(tmp_path / "nowhere")
