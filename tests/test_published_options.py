"""The published system's choices where ours are others: each option does what it says, exactly."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training_stages import (
    NETWORK,
    PENALISED,
    PLAIN,
    SDES,
    context,
    images,
    in_float64,  # noqa: F401 - a fixture
    make_model,
    short_run,
    vae_run,  # noqa: F401 - a fixture
)
from torch import Tensor, nn

import vae.objective
from lsgm.config.architecture import PriorConfig
from lsgm.config.training import DataConfig, LSGMTrainConfig, ObjectiveConfig
from lsgm.data import Datasets, build_datasets
from lsgm.data.arrays import ArrayDataset
from lsgm.models.latent import LSGM
from lsgm.models.loading import load
from lsgm.objectives import NormalControlVariate, prior_losses
from lsgm.score import MixedNormalScore
from lsgm.sde import VPSDE
from lsgm.times import make_proposal
from lsgm.training import World
from lsgm.training.context import EvalContext
from lsgm.training.runs.latent import train_lsgm
from lsgm.training.runs.scan import LatentScan
from lsgm.training.stages.latent import LSGMStage
from lsgm.weighting import make_weighting
from vae.layers import BatchNorm
from vae.objective import kl_balance_weights


def gradients(
    prior: PriorConfig, objective: ObjectiveConfig, model: LSGM | None = None
) -> dict[str, Tensor]:
    """Of one training step in float64, by parameter."""
    model = make_model(prior).double() if model is None else model
    stage = LSGMStage(model, objective, prior).train()
    stage(images().double(), context()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.usefixtures("in_float64")
def test_the_kl_factor_scales_the_priors_gradient_and_not_its_regularisers() -> None:
    """The published joint step gives the prior c times its own gradient (c: KL coefficient)."""
    prior = PriorConfig(NETWORK, mixing_init=-1.0)
    own = gradients(prior, PLAIN)
    scaled = gradients(replace(prior, kl_scales_prior=True), PLAIN)
    penalised = gradients(replace(prior, **PENALISED), PLAIN)
    both = gradients(replace(prior, kl_scales_prior=True, **PENALISED), PLAIN)
    coefficient = LSGMStage(make_model(prior), PLAIN, prior).kl_coefficient(context())
    assert 0.7 < coefficient < 1
    assert own.keys() == scaled.keys() and any(name.startswith("vae.") for name in own)
    for name, gradient in own.items():
        factor = coefficient if name.startswith("score.") else 1.0
        close(scaled[name], factor * gradient)
        close(both[name], factor * gradient + (penalised[name] - gradient))
    assert any(not torch.equal(both[name], scaled[name]) for name in own)


def close(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_prior_gets_the_gradient_of_the_vaes_loss_balance_included(
    balanced: bool, control: bool
) -> None:
    """Against autograd through ``mean_b sum balance w (eps_hat - eps)^2``, written out, for both
    sides; the balance depends on the errors and has no gradient.
    """
    prior = PriorConfig(NETWORK, SDES["geometric"], mixing_init=-1.0)
    score = make_model(prior).double().score
    sde, likelihood = score.sde, make_weighting("likelihood")
    proposal = make_proposal("importance", sde, likelihood)
    z0 = torch.randn(3, 4, 4, 4, dtype=torch.float64, requires_grad=True)

    def balance(weighted: Tensor) -> Tensor:
        return 0.7 * weighted.mean((0, 2, 3), keepdim=True)

    control_variate = NormalControlVariate.of(sde) if control else None
    losses = prior_losses(
        sde,
        score,
        z0,
        weighting_p=likelihood,
        proposal_p=proposal,
        likelihood=likelihood,
        balance=balance if balanced else 0.7,
        control_variate=control_variate,
        balance_prior=True,
        rng=torch.Generator().manual_seed(0),
    )
    inputs = [z0, *score.parameters()]
    ours = torch.autograd.grad(losses.surrogate, inputs, allow_unused=True)

    rng = torch.Generator().manual_seed(0)
    eps = torch.randn(z0.shape, generator=rng).double()
    times = proposal.sample(3, rng)
    t = times.t.double()
    z_t = sde.perturb(z0, t, eps)
    weight = (likelihood(sde, times.t) * times.inverse_density).double().view(-1, 1, 1, 1)
    error = (score(z_t, t) - eps).square()
    control_term = torch.zeros((), dtype=torch.float64)
    if control_variate is not None:
        control_term = control_variate.expected(z0) - weight * control_variate.error(z0, t, eps)
    ce = weight * error + control_term
    factor = balance(ce).detach() if balanced else 0.7
    exact = torch.autograd.grad((factor * ce).sum() / 3, inputs, allow_unused=True)
    assert ours[1].abs().max() > 1e-3
    for a, b in zip(ours, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * b.abs().max().item())


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "line",
    [
        {"weighting_p": "unweighted"},
        {"proposal_q": "importance"},
        {"training": "disjoint"},
        {"training": "frozen"},
    ],
)
def test_objectives_that_differ_leave_the_prior_its_own(line: dict[str, str]) -> None:
    prior = PriorConfig(NETWORK, mixing_init=-1.0, **line)  # type: ignore[arg-type]
    own = gradients(prior, PLAIN)
    scaled = gradients(replace(prior, kl_scales_prior=True), PLAIN)
    assert own.keys() == scaled.keys()
    assert all(torch.equal(own[name], scaled[name]) for name in own)


def statistics(model: LSGM) -> list[Tensor]:
    layers = [m for m in model.vae.modules() if isinstance(m, BatchNorm)]
    return [buffer.clone() for m in layers for buffer in (m.running_mean, m.running_var)]


def test_a_frozen_vae_normalises_by_batch_or_running_statistics() -> None:
    """batch: it computes what a VAE in training mode computes, and its running statistics move as
    that one's do; running: what one in evaluation mode computes, and nothing moves.
    """
    prior = PriorConfig(NETWORK, training="frozen")
    start = make_model(prior)
    for kind in ("batch", "running"):
        model, twin = copy.deepcopy(start), copy.deepcopy(start)
        chosen = replace(prior, frozen_statistics=kind)  # type: ignore[arg-type]
        stage = LSGMStage(model, PLAIN, chosen).train()
        output = stage(images(), context())
        output.loss.backward()
        assert all(p.grad is None for p in model.vae.parameters())
        # The reconstruction is the first term that the stage computes, of the same draws.
        joint = LSGMStage(twin, PLAIN, prior)
        joint.train()
        twin.vae.train(kind == "batch")
        expected = joint(images(), context())
        assert torch.equal(output.metrics["nelbo"], expected.metrics["nelbo"])
        pairs = list(zip(statistics(model), statistics(twin), statistics(start), strict=True))
        assert len(pairs) > 10 and all(torch.equal(a, b) for a, b, _ in pairs)
        assert any(not torch.equal(a, c) for a, _, c in pairs) == (kind == "batch")
        stage.eval()
        assert not any(m.training for m in model.vae.modules())


def test_batch_statistics_of_a_frozen_vae_end_in_the_release(
    vae_run: Path,  # noqa: F811
    tmp_path: Path,
    scripted: dict[int, float],
) -> None:
    scripted.update(dict.fromkeys(range(1, 5), 1.0))
    first = load(vae_run)
    released = {}
    for kind in ("running", "batch"):
        prior = PriorConfig(NETWORK, training="frozen", frozen_statistics=kind)  # type: ignore[arg-type]
        config = every_epoch(short_run(vae_run, prior), "last")
        released[kind] = load(train_lsgm(config, str(tmp_path / kind)))
    weights = dict(first.vae.named_parameters())
    for model in released.values():
        assert all(torch.equal(p, weights[name]) for name, p in model.vae.named_parameters())
    buffers = dict(first.vae.named_buffers())
    moved = {
        kind: sum(not torch.equal(b, buffers[name]) for name, b in model.vae.named_buffers())
        for kind, model in released.items()
    }
    assert moved["running"] == 0 and moved["batch"] > 10


class Recorder(nn.Module):
    """Returns its input times a number, and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x)
        return self.scale * x + 1


def test_the_published_mask_hides_the_input_and_goes_on_training_the_mixing() -> None:
    score = MixedNormalScore(Recorder(), VPSDE(), 3, mixing_init=-1.0, mask_mixing=False)
    score.deactivate(torch.tensor([False, True, False]))
    logit = score.mixing_logit
    assert logit is not None and logit.flatten().tolist() == [-1.0, -15.0, -1.0]
    x, t = torch.randn(2, 3, 4, 4), torch.rand(2)
    eps = score(x, t)
    assert not score.network.seen[0][:, 1].any()  # type: ignore[operator, union-attr]
    a = torch.sigmoid(torch.tensor(-15.0))
    normal = VPSDE().normal_component(x, t)
    torch.testing.assert_close(eps[:, 1], ((1 - a) * normal[:, 1] + a))  # the network says 1
    eps.square().sum().backward()
    assert logit.grad is not None and bool((logit.grad != 0).all())


def test_the_published_mask_is_in_checkpoints_and_not_in_the_release(
    vae_run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scripted: dict[int, float],
) -> None:
    scripted.update(dict.fromkeys(range(1, 5), 1.0))
    inactive = torch.tensor([True, False, False, True])
    monkeypatch.setattr(LatentScan, "inactive_channels", lambda *_, **__: inactive)
    prior = PriorConfig(NETWORK, drop_inactive=True, inactive_mask="training")
    config = every_epoch(short_run(vae_run, prior), "last")
    out = train_lsgm(config, str(tmp_path / "run"))
    last = max((out / "checkpoints").glob("step_*.pt"))
    state = torch.load(last, weights_only=True)
    masks = state["weights"]["model.score.channel_mask"], state["ema"]["prior"]
    assert torch.equal(masks[0].flatten() == 0, inactive)
    assert torch.equal(masks[1]["module.channel_mask"].flatten() == 0, inactive)
    model = load(out)
    assert isinstance(model, LSGM) and bool((model.score.channel_mask == 1).all())
    logits = model.score.mixing_logit
    assert logits is not None
    assert torch.equal(logits.flatten() < -14.9, inactive)


def test_the_averaged_prior_drops_features_only_where_asked() -> None:
    """The VAE's term depends on dropout's generator exactly if the averaged prior drops."""
    network = replace(NETWORK, dropout=0.5)
    for drops in (False, True):
        prior = PriorConfig(
            network, training="disjoint", update_q_ema=True, q_ema_dropout=drops, mixing_init=-1.0
        )
        stage = LSGMStage(make_model(prior), PLAIN, prior).train()
        stage.model.vae.eval()
        average = copy.deepcopy(stage.model.score)
        stage.use_average({"prior": average})
        losses = set()
        for seed in range(3):
            torch.manual_seed(seed)
            losses.add(stage(images(), context()).metrics["vae_loss"].item())
        assert (len(losses) == 3) == drops and (len(losses) == 1) == (not drops)
        stage.eval()
        assert not average.training
        stage.train()
        assert average.training == drops


@pytest.mark.parametrize("sync", [False, True])
def test_balance_of_each_process_or_of_all(sync: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with mean KL (3, 1) and (1, 3): alone 3 to 1, together 1 to 1."""
    other = torch.tensor([1.01, 3.01])
    monkeypatch.setattr(vae.objective.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(vae.objective.dist, "all_reduce", lambda size: size.add_(other))
    kl = torch.tensor([[3.0, 1.0]])
    weights = kl_balance_weights(kl, [2], 0.5, sync=sync)
    alone = torch.tensor([3.01, 1.01]) / 2.01
    torch.testing.assert_close(weights, torch.ones(2) if sync else alone)


@pytest.mark.parametrize("sync", [False, True])
def test_the_stages_pass_the_choice_of_balance_on(
    sync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(vae.objective.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(vae.objective.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(vae.objective.dist, "all_reduce", calls.append)
    objective = replace(PLAIN, kl_balance=True, kl_balance_sync=sync)
    prior = PriorConfig(NETWORK)
    LSGMStage(make_model(prior), objective, prior)(images(), context())
    assert bool(calls) == sync


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, float]]:
    """The evaluations' NELBO by step; a step that is missing stops the run. Data of 16 images."""
    values: dict[int, float] = {}
    digits = build_datasets(DataConfig())
    few = replace(digits, train=ArrayDataset(digits.train.batch(torch.arange(16))))
    monkeypatch.setattr("lsgm.training.runs.latent.build_datasets", lambda _: few)

    def evaluate(*arguments: object) -> dict[str, float]:
        (context,) = (a for a in arguments if isinstance(a, EvalContext))
        if context.step not in values:
            raise KeyboardInterrupt
        return {"nelbo": values[context.step]}

    monkeypatch.setattr("lsgm.training.runs.latent.evaluate_vae", evaluate)
    yield values


def every_epoch(config: LSGMTrainConfig, release: str) -> LSGMTrainConfig:
    """Four epochs of one step."""
    train = replace(
        config.train, batch_size=16, max_steps=4, eval_every=1, checkpoint_every=1,
        keep_checkpoints=4, release=release,
    )  # fmt: skip
    return replace(config, train=train)


def released_step(run: Path) -> int:
    """The step whose averaged weights of both sides the run has released."""
    model = load(run)
    found = []
    for path in sorted((run / "checkpoints").glob("step_*.pt")):
        averages = torch.load(path, weights_only=True)["ema"]
        sides = {"prior": model.score, "vae": model.vae}
        if averages and all(
            torch.equal(p, averages[side][f"module.{name}"])
            for side, module in sides.items()
            for name, p in module.named_parameters()
        ):
            found.append(int(path.stem.removeprefix("step_")))
    (step,) = found
    return step


def test_a_run_releases_its_last_or_its_best_weights(
    vae_run: Path,  # noqa: F811
    tmp_path: Path,
    scripted: dict[int, float],
) -> None:
    scripted.update({1: 9.0, 2: 5.0, 3: math.nan, 4: 6.0})
    config = short_run(vae_run, PriorConfig(NETWORK))
    last = train_lsgm(every_epoch(config, "last"), str(tmp_path / "last"))
    best = train_lsgm(every_epoch(config, "best"), str(tmp_path / "best"))
    assert (released_step(last), released_step(best)) == (4, 2)
    assert not (last / "checkpoints" / "best").exists()
    assert json.loads((best / "run.json").read_text())["release"] == {"step": 2, "nelbo": 5.0}
    assert [p.name for p in (best / "checkpoints" / "best").iterdir()] == ["step_00000002.pt"]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_best_weights_outlive_an_interruption(
    vae_run: Path,  # noqa: F811
    tmp_path: Path,
    scripted: dict[int, float],
    damaged: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A resumed run releases the best of all sessions; of a damaged file it says so and goes on."""
    scripted.update({1: 5.0, 2: 7.0})
    config = every_epoch(short_run(vae_run, PriorConfig(NETWORK)), "best")
    with pytest.raises(KeyboardInterrupt):
        train_lsgm(config, str(tmp_path / "run"))
    kept = tmp_path / "run" / "checkpoints" / "best" / "step_00000001.pt"
    if damaged:
        kept.write_bytes(kept.read_bytes()[:1000])
    scripted.update({3: 8.0, 4: 6.0})
    run = train_lsgm(config, str(tmp_path / "run"), resume=True)
    assert released_step(run) == (4 if damaged else 1)
    said = capsys.readouterr().out
    assert ("the best evaluation's weights are lost" in said) == damaged


def test_without_a_finite_evaluation_the_last_weights_are_released(
    vae_run: Path,  # noqa: F811
    tmp_path: Path,
    scripted: dict[int, float],
) -> None:
    scripted.update(dict.fromkeys(range(1, 5), math.nan))
    config = every_epoch(short_run(vae_run, PriorConfig(NETWORK)), "best")
    run = train_lsgm(config, str(tmp_path / "run"))
    assert released_step(run) == 4
    assert "release" not in json.loads((run / "run.json").read_text())


@pytest.mark.parametrize(("mask", "augmented"), [("kept", False), ("training", True)])
def test_the_published_scan_for_inactive_channels_reads_images_as_training_does(
    mask: str, augmented: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flips included; ours reads the images as they are."""
    flags: list[bool] = []

    def record(x: Tensor, *_: object, train: bool = False) -> Tensor:
        flags.append(train)
        return 2 * x.round() - 1

    monkeypatch.setattr("lsgm.training.runs.scan.preprocess", record)
    prior = PriorConfig(NETWORK, drop_inactive=True, inactive_mask=mask)  # type: ignore[arg-type]
    data = ArrayDataset(images(8))
    model = make_model(prior)
    scan = LatentScan(
        model, Datasets(data, data, model.spec), tmp_path, World(torch.device("cpu")),
        batch_size=4, precision="float32",
    )  # fmt: skip
    inactive = scan.inactive_channels(None, augmented=mask == "training")
    assert flags == [augmented] * 2 and inactive.shape == (model.score.channels,)
