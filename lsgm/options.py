"""Options of the scripts that use a trained run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lsgm.config_checks import require_at_most
from lsgm.errors import UserError

__all__ = [
    "ClassOptions",
    "EditOptions",
    "EvaluateOptions",
    "InpaintOptions",
    "InterpolateOptions",
    "QualityOptions",
    "ResampleOptions",
    "SampleOptions",
    "SolverOptions",
    "require_run",
]

MAX_COUNT = 1_000_000
"""Most evaluations, draws or rows that an option may ask for: more is a slip of the keyboard."""


@dataclass(frozen=True)
class SolverOptions:
    """How a score-based prior or model is sampled.

    Options that are None are the solver's own choice; one that the solver does not have is refused.
    """

    solver: str | None = None
    """Solver by name: normal_reference_pc, dopri5 (adaptive), heun, ... (lsgm.solvers.SOLVERS).
    None: what a model of images recommends, but normal_reference_pc where nfe is at most a tenth of
    its evaluations or grid is pilot; normal_reference_pc for an LSGM. Any solver takes what
    a model of images recommends for it (t_end, denoise, snr, ...) unless given here."""
    nfe: int | None = None
    """Network evaluations per batch, 10 unless the model recommends otherwise; adaptive solvers
    choose their own number."""
    grid: str | None = None
    """Time grid of solvers with fixed steps, by name (lsgm.solvers.GRIDS); pilot: chosen on a few
    pilot trajectories; ladder: the noise levels of an NCSN. None: the solver's own."""
    t_end: float | None = None
    """Last time of the generative process; time runs from 1 down to it. None: the model's, or
    0.001."""
    tolerance: float | None = None
    """Relative and absolute tolerance of adaptive solvers."""
    max_nfe: int | None = None
    """Most network evaluations of an adaptive solver, 10000 unless given: it stops with an error
    where a tolerance would need more."""
    order: int | None = None
    """Order of multistep solvers."""
    alpha: str | None = None
    """Weight of the non-Normal part in normal_reference: a number in [0, 1], or model (the model's
    mixing coefficients, one per channel)."""
    corrector: bool | None = None
    """Whether normal_reference and deis correct each step."""
    corrector_from: int | None = None
    """Fewest steps with which they do."""
    variable: str | None = None
    """Variable of the steps (euler, heun, rk4) or of the extrapolation (normal_reference, deis)."""
    variant: str | None = None
    """UniPC's bh1 or bh2."""
    lower_order_final: bool | None = None
    """Lower the order of multistep solvers in the last steps."""
    eta: float | None = None
    """Noise of ddim: 0 deterministic, 1 ancestral."""
    predictor: str | None = None
    """Predictor of predictor_corrector, discrete_pc: reverse_diffusion, euler_maruyama, ancestral,
    ..."""
    corrector_steps: int | None = None
    """Langevin steps of predictor_corrector, discrete_pc at each time."""
    snr: float | None = None
    """Signal-to-noise ratio of those steps."""
    norm: str | None = None
    """How those steps are scaled: image, batch or expected."""
    noise_scale: float | None = None
    """Factor on the predictor's noise."""
    steps_per_level: int | None = None
    """Langevin steps at each noise level (langevin)."""
    step_ratio: float | None = None
    """Size of those steps over the squared noise level (langevin)."""
    denoise: bool | None = None
    """End with the posterior mean of the data at time zero, one evaluation more. None: what a model
    of images recommends (true unless its configuration says otherwise); false for latents."""
    churn: float | None = None
    """Total amount of noise that edm_churn adds."""
    churn_min: float | None = None
    """Lowest noise level sigma / m at which it adds noise."""
    churn_max: float | None = None
    """Highest noise level sigma / m at which it adds noise."""
    churn_noise: float | None = None
    """Standard deviation of the added noise relative to the exact one (edm_churn)."""
    state_dtype: str | None = None
    """Precision of the solver's state: float64 or float32."""
    temperature: float = 1.0
    """Standard deviation of the starting noise (in units of the prior's) and of latents outside the
    prior."""
    batch_size: int = 64
    """Images at a time. Every image has its own noise, so the images do not depend on it, except
    with adaptive solvers and norm batch, whose steps are shared by a batch."""
    seed: int = 0
    """Seed of all noise."""

    def __post_init__(self) -> None:
        for name in ("nfe", "tolerance", "max_nfe", "temperature", "batch_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be positive, not {value}")
        require_at_most(self, MAX_COUNT, "nfe batch_size corrector_steps steps_per_level")
        if self.t_end is not None and not 0 <= self.t_end < 1:
            raise ValueError(f"t_end: must lie in [0, 1), not {self.t_end}")
        if self.seed < 0:
            raise ValueError(f"seed: must not be negative, not {self.seed}")
        if self.state_dtype not in (None, "float32", "float64"):
            raise ValueError(f"state_dtype: must be float32 or float64, not {self.state_dtype}")


MAX_GRID_IMAGES = 1024
"""Most images that a PNG grid may hold: more could not be told apart."""


@dataclass(frozen=True)
class SampleOptions(SolverOptions):
    """Draw images from a trained run."""

    run: str | None = None
    """Folder of the run."""
    checkpoint: str | None = None
    """Use a checkpoint of the run, finished or not, in place of its released weights: the number of
    a step, or latest."""
    n: int = 64
    """Number of images; at most 1024 in a PNG grid, any number in an NPZ or a folder, which are
    written batch by batch."""
    index: tuple[int, ...] = ()
    """Write only these of the n images (0 is the first). They are made in the batches in which all
    n would be, and are bit for bit the same. Empty: all."""
    out: str = "samples.png"
    """File to write: .png (a grid) or .npz (the array `images` (N, C, H, W)); or a folder (no
    ending), for one PNG an image: 000000.png, ..."""
    dtype: str = "float32"
    """Images in an NPZ: float32 or float16 in [0, 1], or uint8 in 0..255."""
    latents: bool = False
    """Write the latents to the NPZ as well: `latents_0`, ..., coarsest first, float32."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n <= 0:
            raise ValueError(f"n: must be positive, not {self.n}")
        if Path(self.out).suffix not in (".png", ".npz", ""):
            raise ValueError(
                f"out: must end in .png or .npz, or be a folder without an ending, not {self.out}"
            )
        if any(not 0 <= k < self.n for k in self.index):
            raise ValueError(f"index: must lie in 0 to {self.n - 1}, the n images of this seed")
        if self.dtype not in ("float32", "float16", "uint8"):
            raise ValueError(f"dtype: must be float32, float16 or uint8, not {self.dtype}")
        if self.out.endswith(".png") and self.num_written > MAX_GRID_IMAGES:
            raise ValueError(
                f"n: a PNG grid holds at most {MAX_GRID_IMAGES} images, not {self.num_written}; "
                "write an .npz or a folder"
            )
        if not self.out.endswith(".npz") and self.latents:
            raise ValueError("latents: a PNG cannot hold them; write an .npz")

    @property
    def num_written(self) -> int:
        """Number of images to write."""
        return len(set(self.index)) or self.n


@dataclass(frozen=True)
class QualityOptions:
    """Scores of samples against the test images."""

    extractor: str | None = None
    """Features: classifier (of the dataset's own labels; trained once, about a minute),
    efficientnet_lite0, inception (FID). None: no scores."""
    num: int = 2048
    """Number of samples."""
    nfe: tuple[int, ...] = ()
    """Other numbers of network evaluations to score the samples at; beside an adaptive sampler,
    with the model's own."""
    images: str = "draws"
    """Binary data: draws (one Bernoulli draw a pixel) or means (grey decoder means)."""
    neighbours: int = 3
    """Neighbour that sets the radius of precision and recall."""
    subsets: int = 100
    """Subsets of the kernel distance, of 1000 images at most."""
    cache: str | None = None
    """Folder of trained classifiers and features of data. None: LSGM_CACHE, else
    ~/.cache/lsgm/evaluation."""
    seed: int = 0
    """Seed of the subsets, of the groups of standard errors and of the choice of training images.
    """

    def __post_init__(self) -> None:
        require_at_most(self, MAX_COUNT, "num neighbours subsets")
        if self.num < 20:
            raise ValueError(f"num: must be 20 at least, not {self.num}")
        if min((self.neighbours, self.subsets, *self.nfe)) <= 0:
            raise ValueError("nfe, neighbours, subsets: must be positive")
        if self.images not in ("draws", "means"):
            raise ValueError(f"images: must be draws or means, not {self.images}")


@dataclass(frozen=True)
class EditOptions(SolverOptions):
    """Change images with a trained run; the result is a PNG grid."""

    run: str | None = None
    """Folder of the run."""
    index: tuple[int, ...] = (0, 1, 2, 3)
    """Images of the data's test split to start from."""
    files: tuple[str, ...] = ()
    """Image files to start from instead; the run's data are not needed then."""
    samples: int = 4
    """Results for each image."""
    out: str = "edited.png"
    """File to write: a .png grid, one row per image."""
    data_root: str | None = None
    """Where the data lie, if elsewhere than in training."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples <= 0:
            raise ValueError(f"samples: must be positive, not {self.samples}")
        require_at_most(self, MAX_COUNT, "samples")
        if not self.out.endswith(".png"):
            raise ValueError(f"out: must end in .png, not {self.out}")
        if not self.index and not self.files:
            raise ValueError("index: name at least one image")


@dataclass(frozen=True)
class InpaintOptions(EditOptions):
    """Keep the pixels that are known and draw the others. A model of images keeps them exactly; an
    LSGM keeps the latents above them.
    """

    mask: str = "centre"
    """Part to draw: centre, left, right, top, bottom, random (half of all pixels), or an image file
    of the images' size whose transparent pixels are drawn, or, if it has none, its dark ones."""


@dataclass(frozen=True)
class ClassOptions(EditOptions):
    """Draw images of given classes: one row for each, `samples` images long."""

    labels: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    """The classes."""
    guidance: float = 1.0
    """Strength of the guidance: 1 is the conditional law, 0 no class; larger values sharpen it."""
    classifier: str | None = None
    """Run of a noise-conditional classifier that guides a model without classes."""
    judge: str | None = None
    """Run of another classifier, of clean images: print how many results it takes for their class.
    """


@dataclass(frozen=True)
class InterpolateOptions(EditOptions):
    """Go from each image to the next along a great circle of the flow's noise."""

    steps: int = 8
    """Images from one to the other, both included."""
    between: str = "images"
    """images, or seeds: between samples instead, as many rows as `samples`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_most(self, MAX_COUNT, "steps")
        if self.steps < 2:
            raise ValueError(f"steps: must be at least 2, not {self.steps}")
        if self.between not in ("images", "seeds"):
            raise ValueError(f"between: must be images or seeds, not {self.between}")


@dataclass(frozen=True)
class ResampleOptions(EditOptions):
    """Keep some latent groups of an image and draw the others given them."""

    keep: tuple[int, ...] = (0,)
    """Latent groups to keep, coarsest first."""


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


def require_run(run: str | None) -> str:
    if not run:
        raise UserError("--run: give the folder of a trained run, for example --run runs/lsgm")
    return run
