"""The commands of ``edit``: change images with a trained run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lsgm.commands.subcommands import choose_subcommand
from lsgm.config.checks import require_at_most
from lsgm.config.command_line import parse_command_line
from lsgm.data import build_datasets
from lsgm.data.images import read_image
from lsgm.errors import UserError
from lsgm.models.base import DiffusionModel
from lsgm.models.classifier import ImageClassifier
from lsgm.models.loading import load, load_classifier, require_run
from lsgm.models.release import load_data_config
from lsgm.sampling.codes import (
    Closure,
    Code,
    close_round_trip,
    decode,
    draw_code,
    encode,
    interpolate,
    resample_groups,
)
from lsgm.sampling.editing import class_conditional, colourise, inpaint
from lsgm.sampling.masks import make_mask
from lsgm.sampling.sampler import MAX_COUNT, Sampler, SolverOptions, build_sampler
from lsgm.solvers import Callback, Solver, make_solver
from lsgm.system.device import choose_device
from lsgm.system.files import check_output
from lsgm.system.pictures import image_grid, save_grid
from lsgm.system.progress import progress_bar
from vae.random import RowGenerators

__all__ = [
    "COMMANDS",
    "ClassOptions",
    "EditOptions",
    "InpaintOptions",
    "InterpolateOptions",
    "ResampleOptions",
    "edit",
    "edit_command",
]


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


T = TypeVar("T")


CONDITIONAL_SOLVER = "predictor_corrector"


CONDITIONAL_NFE = 200


DETERMINISTIC_SOLVER = "dopri5"


BATCHED_SOLVER = "heun"
"""Of many images at once: with fixed steps no image waits for the hardest of its batch."""


BATCHED_NFE = 50


# Commands
def _open(options: EditOptions) -> DiffusionModel:
    model = load(require_run(options.run), choose_device(options.device)).diffusion
    if model is None:
        raise UserError(f"--run: {options.run} has no score model; give an LSGM or a score model")
    return model


def _inputs(model: DiffusionModel, options: EditOptions) -> tuple[Tensor, Tensor]:
    """The images to start from: as the model takes them, ``(B, C, R, R)`` in [-1, 1], and in [0, 1]
    without padding. The run's data are read for ``index`` alone.
    """
    spec = model.spec
    if options.files:
        if missing := [name for name in options.files if not Path(name).is_file()]:
            raise UserError(f"--files: {missing[0]}: no such file")
        read = [read_image(Path(f), spec.shape[1:], spec.channels) for f in options.files]
        images = torch.stack(read).float() / 255
    else:
        datasets = build_datasets(load_data_config(require_run(options.run), options.data_root))
        print(datasets.summary(), flush=True)
        test = datasets.test
        if bad := [i for i in options.index if not 0 <= i < len(test)]:
            raise UserError(
                f"--index: {bad[0]}: the test split has the images 0 to {len(test) - 1}"
            )
        images = test.batch(torch.tensor(options.index))
    x = model.preprocess(images, torch.Generator().manual_seed(options.seed))
    return x, model.unpad((x.cpu() + 1) / 2)


def _conditional_sampler(model: DiffusionModel, options: EditOptions) -> Sampler:
    """Unless named, a sampler that draws noise, which inpainting needs: the model's own if it is
    one, else predictor and corrector.
    """
    own = model.defaults
    draws_noise = make_solver(own.solver, **own.options_of(own.solver)).stochastic
    if options.solver is None and not draws_noise:
        steps: dict[str, Any] = {"corrector_steps": options.corrector_steps or 3}
        nfe = options.nfe or CONDITIONAL_NFE
        options = replace(options, solver=CONDITIONAL_SOLVER, nfe=nfe, **steps)
    return build_sampler(model, options)


def _flow(model: DiffusionModel, options: EditOptions) -> tuple[Solver, Tensor]:
    """A deterministic solver and its times."""
    # A flow is run both ways: its last time is where an image is encoded.
    closing: dict[str, Any] = {"denoise": bool(options.denoise)}
    chosen = replace(options, solver=options.solver or DETERMINISTIC_SOLVER, **closing)
    sampler = build_sampler(model, chosen)
    solver, times = sampler.method, sampler.times_for(model.sde)
    if solver.stochastic:
        raise UserError(f"--solver: {options.solver} draws noise; the flow needs one that does not")
    return solver, times


def _in_batches(
    name: str,
    count: int,
    solver: Solver,
    times: Tensor,
    options: EditOptions,
    work: Callable[[Tensor, Callback], T],
    ways: int = 1,
) -> list[T]:
    """``work`` on the indices of each batch of ``count`` images, whose solver goes through
    ``times`` ``ways`` times and reports its steps.
    """
    parts = torch.arange(count).split(options.batch_size)
    fixed = solver.evaluations(1) is not None
    total = ways * len(parts) * (len(times) - 1) if fixed else None
    print(f"{name} {count} images, {len(parts[0])} at a time", flush=True)
    with progress_bar(total=total, desc=name, unit="step") as bar:
        return [work(part, lambda _: bar.update()) for part in parts]


def _write_rows(rows: Sequence[Sequence[Tensor]], options: EditOptions) -> None:
    """Write a grid of ``rows`` of images ``(C, H, W)``, all of the same length."""
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    images = torch.stack([image.cpu() for row in rows for image in row])
    save_grid(image_grid(images, columns=len(rows[0])), out)
    print(f"{len(rows)} x {len(rows[0])} images -> {out}")


def _write_samples(
    leading: Sequence[Tensor],
    x: Tensor,
    draw: Callable[[Tensor, RowGenerators], Tensor],
    options: EditOptions,
) -> None:
    """Rows of the ``leading`` images ``(B, C, H, W)`` and ``samples`` results for each of ``x``."""
    columns = list(leading)
    with progress_bar(total=options.samples * len(x), unit="img") as bar:
        for k in range(options.samples):
            parts = []
            for index in torch.arange(len(x)).split(options.batch_size):
                rng = RowGenerators.of(options.seed, (k * len(x) + index).tolist())
                parts.append(draw(x[index.to(x.device)], rng).cpu())
                bar.update(len(index))
            columns.append(torch.cat(parts))
    _write_rows(list(zip(*columns, strict=True)), options)


def _inpaint(options: InpaintOptions) -> None:
    model = _open(options)
    x, shown = _inputs(model, options)
    known = make_mask(options.mask, shown.shape[-2], shown.shape[-1], options.seed)
    sampler = _conditional_sampler(model, options)

    def draw(part: Tensor, rng: RowGenerators) -> Tensor:
        return inpaint(model, part, known, sampler, rng)

    _write_samples([shown, torch.where(known, shown, 0.5)], x, draw, options)


def _colourise(options: EditOptions) -> None:
    model = _open(options)
    if model.has_latents or model.state_shape[0] != 3:
        raise UserError("--run: colourising needs a model of colour images in data space")
    x, shown = _inputs(model, options)
    sampler = _conditional_sampler(model, options)
    grey = shown.mean(1, keepdim=True).expand_as(shown)

    def draw(part: Tensor, rng: RowGenerators) -> Tensor:
        return colourise(model, part, sampler, rng)

    _write_samples([shown, grey], x, draw, options)


def _classifier(path: str | None, option: str, model: DiffusionModel) -> ImageClassifier | None:
    """The classifier of a run, or None without one."""
    try:
        return None if path is None else load_classifier(path, model.device)
    except UserError as error:
        raise UserError(f"--{option}: {error}") from error


def _class_conditional(options: ClassOptions) -> None:
    model = _open(options)
    if model.has_latents and options.classifier is not None:
        raise UserError("--classifier: it guides a model of images, and this one has latents")
    if model.num_classes is None and options.classifier is None:
        raise UserError(
            f"--run: {options.run} was trained without classes (class_conditional); give another, "
            "or of a model of images a --classifier that guides it"
        )
    classifier = _classifier(options.classifier, "classifier", model)
    judge = _classifier(options.judge, "judge", model)
    sampler = build_sampler(model, options)
    labels = torch.tensor(options.labels, device=model.device)
    right = []

    def draw(part: Tensor, rng: RowGenerators) -> Tensor:
        images = class_conditional(model, part, options.guidance, sampler, rng, classifier)
        if judge is not None:
            with torch.no_grad():
                right.append(judge(images.to(judge.device)).argmax(1) == part)
        return images

    _write_samples([], labels, draw, options)
    if judge is not None:
        share = torch.cat(right).double().mean().item()
        count = len(labels) * options.samples
        error = math.sqrt(share * (1 - share) / count)
        print(f"taken for their class: {share:.1%} +- {error:.1%} of {count} ({options.judge})")


def _interpolate(options: InterpolateOptions) -> None:
    model = _open(options)
    if options.solver is None:
        options = replace(options, solver=BATCHED_SOLVER, nfe=options.nfe or BATCHED_NFE)
    solver, times = _flow(model, options)
    if options.between == "images":
        x, _ = _inputs(model, options)
        if len(x) < 2:
            raise UserError("--index: interpolation needs at least two images")

        def coded(part: Tensor, callback: Callback) -> Code:
            return encode(model, x[part], solver, times, callback=callback)

        ends = Code.cat(_in_batches("encoding", len(x), solver, times, options, coded))
    else:
        rng = RowGenerators.of(options.seed, range(options.samples + 1))
        ends = draw_code(model, options.samples + 1, rng, options.temperature)
    paths = interpolate(ends.rows(slice(-1)), ends.rows(slice(1, None)), options.steps)
    path = Code.cat(paths)

    def decoded(part: Tensor, callback: Callback) -> Tensor:
        return decode(model, path.rows(part), solver, times, callback=callback).cpu()

    images = torch.cat(_in_batches("decoding", len(path), solver, times, options, decoded))
    columns = images.split(len(ends) - 1)
    _write_rows(list(zip(*columns, strict=True)), options)


def _reconstruct(options: EditOptions) -> None:
    """Columns: image, decoded posterior mean, and the same after the way through the flow."""
    model = _open(options)
    solver, times = _flow(model, options)
    x, shown = _inputs(model, options)

    @torch.no_grad()
    def there_and_back(part: Tensor, callback: Callback) -> tuple[Tensor, Closure]:
        closure = close_round_trip(model, x[part], solver, times, callback)
        states = (closure.state, closure.back)
        images = [model.decode([state, *closure.finer]) for state in states]
        return torch.stack(images, dim=1).cpu(), closure

    found = _in_batches("reconstructing", len(x), solver, times, options, there_and_back, 2)
    direct, back = torch.cat([images for images, _ in found]).unbind(1)
    state, returned = (
        torch.cat([getattr(closure, name) for _, closure in found]) for name in ("state", "back")
    )
    flow, total = ((back - other).abs().mean().item() for other in (direct, shown))
    off, size = ((v.double().square().mean().sqrt().item()) for v in (returned - state, state))
    print(f"closure of the flow: {off:.2e} of {size:.2e} in the state (root mean square)")
    print(f"mean absolute error of a pixel: {flow:.2e} by the flow, {total:.2e} in all")
    _write_rows(list(zip(shown, direct, back, strict=True)), options)


def _resample(options: ResampleOptions) -> None:
    model = _open(options)
    if not model.state_groups:
        raise UserError("--run: a model of images has no latent groups; give an LSGM")
    x, shown = _inputs(model, options)
    sampler = _conditional_sampler(model, options)

    @torch.no_grad()
    def draw(part: Tensor, rng: RowGenerators) -> Tensor:
        state, *finer = model.encode(part, mean=True)
        try:
            state, finer = resample_groups(model, state, finer, options.keep, sampler, rng)
        except ValueError as error:
            raise UserError(f"--keep: {error}") from error
        return model.decode([state, *finer])

    with torch.no_grad():
        direct = model.decode(model.encode(x, mean=True)).cpu()
    _write_samples([shown, direct], x, draw, options)


COMMANDS: dict[str, tuple[type[EditOptions], Callable[[Any], None]]] = {
    "inpaint": (InpaintOptions, _inpaint),
    "colourise": (EditOptions, _colourise),
    "class-conditional": (ClassOptions, _class_conditional),
    "interpolate": (InterpolateOptions, _interpolate),
    "reconstruct": (EditOptions, _reconstruct),
    "resample": (ResampleOptions, _resample),
}
"""Options and action of each command."""

SHOWN = tuple(
    "run index files samples out mask labels guidance classifier judge steps between keep solver "
    "nfe t_end denoise temperature batch_size seed data_root device".split()
)
"""The options that ``--help`` shows."""


def edit(argv: Sequence[str], prog: str) -> None:
    """Change images with a trained run: fill in pixels, colour grey images, draw given classes, go
    from one image to another, encode and decode, or draw some latent groups anew. Each writes a PNG
    grid.
    """
    chosen = choose_subcommand(COMMANDS, argv, prog, edit.__doc__)
    if chosen is not None:
        edit_command(*chosen, prog)


def edit_command(name: str, argv: Sequence[str], prog: str = "edit.py") -> None:
    """Run a command.

    Raises:
        UserError: There is none of this name, or its options do not fit.
    """
    if name not in COMMANDS:
        raise UserError(f"{name}: no such edit; known are {', '.join(COMMANDS)}")
    options, action = COMMANDS[name]
    line = parse_command_line(options, argv, extra=(), prog=f"{prog} {name}", shown=SHOWN)
    chosen = line.config
    check_output(chosen.out, "--out")
    action(chosen)
