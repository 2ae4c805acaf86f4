r"""Solvers: from noise to data (and back) with any score, for images and latents alike.

``make_solver(name, **options).solve(sde, eps_fn, x, make_grid(grid, sde, n, t_end), rng)``. A new
solver is one class in one file and its line in ``SOLVERS``.

Samples of a mixture of two Gaussians in the plane from its exact noise prediction:

>>> import torch
>>> from lsgm.sde import VPSDE
>>> from lsgm.solvers import make_grid, make_solver
>>> sde, means, std = VPSDE(), torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.2
>>> def eps(x_t, t):
...     m, var = sde.mean_coef(t)[:, None], sde.var(t)[:, None]
...     total = m**2 * std**2 + var
...     difference = x_t[:, None] - m[..., None] * means
...     posterior = (-0.5 * difference.square().sum(-1) / total).softmax(1)
...     return var.sqrt() / total * (posterior[..., None] * difference).sum(1)
>>> solver = make_solver("normal_reference_pc")
>>> times = make_grid("sqrt_time", sde, solver.steps_for(nfe=20), t_end=1e-3)
>>> start = sde.prior_sample((1000, 2), torch.Generator().manual_seed(0))
>>> x = solver.solve(sde, eps, start, times).x
>>> distance = torch.cdist(x, means).min(1).values
>>> abs(distance.square().mean().item() - 2 * std**2) < 0.01
True
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from lsgm.solvers.base import Callback, EpsFn, Hook, Progress, Solution, Solver
from lsgm.solvers.ddpm import DDPM
from lsgm.solvers.discrete import DiscretePredictorCorrector
from lsgm.solvers.exponential import DDIM, DPMSolverPP, UniPC
from lsgm.solvers.grids import GRIDS, make_grid, times_of_noise_levels
from lsgm.solvers.langevin import AnnealedLangevin
from lsgm.solvers.normal_reference import NormalReference
from lsgm.solvers.ode import AdaptiveODE, Euler, Heun, RungeKutta4
from lsgm.solvers.pilot import Pilot, PilotFit, choose_pilot, fit_pilot
from lsgm.solvers.predictor_corrector import PredictorCorrector
from lsgm.solvers.stochastic import EDMChurn, SDEDPMSolverPP

__all__ = [
    "DDIM",
    "DDPM",
    "GRIDS",
    "SOLVERS",
    "AdaptiveODE",
    "AnnealedLangevin",
    "Callback",
    "DPMSolverPP",
    "EDMChurn",
    "EpsFn",
    "Euler",
    "Heun",
    "Hook",
    "NormalReference",
    "Pilot",
    "PilotFit",
    "PredictorCorrector",
    "Progress",
    "RungeKutta4",
    "SDEDPMSolverPP",
    "Solution",
    "Solver",
    "UniPC",
    "choose_pilot",
    "fit_pilot",
    "make_grid",
    "make_solver",
    "solver_parameters",
    "times_of_noise_levels",
]

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ancestral": partial(PredictorCorrector, predictor="ancestral"),
    "ddim": DDIM,
    "ddpm": DDPM,
    "deis": partial(NormalReference, alpha=1.0, order=3),
    "discrete_pc": DiscretePredictorCorrector,
    "dopri5": AdaptiveODE,
    "dpmpp_2m": partial(DPMSolverPP, order=2),
    "dpmpp_3m": partial(DPMSolverPP, order=3),
    "edm_churn": EDMChurn,
    "euler": Euler,
    "euler_maruyama": partial(PredictorCorrector, predictor="euler_maruyama"),
    "heun": Heun,
    "langevin": AnnealedLangevin,
    "normal_reference": NormalReference,
    "normal_reference_pc": partial(
        NormalReference, order=3, corrector=True, lower_order_final=True, corrector_from=4
    ),
    "predictor_corrector": partial(PredictorCorrector, corrector_steps=1),
    "reverse_diffusion": partial(PredictorCorrector, predictor="reverse_diffusion"),
    "rk4": RungeKutta4,
    "rk45": partial(AdaptiveODE, backend="scipy"),
    "sde_dpmpp_2m": SDEDPMSolverPP,
    "unipc": UniPC,
}
"""Every sampler by name, some with options preset."""


def make_solver(name: str, **options: Any) -> Solver:
    """Build the solver of that name with the given options.

    Raises:
        ValueError: The name or an option is unknown, or an option's value out of range.
    """
    known = solver_parameters(name)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"solver {name!r} has no option {', '.join(unknown)}: choose from {', '.join(known)}"
        )
    return SOLVERS[name](**options)


def solver_parameters(name: str) -> list[str]:
    """The names of the options of the solver of that name.

    Raises:
        ValueError: There is no such solver.
    """
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: choose from {', '.join(SOLVERS)}")
    return list(inspect.signature(SOLVERS[name]).parameters)
