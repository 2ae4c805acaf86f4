"""Exported models: diffusers loads score models, and what comes back computes the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsgm
from lsgm.commands.run import run
from lsgm.config.architecture import (
    PriorConfig,
    PriorNetworkConfig,
    SamplerConfig,
    ScoreModelConfig,
    SDEConfig,
    VAEConfig,
)
from lsgm.config.training import DataConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.exporters.command import export_command
from lsgm.exporters.diffusers import export_score_model
from lsgm.importers.formats import IMPORTERS, detect_format
from lsgm.models.images import DataSGM, build_data_model
from lsgm.models.latent import LSGM, VAEModel, build_prior, build_vae
from lsgm.models.release import save

VE_NETWORK: dict[str, Any] = {
    "num_channels": 8,
    "num_scales": 3,
    "channel_mult": (1, 4, 4),
    "num_cells_per_scale": 1,
    "embedding_dim": 16,
    "embedding_width": 32,
    "embedding_type": "fourier",
    "embedding_scale": 16.0,
    "fir": True,
    "progressive": "output_skip",
    "progressive_input": "input_skip",
    "attention_resolutions": (4,),
    "group_rule": "diffusers",
}
DDPM_NETWORK: dict[str, Any] = {
    "num_channels": 8,
    "num_scales": 2,
    "channel_mult": (1, 2),
    "num_cells_per_scale": 1,
    "embedding_dim": 8,
    "embedding_width": 32,
    "embedding_scale": 1.0,
    "attention_resolutions": (8,),
    "block": "ddpm",
    "rescale": False,
    "norm_groups": 4,
    "up_attention": "block",
}
VE: dict[str, Any] = {
    "sde": SDEConfig(kind="vesde", sigma2_min=1e-4, sigma2_max=2500.0, time_eps=1e-5),
    "data_range": "unit",
    "condition": "ln_sigma",
    "centre_input": True,
    "dequantise": False,
    "data_std": 0.0,
}
SYMMETRIC: dict[str, Any] = VE | {
    "sde": SDEConfig(kind="vesde", sigma2_min=4e-4, sigma2_max=1e4, time_eps=1e-5),
    "data_range": "symmetric",
    "condition": "log_sigma",
    "centre_input": False,
}
CHAIN: dict[str, Any] = {
    "sde": SDEConfig(kind="vpsde", time_eps=1e-5),
    "condition": "index",
    "discrete_levels": 1000,
    "dequantise": False,
    "data_std": 0.0,
}


def model_of(network: dict[str, Any], options: dict[str, Any], **sampler: Any) -> DataSGM:
    """A score model with random weights, those that start at zero too."""
    torch.manual_seed(0)
    config = ScoreModelConfig(ncsnpp=PriorNetworkConfig(**network), **options)
    spec = DataSpec("folder", 3, 16, 0, binary=False)
    model = build_data_model("score_sde", config, SamplerConfig(**sampler), spec)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


MODELS = {
    "unit": (VE_NETWORK, VE),
    "as trained here": (VE_NETWORK | {"embedding_scale": 64.0}, SYMMETRIC),
    "chain": (DDPM_NETWORK, CHAIN),
    "continuous": (
        DDPM_NETWORK | {"embedding_scale": 999.0},
        CHAIN | {"condition": "time", "discrete_levels": None},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_diffusers_loads_score_models(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.import_utils._torchvision_available = False
    sampler = {"solver": "discrete_pc", "nfe": 600, "snr": 0.075, "corrector_steps": 1}
    model = model_of(*MODELS[name], **sampler)
    export_score_model(model, tmp_path / "out")
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet").eval()
    rng = torch.Generator().manual_seed(0)
    x, noise = (torch.rand(3, 3, 16, 16, generator=rng) for _ in range(2))
    if name in ("chain", "continuous"):
        steps = torch.tensor([999, 500, 3])
        x_t = 2 * x - 1 + noise
        ours, theirs = model.score(x_t, steps / 999), unet(x_t, steps).sample
    else:
        t = torch.tensor([0.9, 0.5, 0.1])
        sigma = (1e-2 * 5000**t)[:, None, None, None]
        x_t = x + sigma * noise
        ours = model.score(x_t if name == "unit" else 2 * x_t - 1, t)
        theirs = -sigma * unet(x_t, sigma.flatten()).sample
    # of rounding: angles of some hundreds are turned
    limit = 1e-4 if name == "as trained here" else 1e-5
    assert (ours - theirs).abs().max() <= limit * theirs.abs().max()


@torch.no_grad()
def test_diffusers_loads_the_pipelines(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.import_utils._torchvision_available = False
    sampler = {"solver": "discrete_pc", "nfe": 900, "snr": 0.075, "corrector_steps": 2}
    export_score_model(model_of(*MODELS["as trained here"], **sampler), tmp_path / "ve")
    scheduler = diffusers.ScoreSdeVeScheduler.from_pretrained(tmp_path / "ve" / "scheduler")
    config = scheduler.config
    assert (config.num_train_timesteps, config.snr, config.correct_steps) == (300, 0.075, 2)
    assert config.sigma_max == pytest.approx(50) and config.sigma_min == pytest.approx(0.01)
    chain = {"solver": "ddpm", "nfe": 1000, "variance": "large", "clip": False, "t_end": 0.0}
    export_score_model(model_of(*MODELS["chain"], **chain), tmp_path / "ddpm")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ddpm")
    assert pipeline.scheduler.config.variance_type == "fixed_large"
    assert not pipeline.scheduler.config.clip_sample
    assert pipeline.scheduler.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])


@pytest.mark.parametrize("name", ["unit", "chain"])
def test_score_models_come_back(name: str, tmp_path: Path) -> None:
    """Bit for bit, with their sampler."""
    network, options = MODELS[name]
    sampler: dict[str, Any] = (
        {
            "solver": "discrete_pc", "nfe": 4000, "grid": "time", "t_end": 1e-5, "norm": "batch",
            "predictor": "reverse_diffusion", "corrector_steps": 1,
        }
        if name == "unit"
        else {"solver": "ddpm", "nfe": 1000, "grid": "time", "t_end": 0.0}
    )  # fmt: skip
    model = model_of(network, options, **sampler)
    export_score_model(model, tmp_path / "out")
    assert detect_format(tmp_path / "out") == "diffusers"
    IMPORTERS["diffusers"].run(tmp_path / "out", tmp_path / "run", None)
    back = lsgm.load(tmp_path / "run")
    same_weights(model, back)
    assert back.sampler_config == model.sampler_config and back.sde == model.sde


def same_weights(model: nn.Module, back: nn.Module) -> None:
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


REFUSED = {
    "embedding": (VE_NETWORK | {"embedding_type": "positional"}, VE, "embedding_type fourier"),
    "pyramid": (VE_NETWORK | {"progressive_input": "residual"}, VE, "diffusers has no network"),
    "groups": (VE_NETWORK | {"group_rule": "width"}, VE, "8 groups"),
    "data_std": (VE_NETWORK, SYMMETRIC | {"data_std": 0.5}, "score.data_std"),
    "condition": (VE_NETWORK, VE | {"condition": "time"}, "score.condition"),
    "attention": (DDPM_NETWORK | {"up_attention": "level"}, CHAIN, "up.0.attention"),
    "blocks": (DDPM_NETWORK | {"block": "biggan"}, CHAIN, "diffusers has no network"),
    "sde": (DDPM_NETWORK, CHAIN | {"sde": SDEConfig(kind="subvpsde"), "condition": "time",
            "discrete_levels": None}, "no scheduler"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_diffusers_has_not_is_refused(name: str, tmp_path: Path) -> None:
    network, options, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as refused:
        export_score_model(model_of(network, options), tmp_path / "out")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


VAE_CONFIG = VAEConfig(
    num_channels_enc=4, num_channels_dec=4, num_preprocess_cells=1, num_postprocess_cells=1,
    num_latent_per_group=3, num_nf=1,
)  # fmt: skip
SPEC = DataSpec("digits", 1, 16, 0, binary=True)


def latent_model() -> LSGM:
    torch.manual_seed(1)
    vae = build_vae(VAE_CONFIG, SPEC)
    network = PriorNetworkConfig(num_channels=8, embedding_dim=8, attention_resolutions=())
    prior = PriorConfig(network=network, drop_inactive=True)
    model = LSGM(vae, build_prior(prior, vae), SPEC, VAE_CONFIG, prior)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("kind", ["lsgm", "vae"])
@torch.no_grad()
def test_autoencoder_and_prior_come_back(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bound to the last bit, by way of the command line."""
    whole = latent_model()
    model: VAEModel = whole if kind == "lsgm" else VAEModel(whole.vae, SPEC, VAE_CONFIG)
    start = tmp_path / "start"
    start.mkdir()
    save(model, start, DataConfig(name="digits"))
    export_command([str(start), "--to", "diffusers", "--out", str(tmp_path / "out")])
    parts = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/*/*"))
    expected = ["autoencoder/config.json", "autoencoder/model.safetensors"]
    prior = ["prior/config.json", "prior/model.safetensors"] if kind == "lsgm" else []
    assert parts == expected + prior
    assert detect_format(tmp_path / "out") == "exported-lsgm"
    imported = IMPORTERS["exported-lsgm"].run(tmp_path / "out", tmp_path / "run", None)
    assert imported.kind == kind and "released weights" in str(imported)
    back = lsgm.load(tmp_path / "run")
    same_weights(model, back)
    x = 2 * torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)).round() - 1
    bounds = [m.nelbo(x, torch.Generator().manual_seed(2)).total for m in (model, back)]
    assert torch.equal(*bounds)


BROKEN = {
    "no prior": (lambda out: (out / "prior/model.safetensors").unlink(), "is missing"),
    "cut": (
        lambda out: (out / "prior/model.safetensors").write_bytes(b"1234567890"),
        "damaged or truncated",
    ),
    "other sizes": (
        lambda out: (out / "autoencoder/config.json").write_text(
            (out / "autoencoder/config.json").read_text().replace(
                '"num_latent_per_group": 3', '"num_latent_per_group": 4'
            )
        ),
        "weights do not fit",
    ),
    "text": (lambda out: (out / "prior/config.json").write_text("{"), "not readable as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_parts_are_one_line(name: str, tmp_path: Path) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    start.mkdir()
    save(latent_model(), start, DataConfig(name="digits"))
    export_command([str(start), "--to", "diffusers", "--out", str(out)])
    damage, message = BROKEN[name]
    damage(out)
    with pytest.raises(UserError, match=message) as refused:
        IMPORTERS["exported-lsgm"].run(out, tmp_path / "run", None)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_export_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, full = tmp_path / "start", tmp_path / "full"
    start.mkdir()
    full.mkdir()
    (full / "mine.txt").write_text("")
    save(latent_model(), start, DataConfig(name="digits"))
    for arguments, message in (
        ([start, "--to", "diffusers", "--out", full], "not empty"),
        ([start, "--to", "onnx", "--out", tmp_path / "x"], "invalid choice"),
        ([start, "--out", tmp_path / "x"], "--to"),
        ([tmp_path / "none", "--to", "diffusers", "--out", tmp_path / "x"], "no such run"),
    ):
        monkeypatch.setattr(sys, "argv", ["export_checkpoint.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run(lambda: export_command(sys.argv[1:]))
        errors = capsys.readouterr().err
        assert stop.value.code == 2 and message in errors and errors.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "start"]
