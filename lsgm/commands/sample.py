"""The command ``sample``: draw images from a trained run into a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from lsgm.config.command_line import parse_command_line
from lsgm.errors import UserError
from lsgm.models.loading import load, require_run
from lsgm.models.results import Batch
from lsgm.sampling.draw import iterate_samples, solver_name
from lsgm.sampling.sampler import MAX_COUNT, SolverOptions, given_solver_options
from lsgm.solvers import Progress
from lsgm.system.device import choose_device
from lsgm.system.files import atomic_write, check_output
from lsgm.system.memory import process_peak
from lsgm.system.npz import ArrayStream, write_npz
from lsgm.system.pictures import image_grid, save_grid
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
    `images` (N, C, H, W) in [0, 1].
    """
    line = parse_command_line(
        SampleOptions, argv, extra=(), prog=prog, description=sample.__doc__, shown=SHOWN
    )
    sample_to_file(line.config)


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
    """auto, cpu, cuda, ..."""
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
    def num_written(self) -> int:
        """Number of images to write."""
        return len(set(self.index)) or self.n


def sample_to_file(options: SampleOptions) -> None:
    """Draw images from a run and write them; print the number of evaluations and the time.

    Raises:
        UserError: The run or its checkpoint cannot be opened, an option does not apply to it, or
            the output cannot be written: all known before anything is drawn.
        NonFiniteError: Samples are not finite; nothing is written.
    """
    run, device = require_run(options.run), choose_device(options.device)
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
    evaluations: list[int] = []
    bar = progress_bar(total=options.num_written, unit="img")

    def show(progress: Progress) -> None:
        bar.set_postfix(t=f"{progress.t:.3g}", nfe=progress.nfe)

    with bar, _output(out, options) as write, autocast(device, precision):
        batches = iterate_samples(model, options.num_images, options, set(options.index), show)
        for batch in batches:
            evaluations.append(batch.nfe)
            drawn = time.perf_counter()
            write(batch)
            writing += time.perf_counter() - drawn
            bar.update(len(batch.images))
    seconds, count = time.perf_counter() - start, options.num_written
    nfe = sum(evaluations) / len(evaluations)
    print(
        f"{count} images, {solver_name(model, options)}, "
        f"NFE {nfe:g} a batch of {min(options.num_images, options.batch_size)}, {precision}, "
        f"{seconds:.2f} s ({(seconds - writing) / count:.4f} s an image without writing), "
        f"peak memory {process_peak(device) / 2**30:.2f} GiB -> {out}"
    )


@contextlib.contextmanager
def _output(out: Path, options: SampleOptions) -> Iterator[Callable[[Batch], None]]:
    """What takes the batches, opened on entering; a single file is complete only on leaving."""
    check_output(out if out.suffix else out / "000000.png", "--out")
    writer = {".npz": _npz_output, ".png": _grid_output, "": _folder_output}[out.suffix]
    with writer(out, options) as write:
        yield write


@contextlib.contextmanager
def _grid_output(out: Path, options: SampleOptions) -> Iterator[Callable[[Batch], None]]:
    images: list[Tensor] = []
    yield lambda batch: images.append(batch.images)
    found = torch.cat(images)
    if len(found) == 1:
        _save_image(found[0], out)
    else:
        save_grid(image_grid(found), out)


def _save_image(image: Tensor, path: Path) -> None:
    """Write an image ``(C, H, W)`` in [0, 1] as PNG, pixel for pixel."""
    with atomic_write(path) as file:
        pixels = _to_bytes(image).movedim(0, -1).squeeze(-1).numpy()
        Image.fromarray(pixels).save(file, format="png")


@contextlib.contextmanager
def _folder_output(out: Path, options: SampleOptions) -> Iterator[Callable[[Batch], None]]:
    """One PNG an image, named by its index, pixel for pixel."""

    def path(index: int) -> Path:
        return out / f"{index:06d}.png"

    numbers = options.index or range(options.n)
    if taken := [path(k) for k in numbers if path(k).exists()]:
        raise UserError(f"--out: {taken[0]} exists already; choose another folder")

    def write(batch: Batch) -> None:
        for index, image in zip(batch.index, batch.images, strict=True):
            _save_image(image, path(index))

    yield write


@contextlib.contextmanager
def _npz_output(out: Path, options: SampleOptions) -> Iterator[Callable[[Batch], None]]:
    """Arrays of images, and of latents if asked for, that grow with the batches."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(atomic_write(out))
        streams: dict[str, ArrayStream] = {}

        def write(batch: Batch) -> None:
            if not streams:  # the first batch says how many latents there are
                latents = len(batch.latents) * options.latents
                names = ["images", *(f"latents_{i}" for i in range(latents))]
                streams.update(stack.enter_context(write_npz(file, names, out.parent)))
            _append(streams, batch, options.dtype)

        yield write


def _to_bytes(images: Tensor) -> Tensor:
    """Grey levels, uint8, of images in [0, 1]."""
    return images.mul(255).round().to(torch.uint8)


def _append(streams: dict[str, ArrayStream], batch: Batch, dtype: str) -> None:
    images = batch.images
    converted = _to_bytes(images) if dtype == "uint8" else images.to(getattr(torch, dtype))
    for stream, value in zip(streams.values(), (converted, *batch.latents), strict=False):
        stream.append(value.numpy())
