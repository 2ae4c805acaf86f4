"""A process of its own gives back what its job did, and never outlives the one that asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lsgm.errors import UserError
from lsgm.processes import in_fresh_process

SCRIPT = """
import os, sys, time
from lsgm.processes import in_fresh_process

def job(path):
    with open(path + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(path + ".part", path)
    time.sleep(120)

if __name__ == "__main__":
    in_fresh_process(job, sys.argv[1])
"""


def refuse(message: str) -> None:
    raise UserError(message)


def _wait_for(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # one that nobody has waited for yet has ended all the same
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return Path("/proc").is_dir() is False


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_the_process_ends_with_the_one_that_asked(tmp_path, name):
    script, note = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, script, note], stderr=subprocess.DEVNULL)
    try:
        assert _wait_for(note.exists)
        child = int(note.read_text())
        parent.send_signal(getattr(signal, name))
        parent.wait(30)
        assert _wait_for(lambda: not _runs(child), 10)
    finally:
        parent.kill()
        if note.exists() and _runs(int(note.read_text())):
            os.kill(int(note.read_text()), signal.SIGKILL)


def test_results_errors_and_deaths_come_back():
    assert in_fresh_process(divmod, 7, 3) == (2, 1)
    with pytest.raises(UserError, match="no such thing"):
        in_fresh_process(refuse, "no such thing")
    with pytest.raises(RuntimeError, match="ended with code 3"):
        in_fresh_process(os._exit, 3)
