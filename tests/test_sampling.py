"""Sampling a model: options reach the solver, images depend on the seed and their index alone, and
files are written as they come.
"""

from __future__ import annotations

import inspect
import io
import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from oracles import GaussianOracle
from samplers import chosen_solver
from state_model import StateModel

from lsgm.commands.sample import SampleOptions
from lsgm.errors import UserError
from lsgm.models.results import SamplerDefaults
from lsgm.sampling.draw import draw_samples, iterate_samples
from lsgm.sampling.sampler import (
    NOT_ON_COMMAND_LINE,
    SOLVER_OPTIONS,
    SolverOptions,
    solver_arguments,
)
from lsgm.sde import VPSDE
from lsgm.solvers import SOLVERS, make_grid, make_solver
from lsgm.solvers.options import argument_docs, solver_class, solver_options
from lsgm.system.npz import write_npz
from vae.random import RowGenerators, rand, randn

SDE = VPSDE()
SMALL = {"langevin": {"steps_per_level": 2}}
every_solver = pytest.mark.parametrize("solver", sorted(SOLVERS))


class OracleModel(StateModel):
    """A data-space model of Gaussian images (1, 2, 2) whose noise prediction is exact."""

    sde = SDE
    state_shape = (1, 2, 2)
    defaults = SamplerDefaults()

    def __init__(self) -> None:
        super().__init__()
        self.oracle = GaussianOracle(
            SDE, torch.tensor([[[0.5, 0.4], [0.3, 0.6]]]), torch.full((1, 2, 2), 0.01)
        )
        self.score = self.oracle.eps


def options(solver="heun", **values):
    return SolverOptions(solver=solver, **(SMALL.get(solver, {}) | values))


@every_solver
def test_every_option_of_every_solver_is_on_the_command_line(solver):
    """Except the trajectory, which no file holds, the two that name other solvers, and what belongs
    to a model.
    """
    reachable = {name for names in SOLVER_OPTIONS.values() for name in names}
    arguments = set(inspect.signature(SOLVERS[solver]).parameters)
    assert arguments <= reachable | NOT_ON_COMMAND_LINE
    assert reachable.isdisjoint(NOT_ON_COMMAND_LINE)
    assert set(SOLVER_OPTIONS) <= {item.name for item in fields(SolverOptions)}
    # and says what the solver says of it, as one paragraph
    for name in arguments:
        option = solver_options()[name]
        own = argument_docs(solver_class(solver))[name]
        assert own and own in option.help and solver in option.solvers
        assert "``" not in own and "\n" not in own


def test_options_are_what_the_solvers_say():
    order, noise = solver_options()["order"], solver_options()["noise_scale"]
    assert (order.type, noise.type, solver_options()["norm"].type) == (int, float, str)
    assert "heun" not in order.solvers and {"unipc", "dpmpp_2m"} <= set(order.solvers)
    assert noise.help.endswith(
        "reverse_diffusion: Factor on the predictor's noise (a temperature)."
    )
    helps = {item.name: item.metadata.get("help") for item in fields(SolverOptions)}
    assert helps["order"] == order.help and "float64 or float32" in helps["state_dtype"]
    assert SOLVER_OPTIONS["tolerance"] == ("rtol", "atol")


def test_options_reach_the_solver():
    values = {
        "predictor": "ancestral", "corrector_steps": 3, "snr": 0.1, "norm": "expected",
        "noise_scale": 0.9, "denoise": True, "state_dtype": "float32",
    }  # fmt: skip
    solver, times = chosen_solver(
        OracleModel(), options("predictor_corrector", nfe=50, grid="karras", t_end=0.01, **values)
    )
    expected = make_solver("predictor_corrector", **(values | {"state_dtype": torch.float32}))
    assert solver == expected
    assert len(times) - 1 == solver.steps_for(50)
    assert (times[0], times[-1]) == (1.0, 0.01)
    churn = solver_arguments("edm_churn", options(churn=3.0, churn_noise=1.01), None)
    assert churn == {"churn": 3.0, "noise": 1.01}
    adaptive, times = chosen_solver(OracleModel(), options("rk45", tolerance=1e-3))
    assert (adaptive.rtol, adaptive.atol, adaptive.backend) == (1e-3, 1e-3, "scipy")
    assert times.tolist() == [1.0, 1e-3]


def test_alpha_may_be_the_models():
    model = OracleModel()
    asking = options("normal_reference", alpha="model")
    with pytest.raises(UserError, match="no mixing"):
        chosen_solver(model, asking)

    class Mixed(OracleModel):
        mixing = torch.tensor([0.25]).reshape(1, 1, 1, 1)

    model = Mixed()
    assert chosen_solver(model, asking)[0].alpha == (0.25,)
    assert chosen_solver(model, options("deis", alpha="0.5"))[0].alpha == 0.5
    with pytest.raises(UserError, match="--alpha: 'half'"):
        chosen_solver(model, options("deis", alpha="half"))


@pytest.mark.parametrize(
    ("solver", "values", "message"),
    [
        ("heun", {"order": 3}, "--order: .*heun has no.*dpmpp_2m"),
        ("ddim", {"churn": 3.0}, "--churn: .*ddim has no.*edm_churn"),
        ("dpmpp_2m", {"tolerance": 1e-3}, "--tolerance: .*dopri5, rk45$"),
        ("dopri5", {"nfe": 20}, "--nfe: dopri5 is adaptive"),
        ("rk45", {"grid": "time"}, "--grid: rk45 is adaptive"),
        ("langevin", {"steps_per_level": 100}, "--nfe: langevin needs at least 200, got 10"),
        ("magic", {}, "unknown solver magic.*heun"),
        ("heun", {"grid": "magic"}, "time grid 'magic'"),
        ("unipc", {"order": 7}, "orders 2, 3 and 4"),
        ("predictor_corrector", {"predictor": "oracle"}, "unknown predictor"),
        ("ancestral", {"snr": 0.1}, "--snr: ancestral takes no corrector steps"),
        ("euler_maruyama", {"norm": "batch"}, "--norm: euler_maruyama takes no corrector steps"),
        ("heun", {"max_nfe": 100}, "--max_nfe: .*dopri5, rk45$"),
        ("rk4", {"t_end": 0.0}, "t = 0 has no noise"),
    ],
)
def test_misfits_say_what_would_be_right(solver, values, message):
    with pytest.raises(UserError, match=message):
        chosen_solver(OracleModel(), options(solver, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"n": 2000},
        {"latents": True},
        {"out": "x.jpg"},
        {"dtype": "int8", "out": "x.npz"},
        {"seed": -1},
        {"state_dtype": "half"},
    ],
)
def test_wrong_sample_options(values):
    with pytest.raises(ValueError, match="|".join(values)):
        SampleOptions(**values)
    SampleOptions(n=2000, latents=True, out="x.npz")


@every_solver
def test_images_do_not_depend_on_the_batch_size(solver):
    """Of fixed-step solvers, stochastic ones included; adaptive solvers agree to tolerance."""
    drawn = [
        draw_samples(OracleModel(), 7, options(solver, batch_size=size, seed=3)).images
        for size in (7, 3, 1)
    ]
    atol = 2e-3 if make_solver(solver).evaluations(1) is None else 1e-6
    for other in drawn[1:]:
        torch.testing.assert_close(other, drawn[0], atol=atol, rtol=0)
    again = draw_samples(OracleModel(), 7, options(solver, batch_size=3, seed=4)).images
    assert (again - drawn[0]).abs().max() > 1e-2


def test_draws_have_the_data_s_moments():
    model, num = OracleModel(), 4000
    images = draw_samples(model, num, options("dpmpp_2m", nfe=40, batch_size=500)).images
    mean, variance = model.oracle.marginal(1e-3, torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    error = (variance / num).sqrt()
    assert ((images.double().mean(0) - mean).abs() < 4 * error + 2e-3)[0].all()
    ratio = images.double().var(0) / variance[0]
    assert (ratio - 1).abs().max() < 4 * math.sqrt(2 / num) + 0.02
    cool = draw_samples(model, 1000, options("ddim", nfe=40, batch_size=500, temperature=0.5))
    warm = draw_samples(model, 1000, options("ddim", nfe=40, batch_size=500))
    # the flow of a Gaussian is affine
    torch.testing.assert_close(cool.images.std(0), 0.5 * warm.images.std(0), rtol=1e-4, atol=0)


def test_batches_hold_at_most_the_batch_size():
    sizes = [len(b.images) for b in iterate_samples(OracleModel(), 10, options(batch_size=4))]
    assert sizes == [4, 4, 2]


def test_rows_have_independent_noise():
    """Rows of neighbouring indices and seeds are standard normal and uncorrelated."""
    num, dims = 4000, 8
    rows = torch.cat(
        [randn((num, dims), RowGenerators.of(s, range(num)), device="cpu") for s in (0, 1)], 1
    ).double()
    error = 1 / math.sqrt(num)
    assert rows.mean(0).abs().max() < 4.5 * error
    assert (rows.var(0) - 1).abs().max() < 4.5 * math.sqrt(2) * error
    correlation = torch.corrcoef(rows.T) - torch.eye(2 * dims)
    assert correlation.abs().max() < 4.5 * error
    neighbours = (rows[1:] * rows[:-1]).mean(0)
    assert neighbours.abs().max() < 4.5 * error
    part = randn((3, dims), RowGenerators.of(1, range(5, 8)), device="cpu")
    assert torch.equal(part.double(), rows[5:8, dims:])
    assert rand((3, 1), RowGenerators.of(1, range(3)), device="cpu").unique().numel() == 3
    with pytest.raises(ValueError, match="3 generators for 2 rows"):
        randn((2, 1), RowGenerators.of(0, range(3)), device="cpu")


def test_arrays_are_streamed(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 1, 3, 3)).astype(np.uint8)
    latents = rng.normal(size=(10, 2)).astype(np.float32)
    file = io.BytesIO()
    with write_npz(file, ["images", "latents_0"], tmp_path) as streams:
        for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
            streams["images"].append(images[part])
            streams["latents_0"].append(latents[part])
        with pytest.raises(ValueError, match="rows are float32"):
            streams["latents_0"].append(images)
    file.seek(0)
    loaded = np.load(file)
    assert loaded.files == ["images", "latents_0"]
    assert loaded["images"].dtype == np.uint8
    np.testing.assert_array_equal(loaded["images"], images)
    np.testing.assert_array_equal(loaded["latents_0"], latents)
    assert not list(tmp_path.iterdir())


def test_a_pilot_grid_is_nearer_to_the_exact_flow():
    """Than the solver's own grid, on starting points that the pilot has not seen."""
    model = OracleModel()
    start = model.oracle.sample(64, 1.0, torch.Generator().manual_seed(9))
    exact = model.oracle.flow(start, 1.0, 1e-3)
    errors = []
    for grid in (None, "pilot"):
        solver, times = chosen_solver(model, options("deis", nfe=5, grid=grid, alpha="1"))
        solution = solver.solve(SDE, model.score, start, times)
        assert solution.nfe <= 5
        errors.append((solution.x - exact).square().mean().sqrt().item())
    assert errors[1] < 0.5 * errors[0]
    with pytest.raises(UserError, match="--solver ancestral"):
        chosen_solver(model, options("ancestral", grid="pilot"))


def test_a_model_s_own_sampler_is_the_default():
    model = OracleModel()
    assert draw_samples(model, 1, SolverOptions()).solver == "normal_reference_pc"
    model.defaults = SamplerDefaults(
        "langevin", 33, "ladder", 0.25, {"steps_per_level": 4, "step_ratio": 0.3, "denoise": True}
    )
    with pytest.raises(UserError, match="ladder"):
        chosen_solver(model, SolverOptions())

    class Ladder:
        times = make_grid("log_snr", SDE, 7, 0.25)

    model.ladder = Ladder()
    solver, times = chosen_solver(model, SolverOptions())
    assert torch.equal(times, Ladder.times)
    assert solver == make_solver("langevin", steps_per_level=4, step_ratio=0.3, denoise=True)
    drawn = draw_samples(model, 2, SolverOptions())
    assert (drawn.solver, drawn.nfe) == ("langevin", 33)
    # What is given wins; of what is recommended a named solver takes what it has.
    named, again = chosen_solver(model, SolverOptions(solver="langevin"))
    assert named == solver and torch.equal(again, times)
    solver, _ = chosen_solver(model, SolverOptions(nfe=16, step_ratio=0.1))
    assert (solver.steps_per_level, solver.step_ratio, solver.denoise) == (2, 0.1, True)
    solver, times = chosen_solver(model, SolverOptions(solver="heun"))
    assert solver == make_solver("heun", denoise=True)
    assert (len(times), times[-1]) == (5, 0.25)  # 8 calls and the closing one
    # The ladder's levels are given: what cannot apply to them is refused, not ignored.
    for values, message in (
        ({"t_end": 0.1}, "--t_end: the ladder ends"),
        ({"nfe": 7}, "--nfe: 8 noise levels need"),
        ({"nfe": 16, "steps_per_level": 2}, "--nfe: .*takes 17 evaluations"),
        ({"solver": "heun", "grid": "ladder", "nfe": 9}, "--nfe: .*takes 15 evaluations"),
    ):
        with pytest.raises(UserError, match=message):
            chosen_solver(model, SolverOptions(**values))


def test_a_named_solver_takes_what_the_model_recommends_for_it():
    model = OracleModel()
    recommended = {"snr": 0.05, "norm": "batch", "denoise": True}
    model.defaults = SamplerDefaults("predictor_corrector", 40, "phi", 0.01, recommended)
    own = chosen_solver(model, SolverOptions())
    named = chosen_solver(model, SolverOptions(solver="predictor_corrector"))
    assert named[0] == own[0] and torch.equal(named[1], own[1])
    assert (named[0].snr, named[0].norm, named[0].denoise) == (0.05, "batch", True)
    assert chosen_solver(model, options("ancestral"))[0] == make_solver("ancestral", **recommended)
    assert chosen_solver(model, options("dopri5"))[0] == make_solver("dopri5", denoise=True)
    assert not chosen_solver(model, options("dopri5", denoise=False))[0].denoise


def test_latents_are_not_denoised_unless_asked():
    model = OracleModel()  # recommends nothing, as an LSGM
    assert not chosen_solver(model, SolverOptions())[0].denoise
    plain = draw_samples(model, 3, options("heun"))
    closed = draw_samples(model, 3, options("heun", denoise=True))
    assert plain.nfe == 10 and closed.nfe == 9  # four steps and the closing call
    assert not torch.equal(plain.images, closed.images)
