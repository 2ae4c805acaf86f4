"""Reading of published LSGM checkpoints, and their hierarchical VAE.

A checkpoint is a dictionary of tensors and plain values with one foreign object, the namespace of
the run's options. It is read by PyTorch's restricted unpickler, so that nothing in the file is
executed.

The published parameter names follow the order in which the published model builds its layers;
:func:`published_layers` walks our model in that order. A parameter's position in it is also its key
in the optimizer's state.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lsgm.errors import UserError
from vae.cells import InvertedResidual, NormConv, PlainNormConv, ResidualCell, SkipDown, SkipUp
from vae.decoder import Decoder
from vae.encoder import Encoder, EncoderScale
from vae.flows import FlowCell
from vae.hierarchical import HierarchicalVAE
from vae.layers import BatchNorm, Conv2d, WeightNormConv2d
from vae.regularization import SpectralNormRegularizer

__all__ = [
    "OfficialCheckpoint",
    "load_official_regularizer",
    "load_official_vae",
    "official_optimizer_slots",
    "official_vae_weights",
    "published_layers",
    "published_names",
    "read_official_checkpoint",
    "vae_arguments",
]

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
DUPLICATE = ".weight_normalized"
CELL_RECIPES = {
    "res_mbconv": "res_mbconv",
    "res_mbconv_attn": "res_mbconv",  # the attention flag is not acted on
    "res_mbconv_attn_half": "res_mbconv",
    "res_bnswish": "res_bnswish",
    "res_bnswish2": "res_bnswish2",
}
BINARY_DATASETS = ("mnist", "omniglot")
REQUIRED = (
    "num_channels_enc",
    "num_channels_dec",
    "num_preprocess_blocks",
    "num_preprocess_cells",
    "num_postprocess_cells",
    "num_latent_scales",
    "num_groups_per_scale",
    "num_latent_per_group",
    "num_cell_per_cond_enc",
    "num_cell_per_cond_dec",
    "num_nf",
    "decoder_dist",
)


@dataclass(frozen=True)
class OfficialCheckpoint:
    """Contents of a published checkpoint of either stage, in published names.

    Attributes:
        args: Options of the run.
        vae_state: Parameters and buffers of the VAE, in the order of registration, each once.
        vae_ema: The same with averaged parameters, where the optimizer kept averages.
        vae_power_vectors: ``{"u": {(rows, columns): (n, rows)}, "v": ...}`` of the spectral
            regulariser, if stored.
        raw: The whole file.
    """

    args: dict[str, Any]
    vae_state: dict[str, Tensor]
    vae_ema: dict[str, Tensor] | None
    vae_power_vectors: dict[str, dict[tuple[int, int], Tensor]] | None
    raw: dict[str, Any]


def read_official_checkpoint(path: str | Path) -> OfficialCheckpoint:
    """Read a checkpoint of the published implementation, of the first or the second stage, on the
    CPU.

    Raises:
        UserError: If the file is not there, is damaged, holds anything but data, or lacks the VAE.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: there is no such file")
    try:
        with torch.serialization.safe_globals(_harmless_types()):
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        detail = next(
            (line.strip() for line in reason if "GLOBAL" in line or "global" in line), reason[0]
        )
        raise UserError(
            f"checkpoint {path}: holds something other than tensors and plain values ({detail})"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"checkpoint {path}: not a readable PyTorch file ({_first_line(error)})"
        ) from error
    if not isinstance(raw, dict):
        raise UserError(f"checkpoint {path}: holds a {type(raw).__name__}, not a dictionary")
    for key in ("args", "vae_state_dict"):
        if key not in raw:
            raise UserError(
                f"checkpoint {path}: has no {key!r}; its keys are {', '.join(map(str, raw))}"
            )
    args = raw["args"]
    args = dict(args) if isinstance(args, Mapping) else dict(vars(args))
    state = {k: v for k, v in raw["vae_state_dict"].items() if not k.endswith(DUPLICATE)}
    return OfficialCheckpoint(
        args=args,
        vae_state=state,
        vae_ema=_ema_weights(state, raw.get("vae_optimizer"), path),
        vae_power_vectors=_power_vectors(raw.get("vae_sn_calculator", raw.get("sn_calculator"))),
        raw=raw,
    )


def _harmless_types() -> list[Any]:
    """Plain values beyond PyTorch's own list: options, shapes, NumPy scalars."""
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    return [
        argparse.Namespace,
        torch.Size,
        np.dtype,
        *dtypes,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
    ]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_buffer(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in BUFFERS


def _ema_weights(
    state: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None, path: Path
) -> dict[str, Tensor] | None:
    slots = (optimizer or {}).get("state", {})
    if not any("ema" in slot for slot in slots.values()):
        return None
    weights = dict(state)
    names = [name for name in state if not _is_buffer(name)]
    for index, slot in slots.items():
        if "ema" not in slot:
            continue  # a parameter that never had a gradient
        if index >= len(names) or slot["ema"].shape != state[names[index]].shape:
            raise UserError(
                f"checkpoint {path}: average {index} of the VAE's optimizer fits no parameter"
            )
        weights[names[index]] = slot["ema"]
    return weights


def _power_vectors(
    stored: Mapping[str, Any] | None,
) -> dict[str, dict[tuple[int, int], Tensor]] | None:
    if not stored:
        return None
    # Runs in mixed precision may have stored them in half precision.
    return {
        short: {(int(r), int(c)): vectors.float() for (r, c), vectors in stored[name].items()}
        for short, name in (("u", "sr_u"), ("v", "sr_v"))
        if name in stored
    }


def vae_arguments(args: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`HierarchicalVAE` for a checkpoint, the facts about its data included.

    What the options do not say reliably is read off the weights: squeeze-and-excitation (options of
    the second stage lack it), image channels and image size.

    Args:
        args: Options of the run.
        state: Weights of the VAE in published names.

    Raises:
        UserError: If an option is missing or has a value that is not supported.
    """
    missing = [name for name in REQUIRED if name not in args]
    if missing:
        raise UserError(f"checkpoint: its options lack {', '.join(missing)}")
    for name in ("prior_ftr0", "stem.weight"):
        if name not in state:
            raise UserError(f"checkpoint: the VAE has no parameter {name!r}")
    recipe = args.get("arch_instance", "res_mbconv")
    if recipe not in CELL_RECIPES:
        raise UserError(
            f"checkpoint: arch_instance {recipe!r} is none of {', '.join(CELL_RECIPES)}"
        )
    progressive = args.get("progressive_input_vae", "none")
    if progressive not in ("none", "input_skip"):
        raise UserError(
            f"checkpoint: progressive_input_vae {progressive!r} is neither none nor input_skip"
        )
    kwargs: dict[str, Any] = {name: args[name] for name in REQUIRED}
    levels = kwargs["num_preprocess_blocks"] + kwargs["num_latent_scales"]
    image_channels = int(state["stem.weight"].shape[1])
    image_size = int(state["prior_ftr0"].shape[-1]) * 2 ** (levels - 1)
    dataset = args.get("dataset")
    padded = dataset in BINARY_DATASETS if dataset is not None else kwargs["decoder_dist"] == "bin"
    return kwargs | {
        "image_channels": image_channels,
        "image_size": image_size,
        "channel_mult": tuple(args.get("channel_mult", (1, 2))),
        "cell": CELL_RECIPES[recipe],
        "use_se": any(".se.se." in name for name in state),
        "num_x_bits": int(args.get("num_x_bits", 8)),
        "log_sig_q_scale": float(args.get("log_sig_q_scale", 5.0)),
        "input_skip": progressive == "input_skip",
        "crop": 2 if padded else 0,
    }


def load_official_vae(
    checkpoint: OfficialCheckpoint, weights: Literal["raw", "ema"] = "raw"
) -> HierarchicalVAE:
    """The VAE of ``checkpoint``, with its last or its averaged weights (buffers are never
    averaged).

    Raises:
        UserError: If the averages are not there, or the weights do not fit what the options
            describe.
    """
    state = checkpoint.vae_state
    if weights == "ema":
        if checkpoint.vae_ema is None:
            raise UserError(
                "checkpoint: its optimizer holds no averaged VAE weights; use the raw ones"
            )
        state = checkpoint.vae_ema
    try:
        vae = HierarchicalVAE(**vae_arguments(checkpoint.args, state))
    except ValueError as error:
        raise UserError(f"checkpoint: its options do not describe a VAE ({error})") from error
    vae.load_state_dict(official_vae_weights(vae, state))
    return vae


def official_vae_weights(vae: HierarchicalVAE, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names, complete and of the right shapes.

    Raises:
        UserError: If tensors are missing, left over or of another shape; the message names the
            first few.
    """
    names = published_names(vae)
    problems = [f"{name} is missing" for name in names if name not in state]
    problems += [
        f"{name} is unknown" for name in state if name not in names and not name.endswith(DUPLICATE)
    ]
    expected = vae.state_dict()
    for name, ours in names.items():
        if name in state and state[name].shape != expected[ours].shape:
            problems.append(
                f"{name} is {tuple(state[name].shape)}, not {tuple(expected[ours].shape)}"
            )
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"checkpoint: the VAE's weights do not fit its options: {'; '.join(problems[:3])}{more}"
        )
    return {ours: state[name] for name, ours in names.items()}


def official_optimizer_slots(
    checkpoint: OfficialCheckpoint, vae: HierarchicalVAE
) -> dict[str, dict[str, Any]]:
    """The VAE optimizer's state per parameter, under our names: ``exp_avg``, ``exp_inf``, ``step``,
    perhaps ``ema``.

    Raises:
        UserError: If the checkpoint holds no optimizer state.
    """
    optimizer = checkpoint.raw.get("vae_optimizer")
    if not optimizer:
        raise UserError("checkpoint: it holds no state of the VAE's optimizer")
    names = [ours for name, ours in published_names(vae).items() if not _is_buffer(name)]
    return {names[index]: dict(slot) for index, slot in optimizer["state"].items()}


def load_official_regularizer(
    checkpoint: OfficialCheckpoint, vae: HierarchicalVAE
) -> SpectralNormRegularizer:
    """The spectral regulariser of ``vae`` with the checkpoint's power-iteration vectors.

    Raises:
        UserError: If they are not there or do not fit the model.
    """
    regularizer = SpectralNormRegularizer(vae)
    if checkpoint.vae_power_vectors is None:
        raise UserError("checkpoint: it holds no power-iteration vectors")
    ours_by_layer = {id(layer): name for name, layer in vae.named_modules()}
    order: dict[tuple[int, int], list[str]] = {}
    for _, layer in published_layers(vae):
        if isinstance(layer, (Conv2d, WeightNormConv2d)):
            shape = (layer.weight.shape[0], layer.weight[0].numel())
            order.setdefault(shape, []).append(ours_by_layer[id(layer)])
    stored = checkpoint.vae_power_vectors["u"]
    sizes = {shape: (len(names), shape[0]) for shape, names in order.items()}
    if {shape: tuple(vectors.shape) for shape, vectors in stored.items()} != sizes:
        raise UserError("checkpoint: its power-iteration vectors do not fit the VAE's convolutions")
    # They are stacked in the published order of the layers; ours differs.
    vectors = {
        f"{shape[0]}x{shape[1]}": stored[shape][[order[shape].index(name) for name in names]]
        for shape, names in regularizer.names.items()
    }
    regularizer.load_state_dict({"u": vectors, "fresh": False})
    return regularizer


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
