"""The sampler that options stand for, as a solver and its times."""

from __future__ import annotations

from torch import Tensor

from lsgm.models.base import DiffusionModel
from lsgm.sampling.sampler import SolverOptions, build_sampler
from lsgm.solvers import Solver


def chosen_solver(model: DiffusionModel, options: SolverOptions) -> tuple[Solver, Tensor]:
    sampler = build_sampler(model, options)
    assert sampler.times is not None
    return sampler.method, sampler.times


def recommended_solver(model: DiffusionModel) -> tuple[Solver, Tensor]:
    return chosen_solver(model, SolverOptions())
