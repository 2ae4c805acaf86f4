"""Options of the command ``evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field

from lsgm.config.checks import require_at_most
from lsgm.evaluation.quality.options import QualityOptions
from lsgm.sampling.sampler import MAX_COUNT, SolverOptions

__all__ = [
    "EvaluateOptions",
]


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate trained runs."""

    run: tuple[str, ...] = ()
    """Folders of the runs to put in the table."""
    metrics: tuple[str, ...] = ("nelbo",)
    """Bounds of a model with latents: nelbo; iw (importance-weighted); of an LSGM also normal (its
    own VAE under N(0, I)), ode, iw_exact. Of a model of the images themselves: bits."""
    split: str = "test"
    """test or train."""
    json: str | None = None
    """File for the report as JSON."""
    pictures: str | None = None
    """Folder for sample and reconstruction grids and learning curves of the runs."""
    out: str | None = None
    """Folder for report.json, report.md and their pictures, in a folder for each run if there are
    several. None: RUN/evaluation."""
    report: bool = True
    """Write that report."""
    iw: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of posterior draws of the plot of importance-weighted bounds in the report."""
    iw_images: int = 256
    """Images of that plot, at most: drawn at random."""
    neighbours: int = 10
    """Samples whose nearest training images the report shows."""
    limit: int | None = None
    """Use so many images only: drawn at random, the same for all runs."""
    samples: int = 1
    """Posterior draws per image for nelbo."""
    k: int = 32
    """Posterior draws per image for iw."""
    iw_steps: int = 20
    """Steps of the diffusion path in iw of an LSGM: more are tighter and cost as much more."""
    batch_size: int = 250
    """Images at a time. Every image has its own noise, so the numbers do not depend on it, except
    with ode, iw_exact and bits within the tolerance."""
    tolerance: float = 1e-5
    """Tolerance of the ODE in the metric ode."""
    seed: int = 0
    """Seed of the posterior draws, times and probes."""
    data_root: str | None = None
    """Where the data lie, if elsewhere than in training."""
    sampling: SolverOptions = field(default_factory=SolverOptions)
    """Sampler of the pictures and of NFE and seconds a sample."""
    quality: QualityOptions = field(default_factory=QualityOptions)
    """Scores of samples."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        for name in (
            "limit",
            "samples",
            "k",
            "batch_size",
            "tolerance",
            "iw_images",
            "neighbours",
            "iw_steps",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, not {value}")
        require_at_most(self, MAX_COUNT, "samples k batch_size iw_images neighbours iw_steps")
        if any(k <= 0 for k in self.iw):
            raise ValueError("iw: must be positive")
        if self.split not in ("test", "train"):
            raise ValueError(f"split: must be test or train, not {self.split}")
