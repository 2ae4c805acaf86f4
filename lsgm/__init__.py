"""Latent score-based generative models (arXiv 2106.05931), and score-based models of images.

``lsgm.load(RUN)`` opens a finished run folder anywhere; ``lsgm.fit(MODEL, DATA, out=RUN)`` trains
one in Python. The names below are the public ones;
each is imported when it is first used, so that ``import lsgm`` and ``import lsgm.sde`` stay light.

Example:
    Samples of N(2, 0.5^2) from its exact noise prediction.

    >>> import lsgm, torch
    >>> sde = lsgm.VPSDE()
    >>> def eps(x_t, t):
    ...     m, var = sde.mean_coef(t)[:, None], sde.var(t)[:, None]
    ...     return var.sqrt() * (x_t - 2 * m) / (m**2 / 4 + var)
    >>> start = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0))
    >>> times = lsgm.make_grid("log_snr", sde, n=20, t_end=1e-3)
    >>> solution = lsgm.Heun().solve(sde, eps, start, times)
    >>> print(f"{solution.x.mean():.1f} {solution.x.std():.1f} after {solution.nfe} evaluations")
    2.0 0.5 after 40 evaluations
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lsgm.conditioning import ClassifierGuidance as ClassifierGuidance
    from lsgm.conditioning import ProjectionInpainting as ProjectionInpainting
    from lsgm.config.command_line import load_config as load_config
    from lsgm.data import ArrayDataset as ArrayDataset
    from lsgm.data import FolderDataset as FolderDataset
    from lsgm.data import build_datasets as build_datasets
    from lsgm.errors import UserError as UserError
    from lsgm.likelihood import ode_log_density as ode_log_density
    from lsgm.models.autoencoder import Autoencoder as Autoencoder
    from lsgm.models.autoencoder import Posterior as Posterior
    from lsgm.models.base import Model as Model
    from lsgm.models.generic import LatentScoreModel as LatentScoreModel
    from lsgm.models.generic import ScoreModel as ScoreModel
    from lsgm.models.images import DataSGM as DataSGM
    from lsgm.models.latent import LSGM as LSGM
    from lsgm.models.latent import VAEModel as VAEModel
    from lsgm.models.loading import load as load
    from lsgm.models.loading import load_classifier as load_classifier
    from lsgm.models.results import Bound as Bound
    from lsgm.models.results import Samples as Samples
    from lsgm.networks import NCSNpp as NCSNpp
    from lsgm.networks.data_score import DataScore as DataScore
    from lsgm.noise_ladder import NoiseLadder as NoiseLadder
    from lsgm.objectives import denoising_score_matching as denoising_score_matching
    from lsgm.objectives import prior_losses as prior_losses
    from lsgm.score import EpsFn as EpsFn
    from lsgm.score import MixedNormalScore as MixedNormalScore
    from lsgm.score_matching import score_loss as score_loss
    from lsgm.sde import VESDE as VESDE
    from lsgm.sde import VPSDE as VPSDE
    from lsgm.sde import GeometricVPSDE as GeometricVPSDE
    from lsgm.sde import LinearSDE as LinearSDE
    from lsgm.sde import SubVPSDE as SubVPSDE
    from lsgm.solvers import DDIM as DDIM
    from lsgm.solvers import AdaptiveODE as AdaptiveODE
    from lsgm.solvers import AnnealedLangevin as AnnealedLangevin
    from lsgm.solvers import DPMSolverPP as DPMSolverPP
    from lsgm.solvers import Euler as Euler
    from lsgm.solvers import Heun as Heun
    from lsgm.solvers import NormalReference as NormalReference
    from lsgm.solvers import PredictorCorrector as PredictorCorrector
    from lsgm.solvers import Solution as Solution
    from lsgm.solvers import Solver as Solver
    from lsgm.solvers import UniPC as UniPC
    from lsgm.solvers import make_grid as make_grid
    from lsgm.solvers import make_solver as make_solver
    from lsgm.solvers.sampler import Sampler as Sampler
    from lsgm.times import make_proposal as make_proposal
    from lsgm.training.fit import fit as fit
    from lsgm.weighting import make_weighting as make_weighting
    from vae import HierarchicalVAE as HierarchicalVAE

_HOMES = {
    "UserError": "lsgm.errors",
    # Diffusions and their noise
    "GeometricVPSDE": "lsgm.sde",
    "LinearSDE": "lsgm.sde",
    "SubVPSDE": "lsgm.sde",
    "VESDE": "lsgm.sde",
    "VPSDE": "lsgm.sde",
    "NoiseLadder": "lsgm.noise_ladder",
    # Score models
    "EpsFn": "lsgm.score",
    "MixedNormalScore": "lsgm.score",
    "DataScore": "lsgm.networks.data_score",
    "NCSNpp": "lsgm.networks",
    # Training
    "fit": "lsgm.training.fit",
    "make_weighting": "lsgm.weighting",
    "make_proposal": "lsgm.times",
    "denoising_score_matching": "lsgm.objectives",
    "prior_losses": "lsgm.objectives",
    "score_loss": "lsgm.score_matching",
    # Samplers
    "Sampler": "lsgm.solvers.sampler",
    "AdaptiveODE": "lsgm.solvers",
    "AnnealedLangevin": "lsgm.solvers",
    "DDIM": "lsgm.solvers",
    "DPMSolverPP": "lsgm.solvers",
    "Euler": "lsgm.solvers",
    "Heun": "lsgm.solvers",
    "NormalReference": "lsgm.solvers",
    "PredictorCorrector": "lsgm.solvers",
    "Solution": "lsgm.solvers",
    "Solver": "lsgm.solvers",
    "UniPC": "lsgm.solvers",
    "make_grid": "lsgm.solvers",
    "make_solver": "lsgm.solvers",
    # Conditioning and likelihood
    "ClassifierGuidance": "lsgm.conditioning",
    "ProjectionInpainting": "lsgm.conditioning",
    "ode_log_density": "lsgm.likelihood",
    # Models, data and configurations
    "HierarchicalVAE": "vae",
    "Autoencoder": "lsgm.models.autoencoder",
    "Posterior": "lsgm.models.autoencoder",
    "ScoreModel": "lsgm.models.generic",
    "LatentScoreModel": "lsgm.models.generic",
    "DataSGM": "lsgm.models.images",
    "LSGM": "lsgm.models.latent",
    "VAEModel": "lsgm.models.latent",
    "Model": "lsgm.models.base",
    "Samples": "lsgm.models.results",
    "Bound": "lsgm.models.results",
    "load": "lsgm.models.loading",
    "load_classifier": "lsgm.models.loading",
    "ArrayDataset": "lsgm.data",
    "FolderDataset": "lsgm.data",
    "build_datasets": "lsgm.data",
    "load_config": "lsgm.config.command_line",
}
"""The module of each public name; type checkers read the imports above."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
