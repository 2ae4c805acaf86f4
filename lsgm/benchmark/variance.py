"""The study of gradient variance: every weighting and proposal, of a run or on a made-up latent.

The table that arXiv 2106.05931, Sec. 3.3 argues for, for both sides of a training step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lsgm.benchmark.gradients import SIDES, STUDIED_TIMES, Latents, NoiseRow, study
from lsgm.config.command_line import parse_command_line
from lsgm.data import build_datasets
from lsgm.errors import UserError
from lsgm.evaluation.likelihood.bounds import evaluation_batches
from lsgm.models.latent import LSGM, build_prior
from lsgm.models.loading import load
from lsgm.models.release import load_data_config, read_description
from lsgm.score import MixedNormalScore
from lsgm.sde import SDES, LinearSDE, largest_squared_distance, make_sde
from lsgm.system.device import choose_device
from lsgm.system.files import atomic_write, atomic_write_json, check_output
from lsgm.system.markdown import markdown_table
from lsgm.system.progress import progress_bar
from lsgm.tensors import expand_like
from lsgm.weighting import WEIGHTINGS

__all__ = [
    "MixtureNetwork",
    "VarianceOptions",
    "draw_figure",
    "format_tables",
    "run_study",
    "synthetic_study",
    "variance_command",
]

SYNTHETIC_SHAPE = (4, 2, 2)
COMPONENTS = {"gaussian": 1, "mixture": 8}


@dataclass(frozen=True)
class VarianceOptions:
    """Variance of the gradients of a training step's two sides, for every weighting and proposal.

    Fixed images and posterior draws, many draws of noise and times. Without a run, on latents from
    a Gaussian mixture.
    """

    run: str | None = None
    """Folder of a trained LSGM. None: the made-up latents."""
    images: int = 32
    """Images, the same in every draw: the batch that a gradient is the mean over."""
    repeats: int = 40
    """Draws of noise and times for each estimator."""
    sdes: tuple[str, ...] = ()
    """SDEs to add, at the start of training (a mixed-Normal score is valid for any); all: every
    one. Without a run: those to study, default all."""
    start: bool = False
    """Study the run's own SDE at the start of training too."""
    weightings: tuple[str, ...] = tuple(WEIGHTINGS)
    """Weightings of the prior's loss."""
    latents: Literal["mixture", "gaussian"] = "mixture"
    """Without a run: what the made-up latents come from."""
    encoder: bool = True
    """Study the gradient with respect to the encoder's parameters as well (slower)."""
    split: Literal["train", "test"] = "train"
    """Images of the run."""
    seed: int = 0
    """Seed of the posterior draw, of fresh weights and of the first draw of noise and times."""
    data_root: str | None = None
    """Where the data lie, if elsewhere than in training."""
    out: str | None = None
    """Folder for variance.json and variance.png. None: RUN/variance, or variance without a run."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        for name in ("images", "repeats"):
            if getattr(self, name) < (3 if name == "repeats" else 1):
                raise ValueError(f"{name}: too few, {getattr(self, name)}")
        for name, known in (("sdes", [*SDES, "all"]), ("weightings", WEIGHTINGS)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name}: must be among {', '.join(known)}, not {value}")


class MixtureNetwork(nn.Module):
    """The exact noise prediction for data from an equally weighted mixture of isotropic Gaussians,
    whose means ``(K, *shape)`` and logarithm of the standard deviation are parameters.
    """

    def __init__(self, sde: LinearSDE, means: Tensor, std: float) -> None:
        super().__init__()
        self.sde = sde
        self.means = nn.Parameter(means.clone())
        self.log_std = nn.Parameter(torch.tensor(math.log(std)))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        m, var = self.sde.mean_coef(t)[:, None], self.sde.var(t)[:, None]
        total = m.square() * (2 * self.log_std).exp() + var
        difference = x_t.flatten(1)[:, None] - m[..., None] * self.means.flatten(1)
        weights = (-0.5 * difference.square().sum(-1) / total).softmax(1)
        mean = (weights[..., None] * difference).sum(1).view_as(x_t)
        return expand_like((var.sqrt() / total).squeeze(1), x_t) * mean


def synthetic_study(options: VarianceOptions) -> list[NoiseRow]:
    """On ``images`` latents ``(4, 2, 2)`` from a mixture with unit second moment, through a linear
    encoder (the identity). The score is half Normal, half exact (its mixing coefficient is 1/2).
    """
    rng = torch.Generator().manual_seed(options.seed)
    std, components = 0.4, COMPONENTS[options.latents]
    means = torch.randn(components, *SYNTHETIC_SHAPE, generator=rng)
    means *= math.sqrt((1 - std**2) / means.square().mean())
    index = torch.randint(components, (options.images,), generator=rng)
    noise = torch.randn(options.images, *SYNTHETIC_SHAPE, generator=rng)
    x = (means[index] + std * noise).flatten(1)
    encoder = nn.Linear(x.shape[1], x.shape[1])
    nn.init.eye_(encoder.weight)
    nn.init.zeros_(encoder.bias)
    z0 = encoder(x).unflatten(1, SYNTHETIC_SHAPE)
    latents = Latents.of(z0, encoder.parameters() if options.encoder else ())
    rows = []
    for kind in _kinds(options.sdes) or tuple(SDES):
        sde = make_sde(kind)
        if kind == "vesde":
            sde = make_sde(kind, sigma2_max=_range(z0))
        network = MixtureNetwork(sde, means, std)
        score = MixedNormalScore(network, sde, SYNTHETIC_SHAPE[0], mixing_init=0.0)
        rows += _study(kind, options.latents, score.eval(), latents, options)
    return rows


def _kinds(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(SDES) if "all" in names else tuple(names)


def _range(z0: Tensor) -> float:
    """The VESDE's largest variance for these latents."""
    return max(largest_squared_distance([z0.detach()]), 1.0) if len(z0) > 1 else 900.0


def run_study(options: VarianceOptions) -> list[NoiseRow]:
    """On posterior draws of a run's VAE for the first ``images`` images.

    Raises:
        UserError: The run is not one of an LSGM, or asks for another SDE without a Normal part.
    """
    assert options.run is not None
    device = choose_device(options.device)
    model = load(options.run, device)
    if not isinstance(model, LSGM):
        raise UserError(f"--run: {options.run} is the run of a VAE; the prior needs an LSGM's")
    config = model.prior_config
    own = config.sde.kind
    others = [kind for kind in _kinds(options.sdes) if kind != own or options.start]
    if options.start and own not in others:
        others.insert(0, own)
    if others and not config.mixed:
        raise UserError(
            f"--sdes: the prior of {options.run} has no Normal part, so that before training it "
            "means nothing"
        )
    latents = _encode(model, options, device)
    rows = _study(own, "trained", model.score, latents, options)
    for kind in others:
        sde = replace(config.sde, kind=cast(Any, kind))  # the section checks it
        if kind == "vesde" and kind != own:
            sde = replace(sde, sigma2_max=_range(latents.z0))
        torch.manual_seed(options.seed)
        fresh = build_prior(replace(config, sde=sde), model.vae).to(device).eval()
        fresh.deactivate(model.score.channel_mask.flatten() == 0)
        rows += _study(kind, "start", fresh, latents, options)
    return rows


def _encode(model: LSGM, options: VarianceOptions, device: torch.device) -> Latents:
    assert options.run is not None
    data = load_data_config(options.run, options.data_root)
    datasets = build_datasets(data)
    batches = evaluation_batches(
        getattr(datasets, options.split),
        model.spec,
        num_bits=model.vae_config.num_x_bits,
        batch_size=options.images,
        limit=options.images,
        binarisation_seed=data.eval_binarisation_seed,
        device=device,
    )
    x = next(iter(batches))
    posterior = model.vae.encode(x, rng=torch.Generator().manual_seed(options.seed))
    z0 = model.vae.concat_top(posterior.eps).float()
    return Latents.of(z0, model.vae.parameters() if options.encoder else ())


def _study(
    kind: str, state: str, score: MixedNormalScore, latents: Latents, options: VarianceOptions
) -> list[NoiseRow]:
    return study(
        kind,
        state,
        score,
        latents,
        options.repeats,
        seed=1000 * options.seed,
        weightings=options.weightings,
        progress=lambda items: progress_bar(items, desc=f"{kind}, {state}", leave=False),
    )


def _column(row: NoiseRow) -> str:
    return row.side + (", c.v." if row.control_variate else "")


def _groups(rows: Sequence[NoiseRow]) -> dict[str, list[NoiseRow]]:
    """Rows by SDE and state, in order."""
    groups: dict[str, list[NoiseRow]] = {}
    for row in rows:
        groups.setdefault(f"{row.sde}, {row.state}", []).append(row)
    return groups


def _cell(value: float | None, error: float | None) -> str:
    if value is None or error is None or not math.isfinite(value):
        return "-"
    return f"{value:.2g} ± {error:.1g}"


def format_tables(rows: Sequence[NoiseRow]) -> str:
    """Markdown: for each SDE the relative variances, and what they are of those with uniform times;
    c.v.: with the control variate.
    """
    lines: list[str] = []
    for title, group in _groups(rows).items():
        columns = list(dict.fromkeys(map(_column, group)))
        for what, relative in (
            ("variance / squared norm of the mean", True),
            ("variance / variance with uniform times and no variance reduction", False),
        ):
            lines += ["", f"### {title}: {what}", ""]
            cells: dict[tuple[str, str, str], dict[str, str]] = {}
            for row in group:
                key = (
                    row.weighting,
                    row.proposal,
                    "stratified" if row.stratified else "independent",
                )
                shown = (
                    (row.relative, row.relative_error) if relative else (row.ratio, row.ratio_error)
                )
                cells.setdefault(key, {})[_column(row)] = _cell(*shown)
            table = ([*key, *(values[name] for name in columns)] for key, values in cells.items())
            lines.append(markdown_table(["weighting", "proposal", "times", *columns], table))
    return "\n".join(lines[1:])


STYLES = {
    (False, False): ("o", "independent times"),
    (True, False): ("s", "stratified"),
    (False, True): ("^", "control variate"),
    (True, True): ("D", "both"),
}


def draw_figure(rows: Sequence[NoiseRow], path: Path) -> None:
    """A panel for each SDE and gradient: relative variance with standard errors, logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    groups = _groups(rows)
    sides = [side for side in SIDES[1:] if any(row.side == side for row in rows)]
    figure, panels = plt.subplots(
        len(groups),
        len(sides),
        figsize=(1 + 4.2 * len(sides), 1.2 + 2.8 * len(groups)),
        squeeze=False,
    )
    proposals, styles = list(STUDIED_TIMES), list(STYLES)
    for line, (title, group) in zip(panels, groups.items(), strict=True):
        weightings = list(dict.fromkeys(row.weighting for row in group))
        for axes, side in zip(line, sides, strict=True):
            for row in group:
                if row.side != side or row.relative is None or row.relative <= 0:
                    continue
                style = (row.stratified, row.control_variate)
                colour = proposals.index(row.proposal)
                x = weightings.index(row.weighting) + 0.27 * (colour - 1)
                # an error bar down to zero has no end on a logarithmic axis
                error = row.relative_error or 0.0
                below = min(error, 0.9 * row.relative)
                axes.errorbar(
                    x + 0.055 * (styles.index(style) - 1.5),
                    row.relative,
                    [[below], [error]],
                    fmt=STYLES[style][0],
                    color=f"C{colour}",
                    markersize=4,
                    markerfacecolor=f"C{colour}" if row.stratified else "white",
                    lw=1,
                )
            axes.set_yscale("log")
            axes.tick_params(axis="y", which="both", labelsize=7)
            axes.set_xticks(range(len(weightings)), weightings, fontsize=8)
            axes.set_xlim(-0.5, len(weightings) - 0.5)
            axes.grid(alpha=0.3, axis="y")
            axes.set_title(f"{title}: {side}", fontsize=9)
        line[0].set_ylabel("variance / |mean|²", fontsize=8)
    handles = [
        Line2D([], [], color=f"C{k}", lw=4, label=f"{name} times")
        for k, name in enumerate(proposals)
    ] + [
        Line2D(
            [],
            [],
            color="0.3",
            marker=marker,
            ls="",
            markersize=5,
            label=label,
            markerfacecolor="0.3" if stratified else "white",
        )
        for (stratified, _), (marker, label) in STYLES.items()
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def variance_command(argv: Sequence[str], prog: str = "variance") -> None:
    """``benchmark variance [--run RUN] [--images N] [--repeats N] [--sdes KIND ...]
    [--out FOLDER] ...``.
    """
    options = parse_command_line(
        VarianceOptions,
        argv,
        extra=(),
        prog=prog,
        description=VarianceOptions.__doc__,
    ).config
    folder = Path(options.out or (Path(options.run) / "variance" if options.run else "variance"))
    if options.run:
        read_description(Path(options.run))  # before a folder is made in it
    check_output(folder / "variance.json", "--out")
    rows = run_study(options) if options.run else synthetic_study(options)
    print(f"{options.images} images, {options.repeats} draws an estimator\n")
    print(format_tables(rows))
    report = {"options": asdict(options), "rows": [asdict(row) for row in rows]}
    atomic_write_json(folder / "variance.json", report)
    draw_figure(rows, folder / "variance.png")
    print(f"\n{folder / 'variance.json'}, {folder / 'variance.png'}")
