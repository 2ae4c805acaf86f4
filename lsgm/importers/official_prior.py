"""The latent prior of published second-stage LSGM checkpoints.

A checkpoint holds ``args`` (a namespace), ``dae_state_dict`` and, unless it is a release,
``dae_optimizer``, whose per-parameter state carries the EMA. The published network numbers its
modules in the order in which it builds them (``all_modules.0`` ...); :func:`published_modules`
walks ours in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lsgm.networks.layers import AttentionBlock, GroupNormSiLU, ResidualBlock
from lsgm.networks.levels import (
    ConvStep,
    DownLevel,
    InputResidual,
    InputSkip,
    NormConv,
    OutputResidual,
    OutputResidualStart,
    OutputSkip,
    UpLevel,
)
from lsgm.networks.ncsnpp import NCSNpp
from lsgm.networks.resample import (
    ConvDownsample,
    ConvUpsample,
    FIRConvDownsample,
    FIRConvUpsample,
)
from lsgm.score import MixedNormalScore
from lsgm.sde import LinearSDE, make_sde
from lsgm.system.memory import build_within_memory

__all__ = [
    "PriorArguments",
    "load_official_prior",
    "network_weights",
    "prior_arguments",
    "prior_weights",
    "published_modules",
]

SDE_KINDS = {
    "vpsde": "vpsde",
    "geometric_sde": "geometric",
    "sub_vpsde": "subvpsde",
    "vesde": "vesde",
}
SDE_FIELDS = ("beta_start", "beta_end", "sigma2_0", "sigma2_min", "sigma2_max", "time_eps")
IMAGE_SIZES = {
    "cifar10": 32,
    "mnist": 32,
    "omniglot": 32,
    "celeba_256": 256,
    "ffhq": 256,
    "lsun_church_256": 256,
}
_LARGE_MULT = {3: (1, 1, 1), 4: (1, 2, 2, 2), 5: (1, 1, 2, 2, 2)}
WEIGHTINGS = {
    "ll_uniform": ("likelihood", "uniform"),
    "ll_iw": ("likelihood", "importance"),
    "drop_all_uniform": ("unweighted", "uniform"),
    "drop_all_iw": ("unweighted", "importance"),
    "drop_sigma2t_uniform": ("reweighted", "uniform"),
    "drop_sigma2t_iw": ("reweighted", "importance"),
    # the published code draws these times uniformly despite the name
    "rescale_iw": ("rescaled", "uniform"),
    "reweight_p_samples": ("same", "same"),
}
"""Published sampling mode -> (weighting, time proposal)."""


@dataclass(frozen=True)
class PriorArguments:
    """What a checkpoint's arguments say of the prior.

    Attributes:
        channels: ``C`` of the latent.
        resolution: ``S`` of the latent.
        network: the other arguments of :class:`lsgm.networks.NCSNpp`.
        sde: the diffusion.
        sde_kind: its name in :data:`lsgm.sde.SDES`.
        mixed: whether the Normal component is mixed in.
        mixing_init: initial mixing logit.
        weighting_p: weighting and time proposal (``proposal_p``) of the prior's loss.
        proposal_q: time proposal of the encoder's loss, whose weighting is always the likelihood's;
            ``"same"`` shares the prior's samples.
    """

    channels: int
    resolution: int
    network: dict[str, Any]
    sde: LinearSDE
    sde_kind: str
    mixed: bool
    mixing_init: float
    weighting_p: str
    proposal_p: str
    proposal_q: str


def _channel_mult(dataset: str, num_scales: int) -> tuple[int, ...]:
    mult = _LARGE_MULT.get(num_scales, ()) if IMAGE_SIZES.get(dataset) == 256 else (1,) * num_scales
    if not mult:
        raise ValueError(
            f"the published network knows no channel widths for {dataset} with {num_scales} scales"
        )
    return mult


def prior_arguments(args: Any) -> PriorArguments:
    """Read the prior's settings from a published checkpoint's ``args`` (a namespace or a mapping).

    Raises:
        ValueError: a field is missing or holds a value that the published code did not support.
    """
    values: dict[str, Any] = dict(args) if isinstance(args, Mapping) else dict(vars(args))
    try:
        dataset = values["dataset"]
        image_size = IMAGE_SIZES.get(dataset, 64 if dataset.endswith("_64") else None)
        if image_size is None:
            raise ValueError(f"unknown dataset {dataset!r} in the checkpoint's arguments")
        halvings = values["num_preprocess_blocks"] + values["num_latent_scales"] - 1
        network = {
            "num_channels": values["num_channels_dae"],
            "num_scales": values["num_scales_dae"],
            "channel_mult": _channel_mult(dataset, values["num_scales_dae"]),
            "num_cells_per_scale": values["num_cell_per_scale_dae"],
            "embedding_dim": values["embedding_dim"],
            "embedding_type": values["embedding_type"],
            "embedding_scale": float(values["embedding_scale"]),
            "dropout": float(values["dropout"]),
            "fir": values["fir"],
            "progressive": values["progressive"],
            "progressive_input": values["progressive_input"],
            "progressive_combine": values["progressive_combine"],
            "attention_resolutions": (16,),
            "middle_attention": True,
        }
        kind = SDE_KINDS[values["sde_type"]]
        weighting_p, proposal_p = WEIGHTINGS[values["iw_sample_p"]]
        _, proposal_q = WEIGHTINGS[values["iw_sample_q"]]
        return PriorArguments(
            channels=values["num_groups_per_scale"] * values["num_latent_per_group"],
            resolution=image_size >> halvings,
            network=network,
            sde=make_sde(kind, **{name: float(values[name]) for name in SDE_FIELDS}),
            sde_kind=kind,
            mixed=bool(values.get("mixed_prediction", True)),
            mixing_init=float(values.get("mixing_logit_init", -3.0)),
            weighting_p=weighting_p,
            proposal_p=proposal_p,
            proposal_q=proposal_q,
        )
    except KeyError as missing:
        raise ValueError(
            f"the checkpoint's arguments lack or do not support {missing}"
        ) from missing


def _level_modules(blocks: nn.ModuleList, attentions: nn.ModuleList) -> Iterator[nn.Module]:
    for i, block in enumerate(blocks):
        yield block
        if attentions:
            yield attentions[i]


def _pyramid_modules(pyramid: nn.Module | None) -> list[nn.Module]:
    """Modules of a pyramid that the published network numbers."""
    parts: dict[type, Callable[[Any], list[nn.Module]]] = {
        type(None): lambda _: [],
        InputSkip: lambda p: [p],
        InputResidual: lambda p: [p.resample],
        OutputSkip: lambda p: [p.head.norm, p.head.conv],
        OutputResidualStart: lambda p: [p.head.norm, p.head.conv],
        OutputResidual: lambda p: [p.resample],
        NormConv: lambda p: [p.norm, p.conv],
    }
    return parts[type(pyramid)](pyramid)


def published_modules(network: NCSNpp) -> list[nn.Module]:
    """Modules in the published order: position ``k`` is ``all_modules.k``."""
    modules: list[nn.Module] = [network.embedding.hidden, network.embedding.out, network.conv_in]
    for level in cast(Iterable[DownLevel], network.down):
        modules += _level_modules(level.blocks, level.attentions)
        if level.downsample is not None:
            modules += [level.downsample, *_pyramid_modules(level.pyramid)]
    middle = [network.middle_in, network.middle_attention, network.middle_out]
    modules += [module for module in middle if module is not None]
    for stage in cast(Iterable[UpLevel], network.up):
        modules += [*stage.blocks, *([] if stage.attention is None else [stage.attention])]
        modules += _pyramid_modules(stage.pyramid)
        modules += [] if stage.upsample is None else [stage.upsample]
    return modules + _pyramid_modules(network.head)


def _rename(names: Mapping[str, str]) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """Converter that maps published submodule names to ours and keeps ``.weight`` and ``.bias``."""

    def convert(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for key, value in published.items():
            module, _, leaf = key.rpartition(".")
            renamed[f"{names[module]}.{leaf}" if module else leaf] = value
        return renamed

    return convert


def _attention(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published maps are ``(in, out)`` and separate; ours ``(out, in)``, q, k, v stacked."""
    return {
        "norm.weight": published["GroupNorm_0.weight"],
        "norm.bias": published["GroupNorm_0.bias"],
        "qkv.weight": torch.cat([published[f"NIN_{i}.W"].T for i in range(3)]),
        "qkv.bias": torch.cat([published[f"NIN_{i}.b"] for i in range(3)]),
        "out.weight": published["NIN_3.W"].T,
        "out.bias": published["NIN_3.b"],
    }


def _residual(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A residual block; the shortcut of a ``ddpm`` block is a map ``(in, out)`` of pixels."""
    published = dict(published)
    matrix, bias = (published.pop(f"NIN_0.{leaf}", None) for leaf in ("W", "b"))
    converted = _RESIDUAL(published)
    if matrix is not None and bias is not None:
        converted |= {"shortcut.weight": matrix.T[..., None, None], "shortcut.bias": bias}
    return converted


_AS_IT_IS = _rename({})
_RESAMPLER = _rename({"Conv2d_0": "conv", "Conv_0": "conv"})
_RESIDUAL = _rename(
    {
        "GroupNorm_0": "norm_in",
        "Conv_0": "conv_in",
        "Dense_0": "time",
        "GroupNorm_1": "norm_out",
        "Conv_1": "conv_out",
        "Conv_2": "shortcut",
    }
)
_CONVERTERS: dict[type[nn.Module], Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = {
    nn.Linear: _AS_IT_IS,
    nn.Conv2d: _AS_IT_IS,
    GroupNormSiLU: _AS_IT_IS,
    ResidualBlock: _residual,
    AttentionBlock: _attention,
    InputSkip: _rename({"Conv_0": "conv"}),
    FIRConvDownsample: _RESAMPLER,
    FIRConvUpsample: _RESAMPLER,
    ConvDownsample: _RESAMPLER,
    ConvUpsample: _RESAMPLER,
    ConvStep: _rename({"Conv2d_0": "resample.conv", "Conv_0": "resample.conv"}),
}


def network_weights(
    network: NCSNpp, published: dict[str, Tensor], first: int = 0
) -> dict[str, Tensor]:
    """The weights of ``all_modules`` under the names of ``network``, which has to be built like
    them; they are taken out of ``published``, and what is left belongs nowhere.

    Args:
        network: Ours.
        published: Weights by published name.
        first: Number of the first module, the one after the Fourier features.

    Raises:
        ValueError: A module is of another kind, or is not there.
    """
    names = {module: name for name, module in network.named_modules()}
    by_module: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in published if key.startswith("all_modules.")]:
        _, number, leaf = key.split(".", 2)
        by_module.setdefault(number, {})[leaf] = published.pop(key)
    state: dict[str, Tensor] = {}
    for k, module in enumerate(published_modules(network), first):
        own = by_module.pop(str(k), {})
        kind = type(module).__name__
        if not own:
            raise ValueError(f"all_modules.{k}, a {kind}, is missing")
        try:
            converted = _CONVERTERS.get(type(module), _RESAMPLER)(own)
        except KeyError as unexpected:
            raise ValueError(f"all_modules.{k} should be a {kind}, found {unexpected}") from None
        state |= {f"{names[module]}.{leaf}": value.float() for leaf, value in converted.items()}
    published |= {
        f"all_modules.{k}.{leaf}": v for k, own in by_module.items() for leaf, v in own.items()
    }
    return state


def prior_weights(raw: Mapping[str, Any], weights: Literal["raw", "ema"]) -> dict[str, Tensor]:
    """The prior's published state dict with the training weights or their EMA.

    A release without optimizer state holds the EMA already, and both choices return it.

    Raises:
        ValueError: ``weights`` is neither ``"raw"`` nor ``"ema"``, or the EMA of some parameter is
            missing.
    """
    if weights not in ("raw", "ema"):
        raise ValueError(f"weights must be 'raw' or 'ema', got {weights!r}")
    state = dict(raw["dae_state_dict"])
    if weights == "raw" or "dae_optimizer" not in raw:
        return state
    moments = raw["dae_optimizer"]["state"]
    for position, name in enumerate(state):
        if name == "temb_fun.w":  # frozen: listed, but never optimised
            continue
        if "ema" not in moments.get(position, {}):
            raise ValueError(f"the checkpoint's optimizer holds no EMA of the prior's {name}")
        state[name] = moments[position]["ema"]
    return state


def load_official_prior(
    raw: Mapping[str, Any], weights: Literal["raw", "ema"] = "ema"
) -> MixedNormalScore:
    """Build the prior of a published second-stage checkpoint and load its weights.

    Args:
        raw: the checkpoint's dictionary.
        weights: ``"ema"`` (for generation and evaluation) or ``"raw"`` (to go on training).

    Raises:
        ValueError: the arguments or the weights do not fit.
    """
    if "dae_state_dict" not in raw:
        raise ValueError("the checkpoint holds no prior (dae_state_dict); is it a first-stage VAE?")
    arguments = prior_arguments(raw["args"])
    network = build_within_memory(
        lambda: NCSNpp(arguments.channels, arguments.resolution, **arguments.network), "checkpoint"
    )
    score = MixedNormalScore(
        network, arguments.sde, arguments.channels, arguments.mixing_init, arguments.mixed
    )
    published = prior_weights(raw, weights)
    state: dict[str, Tensor] = {"channel_mask": score.channel_mask}
    if arguments.mixed:
        state["mixing_logit"] = published.pop("mixing_logit")
    if "temb_fun.w" in published:
        state["network.embedding.features.frequencies"] = published.pop("temb_fun.w").reshape(-1)
    state |= {f"network.{name}": v for name, v in network_weights(network, published).items()}
    if published:
        raise ValueError(f"weights that belong nowhere: {', '.join(sorted(published))}")
    try:
        score.load_state_dict(state)
    except RuntimeError as mismatch:
        raise ValueError(f"the prior's weights do not fit its arguments: {mismatch}") from mismatch
    return score.eval()
