"""Runs that are killed anywhere, again and again, end as if nothing had happened.

``LSGM_KILLS=60`` kills one run that often; by default a few times.
"""

import random
import signal

from tiny import KILLS, ScriptProcess, assert_nothing_left, assert_same_runs, call

EARLY = (1, 2, 4, 7, 11, 16, 22)  # before, in and just after the first checkpoint
LAST = 130  # a whole run is about 270 moments, a checkpoint 50


def test_killed_anywhere_and_repeated_unchanged(tiny, tmp_path):
    generator, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        out, log = tmp_path / f"run{runs}", tmp_path / f"log{runs}"
        command = (*tiny.command("vae", out), "--resume", "auto")
        moments = list(EARLY[:: 3 if KILLS < 20 else 1]) if runs == 0 else []
        while True:
            moment = moments.pop(0) if moments else generator.randint(1, LAST)
            if kills == KILLS:
                moment = 10**9
            code = ScriptProcess(command, log, signal_at=(moment, signal.SIGKILL)).wait()
            assert code in (0, -signal.SIGKILL), log.read_text()
            if code == 0:
                break
            kills += 1
        assert "Traceback" not in log.read_text() and "warning" not in log.read_text()
        assert_same_runs(out, tiny.vae)
        assert_nothing_left(out, tiny.vae)
        runs += 1
    print(f"{kills} kills in {runs} runs")
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
