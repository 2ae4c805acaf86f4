"""Runs that are killed anywhere, again and again, end as if nothing had happened.

``LSGM_KILLS=60`` kills one run that often; by default a few times.
"""

import os
import random
import signal

from tiny import ScriptProcess, assert_nothing_left, assert_same_runs, call

KILLS = int(os.environ.get("LSGM_KILLS", "6"))
CHOSEN = (1, 2, 3, 5, 8, 13)  # before and in the first checkpoint
LAST_MOMENT = 260


def test_killed_anywhere_and_repeated_unchanged(tiny, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    command = (*tiny.command("vae", out), "--resume", "auto")
    generator, kills = random.Random(0), 0
    while kills < KILLS:
        early = CHOSEN[kills] if kills < min(len(CHOSEN), KILLS // 2) else None
        moment = early or generator.randint(1, LAST_MOMENT if KILLS < 20 else 60)
        code = ScriptProcess(command, log, signal_at=(moment, signal.SIGKILL)).wait()
        assert code in (0, -signal.SIGKILL), log.read_text()
        if code == 0:
            break
        kills += 1
    outcome = call(*command)
    assert outcome.code == 0, outcome.err
    assert kills >= min(KILLS, 4), kills
    assert "Traceback" not in log.read_text() and "warning" not in log.read_text()
    assert_same_runs(out, tiny.vae)
    assert_nothing_left(out, tiny.vae)
    finished = call(*command)
    assert (finished.code, finished.err) == (0, "") and "is finished" in finished.out
    assert_same_runs(out, tiny.vae)


def test_two_processes_on_one_folder(tiny, tmp_path):
    out = tmp_path / "run"
    command = (*tiny.command("vae", out), "--resume", "auto")
    first = ScriptProcess(command, tmp_path / "first")
    first.wait_for_step(out, 2)
    second = call(*command)
    second.error(2, f"{out} is in use by process {first.pid} on ")
    call("train_vae", "--out", out, "--resume").error(2, "is in use by process")
    assert first.wait() == 0
    assert_same_runs(out, tiny.vae)
    assert_nothing_left(out, tiny.vae)


def test_two_first_starts_at_once(tiny, tmp_path):
    out = tmp_path / "run"
    command = (*tiny.command("vae", out), "--resume", "auto")
    both = [ScriptProcess(command, tmp_path / f"log{number}") for number in range(2)]
    codes = sorted(process.wait() for process in both)
    assert codes in ([0, 2], [0, 0]), [process.log.read_text() for process in both]
    assert_same_runs(out, tiny.vae)
    assert_nothing_left(out, tiny.vae)
