"""Fixtures of our own making, in the layout of the given ones, for options that those lack.

A small model of ours is written as a published checkpoint (names, optimizer slots, stored
arguments), and the arrays beside it hold what :mod:`published` makes of the same weights. So every
parity test runs on every option, also where no folder of recorded numbers is given.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published import PublishedSDE, draw_times
from published_layout import prior_state
from published_step import record_prior
from torch import Tensor, nn

from lsgm.importers.official import vae_arguments
from lsgm.importers.official_names import BUFFERS, published_names
from lsgm.importers.official_prior import prior_arguments
from lsgm.networks.ncsnpp import NCSNpp
from lsgm.score import MixedNormalScore
from vae.hierarchical import HierarchicalVAE

__all__ = ["OwnFile", "own_files"]


@dataclass(frozen=True)
class OwnFile:
    """A fixture that is written when it is first asked for; ``write`` gets the file's path."""

    name: str
    write: Callable[[Path], None]

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    def written(self, folder: Path) -> Path:
        path = folder / self.name
        if not path.exists():
            self.write(path)
        return path


def own_files(pattern: str) -> list[OwnFile]:
    """Those whose name matches, in order."""
    return [file for file in OWN_FILES if fnmatch.fnmatch(file.name, pattern)]


# sde_*.npz and iw_*.npz

DEFAULTS = {
    "beta_start": 0.1,
    "beta_end": 20.0,
    "sigma2_0": 0.0,
    "sigma2_min": 1e-4,
    "sigma2_max": 0.99,
    "time_eps": 1e-2,
}
PARAMETERS: dict[str, list[dict[str, float]]] = {
    "vpsde": [
        {"sigma2_0": 0.05, "beta_start": 0.3, "beta_end": 14.0, "time_eps": 3e-3},
        {"beta_start": 0.05, "beta_end": 28.0, "time_eps": 1e-3},
    ],
    "geometric_sde": [
        {"sigma2_0": 0.0, "time_eps": 1e-3},
        {"sigma2_0": 2e-2, "sigma2_min": 1e-3, "sigma2_max": 0.9},
    ],
    "sub_vpsde": [
        {"sigma2_0": 0.05, "beta_start": 0.2, "beta_end": 15.0},
        {"time_eps": 1e-3},
    ],
    "vesde": [
        {"sigma2_0": 1e-2, "sigma2_min": 1e-2, "sigma2_max": 0.8},
        {"sigma2_0": 1e-3, "sigma2_min": 1e-3, "sigma2_max": 2000.0, "time_eps": 0.0},
    ],
}
MODES = (
    "ll_uniform",
    "ll_iw",
    "drop_all_uniform",
    "drop_all_iw",
    "drop_sigma2t_uniform",
    "drop_sigma2t_iw",
    "rescale_iw",
)


def _sdes(sde_type: str) -> list[PublishedSDE]:
    return [PublishedSDE(sde_type, **(DEFAULTS | more)) for more in PARAMETERS[sde_type]]


def _save(path: Path, arrays: dict[str, Any]) -> None:
    plain = {k: v.detach().numpy() if isinstance(v, Tensor) else v for k, v in arrays.items()}
    np.savez(path, **plain)


def _write_sde(sde_type: str, path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sdes = _sdes(sde_type)
    arrays: dict[str, Any] = {"num_sets": len(sdes)}
    for i, sde in enumerate(sdes):
        t = torch.logspace(-5, 0, 60, dtype=torch.float64)
        x, noise = torch.randn(2, len(t), 3, 2, 2, generator=generator, dtype=torch.float64)

        def wide(values: Tensor) -> Tensor:
            return values.view(-1, 1, 1, 1)

        var, mean = sde.var(t), sde.mean(t)
        cutoffs = [1e-5, 1e-2, sde.time_eps] if sde.sigma2_0 or sde.time_eps else [1e-5, 1e-2]
        values = {
            "params": json.dumps(asdict(sde)),
            **{"t": t, "f": sde.f(t), "g2": sde.g2(t), "mean": mean, "var": var},
            **{"x": x, "noise": noise, "mixing": wide(var.sqrt() / sde.total(t)) * x},
            "sample_q": wide(mean) * x + wide(var.sqrt()) * noise,
            "ce_eps": np.array(cutoffs),
            "ce_const": np.array([sde.constant(cutoff) for cutoff in cutoffs], np.float32),
        }
        if sde_type == "sub_vpsde":
            values |= {"var_vpsde": sde.vp_var(t), "inv_var_vpsde": sde.vp_time(sde.vp_var(t))}
        else:
            values["inv_var"] = sde.time(var)
        if sde_type == "vesde":
            total = sde.ve_total(t)
            values |= {"var_N": total, "inv_var_N": sde.ve_total_time(total)}
        arrays |= {f"set{i}_{key}": value for key, value in values.items()}
    _save(path, arrays)


def _write_iw(sde_type: str, mode: str, path: Path) -> None:
    rho = torch.rand(64, generator=torch.Generator().manual_seed(0))
    rho[:4] = torch.tensor([0, 1 - 2**-24, 1e-4, 0.5])
    sdes = _sdes(sde_type)
    arrays: dict[str, Any] = {"num_sets": len(sdes)}
    for i, sde in enumerate(sdes):
        arrays |= {f"set{i}_params": json.dumps(asdict(sde)), f"set{i}_rho": rho}
        for prefix, uniforms in (("", rho), ("f64_", rho.double())):
            draw = draw_times(mode, sde, uniforms)
            values = {"t": draw.t, "var": draw.var, "m": draw.mean, "g2": draw.g2}
            values |= {"wp": draw.wp, "wq": draw.wq}
            arrays |= {f"set{i}_{prefix}{key}": value for key, value in values.items()}
    _save(path, arrays)


# prior_*.pt with prior_*.npz

ARGS: dict[str, Any] = {
    "dataset": "mnist",
    "arch_instance": "res_bnswish",
    "use_se": True,
    "channel_mult": [1, 1, 1],
    "num_preprocess_blocks": 2,
    "num_preprocess_cells": 1,
    "num_postprocess_blocks": 2,
    "num_postprocess_cells": 1,
    "num_latent_scales": 1,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 3,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
    "num_channels_enc": 4,
    "num_channels_dec": 4,
    "num_nf": 0,
    "decoder_dist": "bin",
    "num_x_bits": 8,
    "log_sig_q_scale": 5.0,
    "progressive_input_vae": "none",
    "num_channels_dae": 8,
    "num_scales_dae": 2,
    "num_cell_per_scale_dae": 1,
    "embedding_dim": 8,
    "embedding_type": "positional",
    "embedding_scale": 1000.0,
    "dropout": 0.0,
    "fir": False,
    "progressive": "none",
    "progressive_input": "none",
    "progressive_combine": "sum",
    "mixing_logit_init": -3.0,
    "mixed_prediction": True,
    "denoising_stddevs": "beta",
    "train_vae": True,
    "disjoint_training": False,
    "update_q_ema": False,
    "iw_subvp_like_vp_sde": False,
    "cont_kl_anneal": True,
    "kl_anneal_portion_vada": 0.5,
    "kl_const_portion_vada": 0.0,
    "kl_const_coeff_vada": 0.7,
    "kl_max_coeff_vada": 1.0,
    "kl_balance_vada": False,
    "drop_inactive_var": False,
    "custom_conv_dae": False,
    "weight_decay": 3e-4,
    "weight_decay_norm_vae": 1e-2,
    "weight_decay_norm_dae": 1e-3,
    "learning_rate_vae": 1e-3,
    "learning_rate_min_vae": 1e-4,
    "learning_rate_dae": 2e-3,
    "learning_rate_min_dae": 1e-3,
    "grad_clip_max_norm": 0.0,
    "ema_decay": 0.8,
    "epochs": 10,
    "warmup_epochs": 1,
    "num_total_iter": 40,
    "batch_size": 2,
    "seed": 1,
    **DEFAULTS,
}
COLOUR = {"dataset": "cifar10", "decoder_dist": "dml"}
CASES: dict[str, dict[str, Any]] = {
    # smoothed data, balancing of a KL that both sides share, no spectral term of the prior
    "vp_smoothed": {
        "sde_type": "vpsde",
        "sigma2_0": 0.03,
        "beta_start": 0.2,
        "beta_end": 15.0,
        "time_eps": 5e-3,
        "iw_sample_p": "ll_iw",
        "iw_sample_q": "reweight_p_samples",
        "kl_balance_vada": True,
        "custom_conv_dae": True,
        "denoising_stddevs": "beta_post",
        "embedding_type": "fourier",
        "embedding_scale": 16.0,
    },
    # times like VP's, one draw for two objectives, no annealing, no regulariser of the prior
    "subvp": {
        **COLOUR,
        "sde_type": "sub_vpsde",
        "sigma2_0": 0.01,
        "iw_sample_p": "drop_all_iw",
        "iw_sample_q": "reweight_p_samples",
        "iw_subvp_like_vp_sde": True,
        "mixing_logit_init": -5.0,
        "cont_kl_anneal": False,
        "weight_decay_norm_dae": 0.0,
        "progressive": "residual",
        "progressive_input": "residual",
        "use_se": False,
    },
    # sigma2_0 unlike sigma2_min, finer groups, equal objectives whose KL has its full weight
    "geometric": {
        **COLOUR,
        "sde_type": "geometric_sde",
        "sigma2_0": 2e-2,
        "sigma2_max": 0.95,
        "iw_sample_p": "ll_uniform",
        "iw_sample_q": "reweight_p_samples",
        "num_preprocess_blocks": 1,
        "num_postprocess_blocks": 1,
        "num_latent_scales": 2,
        "num_x_bits": 5,
        "kl_balance_vada": True,
        "cont_kl_anneal": False,
        "disjoint_training": True,
        "update_q_ema": True,
        "fir": True,
        "progressive_input": "input_skip",
        "progressive_combine": "cat",
        "drop_inactive_var": True,
    },
    # a variance that never exceeds one; a release; two draws with balancing
    "ve_narrow": {
        "sde_type": "vesde",
        "sigma2_0": 2e-2,
        "sigma2_min": 2e-2,
        "sigma2_max": 0.8,
        "iw_sample_p": "rescale_iw",
        "iw_sample_q": "ll_iw",
        "kl_balance_vada": True,
        "num_groups_per_scale": 1,
        "num_latent_per_group": 6,
    },
}
RELEASES = ("ve_narrow",)


@torch.no_grad()
def _stir(module: nn.Module, size: float, generator: torch.Generator) -> None:
    """Add noise to all parameters, so that none is at its special initial value."""
    for parameter in module.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator)


def _vae(args: dict[str, Any], images: Tensor, generator: torch.Generator) -> HierarchicalVAE:
    colour = args["decoder_dist"] != "bin"
    levels = args["num_preprocess_blocks"] + args["num_latent_scales"]
    side = 32 >> (levels - 1)
    shapes = {"stem.weight": (1, 3 if colour else 1), "prior_ftr0": (1, side, side)}
    read = vae_arguments(args, {name: torch.empty(shape) for name, shape in shapes.items()})
    vae = HierarchicalVAE(**(read | {"use_se": args["use_se"]}))
    _stir(vae, 0.05, generator)
    with torch.no_grad():
        for _ in range(3):  # statistics of batch norm
            vae.train()(2 * images - 1, rng=generator)
    return vae.eval()


def _write_prior(name: str, path: Path) -> None:
    args = ARGS | CASES[name]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    colour = args["decoder_dist"] != "bin"
    shape = (2, 3 if colour else 1, 32, 32)
    x_u8 = torch.randint(0, 256 if colour else 2, shape, generator=generator)
    x_u8 = (x_u8 * (1 if colour else 255)).to(torch.uint8)
    vae = _vae(args, x_u8.float() / 255, generator)
    arguments = prior_arguments(args)
    network = NCSNpp(arguments.channels, arguments.resolution, **arguments.network)
    score = MixedNormalScore(network, arguments.sde, arguments.channels, arguments.mixing_init)
    _stir(score, 0.05, generator)
    state = prior_state(score)
    vae_state = vae.state_dict()
    published = {theirs: vae_state[ours].clone() for theirs, ours in published_names(vae).items()}
    raw: dict[str, Any] = {
        "epoch": 1,
        "global_step": 4,
        "args": argparse.Namespace(**args),
        "dae_state_dict": state,
        "vae_state_dict": published,
    }
    if args["custom_conv_dae"]:  # none of the prior's convolutions is counted
        raw["dae_sn_calculator"] = {"sr_u": {}, "sr_v": {}}
    if name not in RELEASES:
        raw |= _optimizer_state(state, published, generator)
    torch.save(raw, path)
    _save(path.with_suffix(".npz"), record_prior(raw, vae, x_u8, generator))


def _optimizer_state(
    state: dict[str, Tensor], vae_state: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Any]:
    """Slots of a checkpoint to go on from, with averages of the prior beside its weights."""

    def slots(weights: dict[str, Tensor], average: bool) -> dict[int, dict[str, Tensor]]:
        found = {}
        for i, (name, value) in enumerate(weights.items()):
            if name == "temb_fun.w":
                continue
            found[i] = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.ones_like(value)}
            if average:
                noise = torch.randn(value.shape, generator=generator)
                found[i]["ema"] = value + 0.02 * noise
        return found

    parameters = {k: v for k, v in vae_state.items() if k.rsplit(".", 1)[-1] not in BUFFERS}
    return {
        "dae_optimizer": {"state": slots(state, True), "param_groups": [{"step": 4}]},
        "vae_optimizer": {"state": slots(parameters, False), "param_groups": [{"step": 4}]},
    }


OWN_FILES = [
    *(OwnFile(f"sde_own_{kind}.npz", partial(_write_sde, kind)) for kind in PARAMETERS),
    *(
        OwnFile(f"iw_own_{kind}_{mode}.npz", partial(_write_iw, kind, mode))
        for kind in PARAMETERS
        for mode in MODES
        if (kind, mode) != ("geometric_sde", "drop_all_iw")
    ),
    *(OwnFile(f"prior_own_{name}.pt", partial(_write_prior, name)) for name in CASES),
]
