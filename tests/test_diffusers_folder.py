"""The diffusers package as the witness: its networks and schedulers, and ours, give the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from samplers import chosen_solver, recommended_solver
from torch import Tensor

import lsgm
from lsgm.importers.diffusers_folder import import_diffusers
from lsgm.models.images import DataSGM
from lsgm.sampling.sampler import SolverOptions
from lsgm.sde import VESDE

diffusers = pytest.importorskip("diffusers")
# The networks need none, and one that is built for another torch would stop them.
diffusers.utils.import_utils._torchvision_available = False

VE = {
    "time_embedding_type": "fourier",
    "center_input_sample": True,
    "mid_block_scale_factor": 1.41421356237,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
DDPM = {
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
UNETS: dict[str, dict[str, Any]] = {
    "ve-celebahq256": VE
    | {
        "block_out_channels": (8, 32, 32),
        "down_block_types": ("SkipDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D"),
        "layers_per_block": 2,
    },
    "ve-ffhq1024": VE
    | {
        "block_out_channels": (8, 32, 32, 32),
        "down_block_types": (
            "SkipDownBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D",
        ),
        "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D"),
        "layers_per_block": 1,
    },
    "ddpm-cifar10": DDPM
    | {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "ddpm-grey": DDPM
    | {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    },
}  # fmt: skip
SIZE = 16


def scheduler_of(name: str, **changes: Any) -> Any:
    if name.startswith("ve"):
        return diffusers.ScoreSdeVeScheduler(
            **{"snr": 0.075, "sigma_max": 348.0, "num_train_timesteps": 2000} | changes
        )
    large = {"variance_type": "fixed_large"} if name == "ddpm-cifar10" else {}
    return diffusers.DDPMScheduler(**large | changes)


def make(name: str, folder: Path, **scheduler: Any) -> tuple[Any, Any]:
    """A network with random weights and its scheduler, saved as the package does."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(sample_size=SIZE, **UNETS[name]).eval()
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    chosen = scheduler_of(name, **scheduler)
    unet.save_pretrained(folder / "unet")
    chosen.save_pretrained(folder / "scheduler")
    return unet, chosen


def imported(folder: Path, out: Path) -> DataSGM:
    import_diffusers(folder, out)
    return lsgm.load(out)


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_networks_are_equal(name: str, tmp_path: Path) -> None:
    unet, scheduler = make(name, tmp_path / "folder")
    model = imported(tmp_path / "folder", tmp_path / "run")
    x = torch.rand(3, unet.config.in_channels, SIZE, SIZE)
    if isinstance(model.sde, VESDE):
        t = torch.tensor([0.9, 0.5, 0.01])
        sigma = model.sde.var(t).sqrt()
        x = x + sigma[:, None, None, None] * torch.randn_like(x)
        theirs = -sigma[:, None, None, None] * unet(x, sigma).sample
    else:
        steps = torch.tensor([999, 500, 3])
        t = steps / 999
        theirs = unet(x, steps).sample
    ours = model.score(x, t)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def loop(unet: Any, scheduler: Any, x: Tensor, steps: int, rng: torch.Generator) -> Tensor:
    """The sampling loop of the package's pipelines."""
    scheduler.set_timesteps(steps)
    if isinstance(scheduler, diffusers.DDPMScheduler):
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x, generator=rng).prev_sample
        return x
    scheduler.set_sigmas(steps)
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i] * torch.ones(len(x))
        for _ in range(scheduler.config.correct_steps):
            x = scheduler.step_correct(unet(x, sigma).sample, x, generator=rng).prev_sample
        step = scheduler.step_pred(unet(x, sigma).sample, t, x, generator=rng)
        x = step.prev_sample
    return step.prev_sample_mean


@pytest.mark.parametrize("name, steps", [(name, 7) for name in UNETS] + [("ddpm-grey", 40)])
@torch.no_grad()
def test_samplers_are_equal(name: str, steps: int, tmp_path: Path) -> None:
    """From the same noise, in the same order."""
    unet, scheduler = make(name, tmp_path / "folder")
    model = imported(tmp_path / "folder", tmp_path / "run")
    ve = isinstance(model.sde, VESDE)
    each = 1 + scheduler.config.correct_steps if ve else 1
    options = SolverOptions(solver=model.defaults.solver, nfe=steps * each, grid="time")
    solver, times = chosen_solver(model, options)
    start = torch.randn(2, unet.config.in_channels, SIZE, SIZE)
    start = start * scheduler.init_noise_sigma if ve else start
    theirs = loop(unet, scheduler, start, steps, torch.Generator().manual_seed(3))
    rng = torch.Generator().manual_seed(3)
    ours = solver.solve(model.sde, model.score, start, times, rng)
    assert ours.nfe == steps * each
    assert (ours.x - theirs).abs().max() <= 5e-5 * theirs.abs().max()


def test_the_default_is_the_scheduler(tmp_path: Path) -> None:
    make("ve-ffhq1024", tmp_path / "ve", correct_steps=2, snr=0.15, num_train_timesteps=1000)
    solver, times = recommended_solver(imported(tmp_path / "ve", tmp_path / "a"))
    assert (len(times), solver.corrector_steps, solver.snr, solver.norm) == (1000, 2, 0.15, "batch")
    assert solver.predictor == "reverse_diffusion" and solver.denoise
    make("ddpm-grey", tmp_path / "ddpm", clip_sample=False)
    solver, times = recommended_solver(imported(tmp_path / "ddpm", tmp_path / "b"))
    assert (len(times), solver.clip, solver.variance) == (1000, False, "small")


@torch.no_grad()
def test_old_names_and_flat_folders(tmp_path: Path) -> None:
    """Early files: a pickle at the top, other names of attention, the frequencies twice."""
    make("ve-celebahq256", tmp_path / "new")
    model = imported(tmp_path / "new", tmp_path / "a")
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(tmp_path / "new/unet/config.json", flat)
    shutil.copy(tmp_path / "new/scheduler/scheduler_config.json", flat)
    (flat / "model_index.json").write_text(json.dumps({"model": ["diffusers", "UNet2DModel"]}))
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "new/unet/diffusion_pytorch_model.safetensors")
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, value in weights.items():
        for now, then in new.items():
            name = name.replace(now, then)
        old[name] = value
    old["time_proj.W"] = weights["time_proj.weight"]
    torch.save(old, flat / "diffusion_pytorch_model.bin")
    again = imported(flat, tmp_path / "b")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
