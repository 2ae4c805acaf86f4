"""Reading of published LSGM checkpoints, and their hierarchical VAE.

A checkpoint is a dictionary of tensors and plain values with one foreign object, the namespace of
the run's options (:mod:`lsgm.importers.reading`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

from torch import Tensor

from lsgm.errors import UserError
from lsgm.importers.official_names import BUFFERS, published_layers, published_names
from lsgm.importers.reading import read_checkpoint
from lsgm.system.memory import build_within_memory
from vae.hierarchical import HierarchicalVAE
from vae.layers import Conv2d, WeightNormConv2d
from vae.regularization import SpectralNormRegularizer

__all__ = [
    "OfficialCheckpoint",
    "load_official_regularizer",
    "load_official_vae",
    "official_optimizer_slots",
    "official_vae_weights",
    "read_official_checkpoint",
    "vae_arguments",
]

DUPLICATE = ".weight_normalized"
CELLS_OF_ARCH = {
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
    raw = read_checkpoint(path)
    if not isinstance(raw, dict):
        raise UserError(f"checkpoint {path}: holds a {type(raw).__name__}, not a dictionary")
    for key in ("args", "vae_state_dict"):
        if key not in raw:
            found = shorten(", ".join(map(str, raw)), 200)
            raise UserError(f"checkpoint {path}: has no {key!r}; its keys are {found}")
    args = raw["args"]
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, Mapping):
        raise UserError(f"checkpoint {path}: its 'args' are a {type(args).__name__}, not options")
    for key in ("vae_state_dict", "dae_state_dict"):
        if key in raw:
            _check_weights(raw[key], f"checkpoint {path}: {key}")
    averages = {key: _averages(raw.get(key), path) for key in ("vae_optimizer", "dae_optimizer")}
    state = {k: v for k, v in raw["vae_state_dict"].items() if not k.endswith(DUPLICATE)}
    return OfficialCheckpoint(
        args=dict(args),
        vae_state=state,
        vae_ema=_ema_weights(state, averages["vae_optimizer"], path),
        vae_power_vectors=_power_vectors(raw.get("vae_sn_calculator", raw.get("sn_calculator"))),
        raw=raw,
    )


def _check_weights(state: Any, what: str) -> None:
    if not isinstance(state, Mapping):
        raise UserError(f"{what} is a {type(state).__name__}, not a dictionary of weights")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{what}: {name!r} is no named tensor")
        counter = name.endswith("num_batches_tracked")
        if not (counter or tensor.is_floating_point()):
            raise UserError(f"{what}: {name} is {tensor.dtype}, not floating point")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{what}: {name} holds numbers that are not finite")


def _averages(optimizer: Any, path: Path) -> dict[int, Tensor]:
    """The averaged weights in an optimizer's state, by the position of their parameter."""
    try:
        slots = (optimizer or {}).get("state", {}).items()
        averages = {int(index): slot["ema"] for index, slot in slots if "ema" in slot}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"checkpoint {path}: holds no optimizer state of PyTorch") from None
    _check_weights({str(k): v for k, v in averages.items()}, f"checkpoint {path}: the averages")
    return averages


def _is_buffer(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in BUFFERS


def _ema_weights(
    state: Mapping[str, Tensor], averages: Mapping[int, Tensor], path: Path
) -> dict[str, Tensor] | None:
    if not averages:
        return None
    weights = dict(state)
    names = [name for name in state if not _is_buffer(name)]
    for index, ema in averages.items():  # a parameter that never had a gradient has none
        if not 0 <= index < len(names) or ema.shape != state[names[index]].shape:
            raise UserError(
                f"checkpoint {path}: average {index} of the VAE's optimizer fits no parameter"
            )
        weights[names[index]] = ema
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
    if recipe not in CELLS_OF_ARCH:
        raise UserError(
            f"checkpoint: arch_instance {recipe!r} is none of {', '.join(CELLS_OF_ARCH)}"
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
        "cell": CELLS_OF_ARCH[recipe],
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
    arguments = vae_arguments(checkpoint.args, state)
    try:
        vae = build_within_memory(lambda: HierarchicalVAE(**arguments), "checkpoint")
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
