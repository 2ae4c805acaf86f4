"""Files that are written: links, names, outputs checked before the work, and the log."""

import json
import os
import resource
import stat

import pytest

from lsgm.errors import UserError
from lsgm.system.files import atomic_write_text, check_output, open_log

LINES = [json.dumps({"phase": "train", "step": step}).encode() + b"\n" for step in range(5)]
WHOLE = b"".join(LINES)


def test_a_symlink_is_replaced_and_its_target_stays(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("precious")
    link.symlink_to(target)
    atomic_write_text(link, "new")
    assert target.read_text() == "precious" and link.read_text() == "new"
    assert not link.is_symlink()


def test_a_long_name_is_written(tmp_path):
    path = tmp_path / ("x" * 250 + ".txt")
    atomic_write_text(path, "y")
    assert path.read_text() == "y" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/a.png", "a file is in the way"),
        ("folder", "a folder, where a file"),
        ("x" * 300 + ".png", "File name too long"),
        ("a\0b.png", "null"),
    ],
)
def test_an_output_that_cannot_be_written_shows_before_the_work(tmp_path, name, reason):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=reason) as refused:
        check_output(tmp_path / name, "--out")
    assert "\n" not in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("lsgm.system.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(Read-only file system\)"):
        check_output(tmp_path / "a.png", "--out")


def test_a_good_output_leaves_nothing_but_its_folder(tmp_path):
    check_output(tmp_path / "new" / "a.png", "--out")
    assert list((tmp_path / "new").iterdir()) == []


def logged(path, length):
    said = []
    with open_log(path, length, said.append) as file:
        file.write(b'{"phase": "more"}\n')
    return path.read_bytes(), said


def test_what_came_after_the_checkpoint_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE)
    inode = path.stat().st_ino
    kept = b"".join(LINES[:3])
    assert logged(path, len(kept)) == (kept + b'{"phase": "more"}\n', [])
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("cut", [1, 7, len(LINES[-1]) - 1])
def test_a_torn_tail_is_dropped_and_said(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE[:-cut])
    content, said = logged(path, len(WHOLE))
    assert content == b"".join(LINES[:-1]) + b'{"phase": "more"}\n'
    assert "dropped 1 damaged line" in said[0] and f"{cut} bytes" in said[1]


def test_damage_in_the_middle_and_a_missing_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[0] + b"\xff\x00{nonsense\n" + LINES[2])
    content, said = logged(path, path.stat().st_size)
    assert content == LINES[0] + LINES[2] + b'{"phase": "more"}\n' and len(said) == 1
    path.unlink()
    content, said = logged(path, 1000)
    assert content == b'{"phase": "more"}\n' and "1000 bytes" in said[0]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_the_log_of_another_run_stays_as_it_is(tmp_path, link):
    other, path = tmp_path / "other.jsonl", tmp_path / "metrics.jsonl"
    other.write_bytes(WHOLE)
    link(other, path)
    content, said = logged(path, len(LINES[0]))
    assert content == LINES[0] + b'{"phase": "more"}\n' and said == []
    assert other.read_bytes() == WHOLE and stat.S_ISREG(path.lstat().st_mode)


def test_a_limit_on_file_size_is_an_error_that_names_the_file(tmp_path):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            atomic_write_text(tmp_path / "a.txt", "x" * 5000)
        except OSError as error:
            code = 0 if error.filename == str(tmp_path / "a.txt") else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == []
