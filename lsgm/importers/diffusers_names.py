"""Weights of diffusers' ``UNet2DModel`` under our names and back.

Both networks consist of the same layers; a link says which tensors of theirs make up one of ours.
Theirs keeps queries, keys and values apart, which ours has one below the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lsgm.networks.layers import AttentionBlock, ResidualBlock
from lsgm.networks.levels import DownLevel, OutputSkip, UpLevel
from lsgm.networks.ncsnpp import NCSNpp

__all__ = ["Link", "links", "published_unet_weights", "unet_weights"]

PARAMETERS = ("weight", "bias")
RESIDUAL = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "time": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "shortcut": "conv_shortcut",
}
OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
"""Attention layers in files of early versions."""
OLD_FREQUENCIES = "time_proj.W"


@dataclass(frozen=True)
class Link:
    """One tensor of ours, and those of theirs that lie in it one below the other.

    Attributes:
        ours: Name in :class:`NCSNpp`.
        theirs: Names in ``UNet2DModel``.
        negated: Whether it belongs to an output of a model whose score theirs gives and whose noise
            ours predicts.
    """

    ours: str
    theirs: tuple[str, ...]
    negated: bool = False


def links(network: NCSNpp, exploding: bool) -> Iterator[Link]:
    """The links of a network; ``exploding``: of a variance-exploding model."""
    if hasattr(network.embedding.features, "frequencies"):
        yield Link("embedding.features.frequencies", ("time_proj.weight",))
    yield from _layer("embedding.hidden", "time_embedding.linear_1")
    yield from _layer("embedding.out", "time_embedding.linear_2")
    yield from _layer("conv_in", "conv_in")
    for i, level in enumerate(network.down):
        ours, theirs = f"down.{i}", f"down_blocks.{i}"
        yield from _blocks(level, ours, theirs)
        if isinstance(level.downsample, ResidualBlock):
            yield from _residual(level.downsample, f"{ours}.downsample", f"{theirs}.resnet_down")
        elif level.downsample is not None:
            at = f"{ours}.downsample.resample.conv"
            yield from _layer(at, f"{theirs}.downsamplers.0.conv")
        if level.pyramid is not None:
            yield from _layer(f"{ours}.pyramid.conv", f"{theirs}.skip_conv")
    yield from _residual(network.middle_in, "middle_in", "mid_block.resnets.0")
    if network.middle_attention is not None:
        yield from _attention("middle_attention", "mid_block.attentions.0")
    yield from _residual(network.middle_out, "middle_out", "mid_block.resnets.1")
    for u, level in enumerate(network.up):
        ours, theirs = f"up.{u}", f"up_blocks.{u}"
        yield from _blocks(level, ours, theirs)
        if level.attention is not None:
            yield from _attention(f"{ours}.attention", f"{theirs}.attentions.0")
        if isinstance(level.pyramid, OutputSkip):
            finest = u == len(network.up) - 1
            norm, conv = (
                ("conv_norm_out", "conv_out")
                if finest
                else (f"{theirs}.skip_norm", f"{theirs}.skip_conv")
            )
            yield from _layer(f"{ours}.pyramid.head.norm", norm)
            yield from _layer(f"{ours}.pyramid.head.conv", conv, exploding)
        if isinstance(level.upsample, ResidualBlock):
            yield from _residual(level.upsample, f"{ours}.upsample", f"{theirs}.resnet_up")
        elif level.upsample is not None:
            yield from _layer(f"{ours}.upsample.resample.conv", f"{theirs}.upsamplers.0.conv")
    if network.head is not None:
        yield from _layer("head.norm", "conv_norm_out")
        yield from _layer("head.conv", "conv_out", exploding)


def _layer(ours: str, theirs: str, negated: bool = False) -> Iterator[Link]:
    for leaf in PARAMETERS:
        yield Link(f"{ours}.{leaf}", (f"{theirs}.{leaf}",), negated)


def _residual(block: ResidualBlock, ours: str, theirs: str) -> Iterator[Link]:
    for own, other in RESIDUAL.items():
        if getattr(block, own, None) is not None:
            yield from _layer(f"{ours}.{own}", f"{theirs}.{other}")


def _attention(ours: str, theirs: str) -> Iterator[Link]:
    yield from _layer(f"{ours}.norm", f"{theirs}.group_norm")
    for leaf in PARAMETERS:
        yield Link(f"{ours}.qkv.{leaf}", tuple(f"{theirs}.to_{part}.{leaf}" for part in "qkv"))
    yield from _layer(f"{ours}.out", f"{theirs}.to_out.0")


def _blocks(level: nn.Module, ours: str, theirs: str) -> Iterator[Link]:
    assert isinstance(level, DownLevel | UpLevel)
    for j, block in enumerate(level.blocks):
        assert isinstance(block, ResidualBlock)
        yield from _residual(block, f"{ours}.blocks.{j}", f"{theirs}.resnets.{j}")
    for j, attention in enumerate(level.attentions):
        assert isinstance(attention, AttentionBlock)
        yield from _attention(f"{ours}.attentions.{j}", f"{theirs}.attentions.{j}")


def unet_weights(
    network: NCSNpp, published: dict[str, Tensor], exploding: bool
) -> dict[str, Tensor]:
    """The weights of a ``UNet2DModel`` under the names of ``network``; they are taken out of
    ``published``, and what is left belongs nowhere.

    Raises:
        ValueError: A weight is missing.
    """
    for name in list(published):
        for old, new in OLD_NAMES.items():
            if old in name:
                published[name.replace(old, new)] = published.pop(name)
    # early files have the frequencies twice
    frequencies = published.pop(OLD_FREQUENCIES, None)
    if frequencies is not None:
        published.setdefault("time_proj.weight", frequencies)
    state = {}
    for link in links(network, exploding):
        if missing := [name for name in link.theirs if name not in published]:
            raise ValueError(f"{missing[0]} is missing")
        parts = [published.pop(name).float() for name in link.theirs]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        state[link.ours] = -value if link.negated else value
    return state


def published_unet_weights(
    network: NCSNpp, state: Mapping[str, Tensor], exploding: bool
) -> dict[str, Tensor]:
    """The weights ``state`` of ``network`` under the names of ``UNet2DModel``."""
    published: dict[str, Tensor] = {}
    for link in links(network, exploding):
        value = -state[link.ours] if link.negated else state[link.ours]
        parts = value.chunk(len(link.theirs))
        published |= dict(zip(link.theirs, parts, strict=True))
    return published
