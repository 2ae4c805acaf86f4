"""The command ``sample``: draw images from a trained run into a file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lsgm.config.command_line import parse_command_line
from lsgm.errors import UserError
from lsgm.models.loading import load, require_run
from lsgm.sampling.draw import iterate_samples, solver_name
from lsgm.sampling.outputs import Output, check_samples, open_output
from lsgm.sampling.sampler import MAX_COUNT, SolverOptions, given_solver_options
from lsgm.solvers import Progress
from lsgm.system.job import ALONE, Job, shared_job
from lsgm.system.memory import process_peak
from lsgm.system.npz import Block
from lsgm.system.progress import progress_bar
from lsgm.training.checkpoint_model import load_checkpoint
from lsgm.training.precision import autocast, usable_precision

__all__ = [
    "SHOWN",
    "SampleOptions",
    "sample",
    "sample_to_file",
]

MAX_GRID_IMAGES = 1024
"""Most images that a PNG grid may hold: more could not be told apart."""

SHOWN = tuple(
    "run checkpoint n index out dtype latents solver nfe grid t_end tolerance denoise temperature "
    "batch_size seed device precision compile".split()
)
"""The options that ``--help`` shows."""


def sample(argv: Sequence[str], prog: str) -> None:
    """Draw images from a trained run: a PNG grid, a folder of PNGs, or an NPZ with the array
    `images` (N, C, H, W) in [0, 1]. Under torchrun --nproc-per-node N the processes share the
    batches, and the images are the same.
    """
    with shared_job() as job:
        line = parse_command_line(
            SampleOptions, argv, extra=(), prog=prog, description=sample.__doc__, shown=SHOWN
        )
        sample_to_file(line.config, job)


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
    """Write only these images (0 is the first), of n or beyond. They are made in the batches in
    which all would be, and are bit for bit the same (batch_size 1: nothing else is computed).
    Empty: all."""
    out: str = "samples.png"
    """File to write: .png (a grid, or a single image as it is) or .npz (the array `images` (N, C,
    H, W)); or a folder (no ending), for one PNG an image: 000000.png, ..."""
    dtype: str = "float32"
    """Images in an NPZ: float32 or float16 in [0, 1], or uint8 in 0..255."""
    latents: bool = False
    """Write the latents to the NPZ as well: `latents_0`, ..., coarsest first, float32."""
    device: str = "auto"
    """auto, cpu, cuda, ...; cuda is one device a process."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Of the networks, the decoder's too; the solver's state stays wide. A CPU without bf16 takes
    float32."""
    compile: bool = False
    """torch.compile the score network: pays for many images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n <= 0:
            raise ValueError(f"n: must be positive, not {self.n}")
        if Path(self.out).suffix not in (".png", ".npz", ""):
            raise ValueError(
                f"out: must end in .png or .npz, or be a folder without an ending, not {self.out}"
            )
        if any(not 0 <= k < MAX_COUNT for k in self.index):
            raise ValueError(f"index: must lie in 0 to {MAX_COUNT - 1}")
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
    def num_images(self) -> int:
        """Number of images that are numbered."""
        return max([self.n, *(k + 1 for k in self.index)])

    @property
    def indices(self) -> Sequence[int]:
        """The images to write."""
        return sorted(set(self.index)) or range(self.n)

    @property
    def num_written(self) -> int:
        """Number of images to write."""
        return len(self.indices)


@dataclass(frozen=True)
class _Drawn:
    """What the main process has to know of a batch: its images, its network evaluations, and where
    its rows lie until all are there.
    """

    num: int
    nfe: int
    block: Block | None


def sample_to_file(options: SampleOptions, job: Job = ALONE) -> None:
    """Draw images from a run and write them; print the number of evaluations and the time. The
    processes of ``job`` share the batches.

    Raises:
        UserError: The run or its checkpoint cannot be opened, an option does not apply to it, or
            the output cannot be written: all known before anything is drawn.
        NonFiniteError: Samples are not finite; nothing is written.
    """
    run, device = require_run(options.run), job.choose_device(options.device)
    if options.checkpoint is None:
        model = load(run, device)
    else:
        model = load_checkpoint(run, options.checkpoint, device)
    if options.latents and not model.has_latents:
        raise UserError("--latents: this run is a model of images and has no latents")
    if model.diffusion is None and (idle := given_solver_options(options)):
        raise UserError(f"--{idle[0]}: {run} is a VAE under N(0, I), which no solver samples")
    out = Path(options.out)
    precision = usable_precision(options.precision, device)
    if options.compile and model.diffusion is not None:
        model.diffusion.score.compile()
    start, writing = time.perf_counter(), 0.0
    bar = progress_bar(total=options.num_written, unit="img", disable=not job.is_main)

    def show(progress: Progress) -> None:
        bar.set_postfix(t=f"{progress.t:.3g}", nfe=progress.nfe)

    def parts(output: Output) -> Iterator[tuple[int, _Drawn]]:
        nonlocal writing
        total, wanted = options.num_images, set(options.index)
        for batch in iterate_samples(model, total, options, wanted, show, job.take):
            drawn = time.perf_counter()
            block = output.add(batch)
            writing += time.perf_counter() - drawn
            yield batch.index[0], _Drawn(len(batch.images), batch.nfe, block)

    job.on_main(lambda: check_samples(out, options.indices))
    with bar, open_output(out, options.dtype, options.latents) as output:
        with autocast(device, precision):
            drawn = job.gather(parts(output), everywhere=False, done=lambda d: bar.update(d.num))
        gathered = time.perf_counter()
        job.on_main(lambda: output.finish([d.block for d in drawn if d.block is not None]))
        writing += time.perf_counter() - gathered
    seconds, count = time.perf_counter() - start, options.num_written
    peaks = job.gather([(job.rank, process_peak(device))], everywhere=False)
    if not job.is_main:
        return
    nfe = sum(d.nfe for d in drawn) / len(drawn)
    shared = f" on {job.size} processes" if job.size > 1 else ""
    print(
        f"{count} images, {solver_name(model, options)}, "
        f"NFE {nfe:g} a batch of {min(options.num_images, options.batch_size)}, {precision}, "
        f"{seconds:.2f} s{shared} ({(seconds - writing) / count:.4f} s an image without writing), "
        f"peak memory {max(peaks) / 2**30:.2f} GiB -> {out}"
    )
