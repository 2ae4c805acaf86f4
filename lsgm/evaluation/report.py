"""The report of a run: a table, its JSON, and the pictures that go with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lsgm.config import DataConfig
from lsgm.data import Datasets, build_datasets
from lsgm.errors import UserError
from lsgm.evaluation.figures import (
    image_grid,
    learning_curves,
    read_metrics,
    reconstruction_grid,
    save_grid,
)
from lsgm.evaluation.importance import exact_iw_bound, iw
from lsgm.evaluation.nll import (
    Estimate,
    LikelihoodReport,
    evaluation_batches,
    nelbo,
    normal_nelbo,
    ode_nelbo,
)
from lsgm.files import atomic_write_json
from lsgm.models import LSGM, VAEModel, load, load_data_config
from lsgm.options import EvaluateOptions, require_run
from lsgm.sampling import draw_samples
from lsgm.training.precision import choose_device

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
}
"""Likelihood bounds by name; a new one is one function over (model, batches) and its line here."""


@dataclass(frozen=True)
class RunReport:
    """What an evaluation of one run found.

    ``bounds``: by metric; ``sampling``: solver, evaluations per batch and seconds per image.
    """

    run: Path
    kind: str
    dataset: str
    split: str
    bounds: dict[str, LikelihoodReport]
    sampling: dict[str, Any]

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


def evaluate_run(folder: Path, options: EvaluateOptions) -> RunReport:
    """Evaluate the run in ``folder``: the bounds that apply to it, and the cost of sampling.

    Raises:
        UserError: The run cannot be opened, or a metric does not apply to it.
    """
    model = load(folder, choose_device(options.device))
    data = load_data_config(folder, root=options.data_root)
    datasets = build_datasets(data)
    bounds = {
        name: _run_metric(name, model, datasets, data, options, folder.name)
        for name in options.metrics
        if applies(name, model)
    }
    start = time.perf_counter()
    drawn = draw_samples(model, options.sampling.batch_size, options.sampling)
    sampling = {
        "solver": options.sampling.solver if isinstance(model, LSGM) else "decoder only",
        "nfe": drawn.nfe,
        "batch_size": len(drawn.images),
        "seconds_per_sample": (time.perf_counter() - start) / len(drawn.images),
    }
    if options.pictures:
        write_pictures(
            folder, Path(options.pictures) / folder.name, model, datasets, drawn.images, options
        )
    return RunReport(folder, model.kind, model.spec.name, options.split, bounds, sampling)


def applies(name: str, model: VAEModel) -> bool:
    """Whether a metric is defined for a model: ``normal``, ``ode`` and ``iw_exact`` need a
    score-based prior.

    Raises:
        UserError: There is no metric of this name.
    """
    if name not in METRICS:
        raise UserError(f"--metrics: unknown metric {name}; known are {', '.join(METRICS)}")
    return name in ("nelbo", "iw") or isinstance(model, LSGM)


def _run_metric(
    name: str,
    model: VAEModel,
    datasets: Datasets,
    data: DataConfig,
    options: EvaluateOptions,
    label: str,
) -> LikelihoodReport:
    dataset = datasets.test if options.split == "test" else datasets.train
    total = len(dataset) if options.limit is None else min(options.limit, len(dataset))
    batches = evaluation_batches(
        dataset,
        model.spec,
        num_bits=model.vae_config.num_x_bits,
        batch_size=options.batch_size,
        limit=options.limit,
        binarisation_seed=data.eval_binarisation_seed,
        device=model.device,
    )
    settings: dict[str, Any] = {
        "nelbo": {"samples": options.samples},
        "normal": {"samples": options.samples},
        "iw": {"k": options.k},
        "ode": {"tolerance": options.tolerance},
        "iw_exact": {"k": options.k, "tolerance": options.tolerance},
    }[name]
    with tqdm(total=total, desc=f"{label} {name}", unit="img", leave=False, disable=None) as bar:
        return METRICS[name](
            model,
            batches,
            seed=options.seed,
            callback=bar.update,
            **settings,
            batch_size=options.batch_size,
            binarisation_seed=data.eval_binarisation_seed if model.spec.binary else None,
        )


def write_pictures(
    folder: Path,
    out: Path,
    model: VAEModel,
    datasets: Datasets,
    samples: Tensor,
    options: EvaluateOptions,
) -> None:
    """Sample grid, reconstruction grid and learning curve of a run, as PNG files in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    save_grid(image_grid(samples), out / "samples.png")
    x = next(
        evaluation_batches(
            datasets.test, model.spec, num_bits=model.vae_config.num_x_bits, batch_size=50
        )
    )
    with torch.no_grad():
        reconstructed = model.reconstruct(
            x.to(model.device), torch.Generator().manual_seed(options.seed)
        )
    save_grid(reconstruction_grid(model.to_images(x), reconstructed), out / "reconstructions.png")
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        learning_curves({folder.name: read_metrics(metrics)}, out / "learning_curve.png")


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate the runs of ``options``, print the table and write the JSON and the pictures it asks
    for.
    """
    if not options.run:
        require_run(None)
    folders = [Path(run) for run in options.run]
    reports = [evaluate_run(folder, options) for folder in folders]
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


COLUMNS = (
    "run",
    "bound",
    "images",
    "nats",
    "against first",
    "bits/dim",
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
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for report in reports:
        for name, bound in report.bounds.items():
            first = reports[0].bounds.get(name) or next(iter(reports[0].bounds.values()))
            cells = [
                report.run.name,
                bound.bound,
                str(bound.num_images),
                _format(bound.nats),
                _difference(bound, first),
                f"{bound.bits_per_dim:.4f}",
                f"{bound.reconstruction.mean:.2f}" if bound.reconstruction else "-",
                f"{bound.kl.mean:.2f}" if bound.kl else "-",
                f"{report.sampling['nfe']:g}",
                f"{1000 * report.sampling['seconds_per_sample']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _format(estimate: Estimate) -> str:
    error = "?" if estimate.standard_error is None else f"{estimate.standard_error:.2f}"
    return f"{estimate.mean:.2f} +- {error}"


def _difference(bound: LikelihoodReport, first: LikelihoodReport) -> str:
    if bound is first or len(bound.per_image) != len(first.per_image):
        return "-"
    return _format(Estimate.of(bound.per_image - first.per_image))
