"""Reading of published checkpoints: files in the published layout, and files to refuse."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lsgm.errors import UserError
from lsgm.importers.official import (
    load_official_regularizer,
    load_official_vae,
    official_optimizer_slots,
    read_official_checkpoint,
    vae_arguments,
)
from lsgm.importers.official_names import published_names
from vae.hierarchical import HierarchicalVAE
from vae.regularization import SpectralNormRegularizer

ARGS: dict[str, Any] = {
    "arch_instance": "res_mbconv",
    "num_channels_enc": 6,
    "num_channels_dec": 8,
    "channel_mult": [1, 2, 2],
    "num_preprocess_blocks": 2,
    "num_preprocess_cells": 1,
    "num_postprocess_blocks": 2,
    "num_postprocess_cells": 1,
    "num_latent_scales": 1,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 3,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 2,
    "num_nf": 1,
    "decoder_dist": "bin",
    "num_x_bits": 8,
    "log_sig_q_scale": 4.0,
    "progressive_input_vae": "none",
}
EXTRAS: list[dict[str, Any]] = [
    {},
    {"arch_instance": "res_bnswish", "num_nf": 0},
    {"arch_instance": "res_bnswish2", "decoder_dist": "dml", "num_x_bits": 5},
    {
        "channel_mult": [1, 2, 3, 4],
        "num_latent_scales": 2,
        "num_preprocess_cells": 2,
        "progressive_input_vae": "input_skip",
        "decoder_dist": "normal",
    },
]


def build(extra: dict[str, Any], use_se: bool = True) -> tuple[dict[str, Any], HierarchicalVAE]:
    args = ARGS | extra
    same = {
        k: v for k, v in args.items() if k.startswith(("num_", "channel", "decoder", "log_sig"))
    }
    del same["num_postprocess_blocks"]
    torch.manual_seed(0)
    vae = HierarchicalVAE(
        **same,
        image_channels=1 if args["decoder_dist"] == "bin" else 3,
        image_size=32,
        cell=args["arch_instance"],
        input_skip=args["progressive_input_vae"] == "input_skip",
        use_se=use_se,
    )
    return args, vae


def publish(path: Path, args: dict[str, Any], vae: HierarchicalVAE, **more: Any) -> Path:
    state = vae.state_dict()
    names = published_names(vae)
    published = {name: state[ours] for name, ours in names.items()}
    # the published model lists a convolution without weight norm twice
    for name in [n for n in published if n.endswith(".weight") and published[n].dim() == 4]:
        if f"{name[: -len('.weight')]}.log_weight_norm" not in published:
            published[name + "_normalized"] = published[name]
    file = {"epoch": 1, "args": argparse.Namespace(**args), "vae_state_dict": published}
    torch.save(file | more, path)
    return path


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("use_se", [True, False])
def test_weights_come_back(tmp_path: Path, extra: dict[str, Any], use_se: bool) -> None:
    args, vae = build(extra, use_se)
    checkpoint = read_official_checkpoint(publish(tmp_path / "c.pt", args, vae))
    loaded = load_official_vae(checkpoint)
    state = vae.state_dict()
    assert set(loaded.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.image_size == (32, 32)
    assert loaded.crop == (2 if args["decoder_dist"] == "bin" else 0)
    eps = [torch.randn(2, *shape) for shape in vae.latent_shapes]
    with torch.no_grad():
        assert torch.equal(loaded.eval().decode(eps).mean, vae.eval().decode(eps).mean)
    assert checkpoint.vae_ema is None
    with pytest.raises(UserError, match="averaged"):
        load_official_vae(checkpoint, "ema")


def test_averages_and_power_vectors(tmp_path: Path) -> None:
    """Slots are numbered in published order; half-precision vectors become float32."""
    args, vae = build({})
    ours = list(dict(vae.named_parameters()))
    published = [o for o in published_names(vae).values() if o in ours]
    assert published != ours  # the orders do differ
    values = {name: torch.full_like(vae.get_parameter(name), i) for i, name in enumerate(ours)}
    slots = {
        i: {"step": 3, "exp_avg": values[name] * 0, "ema": values[name]}
        for i, name in enumerate(published)
        if name != "encoder.stem.bias"
    }
    regularizer = SpectralNormRegularizer(vae)
    regularizer()
    vectors = {torch.Size(shape): u.half() for shape, u in regularizer.u.items()}
    path = publish(
        tmp_path / "c.pt",
        args,
        vae,
        vae_optimizer={"state": slots, "param_groups": []},
        vae_sn_calculator={"sr_u": vectors, "sr_v": {}},
    )
    checkpoint = read_official_checkpoint(path)
    averaged = load_official_vae(checkpoint, "ema")
    for name, parameter in averaged.named_parameters():
        expected = vae.encoder.stem.bias if name == "encoder.stem.bias" else values[name]
        assert torch.equal(parameter, expected), name
    assert official_optimizer_slots(checkpoint, vae)["decoder.top_feature"]["step"] == 3
    loaded = load_official_regularizer(checkpoint, vae)
    for shape, u in loaded.u.items():
        assert u.dtype == torch.float32
        assert sorted(u.sum(1).tolist()) == pytest.approx(
            sorted(regularizer.u[shape].half().float().sum(1).tolist())
        )


def test_defaults_of_old_checkpoints() -> None:
    args, vae = build({"channel_mult": [1, 2], "num_preprocess_blocks": 1})
    state = {"prior_ftr0": torch.zeros(16, 16, 16), "stem.weight": torch.zeros(6, 3, 3, 3)}
    for name in ("channel_mult", "num_x_bits", "log_sig_q_scale", "progressive_input_vae"):
        del args[name]
    kwargs = vae_arguments(args | {"dataset": "cifar10"}, state)
    assert (kwargs["channel_mult"], kwargs["num_x_bits"], kwargs["input_skip"]) == (
        (1, 2),
        8,
        False,
    )
    assert (kwargs["image_channels"], kwargs["image_size"], kwargs["crop"]) == (3, 32, 0)
    assert kwargs["use_se"] is False
    assert vae.num_groups == 2


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/lsgm_was_executed",)


def test_code_in_a_file_is_refused_not_run(tmp_path: Path) -> None:
    marker = Path("/tmp/lsgm_was_executed")
    assert not marker.exists()
    torch.save({"args": {}, "vae_state_dict": {}, "x": Boom()}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="other than tensors and plain values"):
        read_official_checkpoint(tmp_path / "c.pt")
    assert not marker.exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_official_checkpoint(tmp_path / "none.pt")
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint at all")
    with pytest.raises(UserError, match=r"junk\.pt"):
        read_official_checkpoint(tmp_path / "junk.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not a dictionary"):
        read_official_checkpoint(tmp_path / "list.pt")
    torch.save({"epoch": 1, "args": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="'vae_state_dict'"):
        read_official_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_channels_dec": 16}, r"prior_ftr0 is \(16, 8, 8\), not \(32, 8, 8\).* more"),
        ({"num_cell_per_cond_dec": 3}, r"dec_tower\S+ is missing"),
        ({"num_nf": 0}, r"nf_cells\S+ is unknown"),
        ({"arch_instance": "res_wide"}, "res_wide"),
        ({"progressive_input_vae": "residual"}, "neither none nor input_skip"),
        ({"channel_mult": [1, 2]}, "channel_mult"),
        ({"decoder_dist": "beta"}, "decoder_dist"),
    ],
)
def test_options_that_do_not_fit_the_weights(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    args, vae = build({})
    checkpoint = read_official_checkpoint(publish(tmp_path / "c.pt", args | change, vae))
    with pytest.raises(UserError, match=message):
        load_official_vae(checkpoint)


def test_missing_option(tmp_path: Path) -> None:
    args, vae = build({})
    del args["num_nf"]
    checkpoint = read_official_checkpoint(publish(tmp_path / "c.pt", args, vae))
    with pytest.raises(UserError, match="lack num_nf"):
        load_official_vae(checkpoint)
