import errno
import io
import os
import subprocess
import sys

import pytest
import torch

from lsgm.errors import UserError
from lsgm.system import files
from lsgm.system.files import (
    RunFolder,
    atomic_save,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
)
from lsgm.training.checkpoint import CheckpointError, Checkpoints

STATE = {"weights": {"w": torch.arange(2000.0)}, "counters": {"step": 3}, "list": [1, 2.5, "a"]}


class FullDisk(io.RawIOBase):
    """A file on a disk with room for `room` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def writable(self):
        return True

    def fileno(self):
        return self.file.fileno()

    def write(self, data):
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def close(self):
        self.file.close()
        super().close()


def _fill_disk(monkeypatch, room):
    original = os.fdopen
    monkeypatch.setattr(files.os, "fdopen", lambda *a, **k: FullDisk(original(*a, **k), room))


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, STATE)
    step, state = checkpoints.latest()
    assert step == 3 and state["list"] == [1, 2.5, "a"] and state["counters"] == {"step": 3}
    assert torch.equal(state["weights"]["w"], STATE["weights"]["w"])


def test_only_the_latest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 123456789):
        checkpoints.save(step, STATE)
    assert checkpoints.steps() == [10, 123456789]
    assert checkpoints.latest()[0] == 123456789


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_gives_way_to_the_one_before(tmp_path, part):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE)
    path = checkpoints.save(2, STATE)
    os.truncate(path, int(part * path.stat().st_size))
    said = []
    assert checkpoints.latest(said.append)[0] == 1
    assert len(said) == 1 and str(path) in said[0] and "step_00000001.pt" in said[0]


def test_changed_bytes_are_noticed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, STATE)
    content = bytearray(path.read_bytes())
    place = content.find(STATE["weights"]["w"].numpy().tobytes()) + 4000
    assert place > 4000
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(1)


def test_no_good_file_is_a_users_problem_that_names_all(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    for step in (1, 2):
        checkpoints.path(step).write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"step_00000002\.pt.*step_00000001\.pt") as caught:
        checkpoints.latest()
    assert "\n" not in str(caught.value)


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    checkpoints = Checkpoints(tmp_path)
    torch.save({"format": 1, "step": Evil()}, checkpoints.path(1))
    with pytest.raises(CheckpointError):
        checkpoints.load(1)
    assert not (tmp_path / "owned").exists()


def test_other_formats_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    torch.save({"format": 99}, checkpoints.path(1))
    torch.save([1], checkpoints.path(2))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoints.load(1)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoints.load(2)
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoints.load(3)


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_full_disk_leaves_the_previous_checkpoint_alone(tmp_path, monkeypatch, room):
    checkpoints = Checkpoints(tmp_path)
    before = checkpoints.save(1, STATE).read_bytes()
    _fill_disk(monkeypatch, room)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoints.save(2, STATE)
    assert caught.value.errno == errno.ENOSPC
    assert "step_00000001.pt is intact" in str(caught.value)
    assert "step_00000002.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001.pt"]
    assert checkpoints.path(1).read_bytes() == before


def test_a_write_that_the_system_refuses(tmp_path):
    # A limit on file size makes the system's own write() fail half-way through torch.save.
    code = (
        "import resource, signal, sys, torch\n"
        "from lsgm.training.checkpoint import Checkpoints\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "c = Checkpoints(sys.argv[1])\n"
        "c.save(1, {'w': torch.zeros(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    c.save(2, {'w': torch.zeros(1000000)})\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert "File too large" in result.stdout and "step_00000001.pt is intact" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001.pt"]


def test_what_a_killed_save_left_is_swept_up(tmp_path):
    stray = tmp_path / ".step_00000001.pt.abcdefgh.tmp"
    stray.write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    checkpoints.save(2, STATE)
    assert not stray.exists()


def test_an_error_inside_the_block_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        atomic_save(path, lambda: 0, save=lambda value, file: file.write(value))
    assert path.read_text() == "old"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        atomic_write_text(tmp_path / "nowhere" / "a.txt", "x")


def test_run_folder_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="no run to continue"):
        RunFolder.resume(tmp_path / "run")
    run = RunFolder.create(tmp_path / "run")
    assert run.samples.is_dir() and run.checkpoints.is_dir()
    RunFolder.create(tmp_path / "run")  # nothing there yet
    atomic_write_json(run.info, {"kind": "vae"})
    with pytest.raises(UserError, match="--resume"):
        RunFolder.create(tmp_path / "run")
    assert RunFolder.resume(tmp_path / "run").read_info() == {"kind": "vae"}


def test_run_folder_reports_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is in the way"):
        RunFolder.create(tmp_path / "file")
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"no run\.json"):
        run.read_info()
    run.info.write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        run.read_info()
    run.info.write_text("[]")
    with pytest.raises(UserError, match="JSON object"):
        run.read_info()
