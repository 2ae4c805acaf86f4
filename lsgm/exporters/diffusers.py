"""Score models of images as folders that the diffusers package loads.

What its ``UNet2DModel`` cannot be is refused: that the export is exact is checked by reading the
folder's options back into a network and comparing it with the model's, layer by layer.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.config.architecture import PriorNetworkConfig
from lsgm.errors import UserError
from lsgm.exporters.folder import new_folder, write_part
from lsgm.importers.diffusers_folder import BLOCKS, COMMON, TYPE, config_of_folder
from lsgm.importers.diffusers_names import published_unet_weights
from lsgm.importers.diffusers_reading import (
    DDPM,
    EXPLODING,
    SCHEDULER,
    UNET,
    WEIGHTS,
    DiffusersFolder,
)
from lsgm.importers.score_runs import meta_model
from lsgm.models.images import DataSGM
from lsgm.networks.data_score import DataScore
from lsgm.networks.ncsnpp import NCSNpp
from lsgm.sde import VESDE, VPSDE

__all__ = ["export_score_model", "folder_of"]

VERSION = "0.42.1"
"""Of diffusers, whose options these are."""
PIPELINES = {EXPLODING: "ScoreSdeVePipeline", DDPM: "DDPMPipeline"}


def export_score_model(model: DataSGM, out: str | Path) -> str:
    """Write the folder ``out`` with the model's network and scheduler; returns what it is.

    Raises:
        UserError: The package has no such model, which the message says, or ``out`` is there.
    """
    folder = folder_of(model)
    index = {
        "_class_name": PIPELINES[folder.type],
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", folder.type],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with new_folder(out) as path:
        write_part(path, ("model_index.json", index))
        write_part(path / "unet", (UNET, folder.unet), (WEIGHTS[0], folder.weights))
        write_part(path / "scheduler", (SCHEDULER, folder.scheduler))
    return f"{out}: {PIPELINES[folder.type]} of diffusers"


def folder_of(model: DataSGM) -> DiffusersFolder:
    """What the folder of a model holds.

    Raises:
        UserError: The package has no such model.
    """
    if not isinstance(model.score, DataScore) or not isinstance(model.score.network, NCSNpp):
        raise UserError(
            f"diffusers has no network like that of kind {model.kind}; models of kind score_sde "
            "can be exported"
        )
    if model.num_classes is not None:
        raise UserError("diffusers has no network like this one, which is told the class")
    exploding = isinstance(model.sde, VESDE)
    state = {name: value.detach() for name, value in model.score.network.state_dict().items()}
    if exploding:
        state = _exploding_state(model, state)
    elif not isinstance(model.sde, VPSDE) or model.sde.sigma2_0 > 0:
        raise UserError("diffusers has no scheduler of this SDE; it has those of vesde and vpsde")
    scheduler = (_exploding_scheduler if exploding else _chain_scheduler)(model)
    here = Path("the model")
    folder = DiffusersFolder(here, here, _unet(model, exploding), scheduler, {})
    _check(model.score.network, folder)
    weights = published_unet_weights(model.score.network, state, exploding)
    return replace(folder, weights=weights)


def _unet(model: DataSGM, exploding: bool) -> dict[str, Any]:
    network, (channels, size, _) = model.config.ncsnpp, model.state_shape
    kind = EXPLODING if exploding else DDPM
    down, up = BLOCKS[kind]
    attends = [size >> i in network.attention_resolutions for i in range(network.num_scales)]
    own = COMMON | TYPE[kind]
    own |= {} if exploding else {"norm_num_groups": network.norm_groups}
    own |= {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1} if exploding else {}
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        **own,
        "block_out_channels": _widths(network),
        "down_block_types": [f"Attn{down}" if attend else down for attend in attends],
        "up_block_types": [f"Attn{up}" if attend else up for attend in reversed(attends)],
        "dropout": network.dropout,
        "in_channels": channels,
        "layers_per_block": network.num_cells_per_scale,
        "num_train_timesteps": None,
        "out_channels": channels,
        "sample_size": size,
    }


def _widths(network: PriorNetworkConfig) -> list[int]:
    if network.widths is not None:
        return list(network.widths)
    mult = network.channel_mult or (1,) * network.num_scales
    return [network.num_channels * m for m in mult[: network.num_scales]]


def _exploding_state(model: DataSGM, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's weights as those of one that sees ``2 x - 1`` and is told ``ln sigma``, for
    images in [0, 1].

    A model of images in [-1, 1] that is told ``ln(sigma) / 4`` of noise twice as large is such a
    one: its frequencies are divided by 4 and the angle of ``ln 2`` turns each pair of sine and
    cosine, which the layer after them takes over.
    """
    score, symmetric = model.score, model.pixels.symmetric
    assert isinstance(score, DataScore)
    if score.condition not in ("ln_sigma", "log_sigma") or (not symmetric and not score.centre):
        raise UserError(
            "diffusers' variance-exploding network sees images in [-1, 1] and is told ln(sigma); "
            "this model has another score.condition or sees them in [0, 1]"
        )
    if score.data_std > 0 or model.pixels.dequantise:
        raise UserError(
            "diffusers does not scale the network's input and its images are not dequantised; this "
            "model has score.data_std or score.dequantise"
        )
    if "embedding.features.frequencies" not in state:
        raise UserError("diffusers' variance-exploding network has embedding_type fourier")
    frequencies = state["embedding.features.frequencies"].double()
    frequencies = frequencies / 4 if score.condition == "log_sigma" else frequencies
    state["embedding.features.frequencies"] = frequencies.float()
    if symmetric:
        angle = 2 * math.pi * frequencies * math.log(2)
        sine, cosine = state["embedding.hidden.weight"].double().chunk(2, dim=1)
        turned = torch.cat(
            [sine * angle.cos() - cosine * angle.sin(), sine * angle.sin() + cosine * angle.cos()],
            dim=1,
        )
        state["embedding.hidden.weight"] = turned.float()
    return state


def _exploding_scheduler(model: DataSGM) -> dict[str, Any]:
    assert isinstance(model.sde, VESDE)
    unit = 2.0 if model.pixels.symmetric else 1.0
    given = model.sampler_config
    steps = 1 if given.corrector_steps is None else given.corrector_steps
    published = given.solver in ("discrete_pc", "predictor_corrector") and given.nfe
    return {
        "_class_name": EXPLODING,
        "_diffusers_version": VERSION,
        "correct_steps": steps,
        "num_train_timesteps": (given.nfe or 0) // (1 + steps) if published else 2000,
        "sampling_eps": model.defaults.t_end or 1e-5,
        "sigma_max": math.sqrt(model.sde.sigma2_max) / unit,
        "sigma_min": math.sqrt(model.sde.sigma2_min) / unit,
        "snr": given.snr,
    }


def _chain_scheduler(model: DataSGM) -> dict[str, Any]:
    assert isinstance(model.sde, VPSDE) and isinstance(model.score, DataScore)
    network = model.config.ncsnpp
    if not model.pixels.symmetric or model.score.data_std > 0 or model.pixels.dequantise:
        raise UserError(
            "diffusers' DDPM has images in [-1, 1], neither scaled nor dequantised; this model has "
            "another score.data_range, score.data_std or score.dequantise"
        )
    if network.embedding_type != "positional":
        raise UserError("diffusers' DDPM has embedding_type positional")
    # A network that is told (N - 1) t knows of N levels, in continuous time too.
    scale = network.embedding_scale
    if model.score.condition == "index" and scale == 1:
        levels = model.config.discrete_levels
    elif model.score.condition == "time" and scale == round(scale):
        levels = round(scale) + 1
    else:
        raise UserError(
            "diffusers' DDPM is told the number of a noise level; this model has another "
            "score.condition or embedding_scale"
        )
    assert levels is not None
    return {
        "_class_name": DDPM,
        "_diffusers_version": VERSION,
        "beta_end": model.sde.beta_end / levels,
        "beta_schedule": "linear",
        "beta_start": model.sde.beta_start / levels,
        "clip_sample": model.sampler_config.clip,
        "num_train_timesteps": levels,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "variance_type": f"fixed_{model.sampler_config.variance}",
    }


def _check(network: NCSNpp, folder: DiffusersFolder) -> None:
    """Refuse a network that is not the one which the folder's options describe."""
    back = meta_model(config_of_folder(folder)).score.network
    assert isinstance(back, NCSNpp)
    ours, theirs = _layers(network), _layers(back)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"diffusers has no network like this one: its {name} is "
                f"{ours.get(name, 'not there')}, theirs {theirs.get(name, 'not there')}"
            )


def _layers(network: nn.Module) -> dict[str, str]:
    """Kinds, numbers and sizes of all layers, in words."""
    described = {}
    for name, module in network.named_modules():
        style: Any = getattr(module, "style", None)
        said = [type(module).__name__]
        if hasattr(style, "rescale"):
            said.append(f"rescale {style.rescale}")
        if isinstance(module, nn.GroupNorm):
            said.append(f"{module.num_groups} groups")
        own = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        described[name] = " ".join([*said, *(f"{key} {shape}" for key, shape in own.items())])
    return described
