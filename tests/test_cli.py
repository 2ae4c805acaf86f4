from __future__ import annotations

import errno

import pytest

from lsgm.cli import run
from lsgm.errors import UserError


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


def test_other_errors_keep_their_traceback():
    def main() -> None:
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        run(main)
