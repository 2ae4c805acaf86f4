"""Few evaluations of a model of images that recommends many: our solver takes the place of its
own, unless something says that its own is meant.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samplers import chosen_solver

from lsgm.config.architecture import (
    LadderConfig,
    PriorNetworkConfig,
    RefineNetConfig,
    SamplerConfig,
    ScoreModelConfig,
    SDEConfig,
)
from lsgm.data.spec import DataSpec
from lsgm.models.images import DataSGM, build_data_model
from lsgm.sampling.draw import draw_samples, solver_name
from lsgm.sampling.sampler import SolverOptions
from lsgm.solvers import AnnealedLangevin, NormalReference, PredictorCorrector, make_grid

SPEC = DataSpec("folder", 1, 8, 0, binary=False)
NETWORK = PriorNetworkConfig(
    num_channels=8, num_scales=2, num_cells_per_scale=1, embedding_dim=8, attention_resolutions=()
)
VE = SDEConfig(kind="vesde", sigma2_min=1e-4, sigma2_max=2500.0, time_eps=1e-5)
PC = {"solver": "discrete_pc", "nfe": 2000, "grid": "time", "corrector_steps": 1}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ve": ("score_sde", {"sde": VE, "data_range": "unit"}, PC | {"t_end": 1e-5}),
    "vp": (
        "score_sde",
        {"sde": SDEConfig(kind="vpsde", time_eps=1e-5)},
        {"solver": "euler_maruyama", "nfe": 1000, "t_end": 1e-3},
    ),
    "ddpm": (
        "score_sde",
        {
            "sde": SDEConfig(kind="vpsde", time_eps=1e-5),
            "condition": "index",
            "discrete_levels": 1000,
        },
        {"solver": "ddpm", "nfe": 1000, "grid": "time", "t_end": 0.0},
    ),
    "ncsn": (
        "ncsn",
        {
            "network": "refinenet",
            "refinenet": RefineNetConfig(num_channels=4),
            "ladder": LadderConfig(sigma_max=2.0, sigma_min=0.02, levels=10),
        },
        {"solver": "langevin", "nfe": 1000, "start": "uniform", "denoise": False},
    ),
}


def build(name: str) -> DataSGM:
    kind, score, sampler = MODELS[name]
    torch.manual_seed(0)
    config = ScoreModelConfig(ncsnpp=NETWORK, **score)
    return build_data_model(kind, config, SamplerConfig(**sampler), SPEC).eval()


@pytest.mark.parametrize("name", MODELS)
def test_few_evaluations_are_ours(name: str) -> None:
    model, options = build(name), SolverOptions(nfe=10, batch_size=2)
    solver, times = chosen_solver(model, options)
    assert isinstance(solver, NormalReference)
    assert solver.denoise == model.sampler_config.denoise
    exploding = name in ("ve", "ncsn")
    end = {"ve": 1e-5, "ncsn": 0.0}.get(name, 1e-3)
    steps = 10 - solver.denoise
    expected = make_grid("phi" if exploding else "sqrt_time", model.sde, steps, end)
    assert torch.equal(times, expected)
    assert solver_name(model, options) == "normal_reference_pc"
    drawn = draw_samples(model, 3, options)
    assert drawn.nfe == 10 and drawn.solver == "normal_reference_pc"
    whole = draw_samples(model, 3, SolverOptions(nfe=10)).images
    assert torch.allclose(drawn.images, whole, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_its_own_sampler_is_the_default(name: str) -> None:
    model = build(name)
    for options in (SolverOptions(), SolverOptions(solver=model.defaults.solver)):
        assert not isinstance(chosen_solver(model, options)[0], NormalReference)
    assert solver_name(model, SolverOptions()) == model.defaults.solver


def test_what_names_the_own_sampler_keeps_it() -> None:
    model = build("ve")
    for options in (
        SolverOptions(nfe=20, snr=0.1),
        SolverOptions(nfe=20, solver="discrete_pc"),
        SolverOptions(nfe=3000),
    ):
        assert isinstance(chosen_solver(model, options)[0], PredictorCorrector)
    half = chosen_solver(build("vp"), SolverOptions(nfe=500))[0]
    assert isinstance(half, PredictorCorrector)  # which does not need its own number
    ladder = SolverOptions(nfe=20, grid="ladder")
    solver, times = chosen_solver(build("ncsn"), ladder)
    assert isinstance(solver, AnnealedLangevin) and len(times) == 10


def test_more_evaluations_go_evenly_in_the_noise_level() -> None:
    model = build("ve")
    _, times = chosen_solver(model, SolverOptions(nfe=50))
    assert times.diff().diff().abs().max() < 1e-12


def test_a_pilot_grid_is_for_our_solver() -> None:
    """Nearer to the exact flow than the default, whose evaluations it has."""
    model = build("ve")
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(1)
        )
    fitted, times = chosen_solver(model, SolverOptions(nfe=4, grid="pilot"))
    plain, even = chosen_solver(model, SolverOptions(nfe=4))
    exact, ends = chosen_solver(model, SolverOptions(solver="dopri5", denoise=True))
    rng = torch.Generator().manual_seed(2)
    start = model.sde.prior_sample((8, *model.state_shape), rng, device="cpu")
    ours, default, flow = (
        solver.solve(model.sde, model.score, start, grid)
        for solver, grid in ((fitted, times), (plain, even), (exact, ends))
    )
    assert ours.nfe <= 4
    assert (ours.x - flow.x).norm() < 0.5 * (default.x - flow.x).norm()
