"""Weights, averages and optimizers that are no longer finite: never kept, never released."""

import math

import pytest
import torch
from training_toy import ToyStage, train

from lsgm.config.training import DataConfig
from lsgm.errors import UserError
from lsgm.models import release
from lsgm.training import loop
from lsgm.training.checkpoint import Checkpoints


def finite(tree):
    if isinstance(tree, torch.Tensor):
        return bool(torch.isfinite(tree).all())
    if isinstance(tree, dict):
        return all(map(finite, tree.values()))
    return all(map(finite, tree)) if isinstance(tree, (list, tuple)) else True


class Spoiled(ToyStage):
    """A stage in which something becomes NaN after some steps, a number of times."""

    def __init__(self, spoil, step, times=1):
        super().__init__()
        self.spoil, self.step, self.times = spoil, step, times

    def after_step(self, step):
        super().after_step(step)
        if step == self.step and self.times:
            self.times -= 1
            self.spoil(self)


def spoil_weight(stage):
    stage.front[0].weight.data[0, 0, 1, 1] = math.inf


def spoil_statistics(stage):
    stage.front[1].running_var[2] = math.nan


SPOILS = {
    "a weight": (spoil_weight, "front.0.weight (weights of front) is NaN or infinite"),
    "statistics": (spoil_statistics, "front.1.running_var (weights of front) is NaN or infinite"),
}


@pytest.mark.parametrize("what", SPOILS)
@pytest.mark.parametrize("step", [6, 15])
def test_a_run_goes_back_and_says_what_was_first(tmp_path, capsys, what, step):
    spoil, words = SPOILS[what]
    released = []
    result = train(
        tmp_path / "run", Spoiled(spoil, step), release=lambda s: released.append(s.state_dict())
    )
    assert (result.state.step, result.state.counters.returns) == (15, 1)
    assert f"after step {step} {words}: back to step {step - 3}" in capsys.readouterr().err
    assert len(released) == 1 and finite(released[0])
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        assert finite(torch.load(path, weights_only=True)), path


def test_averages_and_optimizers_count(tmp_path):
    state = train(tmp_path / "run").state
    assert state.non_finite() is None
    state.sides["back"].ema.module.weight[0, 1] = math.nan
    assert state.non_finite() == "weight (average of back) is NaN or infinite"
    state.sides["back"].ema.module.weight[0, 1] = 0
    moments = state.sides["front"].optimizer.state[state.stage.front[0].bias]
    name = next(k for k, v in moments.items() if v.shape == (4,))
    moments[name][1] = math.inf
    assert state.non_finite() == f"{name} of 0.bias (optimizer of front) is NaN or infinite"


def test_a_hopeless_run_releases_nothing(tmp_path):
    released = []
    stage = Spoiled(spoil_weight, 15, times=100)
    with pytest.raises(UserError, match=r"front\.0\.weight .* after 5 returns"):
        train(tmp_path / "run", stage, release=released.append)
    assert released == []


def test_a_start_from_bad_weights_is_refused(tmp_path):
    stage = ToyStage()
    spoil_weight(stage)
    with pytest.raises(UserError, match=r"training cannot start: front\.0\.weight"):
        train(tmp_path / "run", stage)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_older_good_checkpoints_are_used_and_bad_ones_go(tmp_path, capsys):
    run = tmp_path / "run"
    whole = train(run, keep_checkpoints=3).state.state_dict()["weights"]
    folder = run / "checkpoints"
    for step in (12, 15):  # as an older version could leave them
        path = folder / f"step_{step:08d}.pt"
        content = torch.load(path, weights_only=True)
        content["weights"]["back.bias"][0] = math.nan
        torch.save(content, path)
    result = train(run, resume=True, keep_checkpoints=3)
    said = capsys.readouterr().err
    for step in (12, 15):
        assert f"step_{step:08d}.pt cannot be used: back.bias (weights of back)" in said
    assert "using step_00000009.pt instead" in said
    weights = result.state.state_dict()["weights"]
    assert all(torch.equal(weights[key], whole[key]) for key in whole)
    assert all(finite(torch.load(p, weights_only=True)) for p in folder.iterdir())


def test_a_checkpoint_outlives_later_ones_that_could_not_be_used(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (20, 30):
        checkpoints.path(step).write_bytes(b"nonsense")
    checkpoints.save(11, {"weights": {}})
    assert checkpoints.steps() == [11]


def test_bad_steps_name_the_term_the_side_and_the_parameter(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "PATIENCE", 2)
    stage = ToyStage()
    bad = iter((True, True))

    def poison(step, loss):
        if step in (7, 8) and stage.calls % 2 and next(bad, False):
            return loss + torch.sqrt(stage.back.bias.sum() - 1e9)
        return loss

    stage.poison = poison
    train(tmp_path / "run", stage)
    said = capsys.readouterr().err
    assert "first at step 8: term loss, gradient of back: parameter bias)" in said


def test_the_release_refuses_them(tmp_path):
    class Model(torch.nn.Linear):
        kind = "toy"

        def describe(self):
            return {}

    model = Model(2, 2)
    model.weight.data[1, 1] = math.nan
    with pytest.raises(UserError, match="weight is NaN or infinite: these weights are not"):
        release.save(model, tmp_path, DataConfig())
    assert list(tmp_path.iterdir()) == []
