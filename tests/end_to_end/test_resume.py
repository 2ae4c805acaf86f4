"""Runs that are killed or interrupted end as if nothing had happened."""

import os
import re
import shlex
import signal

import pytest
from tiny import STEPS, STEPS_PER_EPOCH, ScriptProcess, assert_same_runs, call


@pytest.mark.parametrize(("stage", "step"), [("vae", 2), ("vae", STEPS_PER_EPOCH + 1), ("lsgm", 7)])
def test_a_killed_run_goes_on_bit_for_bit(tiny, tmp_path, stage, step):
    out = tmp_path / "run"
    process = ScriptProcess(tiny.command(stage, out), tmp_path / "log")
    process.wait_for_step(out, step)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    outcome = call(*tiny.command(stage, out), "--resume")
    assert outcome.code == 0, outcome.err
    resumed = int(re.match(rf"resumed at step (\d+) of {STEPS}\n", outcome.err)[1])
    assert resumed >= step - step % 5
    assert_same_runs(out, tiny.run(stage))


@pytest.mark.parametrize(("stage", "number"), [("vae", signal.SIGINT), ("lsgm", signal.SIGTERM)])
def test_an_interrupted_run_says_how_to_go_on(tiny, tmp_path, stage, number):
    out = tmp_path / "a run"
    process = ScriptProcess(tiny.command(stage, out), tmp_path / "log")
    process.wait_for_step(out, 3)
    os.kill(process.pid, number)
    assert process.wait() == 128 + number
    log = (tmp_path / "log").read_text()
    by = " by SIGTERM" if number == signal.SIGTERM else ""
    assert "Traceback" not in log and log.splitlines()[-1] == f"error: interrupted{by}"
    name = signal.Signals(number).name
    assert f"{name}: stopping after this step, with a checkpoint\n" in log
    step, command = re.search(r"^stopped at step (\d+); continue with: (.*)$", log, re.M).groups()
    assert [path.name for path in (out / "checkpoints").iterdir()].count(f"step_{step:>08}.pt") == 1
    interpreter, script, *arguments = shlex.split(command)
    assert interpreter.startswith("python") and script.endswith(f"scripts/train_{stage}.py")
    assert arguments == [*tiny.command(stage, out)[1:], "--resume"]
    outcome = call(f"train_{stage}", *arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.err.startswith(f"resumed at step {step} of {STEPS}\n")
    assert_same_runs(out, tiny.run(stage))


def test_the_folder_alone_is_enough_to_go_on(tiny, tmp_path):
    out = tmp_path / "run"
    process = ScriptProcess(tiny.command("lsgm", out), tmp_path / "log")
    process.wait_for_step(out, 6)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    outcome = call("train_lsgm", "--out", out, "--resume")
    assert outcome.code == 0, outcome.err
    assert_same_runs(out, tiny.lsgm)
