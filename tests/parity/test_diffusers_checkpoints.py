"""Folders of diffusers imported: networks and samplers agree with what the package gave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from replayed import Arrays, Replay, close, fixtures
from torch import Tensor

import lsgm
from lsgm.discrete_noise import BetaTable
from lsgm.importers.formats import IMPORTERS, detect_format
from lsgm.models.images import DataSGM
from lsgm.sampling.sampler import SolverOptions, build_sampler
from lsgm.sde import VESDE
from lsgm.solvers import Hook

FILES = "diffusers_*.npz"
MODELS: dict[Path, DataSGM] = {}


def imported(given: Arrays, tmp: pytest.TempPathFactory) -> DataSGM:
    """The model, through the run folder that the import writes."""
    if given.path not in MODELS:
        folder, out = given.path.with_suffix(""), tmp.mktemp(given.path.stem) / "run"
        IMPORTERS[detect_format(folder)].run(folder, out, None)
        MODELS[given.path] = lsgm.load(out)
    return MODELS[given.path]


def time_of(model: DataSGM, timestep: Tensor) -> Tensor:
    """Our time of diffusers' ``timestep (B,)``: a noise level of VE models, a number of DDPM."""
    if isinstance(model.sde, VESDE):
        low, high = model.sde.sigma2_min**0.5, model.sde.sigma2_max**0.5
        return torch.log(timestep.double() / low) / torch.log(torch.tensor(high / low).double())
    assert isinstance(model.levels, BetaTable)
    return timestep.double() / (model.levels.num_levels - 1)


@pytest.mark.parametrize("given", fixtures(FILES))
@torch.no_grad()
def test_outputs(given: Arrays, tmp_path_factory: pytest.TempPathFactory) -> None:
    """DDPM's is the noise, that of a VE model the score."""
    model = imported(given, tmp_path_factory)
    for k in range(len(given["timestep"])):
        timestep, x_t = given["timestep"][k], given["xt"][k]
        eps = model.score(x_t, time_of(model, timestep).float())
        if isinstance(model.sde, VESDE):
            eps = -eps / timestep[:, None, None, None]
        close(eps, given["unet_out"][k], 1e-5)


@pytest.mark.parametrize("given", fixtures(FILES))
@torch.no_grad()
def test_noisy_images(given: Arrays, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = imported(given, tmp_path_factory)
    x = model.pixels.to_network(given["x_u8"].float() / 255, noise=True)
    kernel = model.levels if isinstance(model.levels, BetaTable) else model.sde
    for timestep, noise, x_t in zip(given["timestep"], given["noise"], given["xt"], strict=True):
        close(kernel.perturb(x, time_of(model, timestep), noise), x_t, 1e-5)


@pytest.mark.parametrize("given", fixtures(FILES))
def test_tables(given: Arrays, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, steps = imported(given, tmp_path_factory), int(given["num_inference_steps"])
    own = sampler(model, given)
    solver, times = own.method, own.times
    if "betas" in given:
        assert isinstance(model.levels, BetaTable)
        close(model.levels.betas, given["betas"], 1e-6)
        close(model.levels.alphas_cumprod, given["alphas_cumprod"], 1e-5)
        times = solver.check(model.sde, times) * (model.levels.num_levels - 1)
        assert torch.equal(times.round().long(), given["timesteps"])
    else:
        close(times, given["timesteps"], 1e-6)
        close(model.sde.var(times).sqrt(), given["sigmas"], 1e-5)
    assert len(times) == steps


def sampler(model: DataSGM, given: Arrays):  # type: ignore[no-untyped-def]
    """The model's own sampler with the fixture's few steps."""
    each = model.defaults.nfe // (2000 if isinstance(model.sde, VESDE) else 1000)
    nfe = int(given["num_inference_steps"]) * each
    chosen = SolverOptions(solver=model.defaults.solver, nfe=nfe, grid="time")
    return build_sampler(model, chosen)


class Recorder(Hook):
    """Keeps the state after every step."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def project(self, x_t: Tensor, t: Tensor, rng: object) -> Tensor:
        self.states.append(x_t)
        return x_t


@pytest.mark.parametrize("given", fixtures(FILES, "states"))
@torch.no_grad()
def test_sampler(
    given: Arrays, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the stored noise the states and the image are those of the package's loop."""
    model = imported(given, tmp_path_factory)
    own = sampler(model, given)
    draws = list(given["run_noise"])
    high = model.sde.sigma2_max**0.5 if isinstance(model.sde, VESDE) else 1.0
    monkeypatch.setattr("lsgm.solvers.base.randn", Replay(draws[1:]))
    monkeypatch.setattr(model, "prior_start", lambda *a: high * draws[0])
    recorder = Recorder()
    batch = model.draw(1, None, replace(own, hooks=[recorder]))
    expected = given["states"]
    if "final_mean" in given:  # the last state is without the noise of the package's last step
        close(recorder.states[-1], given["final_mean"], 1e-5, "mean")
        close(torch.stack(recorder.states[:-1]), expected[:-1], 1e-5, "states")
    else:
        close(torch.stack(recorder.states), expected, 1e-5, "states")
    close(batch.images, given["image"], 1e-5, "image")


@pytest.mark.parametrize("given", fixtures(FILES))
def test_the_scheduler_is_the_default_sampler(
    given: Arrays, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, scheduler = imported(given, tmp_path_factory), json.loads(given.text("scheduler_config"))
    chosen = model.defaults
    own = model.default_sampler()
    solver, times = own.method, own.times
    assert len(times) == scheduler["num_train_timesteps"]
    assert solver.evaluations(len(times) - 1) == chosen.nfe
    if "betas" in given:
        assert solver.clip == scheduler["clip_sample"]
        assert f"fixed_{solver.variance}" == scheduler["variance_type"]
    else:
        assert (solver.snr, solver.norm) == (scheduler["snr"], "batch")
        assert solver.corrector_steps == scheduler["correct_steps"]
        assert times[-1] == scheduler["sampling_eps"]
