import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_toy import OPTIMS, TRAIN, Crash, ToyBatches, ToyStage, everything, train

from lsgm.errors import UserError
from lsgm.training import TrainingInterrupted, resume_command
from lsgm.training.interrupt import StopNow, StopSignal

TOY = Path(__file__).parent / "training_toy.py"
CLOCKS = ("time", "train_seconds", "eval_seconds", "images_per_second")


def same(a, b):
    """Equal in every bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def lines(run: Path):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in records]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes of :func:`start_toy`: sums over threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    return everything(train(run)), lines(run)


def start_toy(*arguments):
    return subprocess.Popen(
        [sys.executable, str(TOY), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TOY.parent.parent), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("at", range(15))
def test_a_crash_at_any_step_changes_nothing(tmp_path, whole, at):
    stage = ToyStage()

    def crash(step):
        if step == at and stage.calls % 2 == 0:  # in the second part of the batch
            raise Crash

    stage.on_step = crash
    with pytest.raises(Crash):
        train(tmp_path / "run", stage)
    torch.manual_seed(12345)  # a new process is in another state
    result = train(tmp_path / "run", resume=True)
    assert same(everything(result), whole[0])
    assert lines(tmp_path / "run") == whole[1]


@pytest.mark.parametrize("at", [5, 10, 15])
def test_a_crash_in_an_evaluation_changes_nothing(tmp_path, whole, at):
    def evaluate(context):
        torch.rand(3)  # an evaluation may draw from the global generator
        if context.step == at:
            raise Crash
        return {"score": float(context.step)}

    with pytest.raises(Crash):
        train(tmp_path / "run", evaluate=evaluate)
    result = train(tmp_path / "run", resume=True)
    assert same(everything(result), whole[0])
    assert lines(tmp_path / "run") == whole[1]


def test_a_killed_process_goes_on_bit_for_bit(tmp_path, whole):
    run = tmp_path / "run"
    first = start_toy(run, "--die-at", 8)
    first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL
    result = train(run, resume=True)
    assert same(everything(result), whole[0])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, whole, capsys):
    train(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_00000015.pt"
    os.truncate(path, path.stat().st_size // 2)
    result = train(tmp_path / "run", resume=True)
    assert same(everything(result), whole[0])
    assert lines(tmp_path / "run") == whole[1]
    assert "step_00000015.pt is damaged" in capsys.readouterr().err


def test_a_finished_run_stays_as_it_is(tmp_path, whole):
    train(tmp_path / "run")
    result = train(tmp_path / "run", resume=True)
    assert same(everything(result)["weights"], whole[0]["weights"])
    result = train(tmp_path / "run", resume=True)
    assert lines(tmp_path / "run") == whole[1]


def test_a_longer_run_continues_the_shorter_one(tmp_path):
    train(tmp_path / "run")
    result = train(tmp_path / "run", resume=True, epochs=4)
    assert result.state.step == 20
    steps = [r["step"] for r in lines(tmp_path / "run") if r["phase"] == "train"]
    assert steps == [4, 8, 12, 15, 16, 20]


def test_options_of_the_optimizer_come_from_the_configuration(tmp_path):
    train(tmp_path / "run")
    optims = OPTIMS | {"back": replace(OPTIMS["back"], weight_decay=0.25)}
    result = train(tmp_path / "run", resume=True, optims=optims)
    assert result.state.sides["back"].optimizer.param_groups[0]["weight_decay"] == 0.25


def test_another_architecture_is_named(tmp_path):
    train(tmp_path / "run")
    with pytest.raises(UserError, match=r"step_00000015.*front\.0\.weight \(4, 1, 3, 3\)") as error:
        train(tmp_path / "run", ToyStage(width=5), resume=True)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"unknown: front\.1\.weight.* and 2 more"):
        train(tmp_path / "run", ToyStage(norm=False), resume=True)


def test_another_optimizer_or_epoch_is_named(tmp_path):
    train(tmp_path / "run")
    optims = OPTIMS | {"back": replace(OPTIMS["back"], optimizer="adam")}
    with pytest.raises(UserError, match="adamw"):
        train(tmp_path / "run", resume=True, optims=optims)
    longer = ToyBatches()
    longer.steps_per_epoch = 6
    with pytest.raises(UserError, match=r"5 steps an epoch.*6"):
        train(tmp_path / "run", batches=longer, resume=True)


def test_a_run_is_not_overwritten(tmp_path):
    train(tmp_path / "run", max_steps=1)
    with pytest.raises(UserError, match="already holds a run"):
        train(tmp_path / "run")


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_stops_after_the_step_and_says_how_to_go_on(tmp_path, whole, number, capfd):
    stage = ToyStage()
    before = signal.getsignal(number)

    def send(step):
        if (step, stage.calls % 2) == (7, 1):  # in the first part of the batch: once
            os.kill(os.getpid(), number)

    stage.on_step = send
    with pytest.raises(TrainingInterrupted, match="stopped at step 8; continue with") as error:
        train(tmp_path / "run", stage)
    assert error.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    said = capfd.readouterr().err.splitlines()
    name = signal.Signals(number).name
    assert said[-3] == f"{name}: stopping after this step, with a checkpoint"  # before its line
    assert "--resume" in said[-1]
    assert (tmp_path / "run" / "checkpoints" / "step_00000008.pt").exists()
    result = train(tmp_path / "run", resume=True)
    assert same(everything(result), whole[0])
    assert lines(tmp_path / "run") == whole[1]


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("at", [5, 15])
def test_a_signal_ends_an_evaluation_at_once_with_a_checkpoint(tmp_path, whole, number, at, capfd):
    def evaluate(context):
        if context.step == at:
            os.kill(os.getpid(), number)
            time.sleep(30)
        return {"score": float(context.step)}

    begun = time.monotonic()
    with pytest.raises(TrainingInterrupted, match=f"stopped at step {at}; continue") as error:
        train(tmp_path / "run", evaluate=evaluate)
    assert time.monotonic() - begun < 20 and error.value.exit_code == 128 + number
    assert f"{signal.Signals(number).name}: stopping now" in capfd.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / f"step_{at:08d}.pt").exists()
    result = train(tmp_path / "run", resume=True)
    assert same(everything(result), whole[0])
    assert lines(tmp_path / "run") == whole[1]


def test_a_signal_just_before_an_evaluation_does_not_wait_for_it():
    with StopSignal(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopNow), stop.at_once():
            pytest.fail("the evaluation began")


def test_a_run_beyond_its_new_end_is_refused(tmp_path):
    train(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for changes in ({"epochs": 2}, {"max_steps": 14}):
        with pytest.raises(UserError, match=r"is at step 15 already, they end it at step 1[04]"):
            train(tmp_path / "run", resume=True, **changes)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


class Counting:
    """Batches of 40 images that note which ones are asked for."""

    def __init__(self, size, seen):
        self.size, self.seen, self.steps_per_epoch = size, seen, 40 // size

    def epoch(self, epoch, start):
        for step in range(start, self.steps_per_epoch):
            places = range(step * self.size, (step + 1) * self.size)
            self.seen += [(epoch, place) for place in places]
            yield step, torch.rand(self.size, 1, 6, 6)


@pytest.mark.parametrize("size", [4, 20])
def test_another_batch_size_goes_on_where_the_epoch_stood(tmp_path, size):
    seen, evaluated, run = [], [], tmp_path / "run"

    def evaluate(context):
        evaluated.append((context.step, context.epoch))
        return {"score": 1.0}

    # Two fifths (16 images) of the second epoch; with batches of 20 these are no whole batch.
    train(run, batches=Counting(8, seen), max_steps=7, evaluate=evaluate, eval_every=1)
    result = train(
        run, batches=Counting(size, seen), batch_size=size, resume=True, evaluate=evaluate
    )
    per_epoch, done = 40 // size, 16 // size
    assert result.state.step == 7 + (per_epoch - done) + per_epoch == result.state.total_steps
    assert result.state.position == result.state.end == 3 * per_epoch
    twice = [place for place in set(seen) if seen.count(place) > 1]
    assert len(set(seen)) == 120 and len(twice) == 16 - done * size
    ends = [(5, 1), (7, 1), (7 + per_epoch - done, 2), (result.state.step, 3)]
    assert list(dict.fromkeys(evaluated)) == ends
    logged = [r["epoch"] for r in lines(run) if r["phase"] == "train"]
    assert logged[-1] == 3.0 and logged == sorted(logged)


def test_other_data_are_refused(tmp_path):
    train(tmp_path / "run", batches=Counting(8, []), max_steps=7)
    fewer = Counting(8, [])
    fewer.steps_per_epoch = 4
    with pytest.raises(UserError, match="5 steps an epoch, this run has 4: the data are not"):
        train(tmp_path / "run", batches=fewer, resume=True)


def test_a_missing_or_torn_log_stops_nothing(tmp_path, whole, capsys):
    run = tmp_path / "run"
    train(run)
    metrics = run / "metrics.jsonl"
    for tear in (True, False):
        (run / "checkpoints" / "step_00000015.pt").unlink()
        checkpoint = run / "checkpoints" / "step_00000012.pt"
        length = torch.load(checkpoint, weights_only=True)["metrics_length"]
        os.truncate(metrics, length - 5) if tear else metrics.unlink()
        result = train(run, resume=True)
        assert same(everything(result)["weights"], whole[0]["weights"])
    said = capsys.readouterr().err
    assert "dropped 1 damaged line" in said and f"{length} bytes of the log are missing" in said
    assert [(r["phase"], r["step"]) for r in lines(run)] == [("train", 15), ("eval", 15)]


def test_the_second_signal_is_not_held_back():
    # A shell starts background processes with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert stop and stop.number == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_to_resume(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train_vae.py", "--out", "my runs/a"])
    command = resume_command()
    assert command.endswith("scripts/train_vae.py --out 'my runs/a' --resume")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_command().startswith("torchrun --nproc-per-node 4 scripts/train_vae.py")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lsgm", "train-vae"])
    assert resume_command() == "/usr/bin/lsgm train-vae --resume"


def test_a_run_without_a_checkpoint_starts_anew(tmp_path, whole):
    run = tmp_path / "run"
    train(run, max_steps=2)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    result = train(run, resume=True)
    assert same(everything(result), whole[0])
    assert lines(run) == whole[1]


def test_toy_is_not_trivial(whole):
    assert TRAIN.accumulate == 2
    state = whole[0]
    assert state["extra"]["vector"].tolist() == [120.0, 120.0]
    assert set(state["ema"]) == {"front", "back"}


MALFORMED = {
    "no weights": lambda state: state.pop("weights"),
    "weights that are a list": lambda state: state.update(weights=[1]),
    "weights of another shape": lambda state: state["weights"].update(
        {"front.0.weight": torch.zeros(1)}
    ),
    "no optimizer of a side": lambda state: state["optimizers"].pop("back"),
    "an optimizer that is text": lambda state: state["optimizers"].update(back="adam"),
    "no average": lambda state: state["ema"].pop("front"),
    "an average of nothing": lambda state: state["ema"].update(front={}),
    "a counter too many": lambda state: state["counters"].update(surprise=1),
    "counters that are a number": lambda state: state.update(counters=3),
    "means that are a number": lambda state: state.update(means=3),
    "times that are text": lambda state: state.update(since_log="never"),
    "a length that is text": lambda state: state.update(metrics_length="long"),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_checkpoint_is_one_line(tmp_path, change):
    out = tmp_path / "run"
    train(out, max_steps=3)
    for path in (out / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    with pytest.raises(UserError, match=r"step_00000003\.pt") as caught:
        train(out, resume=True, max_steps=4)
    assert "\n" not in str(caught.value)
