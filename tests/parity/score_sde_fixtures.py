"""Checkpoints of score-SDE with what the published code computed from them, and the configuration
of each in our terms, from the options that are stored with it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lsgm.config import DataConfig, PriorNetworkConfig, SDEConfig
from lsgm.config_data import (
    LadderConfig,
    NCSNTrainConfig,
    RefineNetConfig,
    SamplerConfig,
    ScoreModelConfig,
    ScoreObjectiveConfig,
)
from lsgm.datasgm import DataSGM
from lsgm.importers.score_sde import load_score_sde, read_score_sde
from lsgm.networks.ncsn import DEPTHS

PREDICTORS = {"ancestral_sampling": "ancestral"}
CORRECTORS = {"langevin": "batch", "ald": "expected"}
REFINENETS = {"ncsnv2_64": 64, "ncsnv2_128": 128, "ncsnv2_256": math.inf}
KINDS = {"vesde": "vesde", "vpsde": "vpsde", "subvpsde": "subvpsde"}


@dataclass(frozen=True)
class Fixture:
    """One ``scoresde_*.npz`` and the checkpoint of the same name."""

    path: Path

    @cached_property
    def arrays(self) -> dict[str, Any]:
        with np.load(self.path, allow_pickle=False) as stored:
            return dict(stored)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def text(self, name: str) -> str:
        return str(self.arrays[name])

    @cached_property
    def options(self) -> dict[str, Any]:
        return json.loads(self.text("config"))

    @property
    def ve(self) -> bool:
        return self.options["training"]["sde"] == "vesde"

    @property
    def continuous(self) -> bool:
        return self.options["training"]["continuous"]

    @property
    def checkpoint(self) -> Path:
        return self.path.with_suffix(".pth")

    @cached_property
    def config(self) -> NCSNTrainConfig:
        return configuration(self.options, self.path.stem)

    def model(self, weights: Any) -> DataSGM:
        """With averaged (``ema``) or last (``raw``) weights."""
        return load_score_sde(read_score_sde(self.checkpoint), self.config, weights)

    @cached_property
    def averaged(self) -> DataSGM:
        return self.model("ema")


def _network(options: dict[str, Any]) -> PriorNetworkConfig:
    ddpm = options["name"] == "ddpm"
    width = options["nf"]
    fourier = options["embedding_type"] == "fourier" and not ddpm
    return PriorNetworkConfig(
        num_channels=width,
        num_scales=len(options["ch_mult"]),
        channel_mult=tuple(options["ch_mult"]),
        num_cells_per_scale=options["num_res_blocks"],
        embedding_dim=2 * width if fourier else width,
        embedding_width=4 * width,
        embedding_type="fourier" if fourier else "positional",
        embedding_scale=options.get("fourier_scale", 16.0) if fourier else 1.0,
        dropout=options["dropout"],
        fir=options.get("fir", False),
        progressive=options.get("progressive", "none"),
        progressive_input=options.get("progressive_input", "none"),
        progressive_combine=options.get("progressive_combine", "sum"),
        attention_resolutions=tuple(options["attn_resolutions"]),
        block="ddpm" if ddpm else options["resblock_type"],
        rescale=False if ddpm else options["skip_rescale"],
        norm_groups=32 if ddpm else None,
    )


def _sampler(options: dict[str, Any], continuous: bool, ve: bool) -> SamplerConfig:
    sampling = options["sampling"]
    steps = 0 if sampling["corrector"] == "none" else sampling["n_steps_each"]
    predictor = sampling["predictor"]
    own = options["model"]["num_scales"]
    return SamplerConfig(
        solver="discrete_pc",
        nfe=own * (steps + (predictor != "none")),
        grid="time",
        t_end=1e-5 if ve else 1e-3,
        predictor=PREDICTORS.get(predictor, predictor),
        corrector_steps=steps,
        snr=sampling["snr"],
        norm=CORRECTORS.get(sampling["corrector"], "batch"),
        denoise=sampling["noise_removal"],
    )


def configuration(options: dict[str, Any], name: str) -> NCSNTrainConfig:
    """What the published options are in our terms."""
    model, data = options["model"], options["data"]
    kind = options["training"]["sde"]
    ve, continuous = kind == "vesde", options["training"]["continuous"]
    refinenet = model["name"].startswith("ncsnv2")
    low, high, levels = (
        model.get("sigma_min", 0.01),
        model.get("sigma_max", 50),
        model["num_scales"],
    )
    mult, dilations = DEPTHS[REFINENETS.get(model["name"], 64)]
    network = PriorNetworkConfig() if refinenet else _network(model)
    if not ve and continuous:
        network = PriorNetworkConfig(**{**network.__dict__, "embedding_scale": 999.0})
    score = ScoreModelConfig(
        network="refinenet" if refinenet else "ncsnpp",
        ncsnpp=network,
        refinenet=RefineNetConfig(model["nf"], mult, dilations, conditional=False),
        sde=SDEConfig(
            kind=KINDS[kind],  # type: ignore[arg-type]
            beta_start=model.get("beta_min", 0.1),
            beta_end=model.get("beta_max", 20.0),
            sigma2_min=low**2,
            sigma2_max=high**2,
            time_eps=1e-5,
        ),
        ladder=LadderConfig(high, low, levels),
        data_range="symmetric" if data["centered"] else "unit",
        dequantise=False,
        condition=(("ln_sigma" if ve else "time") if continuous else "index")
        if not refinenet
        else "time",
        discrete_levels=None if continuous or refinenet else levels,
        centre_input=not data["centered"],
        data_std=0.0,
    )
    return NCSNTrainConfig(
        name=name,
        kind="ncsn" if refinenet else "score_sde",
        data=DataConfig(
            name="folder",
            image_size=data["image_size"],
            channels=data["num_channels"],
            flip=data["random_flip"],
        ),
        score=score,
        objective=ScoreObjectiveConfig(
            reduction="mean" if options["training"]["reduce_mean"] else "half_sum"
        ),
        sampler=_sampler(options, continuous, ve),
    )


def fixtures(*needed: str) -> list[Any]:
    """Parameters of a test: all fixtures that hold the arrays needed."""
    folder = os.environ.get("LSGM_PARITY_DIR")
    paths = sorted(Path(folder).glob("scoresde_*.npz")) if folder else []
    found = [fixture for path in paths if _has(fixture := _opened(path), needed)]
    missing = pytest.mark.skip(reason="no scoresde_*.npz in LSGM_PARITY_DIR")
    return [pytest.param(fixture, id=fixture.path.stem) for fixture in found] or [
        pytest.param(None, marks=missing)
    ]


OPENED: dict[Path, Fixture] = {}


def _opened(path: Path) -> Fixture:
    return OPENED.setdefault(path, Fixture(path))


def _has(fixture: Fixture, names: tuple[str, ...]) -> bool:
    with np.load(fixture.path, allow_pickle=False) as stored:
        return set(names) <= set(stored.files)


def close(ours: Tensor, theirs: Tensor, limit: float, what: str = "") -> None:
    """The largest difference over the largest entry is within the limit."""
    scale = theirs.double().abs().max()
    error = (ours.double() - theirs.double()).abs().max() / scale
    assert error <= limit, f"{what}: {error:.2e} > {limit:.0e}"
