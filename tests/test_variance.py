"""The study of gradient variance: its statistics, the gradients it takes, and its command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import MixtureOracle
from sde_cases import all_sdes
from torch import Tensor, nn

from lsgm.benchmark import gradients, variance
from lsgm.benchmark.gradients import (
    Estimator,
    Latents,
    estimators,
    gradient_noise,
    step_gradients,
    study,
)
from lsgm.benchmark.variance import MixtureNetwork, VarianceOptions, run_study, variance_command
from lsgm.config.architecture import PriorConfig, PriorNetworkConfig, VAEConfig
from lsgm.config.training import DataConfig
from lsgm.data import build_datasets
from lsgm.errors import UserError
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.models.release import save
from lsgm.objectives import NormalControlVariate, prior_losses
from lsgm.score import MixedNormalScore
from lsgm.sde import VESDE, VPSDE, LinearSDE
from lsgm.times import make_proposal
from lsgm.weighting import make_weighting

LIKELIHOOD = make_weighting("likelihood")


def test_jackknife_is_leaving_out_one_after_the_other() -> None:
    draws = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    noise = gradient_noise(draws)

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        trace = x.var(0).sum()
        return trace, x.mean(0).square().sum() - trace / len(x)

    trace, signal = moments(draws)
    left_out = [moments(torch.cat([draws[:i], draws[i + 1 :]])) for i in range(7)]
    assert noise.variance == pytest.approx(trace.item())
    assert noise.signal == pytest.approx(signal.item())
    errors = (noise.variance_error, noise.signal_error)
    for error, values in zip(errors, zip(*left_out, strict=True), strict=True):
        spread = torch.stack(values).var(correction=0).item()
        assert error == pytest.approx(math.sqrt(6 * spread))


@pytest.mark.parametrize("strength", [0.5, 4.0])
def test_moments_are_unbiased_and_their_errors_are_right(strength: float) -> None:
    """Over many studies of Normal vectors: means within their errors, and errors that agree with
    the scatter; a hidden signal's error is up to the square root of two too large, never too small.
    """
    rng = torch.Generator().manual_seed(1)
    mean = strength * torch.tensor([1.0, -0.4, 0.2], dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    draws = mean + scale * torch.randn(600, 12, 3, generator=rng, dtype=torch.float64)
    noises = [gradient_noise(study) for study in draws]
    for name, exact in (("variance", scale.square().sum()), ("signal", mean.square().sum())):
        values = torch.tensor([getattr(noise, name) for noise in noises])
        errors = torch.tensor([getattr(noise, f"{name}_error") for noise in noises])
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(values))
        excess = (errors.square().mean().sqrt() / values.std()).item()
        most = math.sqrt(2) if name == "signal" and strength < 1 else 1.0
        assert 0.85 < excess < 1.15 * most


@all_sdes
def test_mixture_network_is_the_exact_prediction(sde: LinearSDE) -> None:
    oracle = MixtureOracle.ring(sde, (2, 1, 2), components=5)
    network = MixtureNetwork(sde, oracle.means, oracle.std).double()
    rng = torch.Generator().manual_seed(2)
    t = sde.time_eps + (1 - sde.time_eps) * torch.rand(50, generator=rng, dtype=torch.float64)
    x = 2 * torch.randn(50, 2, 1, 2, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(network(x, t), oracle.eps(x, t), rtol=1e-6, atol=1e-6)


def toy(sde: LinearSDE, images: int = 6) -> tuple[MixedNormalScore, Latents, nn.Linear]:
    torch.manual_seed(3)
    network = MixtureNetwork(sde, torch.randn(3, 2, 1, 2), 0.5)
    encoder = nn.Linear(3, 4)
    z0 = encoder(torch.randn(images, 3)).unflatten(1, (2, 1, 2))
    score = MixedNormalScore(network, sde, 2, mixing_init=-2.0)
    return score.eval(), Latents.of(z0, encoder.parameters()), encoder


@pytest.mark.parametrize("weighting", ["likelihood", "reweighted"])
@pytest.mark.parametrize("stratified", [False, True])
def test_gradients_are_those_of_a_training_step(weighting: str, stratified: bool) -> None:
    """With and without the control variate, on both sides, through the encoder: one evaluation of
    the network gives what two steps would.
    """
    sde = VPSDE()
    score, latents, encoder = toy(sde)
    control_variate = NormalControlVariate.of(sde)
    estimator = Estimator(weighting, "importance", stratified)
    found = step_gradients(score, sde, latents, estimator, control_variate, seed=5)
    w = make_weighting(weighting)
    for control in (False, True):
        losses = prior_losses(
            sde,
            score,
            latents.z0,
            weighting_p=w,
            proposal_p=make_proposal("importance", sde, w),
            likelihood=LIKELIHOOD,
            control_variate=control_variate if control else None,
            stratified=stratified,
            rng=torch.Generator().manual_seed(5),
        )
        sides = {
            "z_0": [latents.z0],
            "encoder": list(encoder.parameters()),
            "prior": list(score.parameters()),
        }
        for side, inputs in sides.items():
            exact = torch.autograd.grad(losses.surrogate, inputs, retain_graph=True)
            flat = torch.cat([part.flatten() for part in exact])
            # the control variate does not touch the prior
            got = found[side, control and side != "prior"]
            scale = flat.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(got, flat, rtol=1e-4, atol=1e-5 * scale)
        assert found["loss", False].item() == pytest.approx(losses.prior.item(), rel=1e-6)


def test_what_an_encoder_does_not_reach_is_left_out() -> None:
    assert Latents.of(torch.ones(1, 2, requires_grad=True), ()).encoder == ()
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    latents = Latents.of(used * 2, [used, unused])
    assert latents.encoder == (used,)


def test_rescaled_needs_a_variance_below_one() -> None:
    names = {e.weighting for e in estimators(VPSDE())} - {e.weighting for e in estimators(VESDE())}
    assert names == {"rescaled"}


def test_study_finds_what_the_paper_says() -> None:
    """For a score near N(0, I) and likelihood weighting, importance sampling lowers the variance of
    the loss, and the control variate that of the VAE's side, by more than ten times.
    """
    score, latents, _ = toy(VPSDE(), images=16)
    rows = study("vpsde", "start", score, latents, 30, weightings=["likelihood"])
    found = {(row.side, row.proposal, row.stratified, row.control_variate): row for row in rows}
    assert len(found) == len(rows) == 6 * 6
    base = found["z_0", "uniform", False, False]
    assert (base.ratio, base.ratio_error) == (1.0, 0.0)
    loss = found["loss", "importance", False, False]
    assert loss.ratio + 2 * loss.ratio_error < 0.1
    for side in ("z_0", "encoder"):
        plain = found[side, "importance", False, False]
        controlled = found[side, "importance", False, True]
        assert controlled.variance < 0.1 * plain.variance
        assert controlled.relative is not None and plain.relative is not None
        assert controlled.relative / plain.relative == pytest.approx(
            controlled.variance / plain.variance
        )


def test_stratified_times_leave_every_images_gradient_as_noisy_as_it_was() -> None:
    """Each image's time keeps its distribution, so that only sums over images gain."""
    score, latents, _ = toy(VPSDE(), images=8)
    rows = study("vpsde", "start", score, latents, 80, weightings=["unweighted"])
    by_time = {
        row.stratified: row
        for row in rows
        if (row.side, row.proposal, row.control_variate) == ("z_0", "importance", False)
    }
    error = math.hypot(by_time[False].variance_error, by_time[True].variance_error)
    assert abs(by_time[False].variance - by_time[True].variance) < 4 * error
    losses = {
        row.stratified: row.variance
        for row in rows
        if (row.side, row.proposal) == ("loss", "uniform")
    }
    assert losses[True] < 0.7 * losses[False]


def test_hidden_signal_is_not_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the mean gradient does not stand out of its error there is no relative variance."""
    rng = torch.Generator().manual_seed(4)

    def pure_noise(*args: object) -> dict[tuple[str, bool], Tensor]:
        return {("prior", False): torch.randn(50, generator=rng)}

    monkeypatch.setattr(gradients, "step_gradients", pure_noise)
    score, latents, _ = toy(VPSDE())
    rows = study("vpsde", "start", score, latents, 5, weightings=["likelihood"])
    assert all(row.relative is None and row.variance > 0 for row in rows)
    assert "| - |" in variance.format_tables(rows)


VAE_CONFIG = VAEConfig(
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_latent_per_group=2,
    cell="res_bnswish",
)
PRIOR_CONFIG = PriorConfig(
    network=PriorNetworkConfig(
        num_channels=8, num_scales=2, num_cells_per_scale=1, embedding_dim=8
    ),
    mixing_init=-2.0,
)


def write_run(folder: Path, prior: PriorConfig | None = PRIOR_CONFIG) -> str:
    torch.manual_seed(0)
    spec = build_datasets(DataConfig()).spec
    vae = build_vae(VAE_CONFIG, spec)
    model = VAEModel(vae, spec, VAE_CONFIG)
    if prior is not None:
        model = LSGM(vae, build_prior(prior, vae), spec, VAE_CONFIG, prior)
    folder.mkdir()
    save(model, folder, DataConfig())
    return str(folder)


def test_command_on_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    variance_command(
        ["--run", run, "--images", "4", "--repeats", "3", "--sdes", "vesde"]
        + ["--weightings", "likelihood"]
    )
    report = json.loads((tmp_path / "run" / "variance" / "variance.json").read_text())
    assert report["options"]["run"] == run
    seen = {(row["sde"], row["state"]) for row in report["rows"]}
    assert seen == {("vpsde", "trained"), ("vesde", "start")}
    assert {row["side"] for row in report["rows"]} == {"loss", "prior", "z_0", "encoder"}
    picture = (tmp_path / "run" / "variance" / "variance.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "### vpsde, trained: variance / squared norm of the mean" in out
    assert out.count("| likelihood | importance | stratified |") == 4


def test_command_without_a_run_is_repeatable(tmp_path: Path) -> None:
    options = [
        "--images",
        "4",
        "--repeats",
        "3",
        "--weightings",
        "likelihood",
        "--sdes",
        "subvpsde",
    ]
    reports = []
    for name in ("a", "b"):
        variance_command([*options, "--out", str(tmp_path / name)])
        reports.append(json.loads((tmp_path / name / "variance.json").read_text())["rows"])
    assert reports[0] == reports[1]
    assert {row["sde"] for row in reports[0]} == {"subvpsde"}


def test_mistakes(tmp_path: Path) -> None:
    for arguments, message in (
        (["--sdes", "vp"], "sdes: must be among vpsde"),
        (["--weightings", "snr"], "weightings: must be among likelihood"),
        (["--repeats", "2"], "repeats: too few"),
        (["--images", "0"], "images: too few"),
        (["--run", str(tmp_path / "nowhere")], "no such run folder"),
    ):
        with pytest.raises(UserError, match=message):
            variance_command(arguments)
    vae = write_run(tmp_path / "vae", None)
    with pytest.raises(UserError, match="needs an LSGM"):
        run_study(VarianceOptions(run=vae))
    plain = write_run(tmp_path / "plain", replace(PRIOR_CONFIG, mixed=False))
    with pytest.raises(UserError, match="--sdes: .* no Normal part"):
        run_study(VarianceOptions(run=plain, sdes=("geometric",)))
