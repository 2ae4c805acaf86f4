"""The report of a run: a table, its JSON, and the pictures that go with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsgm.config.training import DataConfig
from lsgm.data import Datasets, build_datasets
from lsgm.data.batches import SUBSET_SEED
from lsgm.errors import UserError
from lsgm.evaluation.likelihood.bounds import (
    Estimate,
    LikelihoodReport,
    evaluation_batches,
    nelbo,
    normal_nelbo,
    ode_nelbo,
    with_generators,
)
from lsgm.evaluation.likelihood.images import data_ode_bound
from lsgm.evaluation.likelihood.importance import exact_iw_bound, iw
from lsgm.evaluation.report.details import Details, examine
from lsgm.evaluation.report.document import write_report
from lsgm.evaluation.report.options import EvaluateOptions
from lsgm.models.base import Model
from lsgm.models.latent import VAEModel
from lsgm.models.loading import load, require_run
from lsgm.models.release import load_data_config, read_description
from lsgm.sampling.draw import draw_samples
from lsgm.sampling.sampler import given_solver_options
from lsgm.system.curves import learning_curves, read_metrics
from lsgm.system.device import choose_device
from lsgm.system.files import atomic_write_json, check_output, sweep
from lsgm.system.markdown import markdown_table
from lsgm.system.pictures import image_grid, reconstruction_grid, save_grid
from lsgm.system.progress import progress_bar

__all__ = [
    "METRICS",
    "RunReport",
    "applies",
    "evaluate",
    "evaluate_run",
    "format_table",
    "write_pictures",
]

Metric = Callable[..., LikelihoodReport]


METRICS: dict[str, Metric] = {
    "nelbo": nelbo,
    "normal": normal_nelbo,
    "iw": iw,
    "ode": ode_nelbo,
    "iw_exact": exact_iw_bound,
    "bits": data_ode_bound,
}
"""Likelihood bounds by name; a new one is one function over (model, batches) and its line here."""


DATA_METRICS: tuple[str, ...] = ("bits",)
"""Those of :data:`METRICS` that are defined for models of the images themselves."""


@dataclass(frozen=True)
class RunReport:
    """What an evaluation of one run found.

    ``bounds``: by metric; ``binary``: of binary data, whose bounds are given in nats first, and in
    bits/dim first of others; ``sampling``: solver, evaluations per batch and seconds per image;
    ``details``: what the written report adds, where it was asked for.
    """

    run: Path
    kind: str
    dataset: str
    split: str
    bounds: dict[str, LikelihoodReport]
    sampling: dict[str, Any]
    binary: bool = True
    details: Details | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "run": str(self.run),
            "kind": self.kind,
            "dataset": self.dataset,
            "split": self.split,
            **{name: bound.as_dict() for name, bound in self.bounds.items()},
            "sampling": self.sampling,
        }


def evaluate_run(folder: Path, options: EvaluateOptions, out: Path | None = None) -> RunReport:
    """Evaluate the run in ``folder``: the bounds that apply to it, the cost of sampling, and the
    report in ``out`` (default ``folder/evaluation``) unless ``options`` want none.

    Raises:
        UserError: The run cannot be opened, a metric does not exist, or the report cannot be
            written.
    """
    model = load(folder, choose_device(options.device))
    data = load_data_config(folder, root=options.data_root)
    datasets = build_datasets(data)
    print(datasets.summary(), file=sys.stderr, flush=True)  # standard output is the table
    bounds = {
        name: _run_metric(name, model, datasets, data, options, folder.name)
        for name in options.metrics
        if applies(name, model)
    }
    start = time.perf_counter()
    drawn = draw_samples(model, options.sampling.batch_size, options.sampling)
    sampling = {
        "solver": drawn.solver,
        "nfe": drawn.nfe,
        "batch_size": len(drawn.images),
        "seed": options.sampling.seed,
        "seconds_per_sample": (time.perf_counter() - start) / len(drawn.images),
    }
    spec = model.spec
    report = RunReport(folder, model.kind, spec.name, options.split, bounds, sampling, spec.binary)
    if options.pictures:
        write_pictures(
            folder, Path(options.pictures) / folder.name, model, datasets, drawn.images, options
        )
    if options.report:
        out = out or folder / "evaluation"
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{out}: cannot make the folder of the report ({error.strerror}); choose another "
                "--out, or --report False"
            ) from None
        details = examine(model, folder, data, datasets, drawn.images, options)
        write_pictures(folder, out, model, datasets, drawn.images, options)
        write_report(report, details, out, options.neighbours)
        report = replace(report, details=details)
    return report


def applies(name: str, model: Model) -> bool:
    """Whether a metric is defined for a model: ``normal``, ``ode`` and ``iw_exact`` need a
    score-based prior on latents, ``nelbo`` and ``iw`` latents, and those of :data:`DATA_METRICS` a
    model of the images themselves.
    """
    if name in DATA_METRICS or not model.has_latents:
        return name in DATA_METRICS and not model.has_latents
    return name in ("nelbo", "iw") or model.diffusion is not None


def _run_metric(
    name: str,
    model: Model,
    datasets: Datasets,
    data: DataConfig,
    options: EvaluateOptions,
    label: str,
) -> LikelihoodReport:
    dataset = datasets.test if options.split == "test" else datasets.train
    batches = evaluation_batches(
        dataset,
        model.spec,
        num_bits=model.num_bits,
        batch_size=options.batch_size,
        limit=options.limit,
        binarisation_seed=data.eval_binarisation_seed,
        device=model.device,
    )
    settings: dict[str, dict[str, Any]] = {
        "nelbo": {"samples": options.samples},
        "normal": {"samples": options.samples},
        "iw": {"k": options.k, "steps": options.iw_steps},
        "ode": {"tolerance": options.tolerance},
        "iw_exact": {"k": options.k, "tolerance": options.tolerance},
        "bits": {"tolerance": options.tolerance},
    }
    total = len(batches.index)
    with progress_bar(total=total, desc=f"{label} {name}", unit="img", leave=False) as bar:
        return METRICS[name](
            model,
            batches,
            seed=options.seed,
            callback=bar.update,
            **settings[name],
            batch_size=options.batch_size,
            binarisation_seed=data.eval_binarisation_seed if model.spec.binary else None,
            subset_seed=SUBSET_SEED if total < len(dataset) else None,
        )


def write_pictures(
    folder: Path,
    out: Path,
    model: Model,
    datasets: Datasets,
    samples: Tensor,
    options: EvaluateOptions,
) -> None:
    """Sample grid, reconstruction grid (of a model with latents) and learning curve of a run, as
    PNG files in ``out``.
    """
    out.mkdir(parents=True, exist_ok=True)
    save_grid(image_grid(samples), out / "samples.png")
    if model.has_latents:
        shown = evaluation_batches(
            datasets.test,
            model.spec,
            num_bits=model.num_bits,
            batch_size=50,
            limit=50,
            device=model.device,
        )
        x, rng = next(with_generators(shown, options.seed))
        with torch.no_grad():
            reconstructed = model.reconstruct(x, rng)
        grid = reconstruction_grid(model.unpad((x + 1) / 2), reconstructed)
        save_grid(grid, out / "reconstructions.png")
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        lines = read_metrics(metrics)
        if any(line.get("nelbo") is not None for line in lines):
            dims = None if model.spec.binary else model.spec.num_dims
            learning_curves({folder.name: lines}, out / "learning_curve.png", num_dims=dims)


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate the runs of ``options``, print the table, and write the report of each and the JSON
    and pictures that it asks for.
    """
    if not options.run:
        require_run(None)
    folders = [Path(run) for run in options.run]
    _check_options(folders, options)
    _check_outputs(folders, options)
    reports = [evaluate_run(folder, options, _report_folder(folder, options)) for folder in folders]
    print(format_table(reports))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(Path(options.json), [report.as_dict() for report in reports])
    if options.pictures:
        curves = {
            f.name: read_metrics(f / "metrics.jsonl")
            for f in folders
            if (f / "metrics.jsonl").is_file()
        }
        learning_curves(curves, Path(options.pictures) / "learning_curves.png")


def _check_options(folders: Sequence[Path], options: EvaluateOptions) -> None:
    """Find out before the work whether its options mean something for the runs."""
    if unknown := [name for name in options.metrics if name not in METRICS]:
        raise UserError(f"--metrics: unknown metric {unknown[0]}; known are {', '.join(METRICS)}")
    kinds = {read_description(folder).get("kind") for folder in folders}
    if kinds == {VAEModel.kind} and (idle := given_solver_options(options.sampling)):
        raise UserError(f"--sampling.{idle[0]}: a VAE under N(0, I) is sampled without a solver")


def _check_outputs(folders: Sequence[Path], options: EvaluateOptions) -> None:
    """Find out before the work whether its results can be written."""
    if options.json:
        check_output(options.json, "--json")
    for folder in folders:
        if options.pictures:
            check_output(Path(options.pictures) / folder.name / "samples.png", "--pictures")
        if options.report:
            out = _report_folder(folder, options) or folder / "evaluation"
            check_output(out / "report.json", "--out")
            sweep(out)


def _report_folder(folder: Path, options: EvaluateOptions) -> Path | None:
    if options.out is None:
        return None
    return Path(options.out) / folder.name if len(options.run) > 1 else Path(options.out)


COLUMNS = (
    "run",
    "bound",
    "images",
    "nats",
    "bits/dim",
    "against first",
    "reconstruction",
    "KL",
    "NFE",
    "ms/sample",
)


def format_table(reports: Sequence[RunReport]) -> str:
    """One line per run and bound, as Markdown.

    ``against first``: the difference to the first run's number of the same metric (or its first
    bound), image by image, with the standard error of the paired difference.
    """
    rows = []
    for report in reports:
        for name, bound in report.bounds.items():
            first = reports[0].bounds.get(name) or next(iter(reports[0].bounds.values()))
            row = [
                report.run.name,
                bound.bound,
                str(bound.num_images),
                str(bound.nats),
                f"{bound.bits_per_dim:.4f}",
                _difference(bound, first),
                f"{bound.reconstruction.mean:.2f}" if bound.reconstruction else "-",
                f"{bound.kl.mean:.2f}" if bound.kl else "-",
                f"{report.sampling['nfe']:g}",
                f"{1000 * report.sampling['seconds_per_sample']:.2f}",
            ]
            rows.append(row)
    columns = list(COLUMNS)
    if not any(report.binary for report in reports):
        for line in (columns, *rows):
            line[3], line[4] = line[4], line[3]
    return markdown_table(columns, rows)


def _difference(bound: LikelihoodReport, first: LikelihoodReport) -> str:
    if bound is first or len(bound.per_image) != len(first.per_image):
        return "-"
    return str(Estimate.of(bound.per_image - first.per_image))
