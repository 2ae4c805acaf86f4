"""Published NCSN and NCSNv2 networks under our names.

The published network numbers its stages ``res1``, ``res2``, ... and the steps of its decoder
``refine1``, ...; the deepest has an additional pair called ``res31`` and ``refine31``, which the
data pass between ``res3`` and ``res4`` and between ``refine2`` and ``refine3``. NCSN's network
differs in its normalisation, which knows the noise level and is in the decoder too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsgm.networks.ncsn import NCSN

__all__ = ["refinenet_weights"]


def refinenet_weights(
    network: NCSN, published: dict[str, Tensor], unit: float = 1.0
) -> dict[str, Tensor]:
    """The weights of a published network under the names of ``network``; they are taken out of
    ``published``, and what is left belongs nowhere. Tensors are not copied, except those of
    NCSNv2's normalisations and of NCSN's last layer.

    Args:
        network: Ours.
        published: Weights by published name.
        unit: Length of the published unit in that of our images, 2 where they lie in [-1, 1]. The
            score of NCSN, which is the output of its network, is as much smaller.

    Raises:
        ValueError: A weight is missing.
    """
    ours = _layer(published, "begin_conv", "conv_in") | _layer(published, "end_conv", "conv_out")
    ours["norm_out.table.weight"] = _norm(published, "normalizer")
    count = len(network.stages)
    for i, stage in enumerate(_stages(count)):
        for j in range(2):
            ours |= _block(published, f"res{stage}.{j}", f"stages.{i}.blocks.{j}")
    for i, step in enumerate(_steps(count)):
        ours |= _refine(published, f"refine{step}", f"refine.{i}", last=i == count - 1)
    if network.conditional and unit != 1:
        ours |= {f"conv_out.{leaf}": ours[f"conv_out.{leaf}"] / unit for leaf in ("weight", "bias")}
    return {name: value.float() for name, value in ours.items()}


def _stages(count: int) -> list[str]:
    return ["1", "2", "3", "31", "4", "5"] if count == 6 else [str(i + 1) for i in range(count)]


def _steps(count: int) -> list[str]:
    return ["1", "2", "31", "3", "4", "5"] if count == 6 else [str(i + 1) for i in range(count)]


def _take(published: dict[str, Tensor], name: str) -> Tensor:
    if name not in published:
        raise ValueError(f"{name} is missing")
    return published.pop(name)


def _layer(published: dict[str, Tensor], source: str, name: str) -> dict[str, Tensor]:
    leaves = ("weight", "bias")
    return {f"{name}.{leaf}": _take(published, f"{source}.{leaf}") for leaf in leaves}


def _norm(published: dict[str, Tensor], name: str) -> Tensor:
    """Ours has one row of ``gamma``, ``alpha`` and ``beta`` for each noise level."""
    if f"{name}.embed.weight" in published:
        return published.pop(f"{name}.embed.weight")
    parts = [_take(published, f"{name}.{leaf}") for leaf in ("gamma", "alpha", "beta")]
    return torch.cat(parts)[None]


def _decoder_norm(published: dict[str, Tensor], source: str, name: str) -> dict[str, Tensor]:
    """NCSN's; that of NCSNv2 has none."""
    at = f"{source}.embed.weight"
    return {f"{name}.table.weight": published.pop(at)} if at in published else {}


def _block(published: dict[str, Tensor], source: str, name: str) -> dict[str, Tensor]:
    found = {
        f"{name}.norm_in.table.weight": _norm(published, f"{source}.normalize1"),
        f"{name}.norm_out.table.weight": _norm(published, f"{source}.normalize2"),
    }
    for layer, theirs in (("conv_in", "conv1"), ("conv_out", "conv2"), ("shortcut", "shortcut")):
        at = f"{source}.{theirs}"
        if f"{at}.conv.weight" in published:
            at = f"{at}.conv"  # in a block that halves the resolution
        if layer != "shortcut" or f"{at}.weight" in published:
            found |= _layer(published, at, f"{name}.{layer}")
    return found


def _refine(published: dict[str, Tensor], source: str, name: str, last: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    fuses = f"{source}.msf.convs.0.weight" in published
    for i in range(2 if fuses else 1):
        found |= _units(published, f"{source}.adapt_convs.{i}", f"{name}.inputs.{i}", 2)
        if fuses:
            found |= _layer(published, f"{source}.msf.convs.{i}", f"{name}.fusion.convs.{i}")
            found |= _decoder_norm(published, f"{source}.msf.norms.{i}", f"{name}.fusion.norms.{i}")
    for i in range(2):
        weight = _take(published, f"{source}.crp.convs.{i}.weight")
        found[f"{name}.pooling.convs.{i}.weight"] = weight
        found |= _decoder_norm(published, f"{source}.crp.norms.{i}", f"{name}.pooling.norms.{i}")
    return found | _units(published, f"{source}.output_convs", f"{name}.output", 3 if last else 1)


def _units(published: dict[str, Tensor], source: str, name: str, units: int) -> dict[str, Tensor]:
    found = {}
    for b in range(units):
        for s in range(2):
            at, to = f"{source}.{b + 1}_{s + 1}", 2 * b + s
            found[f"{name}.convs.{to}.weight"] = _take(published, f"{at}_conv.weight")
            found |= _decoder_norm(published, f"{at}_norm", f"{name}.norms.{to}")
    return found
