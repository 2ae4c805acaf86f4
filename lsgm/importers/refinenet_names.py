"""Published NCSNv2 networks under our names.

The published network numbers its stages ``res1``, ``res2``, ... and the steps of its decoder
``refine1``, ...; the deepest has an additional pair called ``res31`` and ``refine31``, which the
data pass between ``res3`` and ``res4`` and between ``refine2`` and ``refine3``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsgm.networks.ncsn import NCSN

__all__ = ["ncsnv2_weights"]


def ncsnv2_weights(network: NCSN, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a published unconditional network under the names of ``network``; they are
    taken out of ``published``, and what is left belongs nowhere. Only those of normalisations are
    copied.

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
    """Ours has one row of ``gamma``, ``alpha`` and ``beta``."""
    parts = [_take(published, f"{name}.{leaf}") for leaf in ("gamma", "alpha", "beta")]
    return torch.cat(parts)[None]


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
    for i in range(2):
        weight = _take(published, f"{source}.crp.convs.{i}.weight")
        found[f"{name}.pooling.convs.{i}.weight"] = weight
    return found | _units(published, f"{source}.output_convs", f"{name}.output", 3 if last else 1)


def _units(published: dict[str, Tensor], source: str, name: str, units: int) -> dict[str, Tensor]:
    found = {}
    for b in range(units):
        for s in range(2):
            weight = _take(published, f"{source}.{b + 1}_{s + 1}_conv.weight")
            found[f"{name}.convs.{2 * b + s}.weight"] = weight
    return found
