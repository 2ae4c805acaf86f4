import json
import math
from dataclasses import replace

import pytest
import torch
from training_toy import BATCH, OPTIMS, TRAIN, ToyBatches, ToyStage, train

from lsgm.config.training import OptimConfig
from lsgm.errors import UserError
from lsgm.objectives import prior_losses
from lsgm.sde import VPSDE
from lsgm.system.device import choose_device
from lsgm.times import make_proposal
from lsgm.training import loop
from lsgm.training.distributed import World
from lsgm.training.precision import autocast, make_scaler
from lsgm.training.state import Stage, StepContext, StepOutput, TrainState
from lsgm.training.step import Step, step_seed
from lsgm.weighting import make_weighting

PLAIN = {name: replace(o, ema_decay=0.0, clip_norm=0.0) for name, o in OPTIMS.items()}


class Exact(ToyStage):
    """Computes in float32 whatever the precision of the run, and without noise."""

    def __init__(self):
        super().__init__(dropout=0.0, norm=False)

    def forward(self, images, context):
        with torch.autocast("cpu", enabled=False):
            return super().forward(images, context)


def make_step(stage, optims=OPTIMS, **changes):
    config = replace(TRAIN, **{"accumulate": 1, **changes})
    state = TrainState(
        stage,
        optims,
        make_scaler(torch.device("cpu"), config.precision),
        total_steps=100,
        steps_per_epoch=5,
    )
    return Step(
        state,
        stage,
        World(torch.device("cpu")),
        seed=config.seed,
        accumulate=config.accumulate,
        precision=config.precision,
        shared_noise=config.shared_noise,
        channels_last=config.channels_last,
    )


def images(step=0):
    return next(iter(ToyBatches().epoch(0, step)))[1]


def weights(stage):
    return {k: v.clone() for k, v in stage.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_parts_of_a_batch_add_up_to_the_batch(tmp_path, monkeypatch):
    # Without noise, since each part draws its own.
    monkeypatch.setattr("training_toy.randn", lambda shape, rng, device: torch.zeros(shape))
    results = [
        train(tmp_path / str(n), ToyStage(dropout=0.0, norm=False), accumulate=n) for n in (1, 2, 4)
    ]
    for other in results[1:]:
        for a, b in zip(
            results[0].state.stage.parameters(), other.state.stage.parameters(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_is_the_optimizers_step_on_the_clipped_gradient():
    stage, reference = Exact(), Exact()
    step = make_step(stage, {n: replace(o, clip_norm=0.01) for n, o in OPTIMS.items()})
    result = step(images())
    generator = torch.Generator().manual_seed(step_seed(TRAIN.seed, 0, 0, 0))
    from lsgm.training import StepContext
    from lsgm.training.optimizers import make_optimizer

    reference(images(), StepContext(0, 100, generator)).loss.backward()
    for name, module in reference.trainables().items():
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
        torch.testing.assert_close(result.metrics[-1][f"grad_norm/{name}"], norm)
        for p in module.parameters():
            p.grad *= min(1.0, 0.01 / norm)
        optimizer = make_optimizer(module.parameters(), OPTIMS[name])
        optimizer.param_groups[0]["lr"] = result.rates[name]
        optimizer.step()
    for a, b in zip(stage.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optims", [OPTIMS, PLAIN])
def test_the_scaler_changes_nothing_when_nothing_overflows(tmp_path, optims):
    # Its scale is a power of two, so not even rounding differs.
    plain = train(tmp_path / "a", Exact(), optims=optims)
    scaled = train(tmp_path / "b", Exact(), optims=optims, precision="fp16")
    assert equal(weights(plain.state.stage), weights(scaled.state.stage))
    assert scaled.state.scaler.get_scale() == 2.0**10


def test_an_overflow_on_one_side_holds_back_both_and_halves_the_scale_once():
    stage = Exact()
    step = make_step(stage, precision="fp16")
    step(images())
    before, ema = weights(stage), weights(step.state.sides["back"].ema.module)
    front = stage.front[0].weight
    hook = front.register_hook(lambda gradient: gradient * math.inf)
    result = step(images(1))
    hook.remove()
    assert not result.applied and step.state.counters.skipped == 1
    assert equal(before, weights(stage))
    assert equal(ema, weights(step.state.sides["back"].ema.module))
    assert step.state.scaler.get_scale() == 2.0**9
    assert step(images(2)).applied and step.state.counters.step == 3
    assert step.state.sides["front"].optimizer.state[front]["step"] == 2
    assert not equal(before, weights(stage))


class HalfNetwork(torch.nn.Module):
    """A noise prediction whose activations' gradients are fp16."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, z, t):
        return (self.gain.half() * z.half()).float()


class InnerStage(Stage):
    """Both sides of an LSGM's loss, whose encoder's part has a backward pass of its own."""

    def __init__(self, coefficient):
        super().__init__()
        self.vae, self.score = torch.nn.Linear(36, 4), HalfNetwork()
        self.coefficient = coefficient

    def trainables(self):
        return {"vae": self.vae, "prior": self.score}

    def forward(self, images, context):
        likelihood = make_weighting("likelihood")
        with torch.autocast("cpu", enabled=False):
            losses = prior_losses(
                VPSDE(),
                self.score,
                self.vae(images.flatten(1)),
                weighting_p=make_weighting("unweighted"),
                proposal_p=make_proposal("importance", VPSDE(), make_weighting("unweighted")),
                likelihood=likelihood,
                proposal_q=make_proposal("importance", VPSDE(), likelihood),
                balance=self.coefficient,
                loss_scale=context.loss_scale,
                rng=context.rng,
            )
        return StepOutput(losses.surrogate, {"prior_loss": losses.prior})


def test_an_overflow_in_the_encoders_own_backward_pass_is_recovered_from():
    """At first it passes fp16's 65504; the scaler's halving reaches it, and steps are taken."""
    optims = {name: OptimConfig(lr=1e-3, warmup_steps=0) for name in ("vae", "prior")}

    def gradient(loss_scale):
        stage = InnerStage(300.0)
        context = StepContext(0, 1, torch.Generator().manual_seed(0), loss_scale)
        stage(images(), context).loss.backward()
        return stage.vae.weight.grad

    assert torch.isfinite(gradient(1.0)).all() and not torch.isfinite(gradient(2.0**10)).all()
    step = make_step(InnerStage(300.0), optims=optims, precision="fp16")
    applied = [step(images()).applied for _ in range(40)]
    skipped = applied.count(False)
    assert not applied[0] and 0 < skipped < 10 and all(applied[-15:])
    assert step.state.counters.skipped == skipped
    assert step.state.scaler.get_scale() == 2.0 ** (10 - skipped)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_used_and_learns(tmp_path, precision):
    stage = ToyStage(dropout=0.0)
    seen = set()
    stage.front[0].register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    before = weights(stage)
    result = train(tmp_path / "run", stage, precision=precision)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert all(p.dtype == torch.float32 for p in stage.parameters())
    assert result.state.counters.skipped == 0 and not equal(before, weights(stage))
    full = train(tmp_path / "full", ToyStage(dropout=0.0))
    a, b = weights(stage), weights(full.state.stage)
    start = ToyStage(dropout=0.0).state_dict()
    for key in ("front.0.weight", "back.weight"):  # the same way, roughly
        x, y = (a[key] - start[key]).flatten(), (b[key] - start[key]).flatten()
        assert torch.nn.functional.cosine_similarity(x, y, dim=0) > 0.95


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_skips_the_step_and_leaves_no_trace(precision, value):
    stage = ToyStage(dropout=0.0)
    step = make_step(stage, precision=precision)
    before = weights(stage)
    stage.poison = lambda number, loss: loss * value
    assert not step(images() * value).applied  # running statistics would be NaN now
    assert equal(before, weights(stage))
    stage.poison = lambda number, loss: loss
    assert step(images()).applied
    assert all(torch.isfinite(v).all() for v in stage.state_dict().values())
    assert all(p.grad is None for p in stage.parameters())


def test_a_loss_that_is_nan_with_finite_gradients_counts():
    stage = ToyStage()
    stage.poison = lambda number, loss: loss + torch.tensor(math.nan)
    step = make_step(stage)
    assert not step(images()).applied


def test_a_few_bad_steps_are_counted_and_do_not_enter_the_log(tmp_path):
    stage = ToyStage()
    stage.poison = lambda step, loss: loss * math.nan if step in (1, 2, 9) else loss
    result = train(tmp_path / "run", stage)
    assert result.state.counters.skipped == 3 and result.state.counters.returns == 0
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    trained = [r for r in records if r["phase"] == "train"]
    assert [r["skipped"] for r in trained] == [2, 2, 3, 3]
    assert all(math.isfinite(r["loss"]) and r["constant"] == 2.0 for r in trained)


def test_many_bad_steps_return_to_the_checkpoint_with_half_the_rate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "PATIENCE", 3)
    stage = ToyStage()
    seen = []

    def poison(step, loss):
        # As a divergence does: all is bad until the learning rate is lower.
        diverged = step >= 7 and rates["back"] > 1.2e-3
        seen.append((step, diverged))
        return loss * math.nan if diverged else loss

    rates = {}

    original = TrainState.set_learning_rates

    def spy(self):
        rates.update(original(self))
        return dict(rates)

    monkeypatch.setattr(TrainState, "set_learning_rates", spy)
    stage.poison = poison
    result = train(tmp_path / "run", stage)
    counters = result.state.counters
    assert (counters.step, counters.returns, counters.lr_multiplier) == (15, 1, 0.5)
    assert counters.skipped == 3
    steps = [step for step, _ in seen[::2]]
    assert steps == [*range(10), *range(6, 15)]  # the checkpoint after step 6
    err = capsys.readouterr().err
    assert "back to step 6, learning rates x 0.5 (return 1 of 5)" in err
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["phase"] == "train"] == [4, 8, 12, 15]
    assert [r["step"] for r in records if r["phase"] == "return"] == [6]
    again = train(tmp_path / "run", ToyStage(), resume=True)
    assert again.state.counters.returns == 1


def test_hopeless_training_gives_up_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PATIENCE", 2)
    stage = ToyStage()
    stage.poison = lambda step, loss: loss * math.nan
    before = weights(stage)
    with pytest.raises(UserError, match=r"after 5 returns.*learning rate") as error:
        train(tmp_path / "run", stage)
    assert "\n" not in str(error.value)
    assert equal(before, weights(stage))


def test_a_checkpoint_is_not_written_amid_bad_steps(tmp_path):
    stage = ToyStage()
    stage.poison = lambda step, loss: loss * math.nan if step in (4, 5, 6) else loss
    seen = []
    stage.on_step = lambda step: seen.append(
        (step, sorted(p.name for p in (tmp_path / "run/checkpoints").glob("*.pt"))[-1])
    )
    train(tmp_path / "run", stage)
    latest = dict(seen)
    assert latest[7] == "step_00000003.pt"  # step 6 was bad
    assert latest[8] == "step_00000008.pt"


def test_evaluation_gets_the_averages_in_evaluation_mode(tmp_path):
    stage = ToyStage()
    seen = []

    def evaluate(context):
        assert not context.stage.training and not torch.is_grad_enabled()
        assert all(not m.training for m in context.models.values())
        assert context.models["front"] is not stage.front
        context.log_image("picture", torch.rand(1, 4, 4))
        seen.append((context.step, context.epoch))
        return {"score": 1.0, "bad": math.nan}

    result = train(tmp_path / "run", stage, evaluate=evaluate, eval_every=2)
    assert seen == [(10, 2), (15, 3)] and stage.training
    assert result.metrics["score"] == 1.0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["phase"] == "eval" and last["bad"] is None  # JSON knows no NaN
    assert last["train_seconds"] > 0
    emas = result.state.ema_models()
    assert set(emas) == {"front", "back"}
    assert result.state.evaluation_models()["front"] is emas["front"].module
    plain = train(tmp_path / "plain", optims=PLAIN)
    assert plain.state.evaluation_models()["front"] is plain.state.stage.front


def test_noise_follows_the_number_of_the_step_only():
    assert step_seed(0, 1) != step_seed(1, 0) != step_seed(1, 0, 0)
    assert 0 <= step_seed(2**31, 10**9, 3) < 2**63
    a, b = make_step(ToyStage()), make_step(ToyStage())
    torch.manual_seed(1)
    x = a(images()).metrics[0]["loss"]
    torch.manual_seed(2)
    assert torch.equal(x, b(images()).metrics[0]["loss"])


@pytest.mark.parametrize("shared", [True, False])
def test_channels_last_and_noise_modes_run(tmp_path, shared):
    for layout in (True, False):
        out = tmp_path / f"{layout}"
        result = train(out, channels_last=layout, shared_noise=shared, max_steps=3)
        assert result.state.step == 3


def test_compiling_compiles_the_networks_and_not_the_stage(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    stage = ToyStage()
    train(tmp_path / "run", stage, compile=True, max_steps=1)
    assert compiled == [stage.front, stage.back]


def test_mistakes_of_the_caller_are_named(tmp_path):
    with pytest.raises(UserError, match=r"8 is not a multiple of 3 process"):
        train(tmp_path / "a", world=World(torch.device("cpu"), 0, 3))
    with pytest.raises(ValueError, match=r"trains .*'back', 'front'.*\['back'\]"):
        train(tmp_path / "b", optims={"back": OPTIMS["back"]})
    stage = ToyStage()
    stage.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"extra\.weight requires a gradient"):
        train(tmp_path / "c", stage)
    stage = ToyStage()
    stage.trainables = lambda: {"front": stage, "back": stage.back}
    with pytest.raises(ValueError, match="two sides"):
        train(tmp_path / "d", stage)
    with pytest.raises(ValueError, match="no precision"):
        autocast(torch.device("cpu"), "fp8")


def test_devices_that_are_missing_are_named():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "xpu")
    with pytest.raises(UserError, match="no device"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="not available"):
            choose_device("cuda:3")


def test_a_device_without_float64_is_not_chosen(monkeypatch):
    mps = torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: mps)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="device: mps has no 64-bit floats.*use cpu or auto"):
        choose_device("mps")


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    from test_training_checkpoint import _fill_disk

    stage = ToyStage()
    stage.on_step = lambda step: _fill_disk(monkeypatch, 3000) if step == 4 else None
    with pytest.raises(OSError, match=r"No space left.*step_00000003\.pt is intact"):
        train(tmp_path / "run", stage)
    monkeypatch.undo()
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step_00000000.pt", "step_00000003.pt"]
    assert train(tmp_path / "run", resume=True).state.step == 15


def test_batches_have_the_size_of_the_toy():
    assert images().shape[0] == BATCH
