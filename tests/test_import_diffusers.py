"""Folders of diffusers that are damaged or of other models: one line each, and no run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lsgm.config.architecture import PriorNetworkConfig, SamplerConfig, ScoreModelConfig, SDEConfig
from lsgm.data.spec import DataSpec
from lsgm.errors import UserError
from lsgm.exporters.diffusers import export_score_model
from lsgm.importers.diffusers_folder import config_of_folder, import_diffusers
from lsgm.importers.diffusers_reading import read_diffusers
from lsgm.importers.formats import detect_format
from lsgm.importers.score_runs import meta_model
from lsgm.models.images import build_data_model

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def folder(path: Path) -> Path:
    """A DDPM's folder."""
    torch.manual_seed(0)
    network = PriorNetworkConfig(
        num_channels=8, num_scales=2, channel_mult=(1, 2), num_cells_per_scale=1, embedding_dim=8,
        embedding_width=32, embedding_scale=1.0, attention_resolutions=(4,), block="ddpm",
        rescale=False, norm_groups=4, up_attention="block",
    )  # fmt: skip
    config = ScoreModelConfig(
        ncsnpp=network, sde=SDEConfig(kind="vpsde", time_eps=1e-5), condition="index",
        discrete_levels=1000, dequantise=False, data_std=0.0,
    )  # fmt: skip
    spec = DataSpec("folder", 1, 8, 0, binary=False)
    export_score_model(build_data_model("score_sde", config, SamplerConfig(), spec), path)
    return path


def changed(file: str, **values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        options = json.loads((path / file).read_text()) | values
        (path / file).write_text(json.dumps(options))

    return change


def unet(**values: Any) -> Callable[[Path], None]:
    return changed("unet/config.json", **values)


def scheduler(**values: Any) -> Callable[[Path], None]:
    return changed("scheduler/scheduler_config.json", **values)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        state = load_file(path / WEIGHTS)
        change(state)
        save_file({name: value.clone() for name, value in state.items()}, path / WEIGHTS)

    return apply


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no scheduler": (
        lambda p: (p / "scheduler/scheduler_config.json").unlink(), "is missing; the folder needs",
    ),
    "other scheduler": (scheduler(_class_name="PNDMScheduler"), "scheduler PNDMScheduler"),
    "other network": (unet(_class_name="UNet2DConditionModel"), "network UNet2DConditionModel"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "has no weights"),
    "weights in parts": (
        lambda p: (p / WEIGHTS).rename(p / f"{WEIGHTS}.index.json"), "in several files",
    ),
    "truncated": (
        lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:5000]), "download",
    ),
    "a pickle of something else": (
        lambda p: [(p / WEIGHTS).unlink(),
                   torch.save([1], p / "unet/diffusion_pytorch_model.bin")],
        "something other than weights",
    ),
    "no JSON": (lambda p: (p / "unet/config.json").write_text("{"), "not readable as JSON"),
    "no object": (lambda p: (p / "unet/config.json").write_text("3"), "expected a JSON object"),
    "several heads": (unet(attention_head_dim=8), "attention_head_dim 8"),
    "eps": (unet(norm_eps=1e-5), "norm_eps 1e-05"),
    "other sinusoids": (unet(freq_shift=0), "freq_shift 0"),
    "other padding": (unet(downsample_padding=1), "downsample_padding 1"),
    "classes": (unet(num_class_embeds=10), "num_class_embeds 10"),
    "fourier": (unet(time_embedding_type="fourier"), "time_embedding_type fourier"),
    "other blocks": (
        unet(down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"]),
        "ResnetDownsampleBlock2D",
    ),
    "attention one way": (unet(up_block_types=["UpBlock2D", "UpBlock2D"]), "on the way up"),
    "no size": (unet(sample_size=None), "sample_size None"),
    "more output": (unet(out_channels=2), "1 channels to 2"),
    "odd size": (unet(sample_size=7), "halved"),
    "velocity": (scheduler(prediction_type="v_prediction"), "prediction_type v_prediction"),
    "cosine": (scheduler(beta_schedule="squaredcos_cap_v2"), "beta_schedule"),
    "learned variance": (scheduler(variance_type="learned"), "variance_type learned"),
    "missing weight": (weights(lambda s: s.pop("conv_in.bias")), "conv_in.bias is missing"),
    "extra weight": (weights(lambda s: s.update(more=torch.zeros(2))), "more is unknown"),
    "other width": (unet(block_out_channels=[8, 24]), "do not fit its unet options"),
    "not a number": (
        weights(lambda s: s["conv_in.bias"].fill_(torch.nan)), "NaN or infinity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_one_line(name: str, tmp_path: Path) -> None:
    damage, message = BAD[name]
    path = folder(tmp_path / "folder")
    damage(path)
    with pytest.raises(UserError) as refused:
        import_diffusers(path, tmp_path / "run")
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert str(path) in str(refused.value) or "halved" in message
    assert not (tmp_path / "run").exists()


def test_what_is_no_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "folder")
    for given, weights_, message in (
        (path / "model_index.json", None, "a file"),
        (tmp_path / "none", None, "no such folder"),
        (path, "raw", "one set of weights"),
    ):
        with pytest.raises(UserError, match=message):
            import_diffusers(given, tmp_path / "run", weights_)  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="none of the formats"):
        detect_format(tmp_path / "empty")


def hub(kind: str, size: int, widths: tuple[int, ...], layers: int, attends: int) -> Any:
    """What the options of a ``google/*`` repository are, without weights."""
    down, up = (
        ("SkipDownBlock2D", "SkipUpBlock2D") if kind == "ve" else ("DownBlock2D", "UpBlock2D")
    )
    names = [f"Attn{down}" if i == attends else down for i in range(len(widths))]
    ups = [f"Attn{up}" if i == attends else up for i in reversed(range(len(widths)))]
    common = {
        "act_fn": "silu", "attention_head_dim": None, "norm_eps": 1e-6, "sample_size": size,
        "block_out_channels": list(widths), "layers_per_block": layers, "down_block_types": names,
        "up_block_types": ups, "in_channels": 3, "out_channels": 3,
    }  # fmt: skip
    if kind == "ve":
        return (
            common
            | {
                "time_embedding_type": "fourier", "center_input_sample": True,
                "mid_block_scale_factor": 1.41421356237, "norm_num_groups": None,
                "freq_shift": 0, "flip_sin_to_cos": True, "downsample_padding": 1,
            },
            {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 380,
             "snr": 0.075, "sampling_eps": 1e-5, "correct_steps": 1, "num_train_timesteps": 2000},
        )  # fmt: skip
    return (
        common
        | {
            "time_embedding_type": "positional", "center_input_sample": False, "freq_shift": 1,
            "mid_block_scale_factor": 1, "norm_num_groups": 32, "flip_sin_to_cos": False,
            "downsample_padding": 0,
        },
        {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02,
         "beta_schedule": "linear", "clip_sample": True, "num_train_timesteps": 1000,
         "variance_type": "fixed_small", "trained_betas": None},
    )  # fmt: skip


@pytest.mark.parametrize(
    "published, parameters",
    [
        (("ve", 256, (128, 128, 256, 256, 256, 256, 256), 2, 4), 65_574_549),
        (("ve", 1024, (16, 32, 64, 128, 256, 512, 512, 512), 1, 6), 105_785_896),
        (("ddpm", 32, (128, 256, 256, 256), 2, 1), 35_746_307),
        (("ddpm", 256, (128, 128, 256, 256, 512, 512), 2, 4), 113_673_219),
    ],
)
def test_published_repositories(published: Any, parameters: int, tmp_path: Path) -> None:
    """The options of the hub's repositories, without memory: their numbers of values, with the
    Fourier frequencies.
    """
    network, scheme = hub(*published)
    (tmp_path / "config.json").write_text(json.dumps(network))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(scheme))
    save_file({"nothing": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    config = config_of_folder(read_diffusers(tmp_path))
    model = meta_model(config)
    buffers = [v for n, v in model.named_buffers() if n.endswith("frequencies")]
    assert sum(v.numel() for v in (*model.parameters(), *buffers)) == parameters
    assert model.default_sampler().times.shape == (scheme["num_train_timesteps"],)
