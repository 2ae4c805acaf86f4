"""Options of the scripts that use a trained run."""

from __future__ import annotations

from dataclasses import dataclass, field

from lsgm.errors import UserError

__all__ = ["EvaluateOptions", "SampleOptions", "SolverOptions", "require_run"]


@dataclass(frozen=True)
class SolverOptions:
    """How the latent prior is sampled."""

    solver: str = "normal_reference_pc"
    """Solver by name: normal_reference_pc, dopri5 (adaptive), heun, ... (lsgm.solvers.SOLVERS)."""
    nfe: int = 10
    """Network evaluations per batch; adaptive solvers choose their own number."""
    grid: str | None = None
    """Time grid of solvers with fixed steps, by name (lsgm.solvers.GRIDS). None: the solver's own.
    """
    t_end: float = 1e-3
    """Last time of the generative process; time runs from 1 down to it."""
    tolerance: float = 1e-5
    """Relative and absolute tolerance of adaptive solvers."""
    temperature: float = 1.0
    """Standard deviation of the starting noise and of latents outside the prior."""
    batch_size: int = 64
    """Images at a time; adaptive solvers share their steps over a batch."""
    seed: int = 0
    """Seed of all noise."""

    def __post_init__(self) -> None:
        for name in ("nfe", "t_end", "tolerance", "temperature", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be positive, not {getattr(self, name)}")
        if self.t_end >= 1:
            raise ValueError(f"t_end: must lie below 1, not {self.t_end}")


@dataclass(frozen=True)
class SampleOptions(SolverOptions):
    """Draw images from a trained run."""

    run: str | None = None
    """Folder of the run."""
    n: int = 64
    """Number of images."""
    out: str = "samples.png"
    """File to write: .png (a grid) or .npz (the array `images`)."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n <= 0:
            raise ValueError(f"n: must be positive, not {self.n}")
        if not self.out.endswith((".png", ".npz")):
            raise ValueError(f"out: must end in .png or .npz, not {self.out}")

    def folder(self) -> str:
        return require_run(self.run)


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate trained runs."""

    run: tuple[str, ...] = ()
    """Folders of the runs to put in the table."""
    metrics: tuple[str, ...] = ("nelbo",)
    """Bounds: nelbo; normal (an LSGM's own VAE under N(0, I)); iw (a VAE run); ode (an LSGM)."""
    split: str = "test"
    """test or train."""
    json: str | None = None
    """File for the report as JSON."""
    pictures: str | None = None
    """Folder for sample and reconstruction grids and learning curves of the runs."""
    limit: int | None = None
    """Use the first so many images only."""
    samples: int = 1
    """Posterior draws per image for nelbo."""
    k: int = 32
    """Posterior draws per image for iw."""
    batch_size: int = 250
    """Images at a time."""
    tolerance: float = 1e-5
    """Tolerance of the ODE in the metric ode."""
    seed: int = 0
    """Seed of the posterior draws, times and probes."""
    data_root: str | None = None
    """Where the data lie, if elsewhere than in training."""
    sampling: SolverOptions = field(default_factory=SolverOptions)
    """Sampler of the pictures and of NFE and seconds a sample."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        for name in ("limit", "samples", "k", "batch_size", "tolerance"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, not {value}")
        if self.split not in ("test", "train"):
            raise ValueError(f"split: must be test or train, not {self.split}")


def require_run(run: str | None) -> str:
    if not run:
        raise UserError("--run: give the folder of a trained run, for example --run runs/lsgm")
    return run
