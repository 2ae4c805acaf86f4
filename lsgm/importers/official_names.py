"""The order in which the published hierarchical VAE names and registers its parameters.

The published parameter names follow the order in which the published model builds its layers;
:func:`published_layers` walks our model in that order. A parameter's position in it is also its key
in the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from vae.cells import InvertedResidual, NormConv, PlainNormConv, ResidualCell, SkipDown, SkipUp
from vae.decoder import Decoder
from vae.encoder import Encoder, EncoderScale
from vae.flows import FlowCell
from vae.hierarchical import HierarchicalVAE
from vae.layers import BatchNorm, Conv2d, WeightNormConv2d

__all__ = ["BUFFERS", "published_layers", "published_names"]

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def published_names(vae: HierarchicalVAE) -> dict[str, str]:
    """Published name -> our name of each parameter and buffer, in published order, each once."""
    ours = {id(layer): name for name, layer in vae.named_modules()}
    names = {"prior_ftr0": "decoder.top_feature"}
    for prefix, layer in published_layers(vae):
        kinds = ("weight", "bias", "log_weight_norm", *BUFFERS)
        for kind in kinds:
            if isinstance(getattr(layer, kind, None), Tensor):
                names[f"{prefix}.{kind}"] = f"{ours[id(layer)]}.{kind}"
    return names


def published_layers(vae: HierarchicalVAE) -> Iterator[tuple[str, nn.Module]]:
    """Layers with parameters and their published prefixes, in published order of registration."""
    encoder, decoder = vae.encoder, vae.decoder
    groups = [group for scale in decoder.latent_scales() for group in scale.latent_groups()]
    yield "stem", encoder.stem
    for i, cell in enumerate(encoder.preprocess):
        yield from _cell(f"pre_process.{i}", cell)
    yield from _encoder_tower(encoder, [group.encoder_combiner for group in reversed(groups)])
    for s, scale in enumerate(encoder.scales):
        assert isinstance(scale, EncoderScale)
        if scale.pyramid is not None:
            prefix = f"progressive_input_cells.{s}.conv"
            yield f"{prefix}.bn_act", scale.pyramid.norm
            yield f"{prefix}.conv_0", scale.pyramid.conv
    for k, group in enumerate(groups):
        yield f"enc_sampler.{k}.1", group.posterior
    flows = [flow for group in groups for flow in group.flows]
    for i, flow in enumerate(flows):
        yield from _flow(f"nf_cells.{i}", flow)
    for k, group in enumerate(groups):
        yield f"eps_conv.{k}", group.latent_conv
    yield from _decoder_tower(decoder)
    for i, cell in enumerate(decoder.postprocess):
        yield from _cell(f"post_process.{i}", cell)
    yield "image_conditional.1", decoder.head


def _encoder_tower(
    encoder: Encoder, combiners: list[WeightNormConv2d | None]
) -> Iterator[tuple[str, nn.Module]]:
    """Cells, combiners and down-sampling cells share one counter; a combiner sits at its tap."""
    index, tap = 0, 0
    for scale in encoder.scales:
        assert isinstance(scale, EncoderScale)
        for group in scale.groups:
            assert isinstance(group, nn.Sequential)
            for cell in group:
                yield from _cell(f"enc_tower.{index}", cell)
                index += 1
            combiner = combiners[tap]
            if combiner is not None:
                yield f"enc_tower.{index}.conv", combiner
            index, tap = index + 1, tap + 1
        if scale.down is not None:
            yield from _cell(f"enc_tower.{index}", scale.down)
            index += 1


def _decoder_tower(decoder: Decoder) -> Iterator[tuple[str, nn.Module]]:
    index = 0
    for scale in decoder.latent_scales():
        for group in scale.latent_groups():
            yield f"dec_tower.{index}.conv", group.combiner
            index += 1
            for cell in group.cells:
                yield from _cell(f"dec_tower.{index}", cell)
                index += 1
        if scale.up is not None:
            yield from _cell(f"dec_tower.{index}", scale.up)
            index += 1


def _cell(prefix: str, cell: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    assert isinstance(cell, ResidualCell)
    if isinstance(cell.skip, SkipDown):
        for j, conv in enumerate(cell.skip.convs, start=1):
            yield f"{prefix}.skip.conv_{j}", conv
    elif isinstance(cell.skip, SkipUp):
        yield f"{prefix}.skip.1", cell.skip.conv
    if isinstance(cell.branch, InvertedResidual):
        yield from _inverted_residual(f"{prefix}._ops.0.conv", cell.branch)
    elif isinstance(cell.branch, PlainNormConv):
        yield f"{prefix}._ops.0.bn_act_0", cell.branch.norm_in
        yield f"{prefix}._ops.0.conv_0", cell.branch.conv_in
        yield f"{prefix}._ops.0.bn_act_1", cell.branch.norm_out
        yield f"{prefix}._ops.0.conv_1", cell.branch.conv_out
    else:
        assert isinstance(cell.branch, nn.Sequential)
        for j, op in enumerate(cell.branch):
            assert isinstance(op, NormConv)
            yield f"{prefix}._ops.{j}.bn_act", op.norm
            yield f"{prefix}._ops.{j}.conv_0", op.conv
    if cell.se is not None:
        yield f"{prefix}.se.se.0", cell.se.squeeze
        yield f"{prefix}.se.se.2", cell.se.excite


def _inverted_residual(prefix: str, op: InvertedResidual) -> Iterator[tuple[str, nn.Module]]:
    o = 1 if op.up else 0  # the published up-sampling comes first and counts
    layers: list[tuple[str, BatchNorm | Conv2d]] = [
        (f"{o}.bn", op.norm_in),
        (f"{1 + o}.conv.0", op.expand),
        (f"{1 + o}.conv.1", op.norm_expand),
        (f"{2 + o}.conv.0", op.depthwise),
        (f"{2 + o}.conv.1", op.norm_depthwise),
        (f"{3 + o}", op.project),
        (f"{4 + o}.bn", op.norm_out),
    ]
    for name, layer in layers:
        yield f"{prefix}.{name}", layer


def _flow(prefix: str, flow: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    assert isinstance(flow, FlowCell)
    for name, shift in (("cell1", flow.first), ("cell2", flow.second)):
        yield f"{prefix}.{name}.conv.convz.0", shift.conv_in
        yield f"{prefix}.{name}.conv.convz.2", shift.depthwise
        yield f"{prefix}.{name}.mu.conv_0", shift.conv_out
