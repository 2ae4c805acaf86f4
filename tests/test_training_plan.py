"""What --resume does in a folder, by the state that it is in; changed options and their record."""

import json
from dataclasses import replace

import pytest

from lsgm.config.command_line import load_config, save_config
from lsgm.config.training import LSGMTrainConfig, VAETrainConfig
from lsgm.errors import UserError
from lsgm.system.files import RunFolder, atomic_write_json
from lsgm.training.runs.resume import (
    Plan,
    configuration_changes,
    plan,
    record_changes,
    release_notes,
)

CONFIG = VAETrainConfig()


def longer(epochs=200):
    return replace(CONFIG, train=replace(CONFIG.train, epochs=epochs))


def faster():
    return replace(CONFIG, optim_vae=replace(CONFIG.optim_vae, lr=0.5))


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.make()
    return run


def begin(run, *, checkpoint=False, finished=False, noted=True):
    save_config(CONFIG, run.config)
    if checkpoint:
        (run.checkpoints / "step_00000007.pt").touch()
    if finished:
        run.weights.touch()
        atomic_write_json(run.info, release_notes(CONFIG.train, 7) if noted else {"steps": 7})


def test_nothing_there(run):
    assert plan(run, CONFIG, False) == plan(run, CONFIG, "auto") == Plan()
    with pytest.raises(UserError, match="no run to continue"):
        plan(run, CONFIG, True)


def test_stopped_before_the_first_checkpoint(run):
    begin(run)
    assert plan(run, CONFIG, True) == plan(run, CONFIG, "auto") == Plan()
    with pytest.raises(UserError, match="already holds a run"):
        plan(run, CONFIG, False)


def test_stopped_later(run):
    begin(run, checkpoint=True)
    assert plan(run, CONFIG, True) == plan(run, CONFIG, "auto") == Plan(resume=True)
    changed = plan(run, faster(), "auto")
    assert changed.resume and changed.changes == {"optim_vae.lr": (1e-2, 0.5)}
    assert changed.lines() == ["optim_vae.lr: 0.01 until now, 0.5 from here"]


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_finished_run_goes_on_only_if_it_is_made_longer(run, checkpoint, resume):
    begin(run, checkpoint=checkpoint, finished=True)
    assert plan(run, CONFIG, resume).finished
    with pytest.raises(UserError, match=r"is finished, optim_vae\.lr would change nothing"):
        plan(run, faster(), resume)
    if checkpoint:
        found = plan(run, longer(), resume)
        assert not found.finished and found.changes == {"train.epochs": (100, 200)}
    else:
        with pytest.raises(UserError, match="no checkpoint to continue from"):
            plan(run, longer(), resume)


def test_an_extension_that_was_killed_goes_on(run):
    begin(run, checkpoint=True, finished=True)
    record_changes(run, longer(), plan(run, longer(), True), 7)
    assert plan(run, longer(), "auto") == Plan(resume=True)
    assert plan(run, CONFIG, "auto").changes == {"train.epochs": (200, 100)}


def test_runs_of_older_versions(run):
    begin(run, finished=True, noted=False)
    assert plan(run, CONFIG, True).finished
    with pytest.raises(UserError, match="no checkpoint to continue from"):
        plan(run, longer(), True)
    (run.checkpoints / "step_00000007.pt").touch()
    assert plan(run, CONFIG, True) == Plan(resume=True)  # the loop sees whether it is at its end


def test_weights_alone_are_never_started_over(run):
    run.weights.touch()
    for resume in (True, "auto"):
        with pytest.raises(UserError, match="not overwritten"):
            plan(run, CONFIG, resume)
    with pytest.raises(UserError, match="already holds a run"):
        plan(run, CONFIG, False)


def test_what_cannot_change_is_named(run):
    begin(run, checkpoint=True)
    for config, key in (
        (replace(CONFIG, vae=replace(CONFIG.vae, num_channels_enc=1)), "vae.num_channels_enc"),
        (replace(CONFIG, data=replace(CONFIG.data, name="mnist")), "data.name"),
        (replace(CONFIG, train=replace(CONFIG.train, seed=4)), "train.seed"),
    ):
        with pytest.raises(UserError, match=f"^{key}: .* was begun with"):
            plan(run, config, True)
    moved = replace(CONFIG, data=replace(CONFIG.data, root="/elsewhere"))
    assert plan(run, moved, True).changes == {"data.root": (None, "/elsewhere")}


def test_the_same_place_by_another_name_is_no_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = LSGMTrainConfig(vae_run="vae"), LSGMTrainConfig(vae_run=str(tmp_path / "x/../vae"))
    assert configuration_changes(a, b) == {}
    assert set(configuration_changes(a, LSGMTrainConfig(vae_run="other"))) == {"vae_run"}


def test_changes_are_recorded_with_their_step_and_hold_from_then_on(run):
    begin(run, checkpoint=True)
    for step, config in ((7, faster()), (9, longer())):
        record_changes(run, config, plan(run, config, True), step)
        assert load_config(VAETrainConfig, run.config) == config
        assert plan(run, config, True).changes == {}
        record_changes(run, config, plan(run, config, True), step)
    entries = [json.loads(line) for line in run.history.read_text().splitlines()]
    assert [(e["step"], e["changes"]) for e in entries] == [
        (7, {"optim_vae.lr": [0.01, 0.5]}),
        (9, {"optim_vae.lr": [0.5, 0.01], "train.epochs": [100, 200]}),
    ]


def test_a_kill_between_the_two_files_leaves_one_entry(run, monkeypatch):
    begin(run, checkpoint=True)
    chosen = plan(run, faster(), True)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("lsgm.training.runs.resume.save_config", _interrupt)
        record_changes(run, faster(), chosen, 7)
    assert load_config(VAETrainConfig, run.config) == CONFIG
    record_changes(run, faster(), plan(run, faster(), True), 7)
    assert len(run.history.read_text().splitlines()) == 1


def _interrupt(*arguments):
    raise InterruptedError


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": 3, "train_images": 4}'])
def test_a_damaged_start_is_named(run, text):
    with pytest.raises(UserError, match=r"start\.json is missing"):
        run.read_start()
    run.start.write_text(text)
    with pytest.raises(UserError, match=r"start\.json: damaged; remove it"):
        run.read_start()
