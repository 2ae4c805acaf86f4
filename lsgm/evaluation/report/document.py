"""The report of a run as ``report.json`` and a ``report.md`` that a person reads, with pictures.

In both, every number comes with what it is, and times are kept apart from what repeats to the
digit.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lsgm.evaluation.likelihood.bounds import Estimate, LikelihoodReport
from lsgm.evaluation.quality.scores import QualityPoint, SampleQualityReport, difference
from lsgm.evaluation.report.details import Details
from lsgm.evaluation.report.figures import Series, bound_plot, decomposition_plot, quality_plot
from lsgm.system.files import atomic_write_json, atomic_write_text, json_text
from lsgm.system.markdown import markdown_table
from lsgm.system.pictures import neighbours_grid, save_grid

__all__ = [
    "as_json",
    "markdown",
    "write_report",
]


def write_report(report: Any, details: Details, out: Path, neighbours: int) -> None:
    """Write ``report.json``, ``report.md`` and the plots of a run's report into the folder ``out``.

    ``report``: :class:`~lsgm.evaluation.report.evaluate.RunReport`; ``neighbours``: rows of the
    grid of nearest images.
    """
    out.mkdir(parents=True, exist_ok=True)
    _plots(details, out, neighbours)
    atomic_write_json(out / "report.json", as_json(report, details))
    atomic_write_text(out / "report.md", markdown(report, details, out))


def as_json(report: Any, details: Details) -> dict[str, Any]:
    """Plain values for JSON: ``numbers`` and ``repeat`` are the same in every run of the command,
    ``timings`` are not.
    """
    bounds = {name: bound.as_dict() for name, bound in report.bounds.items()}
    timings = {f"{name}_seconds": bound.pop("seconds") for name, bound in bounds.items()}
    sampling = dict(report.sampling)
    timings["sampling_seconds_per_image"] = sampling.pop("seconds_per_sample")
    if details.quality:
        timings["quality_seconds"] = details.quality.seconds
    return {
        "run": report.run.name,
        "kind": report.kind,
        "dataset": report.dataset,
        "split": report.split,
        "numbers": {
            "bounds": bounds,
            "decomposition": details.decomposition and details.decomposition.as_dict(),
            "bound_curves": [curve.as_dict() for curve in details.curves],
            "quality": details.quality and details.quality.as_dict(),
            "neighbours": details.neighbours.as_dict(),
            "sampling": sampling,
        },
        "model": details.model,
        "published": details.published
        and details.published.as_dict() | {"caveat": details.published.caveat(details.num_test)},
        "repeat": details.repeat,
        "timings": timings,
    }


def _plots(details: Details, out: Path, neighbours: int) -> None:
    if parts := details.decomposition:
        decomposition_plot(
            [term.name for term in parts.terms],
            [term.nats.mean for term in parts.terms],
            [_error(term.nats) for term in parts.terms],
            out / "decomposition.png",
        )
    if details.curves:
        series = [
            Series(
                curve.name,
                curve.k,
                [nats.mean for nats in curve.nats],
                [_error(nats) for nats in curve.nats],
            )
            for curve in details.curves
        ]
        bound_plot(series, out / "bounds.png")
    if details.quality and details.quality.by_nfe:
        points = _by_nfe(details.quality)
        scores = [point.scores["frechet"] for point in points]
        by_nfe = Series(
            f"{details.quality.samples.num} samples",
            [point.nfe or 0.0 for point in points],
            [score.value for score in scores],
            [score.standard_error for score in scores],
        )
        floor = details.quality.floor
        quality_plot(
            [by_nfe],
            out / "quality.png",
            scores[0].name,
            floor.scores["frechet"].value if floor else None,
        )
    near = details.neighbours
    grid = neighbours_grid(near.samples[:neighbours], near.images[:neighbours])
    save_grid(grid, out / "neighbours.png", scale=3)


def _by_nfe(quality: SampleQualityReport) -> list[QualityPoint]:
    """The samples of every number of evaluations, each number once."""
    points = {point.nfe or 0.0: point for point in (*quality.by_nfe, quality.samples)}
    return [points[nfe] for nfe in sorted(points)]


def markdown(report: Any, details: Details, out: Path) -> str:
    """The report in words; pictures that are in ``out`` are shown."""
    parts = [
        f"# {report.run.name}",
        f"A run of kind `{report.kind}` on the {report.split} images of {report.dataset}. "
        "Likelihoods are nats an image of images without their padding, lower is better; `+-` is "
        "one standard error over images.",
        f"The model: {details.model}.",
        *_likelihood(report.bounds, report.binary),
        *_decomposition(details),
        *_curves(details),
        *(_quality(details.quality) if details.quality else ()),
        *_pictures(report, details, out),
        *_published(details),
        *_repeat(details.repeat),
        *_timings(report, details),
    ]
    return "\n\n".join(parts) + "\n"


def _nats(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def _error(estimate: Estimate) -> float:
    return math.nan if estimate.standard_error is None else estimate.standard_error


def _settings(bound: LikelihoodReport) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in bound.settings.items()
        if value is not None
    )


def _likelihood(bounds: dict[str, LikelihoodReport], binary: bool) -> list[str]:
    if not bounds:
        return ["No bound that was asked for (--metrics) is defined for this run."]
    rows = [
        [bound.bound, _nats(bound.nats), f"{bound.bits_per_dim:.4f}", _nats(bound.reconstruction),
         _nats(bound.kl), str(bound.num_images), bound.estimator, _settings(bound)]
        for bound in bounds.values()
    ]  # fmt: skip
    head = [
        "number", "nats", "bits/dim", "reconstruction", "KL", "images", "estimator", "settings",
    ]  # fmt: skip
    if not binary:
        for line in (head, *rows):
            line[1], line[2] = line[2], line[1]
    return ["## Likelihood", markdown_table(head, rows)]


def _decomposition(details: Details) -> list[str]:
    parts = details.decomposition
    if parts is None:
        return []
    rows = [(term.name, term.prior, _nats(term.nats)) for term in parts.terms]
    text = [
        "## Where the nats are",
        f"NELBO of {parts.num_images} images, {parts.estimator}, seed {parts.seed}. Groups are "
        "counted from the coarsest.",
        markdown_table(
            ("part", "under", "nats"), [*rows, ("**NELBO**", "", f"**{_nats(parts.total)}**")]
        ),
    ]
    if parts.under_normal:
        under = ", ".join(f"{_nats(term.nats)}" for term in parts.under_normal)
        text.append(
            "Under N(0, I) the groups of the coarsest scale would cost, one by one, "
            f"{under} nats; the score-based prior takes them together."
        )
    return [*text, "![parts of the NELBO](decomposition.png)"]


def _curves(details: Details) -> list[str]:
    if not details.curves:
        return []
    first = details.curves[0]
    rows = ((curve.name, *map(_nats, curve.nats)) for curve in details.curves)
    return [
        "## Bound against importance weights",
        f"{first.num_images} images, drawn at random if there are more, seed {first.seed}; a bound "
        "with fewer weights is the mean over groups of the same draws.",
        markdown_table(("bound", *(f"k = {k}" for k in first.k)), rows),
        "![bound against importance weights](bounds.png)",
    ]


def _quality(quality: SampleQualityReport) -> list[str]:
    points = [*_by_nfe(quality), *([quality.floor] if quality.floor else ())]
    rows = [
        (
            f"{score.name}, {score.better} is better",
            *(
                f"{found.value:.4g} +- {found.standard_error:.2g}"
                for found in (point.scores[key] for point in points)
            ),
        )
        for key, score in quality.samples.scores.items()
    ]
    facts = [
        f"* features: {quality.extractor}, {quality.num_features} of them; weights sha256 "
        f"`{quality.weights_sha256[:16]}`",
        f"* preprocessing: {quality.preprocessing}",
        f"* images: {quality.images}",
        f"* {quality.samples.num} samples against {quality.real}; their sha256 "
        f"`{quality.real_sha256[:16]}`",
        "* standard errors: over the draw of the samples (jackknife of ten groups); the real "
        "images and the features are fixed",
        *(f"* **{note}**" for note in quality.notes),
    ]
    text = [
        "## Sample quality",
        "\n".join(facts),
        markdown_table(("score", *(point.label for point in points)), rows),
    ]
    if quality.by_nfe:
        text += [_differences(quality), "![quality against evaluations](quality.png)"]
    return text


def _differences(quality: SampleQualityReport) -> str:
    """Which numbers of evaluations differ by more than their error from the sampler's own."""
    own = quality.samples.scores["frechet"]
    found = []
    for point in quality.by_nfe:
        value, error = difference(point.scores["frechet"], own)
        found.append(f"{point.nfe:g}: {value:+.3g} +- {error:.2g}")
    return (
        f"Frechet distance less that of {quality.samples.label}, by evaluations, with the standard "
        f"error of the paired difference (same noise): {'; '.join(found)}."
    )


def _pictures(report: Any, details: Details, out: Path) -> list[str]:
    text = ["## Pictures"]
    sampling = report.sampling
    words = {
        "samples": f"{sampling['batch_size']} samples: {sampling['solver']}, NFE "
        f"{sampling['nfe']:g}, seed {sampling['seed']}; decoder means, not chosen",
        "reconstructions": "test images drawn at random, each with its reconstruction to the right",
    }
    for name, caption in words.items():
        if (out / f"{name}.png").is_file():
            text.append(f"{caption[0].upper()}{caption[1:]}.\n\n![{name}]({name}.png)")
    near = details.neighbours
    text.append(
        "Samples (left) and their nearest training images, nearest first, by Euclidean distance of "
        f"pixel values. The nearest is at {near.median_distance:.3g} (median of "
        f"{len(near.samples)} samples); of as many test images it is at "
        f"{near.test_median_distance:.3g}. Samples copied from the training set would lie far "
        "below that.\n\n![nearest training images](neighbours.png)"
    )
    if (out / "learning_curve.png").is_file():
        text.append("![NELBO against training time](learning_curve.png)")
    return text


def _published(details: Details) -> list[str]:
    table = details.published
    if table is None:
        return []
    rows = (
        (number.model, f"{'<= ' * number.bound}{number.nats:.2f}", f"arXiv {number.citation}",
         number.source)
        for number in table.numbers
    )  # fmt: skip
    return [
        "## Published numbers",
        table.caveat(details.num_test),
        markdown_table(("model", "nats", "method", "number"), rows),
    ]


def _repeat(repeat: dict[str, Any]) -> list[str]:
    facts = {key: value for key, value in repeat.items() if key != "options"}
    return [
        "## To repeat",
        f"```\n{repeat['command']}\n```",
        "The same command on the same machine gives the same digits. All options are in "
        "`report.json`.",
        f"```json\n{json_text(facts, indent=2)}\n```",
    ]


def _timings(report: Any, details: Details) -> list[str]:
    timings = as_json(report, details)["timings"]
    return [
        "## Times, which do not repeat",
        "\n".join(f"* {name.replace('_', ' ')}: {value:.4g}" for name, value in timings.items()),
    ]
