from __future__ import annotations

import errno
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from lsgm.commands.run import EXIT_BROKEN_PIPE, EXIT_USER_ERROR, run
from lsgm.errors import UserError
from lsgm.system.files import RunFolder
from lsgm.system.signals import STOP_SIGNALS
from lsgm.training.logging import RunLogger


def outcome(capsys, error: BaseException | None) -> tuple[int, str]:
    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as stop:
        run(main)
    return stop.value.code, capsys.readouterr().err


def test_success(capsys):
    assert outcome(capsys, None) == (0, "")


def test_user_error_is_one_line(capsys):
    assert outcome(capsys, UserError("a: wrong\n  so")) == (2, "error: a: wrong so\n")


def test_interrupt(capsys):
    assert outcome(capsys, KeyboardInterrupt()) == (130, "error: interrupted\n")


def test_exit_code_of_main_is_kept(capsys):
    assert outcome(capsys, SystemExit(3)) == (3, "")


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_is_one_line(capsys, wrapped):
    error: Exception = OSError(errno.ENOSPC, "No space left on device", "/runs/x")
    if wrapped:  # as a writer in compiled code reports it
        outer = RuntimeError("writing failed")
        outer.__cause__ = error
        error = outer
    code, text = outcome(capsys, error)
    assert code == 1
    assert text.startswith("error: no space left") and text.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EFBIG, errno.EIO, errno.ENOENT])
def test_what_the_system_refuses_is_one_line(capsys, number):
    reason = os.strerror(number)
    expected = (1, f"error: runs/x: {reason}\n")
    assert outcome(capsys, OSError(number, reason, "runs/x")) == expected
    wrapped = RuntimeError("writing failed")
    wrapped.__cause__ = OSError(number, reason, "runs/x")
    assert outcome(capsys, wrapped) == expected


def test_a_nul_in_a_path_is_one_line(capsys):
    with pytest.raises(ValueError, match="null") as raised:
        open("a\0b")
    code, text = outcome(capsys, raised.value)
    assert code == 2 and text == "error: a path with a NUL character in it names no file\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_end_a_script_with_a_line_and_their_code(capsys, number):
    cleaned = []

    def main() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            cleaned.append(True)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        run(main)
    name = signal.Signals(number).name
    assert stop.value.code == 128 + number and cleaned
    assert capsys.readouterr().err == f"error: interrupted by {name}\n"
    assert signal.getsignal(number) is before


def test_an_ignored_hangup_stays_ignored(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with pytest.raises(SystemExit) as stop:
            run(lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert stop.value.code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_script_is_loading_is_no_traceback(number):
    script = Path(__file__).parents[1] / "scripts" / "sample.py"
    code = (
        "import os, runpy, sys\n"
        "class Loading:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'torch': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Loading())\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    by = "" if number == signal.SIGINT else " by SIGTERM"
    assert (done.returncode, done.stderr) == (128 + number, f"error: interrupted{by}\n")


def test_other_errors_keep_their_traceback():
    def main() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(main)


HELP = "print('help ' * 100_000)"
MISTAKE = "raise UserError('no')"


@pytest.mark.parametrize(("main", "code"), [(HELP, EXIT_BROKEN_PIPE), (MISTAKE, EXIT_USER_ERROR)])
def test_a_reader_that_has_gone_is_no_traceback(main, code, tmp_path):
    program = f"from lsgm.commands.run import run, UserError\ndef main():\n    {main}\nrun(main)"
    read, write = os.pipe()
    os.close(read)  # as `| head` does when it has seen enough
    stdout_only = main is HELP
    with open(tmp_path / "stderr", "wb") as stderr:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=write, stderr=stderr if stdout_only else write
        )
    os.close(write)
    assert done.returncode == code
    assert (tmp_path / "stderr").read_bytes() == b""


@pytest.mark.parametrize("columns", [0, 80])
def test_a_terminal_of_no_size_gets_lines(columns, tmp_path):
    primary, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", columns // 3, columns, 0, 0))
    run_folder = RunFolder.create(tmp_path / "run")
    with os.fdopen(terminal, "w") as stream:
        logger = RunLogger(run_folder, 4, stream=stream)
        logger.open(0)
        logger.progress(2, 0, {"loss": 1.5}, 1.0)
        logger.close()
        stream.flush()
        text = os.read(primary, 10_000).decode()
    os.close(primary)
    assert ("step 2/4  epoch 0  loss 1.5" in text) == (columns == 0)
    assert ("0/4 [" in text) == (columns == 80)  # a bar
