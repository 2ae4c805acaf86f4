"""Single updates of the published predictors and correctors of score-SDE models.

The arrays hold no network. Its score is what the annealed corrector, whose step is known, moved the
state by; all other updates have to follow from that score.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from prior_fixtures import parametrize_files, relative
from torch import Tensor

from lsgm.sde import VESDE, VPSDE, LinearSDE
from lsgm.solvers import base, make_solver


def sde_of(config: dict) -> tuple[LinearSDE, int]:
    model = config["model"]
    if config["training"]["sde"] == "vesde":
        return VESDE(model["sigma_min"] ** 2, model["sigma_max"] ** 2, 0.0), model["num_scales"]
    return VPSDE(model["beta_min"], model["beta_max"], 0.0), model["num_scales"]


@pytest.mark.parametrize("j", [0, 1])
@parametrize_files("scoresde_v*.npz")
def test_single_updates(path: Path, j: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.load(path)
    if "upd_t" not in data or "upd0_ald_mean" not in data:
        pytest.skip("no single updates in this file")
    sde, scales = sde_of(json.loads(str(data["config"])))
    exact = isinstance(sde, VESDE)  # of VP ours are the exact transitions, not a table of beta,
    # but for Euler-Maruyama, the published choice
    noise = torch.from_numpy(data["upd_noise"]).double()
    snr = data["upd_snr"].item()
    monkeypatch.setattr(base, "randn", lambda *_, **__: noise)
    t = data["upd_t"][j].item()
    x = torch.from_numpy(data["upd_x"][j]).double()
    index = int(np.float32(t) * np.float32(scales - 1))
    std = sde.var(torch.tensor(t, dtype=torch.float64)).sqrt().item()
    beta = 0.0 if exact else data["discrete_betas"][index].item()
    step = 2 * (1 - beta) * (snr * std) ** 2
    moved = torch.from_numpy(data[f"upd{j}_ald"]).double() - math.sqrt(2 * step) * noise
    score = (moved - x) / step

    def check(solver: str, times: list[float], expected: str, **options: object) -> None:
        def eps(x_t: Tensor, t: Tensor) -> Tensor:
            return -sde.var(t).sqrt().reshape(-1, 1, 1, 1) * score

        grid = torch.tensor(times, dtype=torch.float64)
        problem = base.Problem(sde, eps, grid, None, (), None, torch.float64)
        found = make_solver(solver, **options)._step(problem, 0, x, [])
        assert relative(found, torch.from_numpy(data[f"upd{j}_{expected}"])) < 2e-5, expected

    table = [index / (scales - 1), (index - 1) / (scales - 1)]
    check("euler_maruyama", [t, t - 1 / scales], "euler_maruyama_mean", noise_scale=0.0)
    if exact:
        check("reverse_diffusion", table, "reverse_diffusion_mean", noise_scale=0.0)
        check("ancestral", table, "ancestral_sampling_mean", noise_scale=0.0)
        if j == 0:
            check("reverse_diffusion", table, "reverse_diffusion")
            check("ancestral", table, "ancestral_sampling")
        # the corrector alone: without a predictor the state is carried to the next time
        options = {"predictor": None, "norm": "batch", "snr": snr}
        check("predictor_corrector", [t, t - 1e-9], "langevin", **options)
