"""A prior of ours under the published names: the way back from the importer's."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lsgm.importers.official_prior import published_modules
from lsgm.networks.layers import AttentionBlock, ResidualBlock
from lsgm.networks.ncsnpp import NCSNpp
from lsgm.networks.resample import FIRConvDownsample, FIRConvUpsample
from lsgm.score import MixedNormalScore

__all__ = ["prior_state"]

_PUBLISHED_PARTS: dict[type[nn.Module], dict[str, str]] = {
    ResidualBlock: {
        "norm_in": "GroupNorm_0",
        "conv_in": "Conv_0",
        "time": "Dense_0",
        "norm_out": "GroupNorm_1",
        "conv_out": "Conv_1",
        "shortcut": "Conv_2",
    },
    FIRConvDownsample: {"conv": "Conv2d_0"},
    FIRConvUpsample: {"conv": "Conv2d_0"},
}


def _published_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of one numbered module under their published names."""
    state = module.state_dict()
    if isinstance(module, AttentionBlock):
        yield "GroupNorm_0.weight", state["norm.weight"]
        yield "GroupNorm_0.bias", state["norm.bias"]
        maps = [*zip(state["qkv.weight"].chunk(3), state["qkv.bias"].chunk(3), strict=True)]
        for i, (weight, bias) in enumerate([*maps, (state["out.weight"], state["out.bias"])]):
            yield f"NIN_{i}.W", weight.T.contiguous()
            yield f"NIN_{i}.b", bias
        return
    names = _PUBLISHED_PARTS.get(type(module), {"conv": "Conv_0"})
    for key, value in state.items():
        part, _, leaf = key.rpartition(".")
        yield (f"{names[part]}.{leaf}" if part else leaf), value


def prior_state(score: MixedNormalScore) -> dict[str, Tensor]:
    """The prior's weights in published names and order."""
    network = score.network
    assert isinstance(network, NCSNpp) and score.mixing_logit is not None
    state = {"mixing_logit": score.mixing_logit.detach()}
    features = network.embedding.features.state_dict()
    if "frequencies" in features:
        state["temb_fun.w"] = features["frequencies"].reshape(1, -1)
    for k, module in enumerate(published_modules(network)):
        state |= {f"all_modules.{k}.{name}": v for name, v in _published_state(module)}
    return {name: value.clone() for name, value in state.items()}
