"""What imported score-SDE checkpoints compute, against the published implementation: networks,
scores, losses, sampler steps, probability flow and likelihood.

Any ``scoresde_*.npz`` with its ``.pth`` is tested by its own options. Limits are relative to the
largest entry.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from score_sde_fixtures import CORRECTORS, PREDICTORS, Fixture, close, fixtures
from torch import Tensor

import lsgm
import lsgm.sde
from lsgm.config.command_line import save_config
from lsgm.divergence import HutchinsonDivergence
from lsgm.importers.score_sde import import_score_sde
from lsgm.likelihood import ode_log_density
from lsgm.models.images import DataSGM
from lsgm.networks.data_score import DataScore
from lsgm.objectives import denoising_score_matching
from lsgm.solvers import DiscretePredictorCorrector, base, make_solver
from lsgm.solvers.base import Problem, probability_flow_velocity
from lsgm.solvers.discrete import table_at
from lsgm.solvers.sampler import Sampler
from lsgm.tensors import expand_like, sum_except_batch
from lsgm.training.stages.score import ScoreStage
from lsgm.weighting import make_weighting


def with_arrays(*names: str) -> Any:
    return pytest.mark.parametrize("fixture", fixtures(*names))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def table_std(fixture: Fixture, k: int) -> Tensor:
    """What the published score is divided by at ``t[k]``."""
    if fixture.continuous:
        return fixture["std"][k]
    name = "sigmas" if fixture.ve else "sqrt_1m_alphas_cumprod"
    return fixture[name][fixture["labels"][k].long()]


def noise_prediction(fixture: Fixture, net: Tensor, k: int) -> Tensor:
    """The stored network output ``F`` as a noise prediction."""
    if not fixture.ve:
        return net.double()
    sigma = table_std(fixture, k)
    return -net.double() * expand_like(sigma.double(), net)


@with_arrays("net_raw", "net_ema")
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_network_outputs(fixture: Fixture, weights: str) -> None:
    model = fixture.model(weights)
    for k, t in enumerate(fixture["t"]):
        eps = model.score(fixture["xt"][k], t)
        close(eps, noise_prediction(fixture, fixture["net_" + weights][k], k), 1e-5, f"at {t}")


@with_arrays("labels")
def test_what_the_network_is_told(fixture: Fixture) -> None:
    model = fixture.averaged
    for t, labels in zip(fixture["t"], fixture["labels"], strict=True):
        if not isinstance(model.score, DataScore):
            assert torch.equal(model.score.ladder.index(t), labels.long())
        elif not fixture.continuous:
            close(model.score.index(t) + 1, labels + 1, 1e-6)
        elif fixture.ve:
            close(model.score.ln_sigma(t).exp(), labels, 1e-6)
        else:
            close(model.score.network.embedding.features.scale * t, labels, 1e-6)


@with_arrays("score_raw", "score_ema")
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_scores(fixture: Fixture, weights: str) -> None:
    """Multiplied by the published float32 standard deviation, which has few digits at small t."""
    model = fixture.model(weights)
    for k, (t, x) in enumerate(zip(fixture["t"], fixture["xt"], strict=True)):
        scaled = fixture["score_" + weights][k] * expand_like(table_std(fixture, k), x)
        close(-model.score(x, t), scaled, 1e-5, f"at {t}")


@with_arrays("mean_coef", "std", "g")
def test_coefficients(fixture: Fixture) -> None:
    """To the rounding of float32: that of ``1 - exp(.)`` is of the size of 1, not of the result."""
    sde = fixture.averaged.sde
    t = fixture["t"].double().flatten()
    if not fixture.continuous and not fixture.ve:
        pytest.skip("the kernel of a discrete model is that of its table")
    close(sde.mean_coef(t), fixture["mean_coef"].flatten(), 1e-6)
    close(sde.var(t).sqrt(), fixture["std"].flatten(), 1e-6 if fixture.ve else 1e-5)
    close(sde.g2(t).sqrt(), fixture["g"].flatten(), 1e-6)
    drift = fixture["drift_coef"].flatten()
    assert (sde.f(t) - drift).abs().max() <= 1e-6 * drift.abs().max().clamp(min=1)


@with_arrays("x_scaled", "x_deq_scaled")
def test_data_scaling(fixture: Fixture) -> None:
    pixels = fixture.averaged.pixels
    images = fixture["x_u8"].float() / 255
    close(pixels.to_network(images), fixture["x_scaled"], 1e-6)
    close(pixels.to_images(fixture["x_scaled"]), images, 1e-6)


@with_arrays("pf_drift_ema")
def test_probability_flow(fixture: Fixture) -> None:
    """With the published coefficients of the score in place of the exact ones: in float32, or of
    the table.
    """
    model = fixture.averaged
    for k, t in enumerate(fixture["t"]):
        x, exact = fixture["xt"][k], t.double()
        if model.sde.var(exact).min() < 1e-10:
            continue  # no score of ours at t = 0
        velocity = probability_flow_velocity(model.sde, model.score(x, t), x, exact)
        drift = expand_like(model.sde.f(exact), x) * x
        std = table_std(fixture, k).double()
        factor = fixture["g"][k].double().square() / std
        ratio = expand_like(factor * model.sde.var(exact).sqrt() / model.sde.g2(exact), x)
        close(drift + ratio * (velocity - drift), fixture["pf_drift_ema"][k], 1e-5, f"at {t}")


@with_arrays("loss_plain_mean_raw")
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_continuous_losses(fixture: Fixture, weights: str) -> None:
    model = fixture.model(weights)
    t, noise, x = fixture["loss_t"], fixture["loss_noise"], fixture["x_scaled"]
    _, elements = denoising_score_matching(model.sde, model.score, x, t, noise)
    weight = 2 * make_weighting("likelihood")(model.sde, t.double())
    error = sum_except_batch(elements)
    for name, factor in (("plain", 1.0), ("likelihood", weight)):
        for reduction, key in (("mean", "mean"), ("half_sum", "halfsum")):
            stage = ScoreStage(model, reduction=reduction)
            ours = stage.scale * (factor * error).mean()
            close(ours, fixture[f"loss_{name}_{key}_{weights}"], 1e-5, f"{name} {key}")


@with_arrays("loss_discrete_mean_raw")
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_discrete_losses(fixture: Fixture, weights: str) -> None:
    """As the training stage computes them, at the given levels."""
    model = fixture.model(weights)
    levels, labels = model.levels, fixture["loss_labels"].long()
    t = (levels.times if fixture.ve else levels.times.flip(0))[labels].float()
    for reduction, key in (("mean", "mean"), ("half_sum", "halfsum")):
        stage = ScoreStage(model, reduction=reduction)
        _, elements = denoising_score_matching(
            stage.kernel, model.score, fixture["x_scaled"], t, fixture["loss_noise"]
        )
        ours = stage.scale * sum_except_batch(elements).mean()
        close(ours, fixture[f"loss_discrete_{key}_{weights}"], 1e-5, key)


# Samplers


class Replayed(Problem):
    """A solve whose noise is given."""

    given: list[Tensor]

    def noise(self, x: Tensor) -> Tensor:
        return self.given.pop(0).to(x.dtype)


def replay(model: DataSGM, times: Tensor, noise: Any) -> Replayed:
    problem = Replayed(model.sde, model.score, times, None, (), None, torch.float32)
    problem.given = list(noise)
    return problem


def even_times(fixture: Fixture, n: int) -> Tensor:
    end = fixture["sampling_eps"].item()
    return torch.linspace(1, end, n, dtype=torch.float64)


def solver_of(
    fixture: Fixture, predictor: str, corrector: str, corrector_steps: int | None = None
) -> DiscretePredictorCorrector:
    sampling = fixture.options["sampling"]
    levels = fixture.averaged.levels
    return DiscretePredictorCorrector(
        predictor=None if predictor == "none" else PREDICTORS.get(predictor, predictor),
        corrector_steps=0 if corrector == "none" else corrector_steps or sampling["n_steps_each"],
        norm=CORRECTORS.get(corrector, "batch"),  # type: ignore[arg-type]
        snr=fixture["upd_snr"].item(),
        levels=None if levels is None else levels.num_levels,
    )


def steps(
    solver: DiscretePredictorCorrector, problem: Replayed, x: Tensor, which: Any
) -> tuple[list[Tensor], Tensor]:
    """States after each corrector and predictor, and the last mean."""
    states, mean = [], x
    x = x.double()
    for i in which:
        x = mean = solver._corrected(problem, i, x)
        states.append(x)
        if solver.predictor is not None:
            step = solver._predicted(problem, i, x)
            mean, x = step.mean, step.mean + step.std * problem.noise(x)
        states.append(x)
    return states, mean


def published(fixture: Fixture, corrector_steps: int | None = None) -> DiscretePredictorCorrector:
    pair = fixture.text("run_predictor"), fixture.text("run_corrector")
    return solver_of(fixture, *pair, corrector_steps)


@with_arrays("grid_index")
def test_levels_of_the_grid(fixture: Fixture) -> None:
    index = fixture["grid_index"]
    end = fixture["sampling_eps"].item()
    model = fixture.averaged
    grid = table_at(model.sde, torch.linspace(1, end, len(index)), len(index), False)
    assert grid.index == index.tolist()
    if "discrete_sigmas" in fixture:
        close(torch.tensor(grid.sigma), fixture["discrete_sigmas"], 1e-6)
    if "discrete_betas" in fixture:
        close(torch.tensor(grid.beta), fixture["discrete_betas"], 1e-6)


@with_arrays("upd_t", "upd_x")
def test_single_updates(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fixture.averaged
    n = fixture.options["model"]["num_scales"]
    checked = 0
    for j, t in enumerate(fixture["upd_t"]):
        grid = table_at(model.sde, t[None], n, model.levels is not None)
        monkeypatch.setattr(DiscretePredictorCorrector, "_table", lambda *_, grid=grid: grid)
        times = torch.tensor([t.item(), 0.0], dtype=torch.float64)
        x = fixture["upd_x"][j].double()
        for name in ("euler_maruyama", "reverse_diffusion", "ancestral_sampling"):
            if f"upd{j}_{name}_mean" not in fixture:
                continue
            solver = solver_of(fixture, name, "none")
            step = solver._predicted(replay(model, times, []), 0, x)
            close(step.mean, fixture[f"upd{j}_{name}_mean"], 2e-5, name)
            if f"upd{j}_{name}" in fixture:
                moved = step.mean + step.std * fixture["upd_noise"]
                close(moved, fixture[f"upd{j}_{name}"], 2e-5, name)
            if f"upd{j}_{name}_flow_mean" in fixture:
                flow = DiscretePredictorCorrector(
                    predictor=solver.predictor, levels=solver.levels, probability_flow=True
                )
                flowed = flow._predicted(replay(model, times, []), 0, x)
                close(flowed.mean, fixture[f"upd{j}_{name}_flow_mean"], 2e-5, f"{name} flow")
                assert flowed.std == 0
            checked += 1
        for name in ("langevin", "ald"):
            if f"upd{j}_{name}" not in fixture:
                continue
            solver = solver_of(fixture, "none", name)
            moved = solver._correct(replay(model, times, [fixture["upd_noise"]]), 0, x)
            close(moved, fixture[f"upd{j}_{name}"], 2e-5, name)
            checked += 1
    assert checked


@with_arrays("head_states")
def test_first_steps(fixture: Fixture) -> None:
    model, times = fixture.averaged, even_times(fixture, len(fixture["grid_index"]))
    start = fixture["run_noise"][0] * math.sqrt(model.sde.prior_var)
    problem = replay(model, times, fixture["run_noise"][1:])
    states, _ = steps(published(fixture), problem, start, (0, 1))
    for state, theirs in zip(states, fixture["head_states"], strict=True):
        close(state, theirs, 2e-5)


@with_arrays("tail_states")
def test_last_steps(fixture: Fixture) -> None:
    model, n = fixture.averaged, len(fixture["grid_index"])
    problem = replay(model, even_times(fixture, n), fixture["run_noise"][1:])
    states, mean = steps(published(fixture), problem, fixture["tail_start"], (n - 2, n - 1))
    for state, theirs in zip(states, fixture["tail_states"], strict=True):
        close(state, theirs, 2e-5)
    close(mean, fixture["tail_final_mean"], 2e-5)
    close(model.to_images(mean), fixture["tail_image"], 2e-5)


@with_arrays("short_states")
def test_short_runs(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step, and as sample() does them."""
    model, n = fixture.averaged, int(fixture["short_N"])
    noise = fixture["short_noise" if "short_noise" in fixture else "run_noise"]
    start, times = noise[0] * math.sqrt(model.sde.prior_var), even_times(fixture, n)
    # reported: one evaluation of the predictor and those of the corrector at every time
    solver = published(fixture, int(fixture["short_nfe_reported"]) // n - 1)
    states, mean = steps(solver, replay(model, times, noise[1:]), start, range(n))
    for state, theirs in zip(states[1::2], fixture["short_states"], strict=True):
        close(state, theirs, 1e-3)
    close(mean, fixture["short_final_mean"], 1e-3)

    left = list(noise)
    for module in (base, lsgm.sde):
        monkeypatch.setattr(module, "randn", lambda *_, **__: left.pop(0))
    whole = DiscretePredictorCorrector(**{**vars(solver), "denoise": True})
    sampler = Sampler(whole, times=times)
    first = model.prior_start(len(start), None, solver=whole)
    sample = sampler.solve(model.sde, model.eps_fn(), first)
    close(model.to_images(sample.x), fixture["short_image"], 1e-3)
    calls = solver.corrector_steps + (solver.predictor is not None)
    assert sample.nfe == n * calls == whole.evaluations(n - 1)


@with_arrays("pairs")
def test_other_pairs(fixture: Fixture) -> None:
    model, times = fixture.averaged, even_times(fixture, int(fixture["short_N"]))
    start = fixture["run_noise"][0] * math.sqrt(model.sde.prior_var)
    for pair in map(str, fixture.arrays["pairs"]):
        predictor, _, corrector = pair.partition("__")
        problem = replay(model, times, fixture["run_noise"][1:])
        _, mean = steps(solver_of(fixture, predictor, corrector), problem, start, range(len(times)))
        close(model.to_images(mean), fixture[f"pair_{pair}"], 1e-3, pair)


@with_arrays("run_predictor")
def test_imported_runs_carry_the_published_sampler(fixture: Fixture, tmp_path: Any) -> None:
    save_config(fixture.config, tmp_path / "config.yaml")
    import_score_sde(fixture.checkpoint, tmp_path / "run", config=tmp_path / "config.yaml")
    model = lsgm.load(tmp_path / "run")
    sampler = model.default_sampler()
    solver, times = sampler.method, sampler.times
    expected = published(fixture)
    sampling = fixture.options["sampling"]
    assert isinstance(solver, DiscretePredictorCorrector)
    assert solver.denoise == sampling["noise_removal"]
    assert (solver.predictor, solver.corrector_steps) == (
        expected.predictor,
        expected.corrector_steps,
    )
    assert (solver.snr, solver.levels) == (sampling["snr"], expected.levels)
    assert solver.corrector_steps == 0 or solver.norm == expected.norm
    assert len(times) == fixture.options["model"]["num_scales"]
    assert times[-1] == pytest.approx(fixture["sampling_eps"].item(), rel=1e-6)
    x, t = fixture["xt"][0], fixture["t"][0]
    weights = fixture.averaged.score.state_dict()
    for key, value in model.score.state_dict().items():
        assert torch.equal(value, weights[key])
    # where tensors lie in memory decides the last bit on some machines
    torch.testing.assert_close(
        model.score(x, t), fixture.averaged.score(x, t), rtol=1e-5, atol=1e-6
    )


# The probability flow


@with_arrays("prior_logp")
def test_prior_density(fixture: Fixture) -> None:
    ours = fixture.averaged.sde.prior_log_prob(fixture["prior_z"].double())
    close(ours, fixture["prior_logp"], 1e-5)


class GivenProbe(HutchinsonDivergence):
    """One probe, drawn elsewhere."""

    given: Tensor

    def probe(self, x: Tensor, rng: Any = None) -> Tensor:
        return self.given[None].to(x)


def given_probe(probe: Tensor) -> GivenProbe:
    divergence = GivenProbe()
    object.__setattr__(divergence, "given", probe)
    return divergence


@pytest.mark.slow
@with_arrays("bpd")
def test_likelihood(fixture: Fixture) -> None:
    model, tolerance = fixture.averaged, fixture["ode_tol"].item()
    y = fixture["x_deq_scaled"]
    density = ode_log_density(
        model.sde,
        model.score,
        y,
        divergence=given_probe(fixture["probe"]),
        t_end=1e-5,
        rtol=tolerance,
        atol=tolerance,
        method="rk45",
    )
    nats = -(density.log_prob.double() + model.pixels.log_det_v)
    bits = nats / (model.spec.num_dims * math.log(2))
    close(bits, fixture["bpd"], 2e-3)
    assert density.nfe == pytest.approx(fixture["bpd_nfe"].item(), rel=0.2)


@with_arrays("ode_state")
def test_ode_samples(fixture: Fixture) -> None:
    model, tolerance = fixture.averaged, fixture["ode_tol"].item()
    solver = make_solver("rk45", rtol=tolerance, atol=tolerance)
    times = torch.tensor([1.0, fixture["sampling_eps"].item()])
    solution = solver.solve(model.sde, model.score, fixture["ode_z"], times)
    close(solution.x, fixture["ode_state"], 1e-3)
    assert solution.nfe == pytest.approx(fixture["ode_nfe"].item(), rel=0.1, abs=12)
