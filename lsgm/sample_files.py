"""Samples of a run as files: a PNG grid, single PNGs or an NPZ (``scripts/sample.py``)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lsgm.errors import UserError
from lsgm.evaluation.figures import image_grid, save_grid
from lsgm.files import atomic_write, check_output
from lsgm.models import VAEModel, load
from lsgm.npz import ArrayStream, write_npz
from lsgm.options import SampleOptions, require_run
from lsgm.progress import progress_bar
from lsgm.protocols import has_diffusion
from lsgm.sampling import Batch, iterate_samples, solver_name
from lsgm.solver_choice import given_solver_options
from lsgm.solvers import Progress
from lsgm.training.checkpoint_model import load_checkpoint
from lsgm.training.precision import choose_device

__all__ = ["sample_to_file"]


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
    if options.latents and not isinstance(model, VAEModel):
        raise UserError("--latents: this run is a model of images and has no latents")
    if not has_diffusion(model) and (idle := given_solver_options(options)):
        raise UserError(f"--{idle[0]}: {run} is a VAE under N(0, I), which no solver samples")
    out = Path(options.out)
    start = time.perf_counter()
    evaluations: list[int] = []
    bar = progress_bar(total=options.num_written, unit="img")

    def show(progress: Progress) -> None:
        bar.set_postfix(t=f"{progress.t:.3g}", nfe=progress.nfe)

    with bar, _output(out, options) as write:
        for batch in iterate_samples(model, options.n, options, set(options.index), show):
            evaluations.append(batch.nfe)
            write(batch)
            bar.update(len(batch.images))
    seconds, count = time.perf_counter() - start, options.num_written
    nfe = sum(evaluations) / len(evaluations)
    print(
        f"{count} images, {solver_name(model, options)}, "
        f"NFE {nfe:g} a batch of {min(options.n, options.batch_size)}, "
        f"{seconds:.2f} s ({seconds / count:.4f} s an image) -> {out}"
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
    save_grid(image_grid(torch.cat(images)), out)


@contextlib.contextmanager
def _folder_output(out: Path, options: SampleOptions) -> Iterator[Callable[[Batch], None]]:
    """One PNG an image, named by its index, pixel for pixel."""

    def path(index: int) -> Path:
        return out / f"{index:06d}.png"

    if taken := [path(k) for k in options.index or range(options.n) if path(k).exists()]:
        raise UserError(f"--out: {taken[0]} exists already; choose another folder")

    def write(batch: Batch) -> None:
        for index, image in zip(batch.index, batch.images, strict=True):
            with atomic_write(path(index)) as file:
                pixels = _to_bytes(image).movedim(0, -1).squeeze(-1).numpy()
                Image.fromarray(pixels).save(file, format="png")

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
