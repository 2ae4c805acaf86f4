"""NCSN and NCSNv2 imported: networks, losses and samplers agree with what the published code gave.

Ours have images in [-1, 1], so that noise is twice and scores are half as large.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from replayed import Arrays, Replay, close, fixtures
from torch import Tensor, nn

import lsgm
from lsgm.importers.formats import IMPORTERS, detect_format
from lsgm.models.images import DataSGM
from lsgm.networks.ncsn import NCSN
from lsgm.objectives import denoising_score_matching
from lsgm.sampling.sampler import SolverOptions, build_sampler
from lsgm.score_matching import sliced_error
from lsgm.solvers import AnnealedLangevin, Hook, times_of_noise_levels
from lsgm.tensors import expand_like

FILES = "ncsn_*.npz ncsnv2_*.npz"
MODELS: dict[tuple[Path, str], DataSGM] = {}


def imported(given: Arrays, tmp: pytest.TempPathFactory, weights: str) -> DataSGM:
    """The model, through the run folder that the import writes."""
    key = given.path, weights
    if key not in MODELS:
        file = given.path.with_suffix(".pth")
        out = tmp.mktemp(given.path.stem) / weights
        IMPORTERS[detect_format(file)].run(file, out, weights)
        MODELS[key] = lsgm.load(out)
    return MODELS[key]


def kinds(given: Arrays) -> list[tuple[str, str]]:
    """Weights in the file, and the end of the names of what was computed with them."""
    return [("raw", "")] if "score" in given else [("raw", "_raw"), ("ema", "_ema")]


def sampling_model(given: Arrays, tmp: pytest.TempPathFactory) -> DataSGM:
    return imported(given, tmp, kinds(given)[-1][0])


def times_of(model: DataSGM, labels: Tensor) -> Tensor:
    assert model.ladder is not None
    return model.ladder.times[labels].float()


def published_score(model: DataSGM, x: Tensor, labels: Tensor) -> Tensor:
    """Score of images in [0, 1] at noise levels ``labels (B,)``, by our model."""
    assert model.ladder is not None
    eps = model.score(2 * x - 1, times_of(model, labels))
    return -2 * eps / expand_like(model.ladder.sigmas[labels], eps)


@pytest.mark.parametrize("given", fixtures(FILES))
@torch.no_grad()
def test_scores_and_levels(given: Arrays, tmp_path_factory: pytest.TempPathFactory) -> None:
    for weights, end in kinds(given):
        model = imported(given, tmp_path_factory, weights)
        assert model.kind == "ncsn" and model.ladder is not None
        close(model.ladder.sigmas / 2, given["sigmas"], 1e-6, "levels")
        for x, labels, score in zip(
            given["xt"], given["labels"], given[f"score{end}"], strict=True
        ):
            close(published_score(model, x, labels), score, 1e-5, weights)


@pytest.mark.parametrize("given", fixtures(FILES))
@torch.no_grad()
def test_perturbed_images(
    given: Arrays, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise is that of our SDE, and NCSN's images are dequantised as ours."""
    model = sampling_model(given, tmp_path_factory)
    images = given["x_u8"].float() / 255
    if "u_deq" in given:
        monkeypatch.setattr("lsgm.data.pixels.rand", Replay([given["u_deq"]]))
    x = model.pixels.to_network(images, noise=True)
    close((x + 1) / 2, given["x_deq"] if "x_deq" in given else images, 1e-6, "images")
    for labels, noise, x_t in zip(given["labels"], given["noise"], given["xt"], strict=True):
        ours = model.sde.perturb(x, times_of(model, labels), noise)
        close((ours + 1) / 2, x_t, 1e-6)


@pytest.mark.parametrize("given", fixtures(FILES))
def test_losses(given: Arrays, tmp_path_factory: pytest.TempPathFactory) -> None:
    labels, noise = given["loss_labels"], given["loss_noise"]
    x = given["x_deq"] if "x_deq" in given else given["x_u8"].float() / 255
    for weights, end in kinds(given):
        model = imported(given, tmp_path_factory, weights)
        t = times_of(model, labels)
        _, error = denoising_score_matching(model.sde, model.score, 2 * x - 1, t, noise)
        loss = 0.5 * error.detach().flatten(1).sum(1).mean()
        close(loss, given[f"loss_dsm{end}"], 1e-5, weights)
        if "loss_ssm" in given:
            x_t = model.sde.perturb(2 * x - 1, t, noise)
            probes = given["ssm_vectors"][None]
            sliced = sliced_error(model.sde, model.score, x_t, t, probes).detach()
            close((sliced.mean() - x[0].numel()) / 2, given["loss_ssm"], 1e-4, "sliced")


def traced(network: NCSN, name: str) -> nn.Module | None:
    """Our module of a published name; None where ours has none of its own."""
    if name in ("begin_conv", "end_conv", "normalizer"):
        ours = {"begin_conv": "conv_in", "end_conv": "conv_out", "normalizer": "norm_out"}
        return network.get_submodule(ours[name])
    if name.startswith("normalizer."):
        return None
    first, *rest = name.split(".")
    numbers = ["1", "2", "3", "31", "4", "5"] if len(network.stages) == 6 else list("12345")
    if first.startswith("res"):
        return network.get_submodule(f"stages.{numbers.index(first[3:])}.blocks.{rest[0]}")
    numbers = ["1", "2", "31", "3", "4", "5"] if len(network.stages) == 6 else numbers
    parts = {"crp": "pooling", "output_convs": "output", "msf": "fusion"}
    ours = [f"refine.{numbers.index(first[6:])}", *(parts[part] for part in rest)]
    return network.get_submodule(".".join(ours))


@pytest.mark.parametrize("given", fixtures(FILES))
@torch.no_grad()
def test_named_blocks(given: Arrays, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, end = sampling_model(given, tmp_path_factory), kinds(given)[-1][1].replace("_raw", "")
    network, seen, compared = model.score, {}, 0
    handles = []
    for name in given.texts("trace_names"):
        if (module := traced(network, name)) is not None:
            handles.append(
                module.register_forward_hook(lambda m, i, out, name=name: seen.update({name: out}))
            )
    network(2 * given["xt"][0] - 1, times_of(model, given["labels"][0]))
    for handle in handles:
        handle.remove()
    for name, values in zip(given.texts("trace_names"), given[f"trace{end}"], strict=True):
        if name not in seen:
            continue
        out = seen[name].double()
        if name == "end_conv" and network.conditional:
            out = 2 * out  # the score
        found = torch.cat([out.mean()[None], out.std()[None], out.flatten()[:4]])
        close(found, values, 1e-4, name)
        compared += 1
    assert compared >= len(seen) >= len(network.stages) * 2 + 5


class Recorder(Hook):
    """Keeps the state after every step."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def project(self, x_t: Tensor, t: Tensor, rng: object) -> Tensor:
        self.states.append(x_t)
        return x_t


@pytest.mark.parametrize("given", fixtures(FILES, "ald_states"))
@torch.no_grad()
def test_annealed_langevin(
    given: Arrays, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the stored noise every state and the image are those of the published sampler, which is
    the run's own but for the number of steps.
    """
    model = sampling_model(given, tmp_path_factory)
    each = int(given["ald_steps_each"])
    sampler = build_sampler(model, SolverOptions(steps_per_level=each))
    solver = sampler.method
    assert isinstance(solver, AnnealedLangevin) and model.ladder is not None
    step = float(given["ald_step_lr"]) / float(given["sigmas"][-1].double()) ** 2
    assert solver.step_ratio == pytest.approx(2 * step, rel=1e-6)
    sizes = 0.5 * solver.step_ratio * (model.ladder.sigmas / 2) ** 2
    close(sizes, given["ald_step_sizes"], 1e-6, "step sizes")
    monkeypatch.setattr("lsgm.solvers.base.randn", Replay(given["ald_noise"]))
    monkeypatch.setattr(model, "prior_start", lambda *a: 2 * given["ald_start"] - 1)
    recorder = Recorder()
    batch = model.draw(1, None, replace(sampler, hooks=[recorder]))
    states = torch.stack(recorder.states[: len(given["ald_states"])])
    close((states + 1) / 2, given["ald_states"], 1e-4, "states")
    assert batch.nfe == len(given["ald_states"]) + ("ald_denoised" in given)
    if "ald_denoised" in given:
        assert solver.denoise
        close((recorder.states[-1] + 1) / 2, given["ald_denoised"], 1e-4, "denoised")
        close(batch.images, given["ald_image"], 1e-4, "image")
    else:
        assert not solver.denoise
        before = ((recorder.states[-2] + 1) / 2).clamp(0, 1)
        close(before, given["ald_published_last_image"], 1e-4)


@pytest.mark.parametrize("given", fixtures(FILES))
def test_the_published_sampler_is_the_default(
    given: Arrays, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = sampling_model(given, tmp_path_factory)
    chosen = model.defaults
    assert (chosen.solver, chosen.grid) == ("langevin", "ladder")
    assert model.sampler_config.start == "uniform"
    if "score" in given:
        assert chosen.options["steps_per_level"] == 100 and not chosen.options["denoise"]
    else:
        assert chosen.options["denoise"]
    start = model.prior_start(64, torch.Generator().manual_seed(0), 1.0, AnnealedLangevin())
    assert start.min() >= -1 and start.max() <= 1 and abs(start.var() - 1 / 3) < 0.02


def run_levels(
    model: DataSGM,
    start: Tensor,
    sigmas: Tensor,
    each: int,
    step_lr: float,
    hook: Hook,
) -> tuple[list[Tensor], Tensor]:
    """Langevin dynamics of images in [0, 1] over a list of noise levels that are not the model's:
    the network takes the numbers 0, 1, ... of its own for them. Inputs of the network, last state.
    """
    sigmas = 2 * sigmas.double()
    times = times_of_noise_levels(model.sde, sigmas.clamp(*model_limits(model)))
    inputs: list[Tensor] = []

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        inputs.append((x + 1) / 2)
        number = int((times - t[0]).abs().argmin())
        score = published_score(model, (x + 1) / 2, torch.full((len(x),), number))
        return -sigmas[number] * score / 2

    ratio = 2 * step_lr / float(sigmas[-1] / 2) ** 2
    solver = AnnealedLangevin(steps_per_level=each, step_ratio=ratio)
    x = solver.solve(model.sde, eps_fn, 2 * start - 1, times, hooks=[hook]).x
    return inputs, (x + 1) / 2


def model_limits(model: DataSGM) -> tuple[float, float]:
    assert model.ladder is not None
    return model.ladder.sigma_min, model.ladder.sigma_max


class LeftHalf(Hook):
    """Writes the known left half with noise: the published inpainting. ``fresh``: noise of its own
    for every step (NCSNv2), else one for each level (NCSN).
    """

    def __init__(self, known: Tensor, sigmas: Tensor, noise: Tensor, each: int, fresh: bool):
        self.known, self.sigmas, self.noise = known, sigmas, noise
        self.each, self.fresh, self.step = each, fresh, 0

    def written(self, x: Tensor, step: int) -> Tensor:
        """``x`` in [0, 1] with the half that belongs to that step."""
        level = step // self.each
        noise = self.noise[step if self.fresh else level]
        half = self.known.shape[-1] // 2
        left = self.known[..., :half] + self.sigmas[level] * noise
        return torch.cat([left.to(x), x[..., half:]], dim=-1)

    def project(self, x_t: Tensor, t: Tensor, rng: object) -> Tensor:
        self.step += 1
        last = self.step == self.each * len(self.sigmas)
        if last and self.fresh:
            return x_t
        # After the last step of a level the next one writes its own.
        return 2 * self.written((x_t + 1) / 2, self.step - last) - 1


@pytest.mark.parametrize("given", fixtures(FILES, "inpaint_sigmas"))
@torch.no_grad()
def test_inpainting(
    given: Arrays, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fresh = sampling_model(given, tmp_path_factory), "inpaint_inputs" in given
    step_lr = given["inpaint_step_lr" if "inpaint_step_lr" in given else "ald_step_lr"]
    each, sigmas = int(given["inpaint_steps_each"]), given["inpaint_sigmas"]
    known = given["inpaint_ref_u8"].float() / 255
    hook = LeftHalf(known, sigmas, given["inpaint_half_noise"], each, fresh)
    start = hook.written(given["inpaint_start"].reshape(known.shape), 0)
    monkeypatch.setattr("lsgm.solvers.base.randn", Replay(given["inpaint_noise"]))
    inputs, last = run_levels(model, start, sigmas, each, float(step_lr), hook)
    if fresh:
        close(torch.stack(inputs), given["inpaint_inputs"], 1e-4, "inputs")
        close(last, given["inpaint_final"], 1e-4, "last")
    else:
        close(torch.stack([*inputs, last]), given["inpaint_states"], 1e-4)


@pytest.mark.parametrize("given", fixtures(FILES, "interp_sigmas"))
@torch.no_grad()
def test_interpolation(
    given: Arrays, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, num = sampling_model(given, tmp_path_factory), int(given["interp_n"])
    angles = torch.linspace(0, math.pi / 2, num)[:, None, None, None]
    noises = [angles.cos() * p + angles.sin() * q for p, q in given["interp_noise"]]
    start = given["interp_start"]
    start = start.expand(num, *start.shape[1:]) if len(start) == 1 else start
    monkeypatch.setattr("lsgm.solvers.base.randn", Replay(noises))
    _, last = run_levels(
        model, start, given["interp_sigmas"], 1, float(given["ald_step_lr"]), Hook()
    )
    close(last, given["interp_final"], 1e-4)
