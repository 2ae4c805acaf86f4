"""Files in the layout of score-SDE's checkpoints, with the weights of a model of ours."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsgm.datasgm import DataSGM
from lsgm.importers.official_prior import published_modules
from lsgm.networks.layers import AttentionBlock, ResidualBlock
from lsgm.sde import VESDE

RESIDUAL = {
    "norm_in": "GroupNorm_0",
    "conv_in": "Conv_0",
    "time": "Dense_0",
    "norm_out": "GroupNorm_1",
    "conv_out": "Conv_1",
}


def published_state(model: DataSGM) -> OrderedDict[str, Tensor]:
    """The weights under published names, in the published order, without prefix."""
    network: Any = model.score.network
    state: OrderedDict[str, Tensor] = OrderedDict()
    features = network.embedding.features
    fourier = hasattr(features, "frequencies")
    if fourier:
        state["all_modules.0.W"] = features.frequencies
    names = {module: name for name, module in network.named_modules()}
    for k, module in enumerate(published_modules(network), int(fourier)):
        last = isinstance(model.sde, VESDE) and names[module].endswith("head.conv")
        for name, value in _renamed(module).items():
            state[f"all_modules.{k}.{name}"] = -value if last else value
    return state


def _renamed(module: nn.Module) -> dict[str, Tensor]:
    own = {name: value.detach() for name, value in module.state_dict().items()}
    if isinstance(module, AttentionBlock):
        found = {f"GroupNorm_0.{leaf}": own[f"norm.{leaf}"] for leaf in ("weight", "bias")}
        for i, part in enumerate(own["qkv.weight"].chunk(3)):
            found[f"NIN_{i}.W"] = part.T.contiguous()
            found[f"NIN_{i}.b"] = own["qkv.bias"].chunk(3)[i].clone()
        return found | {"NIN_3.W": own["out.weight"].T.contiguous(), "NIN_3.b": own["out.bias"]}
    if isinstance(module, ResidualBlock):
        found = {}
        for name, value in own.items():
            layer, leaf = name.split(".")
            if layer != "shortcut":
                found[f"{RESIDUAL[layer]}.{leaf}"] = value
            elif module.style.rescale:
                found[f"Conv_2.{leaf}"] = value
            else:
                ddpm = leaf == "weight"
                found["NIN_0.W" if ddpm else "NIN_0.b"] = value[..., 0, 0].T if ddpm else value
        return found
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
        return own
    return {f"Conv_0.{name.rsplit('.', 1)[-1]}": value for name, value in own.items()}


def write_checkpoint(
    path: Path, model: DataSGM, /, *, prefix: str = "module.", **parts: Any
) -> Path:
    """A checkpoint with averages that are 0.9 of the weights; ``parts`` replace those of the file,
    and are left out if they are None.
    """
    state = published_state(model)
    steps = model.defaults.nfe // (1 + model.defaults.options.get("corrector_steps", 0))
    sigmas = torch.linspace(50.0, 0.01, steps, dtype=torch.float64)
    if isinstance(model.sde, VESDE):
        low, high = model.sde.sigma2_min**0.5, model.sde.sigma2_max**0.5
        sigmas = high * (low / high) ** torch.linspace(0, 1, steps, dtype=torch.float64)
    trained = [name for name in state if name != "all_modules.0.W"]
    shadow = [0.9 * state[name] for name in trained]
    whole: dict[str, Any] = {
        "optimizer": {"state": {}, "param_groups": []},
        "model": OrderedDict(
            [(f"{prefix}sigmas", sigmas), *((f"{prefix}{k}", v) for k, v in state.items())]
        ),
        "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": shadow},
        "step": 7,
    }
    kept = {name: value for name, value in (whole | parts).items() if value is not None}
    torch.save(kept, path)
    return path
