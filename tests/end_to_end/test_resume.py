"""Runs that are killed or interrupted end as if nothing had happened."""

import json
import os
import re
import shlex
import shutil
import signal

import pytest
from tiny import STEPS, STEPS_PER_EPOCH, ScriptProcess, assert_same_runs, call

from lsgm.config.command_line import load_run_config


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


def test_a_second_stage_goes_on_without_the_first(tiny, tmp_path):
    first, out = tmp_path / "vae", tmp_path / "run"
    shutil.copytree(tiny.vae, first)
    name, config, path, _, _, *rest = tiny.command("lsgm", out)
    process = ScriptProcess((name, config, path, "--vae", str(first), *rest), tmp_path / "log")
    process.wait_for_step(out, 6)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(first)
    outcome = call("train_lsgm", "--resume", "--out", out)
    assert outcome.code == 0, outcome.err
    assert_same_runs(out, tiny.lsgm)


def test_a_finished_run_without_checkpoints_stays_as_it_is(tiny, tmp_path):
    out = shutil.copytree(tiny.vae, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    command = tiny.command("vae", out)
    for resume in ("--resume",), ("--resume", "auto"):
        outcome = call(*command, *resume)
        assert (outcome.code, outcome.err) == (0, "") and "is finished" in outcome.out
        outcome = call(*command, *resume, "--train.max_steps", STEPS + 2)
        outcome.error(2, str(out), "no checkpoint to continue from", "not overwritten", "--out")
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_an_extension_and_another_batch_are_said_and_recorded(tiny, tmp_path):
    out = shutil.copytree(tiny.vae, tmp_path / "run")
    first = tiny.command("vae", out)
    changes = ("--train.max_steps", STEPS + 3, "--train.batch_size", 64)
    outcome = call(*first, "--resume", *changes)
    assert outcome.code == 0, outcome.err
    said = outcome.err.splitlines()
    assert said[:3] == [
        f"train.max_steps: {STEPS} until now, {STEPS + 3} from here",
        "train.batch_size: 128 until now, 64 from here",
        f"resumed at step {STEPS} of {STEPS + 3}",
    ]
    (entry,) = [json.loads(x) for x in (out / "config_history.jsonl").read_text().splitlines()]
    changed = {"train.max_steps": [STEPS, STEPS + 3], "train.batch_size": [128, 64]}
    assert (entry["step"], entry["changes"]) == (STEPS, changed)
    assert load_run_config(out).train.batch_size == 64
    assert json.loads((out / "run.json").read_text())["steps"] == STEPS + 3
    # They hold from then on: nothing is left to do, and the first command would go back.
    again = call("train_vae", "--out", out, "--resume")
    assert again.code == 0 and "is finished" in again.out
    outcome = call(*first, "--resume")
    outcome.error(2, f"is at step {STEPS + 3} already, they end it at step {STEPS}", log=True)
    assert load_run_config(out).train.batch_size == 64


def test_a_script_without_training_stops_by_a_signal(tiny, tmp_path):
    command = ("evaluate", "--run", str(tiny.vae), "--out", str(tmp_path / "out"))
    process = ScriptProcess(command, tmp_path / "log", signal_at=(2, signal.SIGTERM))
    assert process.wait() == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().splitlines()[-1] == "error: interrupted by SIGTERM"
    assert not list(tmp_path.rglob("*.tmp"))
